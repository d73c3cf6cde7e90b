"""The number of CPUs that this process may use, in a container or not."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def available_processors(
    *, cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int:
    """Whole CPUs allowed by affinity and by the quotas of all enclosing cgroups, at least 1.

    Fractions are rounded down: an extra thread would use up the quota early, and the kernel would
    stop it until the next period, together with every thread that waits for it.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        allowed = os.cpu_count() or 1
    quotas = [quota for folder in _folders(cgroups, membership) if (quota := _quota(folder))]
    return max(1, int(min([allowed, *quotas])))


def device_threads(asked: int = 0) -> int:
    """The number of CPU threads: `asked`, or for 0 torch's number, limited to the quota.

    torch counts the machine's CPUs and doesn't know the container's quota.
    """
    return asked or min(torch.get_num_threads(), available_processors())


def _folders(cgroups: Path, membership: Path) -> list[Path]:
    """The folders of this process's cgroup and the enclosing ones, of cgroup v2 and v1."""
    found = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # v1 mounts each set of controllers under its name, often with a symlink per controller.
        mount = cgroups / controllers if (cgroups / controllers).is_dir() else cgroups / "cpu"
        folder = mount / path.lstrip("/") if controllers else cgroups / path.lstrip("/")
        top = mount if controllers else cgroups
        if ".." in folder.parts:  # a cgroup outside the namespace this process sees
            folder = top
        found += [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]
    return found


def _quota(folder: Path) -> float | None:
    """CPUs that the cgroup at `folder` may use; None if it has no limit."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None

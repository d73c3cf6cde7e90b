"""Available processors follow the cgroup's limit."""

import os
from pathlib import Path

import pytest

from app.engine.cpu_limits import available_processors


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(autouse=True)
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000"}, 16),
        ({"cpu.max": "400000 100000"}, 4),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "6400000 100000"}, 16),
        ({"pod/box/cpu.max": "300000 100000", "pod/cpu.max": "600000 100000"}, 3),
        ({"pod/box/cpu.max": "max 100000", "pod/cpu.max": "600000 100000"}, 6),
        ({"pod/other/cpu.max": "100000 100000"}, 16),
        ({"cpu.max": "nonsense"}, 16),
        ({"cpu.max": "100000 0"}, 16),
    ],
)
def test_cgroup_v2(tmp_path: Path, limits: dict[str, str], expected: int) -> None:
    for name, text in limits.items():
        write(tmp_path / "fs" / name, text + "\n")
    write(tmp_path / "cgroup", "0::/pod/box\n")
    found = available_processors(cgroups=tmp_path / "fs", membership=tmp_path / "cgroup")
    assert found == expected


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
@pytest.mark.parametrize(("quota", "expected"), [("-1", 16), ("300000", 3), ("20000", 1)])
@pytest.mark.parametrize("inside", [True, False], ids=["own path", "only the mount is seen"])
def test_cgroup_v1(tmp_path: Path, folder: str, quota: str, expected: int, inside: bool) -> None:
    box = tmp_path / "fs" / folder / ("docker/1234" if inside else "")
    write(box / "cpu.cfs_quota_us", quota + "\n")
    write(box / "cpu.cfs_period_us", "100000\n")
    write(tmp_path / "cgroup", "5:memory:/docker/1234\n4:cpu,cpuacct:/docker/1234\n0::/\n")
    found = available_processors(cgroups=tmp_path / "fs", membership=tmp_path / "cgroup")
    assert found == expected


def test_cgroup_outside_the_namespace(tmp_path: Path) -> None:
    write(tmp_path / "fs" / "cpu.max", "200000 100000\n")
    write(tmp_path / "cpu.max", "100000 100000\n")
    write(tmp_path / "cgroup", "0::/../neighbour\n")
    found = available_processors(cgroups=tmp_path / "fs", membership=tmp_path / "cgroup")
    assert found == 2


def test_affinity_is_used_without_a_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = available_processors(cgroups=tmp_path, membership=tmp_path / "none")
    assert found == 16
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert available_processors(cgroups=tmp_path, membership=tmp_path / "none") == 5


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # its real affinity
    assert 1 <= available_processors() <= (os.cpu_count() or 1)

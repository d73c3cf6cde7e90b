"""Each evaluation is visible only to the owner that requested it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.errors import NotFound
from app.jobs.job import Job
from app.settings import Settings
from robust.attacks import resolve_attack
from robust.datasets import Dataset
from robust.threat_model import ThreatModel
from tests.support.serving import Running, gated, serving

ATTACK = resolve_attack("fgsm", ThreatModel(norm="linf", eps=8 / 255))
IMAGES = Dataset(
    images=torch.zeros(4, 3, 32, 32, dtype=torch.uint8),
    labels=torch.zeros(4, dtype=torch.int64),
    classes=tuple("abcdefghij"),
    name="black",
)


def submit(running: Running, owner: str | None, key: str | None = None) -> Job:
    jobs, model = running.service.jobs, running.service.models.current
    return running.begin(jobs.submit(model, IMAGES, [ATTACK], key=key, owner=owner)).result(280)


def listed(running: Running, owner: str | None) -> set[str]:
    return {job.id for job in running.begin(running.service.jobs.all(owner)).result(280)}


def check_owners(running: Running) -> None:
    """The same request of two owners is two jobs, and neither owner sees the other's."""
    jobs = running.service.jobs
    with gated(running.service):
        mine, yours = submit(running, "me"), submit(running, "you")
        assert mine.id != yours.id
        assert submit(running, "me").id == mine.id
        assert listed(running, "me") == {mine.id}
        assert listed(running, "you") == {yours.id}
        assert listed(running, None) == {mine.id, yours.id}
        with pytest.raises(NotFound):
            running.begin(jobs.get(mine.id, "you")).result(280)
        assert running.begin(jobs.get(mine.id, "me")).result(280).state in ("queued", "running")
        for id in (mine.id, yours.id):
            running.begin(jobs.delete(id)).result(280)
            running.begin(jobs.delete(id)).result(280)
        named = [submit(running, owner, key="a").id for owner in ("me", "you", "me")]
        assert named[0] == named[2] != named[1]
        for id in named[:2]:
            running.begin(jobs.delete(id)).result(280)
            running.begin(jobs.delete(id)).result(280)


def test_job_is_visible_only_to_its_owner(checkpoint: Path, tmp_path: Path) -> None:
    settings = Settings(checkpoint=checkpoint, threads=1, device="cpu", jobs=tmp_path / "jobs")
    with serving(settings) as running:
        check_owners(running)
        with gated(running.service) as gate:
            left = submit(running, "me")
            running.stop_jobs(gate)
    with serving(settings) as running:  # the owner is kept
        assert listed(running, "you") == set()
        assert listed(running, "me") == {left.id}

"""A disk that is full for a while: nothing half-done is left, and what was taken on is not lost."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.settings import Settings
from tests.app.http.test_errors import assert_problem
from tests.app.jobs.test_service import finish, submit
from tests.support.faults import prediction, unharmed
from tests.support.serving import gated, labeled, serving, until


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file of this process grow: the kernel refuses each write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_no_evaluation_and_leaves_nothing_half_done(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "jobs"
    settings = Settings(checkpoint=checkpoint, threads=1, device="cpu", jobs=folder)
    with serving(settings) as running, unharmed(running):
        with gated(running.service) as gate:
            taken = submit(running, 20)["id"]
            until(lambda: gate.waiting)
            with full_disk():
                for n in (5, 6):
                    refused = running.client.post("/evaluate", content=labeled(n))
                    assert "no room" in assert_problem(refused, 503)["detail"]
                    assert int(refused.headers["Retry-After"]) >= 1
                assert [job["id"] for job in running.client.get("/evaluate").json()] == [taken]
                assert {path.stem for path in folder.glob("*.npz")} == {taken}
                assert not list(folder.glob("*.tmp")) + list(folder.glob(".*.tmp"))
                gate.open.set()
                found = finish(running, taken)
                assert found["state"] in ("done", "failed")
                prediction(running)
        # There is room again: it is taken on at once.
        assert finish(running, submit(running, 7)["id"])["state"] == "done"
    with serving(settings) as running:
        again = finish(running, taken)
        assert (again["state"], again["evaluation"]["n"]) == ("done", 20)

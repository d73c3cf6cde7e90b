"""A temporarily full disk: no partial files are left and no accepted job is lost."""

from __future__ import annotations

import resource
import sqlite3
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


def test_finished_evaluation_on_a_full_disk_is_readable_and_deleted_later(
    checkpoint: Path, tmp_path: Path
) -> None:
    settings = Settings(checkpoint=checkpoint, threads=1, device="cpu", jobs=tmp_path / "jobs")
    with serving(settings) as running:
        ask = running.client.request
        removed, expired = (finish(running, submit(running, n)["id"])["id"] for n in (5, 6))
        with full_disk():
            assert_problem(ask("DELETE", f"/evaluate/{removed}"), 503)
            assert ask("GET", f"/evaluate/{removed}").json()["state"] == "done"
            running.service.jobs._store._expires[expired] = 0.0  # type: ignore[attr-defined]
            for path in ("/metrics", f"/evaluate/{removed}", "/evaluate"):
                assert ask("GET", path).status_code == 200
            assert_problem(ask("GET", f"/evaluate/{expired}"), 404)
        assert ask("DELETE", f"/evaluate/{removed}").status_code == 200
        assert ask("GET", "/evaluate").json() == []
    later = settings.model_copy(update={"job_expiry_seconds": 0.001})
    with serving(later) as running:  # which finds the expired one in the folder, and removes it
        assert running.client.get("/evaluate").json() == []
        rows = sqlite3.connect(tmp_path / "jobs/jobs.sqlite").execute("SELECT id FROM jobs")
        assert rows.fetchall() == []


def test_full_disk_loses_no_evaluation(checkpoint: Path, tmp_path: Path) -> None:
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

"""Evaluation jobs on disk: none is lost, none is run twice."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from app.jobs import local_store as local
from app.jobs.disk import JobFolder
from app.jobs.job import Job, bytes_for, digest_of
from app.jobs.store import StoreError
from app.settings import Settings
from robust import report
from robust.attacks import resolve_attack
from robust.datasets import Dataset
from robust.evaluation.forecast import count_passes
from robust.evaluation.journal import Journal
from robust.threat_model import ThreatModel
from tests.app.conftest import write_checkpoint
from tests.app.test_server import Server
from tests.support.serving import Gate, Running, gated, labeled, serving, until

TIMES = ("seconds", "times")
ATTACKS = {"attack": ["fgsm", "pgd-3"], "eps": "2/255"}


@pytest.fixture
def settings(checkpoint: Path, tmp_path: Path) -> Settings:
    return Settings(checkpoint=checkpoint, threads=1, device="cpu", jobs=tmp_path / "jobs")


def submit(running: Running, n: int = 20, *, key: str | None = None, **more: Any) -> dict[str, Any]:
    response = running.client.post(
        "/evaluate",
        files={"file": labeled(n)},
        data=ATTACKS | more,
        headers={} if key is None else {"Idempotency-Key": key},
    )
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    return job


def finish(running: Running, id: str) -> dict[str, Any]:
    """The finished job; 503 means that the store can't be reached yet."""
    job: dict[str, Any] = {}

    def finished() -> bool:
        response = running.client.get(f"/evaluate/{id}")
        assert response.status_code in (200, 503), response.text
        job.update(response.json() if response.status_code == 200 else {})
        return job.get("state") not in (None, "queued", "running")

    until(finished)
    return job


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_seconds(v) for name, v in value.items() if name not in TIMES}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def test_result_survives_a_restart(settings: Settings) -> None:
    with serving(settings) as running:
        done = finish(running, submit(running)["id"])
        assert done["state"] == "done"
    assert settings.jobs is not None
    assert sorted(path.name for path in settings.jobs.glob(f"{done['id']}*")) == []
    with serving(settings) as running:
        assert running.client.get(f"/evaluate/{done['id']}").json() == done
        assert running.client.get("/evaluate").json() == [done]
        # Sent again it is the same job, which has long been done.
        assert submit(running)["id"] == done["id"]
        running.client.delete(f"/evaluate/{done['id']}")
    with serving(settings) as running:
        assert running.client.get("/evaluate").json() == []


def test_job_resumes_after_a_restart(settings: Settings) -> None:
    with serving(settings) as running:
        expected = finish(running, submit(running)["id"])["evaluation"]
        running.client.delete(running.client.get("/evaluate").json()[0]["id"])
    with serving(settings) as running, gated(running.service) as gate:
        job = submit(running, key="anew")
        until(lambda: gate.waiting)
        running.stop_jobs(gate)
    with serving(settings) as running:
        found = finish(running, job["id"])
    assert (found["id"], found["state"], found["created"]) == (job["id"], "done", job["created"])
    assert without_seconds(found["evaluation"]) == without_seconds(expected)


def die_running(settings: Settings, id: str) -> None:
    """Make the folder look as if the service had died while it ran the job."""
    assert settings.jobs is not None
    folder = JobFolder(settings.jobs)
    stored = dict(folder.all())[id]
    assert stored["state"] == "queued"  # a stopped service did not die
    about = {name: value for name, value in stored.items() if name != "version"}
    folder.save(id, 0.0, about | {"state": "running"})
    folder.close()


async def state_while_running(settings: Settings, id: str) -> str:
    """The state of a job in a store that runs it for a moment, and is then stopped."""
    started = asyncio.Event()

    async def run(job: Job) -> None:
        started.set()
        await asyncio.Event().wait()

    store = local.LocalStore(settings)
    await store.start(run)
    async with asyncio.timeout(280):
        await started.wait()
    job = await store.get(id)
    assert job is not None
    state = job.state
    await store.stop()
    await store.close()
    return state


def test_evaluation_that_ends_three_services_fails(settings: Settings) -> None:
    id = unfinished_job(settings)
    for _ in range(2):
        die_running(settings, id)
        assert asyncio.run(state_while_running(settings, id)) == "running"
    die_running(settings, id)
    with serving(settings) as running:
        job = running.client.get(f"/evaluate/{id}").json()
        assert job["state"] == "failed"
        assert job["error"] == (
            "The service died 3 times while running it, without progress in between."
        )
        assert finish(running, submit(running, key="another")["id"])["state"] == "done"


def test_progress_forgets_earlier_deaths(settings: Settings) -> None:
    id = unfinished_job(settings)
    assert settings.jobs is not None
    for done in range(4):  # each service finishes one image more
        die_running(settings, id)
        assert asyncio.run(state_while_running(settings, id)) == "running"
        with closing(sqlite3.connect(settings.jobs / f"{id}.journal")) as db, db:
            db.execute("CREATE TABLE IF NOT EXISTS finished (stage TEXT, image INTEGER)")
            db.execute("INSERT INTO finished VALUES ('clean', ?)", (done,))


def test_job_keeps_its_precision_after_a_settings_change(settings: Settings) -> None:
    """As when a replica without a GPU goes on with what one with a GPU began."""
    id = unfinished_job(settings.model_copy(update={"precision": "bf16"}))
    with serving(settings) as running:
        done = finish(running, id)
        assert done["state"] == "done"
        assert done["evaluation"]["precision"] == "bf16 search, fp32 verified"
        again = submit(running)
        assert again["id"] != id  # not the same evaluation here
        assert finish(running, again["id"])["evaluation"]["precision"] == "fp32"


def test_watcher_is_notified_when_the_service_stops(settings: Settings) -> None:
    with serving(settings) as running, gated(running.service) as gate:
        job = submit(running)
        until(lambda: gate.waiting)
        with running.client.stream("GET", f"/evaluate/{job['id']}/events") as stream:
            lines = stream.iter_lines()
            assert next(lines) == "event: progress"
            running.stop_jobs(gate)
            events = [line for line in lines if line.startswith("event:")]
    assert set(events) == {"event: progress"}


def test_identical_requests_share_one_job(settings: Settings) -> None:
    with serving(settings) as running, gated(running.service):
        first = submit(running)
        assert submit(running)["id"] == first["id"]
        others = [
            submit(running, 21),
            submit(running, seed="1"),
            submit(running, curve="5"),
            submit(running, key="a"),
        ]
        assert len({first["id"], *(job["id"] for job in others)}) == 5
        assert submit(running, key="a")["id"] == others[-1]["id"]
        listed = [job["id"] for job in running.client.get("/evaluate").json()]
        assert listed == [job["id"] for job in reversed([first, *others])]
        response = running.client.post(
            "/evaluate",
            files={"file": labeled(22)},
            data=ATTACKS,
            headers={"Idempotency-Key": "a"},
        )
        assert response.status_code == 422
        assert response.json()["errors"][0]["field"] == "Idempotency-Key"
        for job in (first, *others):
            running.client.delete(f"/evaluate/{job['id']}")
        # What was cancelled is not what somebody who asks again wants.
        assert submit(running)["id"] != first["id"]


def test_same_file_with_another_normalization_is_another_model(
    checkpoint: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "theirs.pt"  # without a sidecar, which settles the normalization
    shutil.copy(checkpoint, bare)
    common: dict[str, Any] = {"checkpoint": bare, "threads": 1, "device": "cpu"}
    common["jobs"] = tmp_path / "jobs"
    with serving(Settings(**common)) as running:
        first = finish(running, submit(running)["id"])
        assert submit(running)["id"] == first["id"]
    with serving(Settings(**common, std="0.5,0.5,0.5")) as running:
        job = finish(running, submit(running)["id"])
        assert job["model_sha256"] == first["model_sha256"]
        assert job["id"] != first["id"]


def test_malformed_idempotency_key_is_rejected(settings: Settings) -> None:
    with serving(settings) as running:
        response = running.client.post(
            "/evaluate", files={"file": labeled(5)}, headers={"Idempotency-Key": "a b"}
        )
        assert response.status_code == 422
        assert response.json()["errors"][0]["field"] == "Idempotency-Key"


def test_jobs_folder_is_locked_by_one_service(settings: Settings, tmp_path: Path) -> None:
    with serving(settings), pytest.raises(StoreError, match="another service"):
        JobFolder(tmp_path / "jobs")
    JobFolder(tmp_path / "jobs").close()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="a folder to write to"):
        JobFolder(tmp_path / "file")


@pytest.mark.parametrize("content", [b"no database at all", b"", b"SQLite format 3\0" + b"x" * 200])
def test_broken_database_is_moved_aside(settings: Settings, content: bytes) -> None:
    assert settings.jobs is not None
    settings.jobs.mkdir()
    (settings.jobs / "jobs.sqlite").write_bytes(content)
    with serving(settings) as running:
        assert running.client.get("/evaluate").json() == []
        assert finish(running, submit(running)["id"])["state"] == "done"
    aside = [path.read_bytes() for path in settings.jobs.glob("*.broken-*")]
    assert aside == ([content] if content else [])  # an empty file is an empty database


def test_database_that_cannot_be_opened_now_is_not_moved_aside(settings: Settings) -> None:
    assert settings.jobs is not None
    with serving(settings) as running:
        id = finish(running, submit(running)["id"])["id"]
    in_the_way = settings.jobs / "jobs.sqlite-wal"  # as a full disk: SQLite can't create the file
    in_the_way.mkdir()
    with pytest.raises(StoreError, match=r"jobs\.sqlite: the evaluations can't be opened"):
        JobFolder(settings.jobs)
    in_the_way.rmdir()
    with serving(settings) as running:
        assert running.client.get(f"/evaluate/{id}").json()["state"] == "done"


def test_files_without_a_job_are_deleted(settings: Settings) -> None:
    assert settings.jobs is not None
    with serving(settings):
        pass
    for name in ("gone.npz", "gone.journal", "mine.txt"):
        (settings.jobs / name).write_text("")
    with serving(settings):
        pass
    names = {path.name for path in settings.jobs.iterdir()}
    assert "mine.txt" in names
    assert not names & {"gone.npz", "gone.journal"}


def unfinished_job(settings: Settings) -> str:
    """A job that a service left unfinished."""
    with serving(settings) as running, gated(running.service) as gate:
        job = submit(running)
        until(lambda: gate.waiting)
        running.stop_jobs(gate)
    id: str = job["id"]
    return id


def end_device_thread(running: Running, gate: Gate) -> None:
    """Let the pass that waits at `gate` end the device thread."""

    def die(_: torch.Tensor) -> torch.Tensor:
        raise SystemExit

    gate.inner = die
    gate.open.set()
    until(lambda: not running.service.engine.alive)


def test_stored_jobs_continue_after_the_device_thread_ended(settings: Settings) -> None:
    with serving(settings) as running, gated(running.service) as gate:
        ids = [submit(running, n)["id"] for n in (20, 21)]
        until(lambda: gate.waiting)
        end_device_thread(running, gate)
        until(lambda: running.service.jobs._store._worker.done())  # type: ignore[attr-defined]
        states = {job["state"] for job in running.client.get("/evaluate").json()}
        assert states <= {"queued", "running"}
        response = running.client.post("/evaluate", files={"file": labeled(22)}, data=ATTACKS)
        assert response.status_code == 503
    assert settings.jobs is not None
    folder = JobFolder(settings.jobs)
    assert [about["state"] for _, about in folder.all()] == ["running", "queued"]
    folder.close()
    with serving(settings) as running:
        assert [finish(running, id)["state"] for id in ids] == ["done", "done"]


def test_jobs_in_memory_fail_with_the_device_thread(settings: Settings) -> None:
    in_memory = settings.model_copy(update={"jobs": None})
    with serving(in_memory) as running, gated(running.service) as gate:
        ids = [submit(running, n)["id"] for n in (20, 21)]
        until(lambda: gate.waiting)
        end_device_thread(running, gate)
        for id in ids:
            job = finish(running, id)
            assert (job["state"], "device failed" in job["error"]) == ("failed", True)


def test_job_of_another_model_fails_with_a_reason(settings: Settings, tmp_path: Path) -> None:
    id = unfinished_job(settings)
    write_checkpoint(tmp_path / "other.pt", seed=9)
    with serving(settings.model_copy(update={"checkpoint": tmp_path / "other.pt"})) as running:
        job = running.client.get(f"/evaluate/{id}").json()
    assert (job["state"], job["error"]) == (
        "failed",
        "The model it was started with is no longer served.",
    )


def test_job_without_its_images_fails_with_a_reason(settings: Settings) -> None:
    id = unfinished_job(settings)
    assert settings.jobs is not None
    (settings.jobs / f"{id}.npz").write_bytes(b"PK broken")
    with serving(settings) as running:
        job = running.client.get(f"/evaluate/{id}").json()
        assert job["error"] == "Its images were lost while the service was down."


def test_unreadable_job_is_dropped(settings: Settings) -> None:
    assert settings.jobs is not None
    store = JobFolder(settings.jobs)
    store.save("odd", 0.0, {"state": "queued"})
    store.close()
    with serving(settings) as running:
        assert running.client.get("/evaluate").json() == []


def test_full_disk_rejects_the_job_and_leaves_no_files(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StoreError("no space left")

    with serving(settings) as running:
        with monkeypatch.context() as patched:
            patched.setattr(JobFolder, "save", full)
            response = running.client.post("/evaluate", files={"file": labeled(5)}, data=ATTACKS)
            assert response.status_code == 503
            assert "no room" in response.json()["detail"]
        assert running.client.get("/evaluate").json() == []
        assert settings.jobs is not None
        assert not list(settings.jobs.glob("*.npz"))
        assert finish(running, submit(running)["id"])["state"] == "done"


def test_expired_jobs_are_deleted_from_disk(settings: Settings) -> None:
    short = settings.model_copy(update={"job_expiry_seconds": 0.2})
    with serving(short) as running:
        id = submit(running)["id"]
        until(lambda: running.client.get(f"/evaluate/{id}").status_code == 404)
    with serving(settings) as running:
        assert running.client.get("/evaluate").json() == []


class Earlier(local.datetime):  # type: ignore[name-defined,misc]
    """A clock that somebody has set back."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return super().now(tz).replace(year=2001)


def test_clock_set_back_does_not_extend_expiry(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(settings) as running:
        done = finish(running, submit(running)["id"])

    monkeypatch.setattr(local, "datetime", Earlier)
    with serving(settings) as running:
        expires = running.service.jobs._store._expires[done["id"]]  # type: ignore[attr-defined]
        assert expires <= time.monotonic() + settings.job_expiry_seconds


def test_finished_evaluation_has_a_report(running: Running) -> None:
    done = finish(running, submit(running, 12, curve="6")["id"])
    page = running.client.get(f"/evaluate/{done['id']}/report")
    assert page.status_code == 200
    assert page.headers["Content-Type"].startswith("text/html")
    assert "script" not in page.headers["Content-Security-Policy"]
    correct = done["evaluation"]["results"][0]["correct"]
    assert f"{correct} of 12" in page.text or f"{correct}/12" in page.text
    assert done["model_sha256"][:16] in page.text
    headers = {"Accept": "application/pdf"}
    printed = running.client.get(f"/evaluate/{done['id']}/report", headers=headers)
    assert printed.headers["Content-Type"] == "application/pdf"
    assert printed.content.startswith(b"%PDF")


def test_unfinished_evaluation_has_no_report(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gated(running.service):
        job = submit(running, 13)
        response = running.client.get(f"/evaluate/{job['id']}/report")
        assert response.status_code == 409
        assert "there is a report once it is done" in response.json()["detail"]
        running.client.delete(f"/evaluate/{job['id']}")
    done = finish(running, submit(running, 12)["id"])
    monkeypatch.setitem(report.PACKAGES, "matplotlib", "no_such_module")
    response = running.client.get(f"/evaluate/{done['id']}/report")
    assert (response.status_code, "without the extra" in response.text) == (409, True)
    running.begin(running.service.jobs.get(done["id"])).result().model = "0"
    response = running.client.get(f"/evaluate/{done['id']}/report")
    assert "another is served now" in response.json()["detail"]


def test_killed_service_resumes_its_job(checkpoint: Path, tmp_path: Path) -> None:
    def start() -> Server:  # errors only, as nobody reads them
        settings = {"ROBUST_JOBS": str(tmp_path / "jobs"), "ROBUST_DEVICE": "cpu"}
        return Server(checkpoint, ROBUST_LOG_LEVEL="error", **settings)

    def job() -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{server.url}/evaluate/{id}", timeout=120).json()
        return found

    server = start()
    try:
        id = httpx.post(
            f"{server.url}/evaluate",
            files={"file": labeled(300)},
            data={"attack": ["pgd-40"], "eps": "1/255"},
            timeout=120,
        ).json()["id"]
        until(lambda: (job()["evaluation"] or {"done": 0})["done"] > 0)
        server.process.kill()
        server.process.communicate()
        server = start()
        until(lambda: job()["state"] == "done")
        assert job()["evaluation"]["n"] == 300
    finally:
        server.process.terminate()
        server.process.communicate()
    assert server.process.returncode == 0


def test_stored_bytes_are_limited_and_rejected_jobs_leave_no_files(settings: Settings) -> None:
    room = settings.model_copy(update={"jobs_bytes": 400_000})
    with serving(room) as running, gated(running.service) as gate:
        first = submit(running, 20)
        response = running.client.post("/evaluate", files={"file": labeled(90)}, data=ATTACKS)
        assert response.status_code == 413  # never, however long one waits
        assert "400000" in response.json()["detail"]
        response = running.client.post("/evaluate", files={"file": labeled(70)}, data=ATTACKS)
        assert (response.status_code, "no room" in response.text) == (429, True)
        assert int(response.headers["Retry-After"]) >= 1
        assert 'robust_rejected_total{reason="bytes"} 1.0' in running.client.get("/metrics").text
        assert [job["id"] for job in running.client.get("/evaluate").json()] == [first["id"]]
        assert settings.jobs is not None
        assert {path.stem for path in settings.jobs.glob("*.npz")} == {first["id"]}
        gate.open.set()
        assert finish(running, first["id"])["state"] == "done"
        assert finish(running, submit(running, 70)["id"])["state"] == "done"  # what was refused


def test_journal_fits_in_the_reserved_bytes(tmp_path: Path) -> None:
    attacks = [resolve_attack("autoattack", ThreatModel(norm="linf", eps=8 / 255))]
    dataset = Dataset(
        images=torch.zeros(2000, 3, 1, 1, dtype=torch.uint8),
        labels=torch.zeros(2000, dtype=torch.int64),
        classes=("one",),
        name="many",
    )
    journal = Journal(tmp_path / "journal", {})
    for stage in ("clean", *attacks[0].stages):
        rows = [(image, 1, 999, 1 / 3, 1, 10**6, 10**6) for image in range(len(dataset))]
        journal.write(f"{attacks[0]} {getattr(stage, 'label', stage)}", rows, 1 / 3)
    journal.close()
    set_aside = bytes_for(dataset, attacks, 0) - dataset.images.nbytes - dataset.labels.nbytes
    assert set_aside / 4 < (tmp_path / "journal").stat().st_size <= set_aside


def test_job_with_a_multi_stage_attack_round_trips_through_json() -> None:
    attack = resolve_attack("autoattack", ThreatModel(eps=8 / 255), stages=["pgd-3", "square-5"])
    job = Job(
        id="1", model="a", dataset="b", images=1, attacks=(attack,), created=datetime.now(UTC)
    )
    again = Job.from_about("1", json.loads(json.dumps(job.about())))
    assert again.attacks == (attack,)
    dataset = Dataset(
        images=torch.zeros(1, 3, 1, 1, dtype=torch.uint8),
        labels=torch.zeros(1, dtype=torch.int64),
        classes=("one",),
        name="one",
    )
    other = resolve_attack("autoattack", attack.threat_model, stages=["pgd-3", "square-6"])
    digests = {digest_of("a", dataset, [one], 0, "auto") for one in (attack, again.attacks[0])}
    assert digests != {digest_of("a", dataset, [other], 0, "auto")}
    assert len(digests) == 1


def test_cost_counts_the_passes_of_the_curve() -> None:
    attacks = tuple(resolve_attack(name, ThreatModel(eps=8 / 255)) for name in ("fgsm", "pgd-3"))
    images = torch.zeros(20, 3, 8, 8)
    for curve in (0, 5, 30):
        job = Job(
            id="1",
            model="a",
            dataset="b",
            images=len(images),
            attacks=attacks,
            created=datetime.now(UTC),
            curve=curve,
        )
        clean = len(images)
        assert job.cost == clean + count_passes(images, attacks, curve, worst=True)


def test_clock_set_back_during_a_job_loses_no_result(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(settings) as running:
        with gated(running.service) as gate:
            id = submit(running)["id"]
            until(lambda: gate.waiting)
            monkeypatch.setattr(local, "datetime", Earlier)
        done = finish(running, id)
        assert (done["state"], done["finished"][:4]) == ("done", "2001")
        assert submit(running)["id"] == id
    with serving(settings) as running:
        assert running.client.get(f"/evaluate/{id}").json() == done

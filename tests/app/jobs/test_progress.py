"""Reported progress never decreases, not even after a kill or when a journal is read."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import weakref
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from app.jobs import local_store
from app.jobs import progress as progress_module
from app.jobs.disk import JobFolder
from app.jobs.job import Job
from app.jobs.local_store import LocalStore
from app.jobs.progress import Progress
from app.jobs.store import Changes
from app.settings import Settings
from robust.datasets import Dataset
from tests.app.jobs.test_owners import ATTACK, IMAGES


def test_watching_an_unchanged_job_leaks_nothing() -> None:
    changes = Changes()
    first, second = changes.next("a"), changes.next("a")
    assert first is second
    changes.notify("a")
    assert first.is_set()
    unchanged = weakref.ref(changes.next("a"))
    assert unchanged() is None


def test_job_cancelled_while_its_images_are_written_is_not_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = JobFolder.put

    async def run() -> None:
        store, loop = LocalStore(Settings(jobs=tmp_path)), asyncio.get_running_loop()

        def put_and_cancel(folder: JobFolder, id: str, dataset: Dataset) -> None:
            asyncio.run_coroutine_threadsafe(store.cancel(id), loop).result(280)
            put(folder, id, dataset)

        monkeypatch.setattr(JobFolder, "put", put_and_cancel)
        job = await store.add(make_job(), IMAGES)
        assert job.state == "cancelled"
        assert not store._queue
        assert not list(tmp_path.glob("*.npz"))
        await store.close()

    asyncio.run(run())


def make_job() -> Job:
    return Job(
        id="a",
        model="m",
        dataset="black",
        images=4,
        attacks=(ATTACK,),
        created=datetime.now(UTC),
        digest="d",
    )


def test_restarted_service_shows_the_saved_progress_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_store, "SAVE_SECONDS", 0.0)
    settings = Settings(jobs=tmp_path / "jobs")
    shown: list[dict[str, Any] | None] = []

    async def killed() -> None:
        store = LocalStore(settings)
        job = await store.add(make_job(), IMAGES)
        await store.show(job, {"n": 4, "done": 0.97}, None)
        shutil.copytree(tmp_path / "jobs", tmp_path / "left")
        await store.close()

    async def restarted() -> None:
        store = LocalStore(settings.model_copy(update={"jobs": tmp_path / "left"}))
        begun = asyncio.Event()

        async def run(job: Job) -> None:
            shown.append(job.result)
            begun.set()

        await store.start(run)
        (job,) = await store.all()
        shown.append(job.result)
        await begun.wait()
        await store.stop()
        await store.close()

    asyncio.run(killed())
    asyncio.run(restarted())
    assert shown == [{"n": 4, "done": 0.97}] * 2


def test_resumed_run_never_shows_less_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "as_json", lambda done: {"done": done})

    async def follow() -> list[float]:
        progress = Progress(None, every=None, shown={"done": 0.5})
        seen = []
        for done in (0.1, 0.4, 0.5, 0.7):
            progress.show(done)  # type: ignore[arg-type]
            await progress.changed()
            assert progress.result is not None
            seen.append(progress.result["done"])
        return seen

    assert asyncio.run(follow()) == [0.5, 0.5, 0.5, 0.7]


def test_job_round_trips_through_its_record() -> None:
    job = dataclasses.replace(make_job(), owner="me", key="k")
    assert Job.from_about("a", job.about()).about() == job.about()

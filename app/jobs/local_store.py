"""The jobs of a single service: in memory, and on disk if a folder is set."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from app.errors import EngineStopped
from app.jobs.disk import JobFolder
from app.jobs.job import Job, JobState
from app.jobs.store import (
    MAX_FINISHED,
    MAX_LOST,
    Changes,
    Damaged,
    Full,
    KeyUsed,
    Lost,
    Run,
    StoreError,
    TooLarge,
)
from app.settings import Settings
from robust.datasets import Dataset
from robust.evaluation.journal import count_rows

logger = logging.getLogger(__name__)

SAVE_SECONDS = 1.0  # between writes of the result so far to the disk


class LocalStore:
    """A `JobStore` for one service. Jobs expire by the monotonic clock, which nobody can set."""

    alone = True
    show_seconds = 0.0
    journal_seconds: float | None = None

    def __init__(self, settings: Settings) -> None:
        self.changes = Changes()
        self._settings = settings
        self._folder = None if settings.jobs is None else JobFolder(settings.jobs)
        self._jobs: dict[str, Job] = {}
        self._expires: dict[str, float] = {}  # on the monotonic clock
        self._saved = 0.0  # when a result so far was last written, on the same clock
        self._images: dict[str, Dataset] = {}  # only without a folder
        self._deaths: dict[str, Deaths] = {}  # of the active jobs of the folder
        self._queue: deque[Job] = deque()
        self._queued = asyncio.Event()
        self._current: tuple[Job, asyncio.Task[None]] | None = None
        self._worker: asyncio.Task[None] | None = None
        self._device_failed = False

    def count(self, state: JobState) -> int:
        """See `JobStore`."""
        self._expire()
        return sum(job.state == state for job in self._jobs.values())

    async def start(self, run: Run) -> None:
        """Restore the jobs of the folder, finished and unfinished."""
        if self._folder is not None:
            self._folder.sweep()
            for id, about in self._folder.all():
                self._restore(self._folder, id, about)
        self._worker = asyncio.create_task(self._work(run))

    def _restore(self, folder: JobFolder, id: str, about: dict[str, Any]) -> None:
        try:
            job, deaths = _from_stored(id, about)
        except (KeyError, TypeError, ValueError) as error:
            logger.error("evaluation %s is unreadable and removed: %r", id, error)
            with suppress(StoreError):  # the next service tries again
                folder.forget(id)
            return
        self._jobs[job.id] = job
        if not job.active:
            self._expires[job.id] = self._expiry(job)
            return
        if job.state == "running":  # the service died, or its device
            deaths = deaths.one_more(count_rows(folder.journal(job.id)))
            logger.warning("evaluation %s was running when the service or its device died", job.id)
        self._deaths[job.id] = deaths
        if deaths.count >= MAX_LOST:
            job.error = (
                f"The service died {MAX_LOST} times while running it, without progress in between."
            )
            self._end(job, "failed")
            return
        job.state = "queued"
        self._try_to_save(job)
        self._enqueue(job)

    async def add(self, job: Job, dataset: Dataset) -> Job:
        """See `JobStore`."""
        self._expire()
        if same := self._same(job):
            return same
        self._check_room(job)
        self._jobs[job.id] = job  # so that it counts while its images are being written
        try:
            if self._folder is None:
                self._images[job.id] = dataset
            else:
                await asyncio.to_thread(self._folder.put, job.id, dataset)
                if not job.active:  # cancelled meanwhile
                    self._folder.release(job.id)
                    return job
                self._save(job)
        except BaseException:
            del self._jobs[job.id]
            self._expires.pop(job.id, None)  # set if it was cancelled meanwhile
            if self._folder is not None:
                self._folder.release(job.id)
            raise
        self._enqueue(job)
        return job

    def _same(self, job: Job) -> Job | None:
        for other in self._jobs.values():
            if other.state in ("failed", "cancelled") or other.key != job.key:
                continue
            if other.digest == job.digest:
                return other
            if job.key is not None:
                raise KeyUsed("the key names another evaluation")
        return None

    def _check_room(self, job: Job) -> None:
        check_room(
            job,
            active=sum(other.active for other in self._jobs.values()),
            stored_bytes=sum(other.bytes for other in self._jobs.values()),
            settings=self._settings,
        )

    def _enqueue(self, job: Job) -> None:
        self._queue.append(job)
        self._queued.set()

    async def get(self, id: str) -> Job | None:
        """See `JobStore`."""
        self._expire()
        return self._jobs.get(id)

    async def all(self, owner: str | None = None) -> list[Job]:
        """See `JobStore`."""
        self._expire()
        found = [job for job in self._jobs.values() if owner is None or job.owner == owner]
        return sorted(found, key=lambda job: job.created, reverse=True)

    async def cancel(self, id: str) -> None:
        """See `JobStore`."""
        job = self._jobs.get(id)
        if job is None or not job.active:
            return
        self._end(job, "cancelled")
        if job in self._queue:
            self._queue.remove(job)
        if self._current is not None and self._current[0] is job:
            self._current[1].cancel()

    async def forget(self, id: str) -> None:
        """See `JobStore`."""
        job = self._jobs.get(id)
        if job is not None and not job.active:
            self._forget_stored(job)
            del self._jobs[id], self._expires[id]

    async def images(self, job: Job) -> Dataset:
        """See `JobStore`."""
        if self._folder is None:
            return self._images[job.id]
        try:
            return await asyncio.to_thread(self._folder.get, job.id)
        except StoreError as error:
            raise Damaged(str(error)) from error

    @asynccontextmanager
    async def journal(self, job: Job) -> AsyncIterator[Path | None]:
        """See `JobStore`."""
        yield None if self._folder is None else self._folder.journal(job.id)

    async def show(self, job: Job, result: dict[str, Any] | None, journal: bytes | None) -> None:
        """See `JobStore`."""
        if not job.active:
            raise Lost("the evaluation was cancelled")
        job.state = "running"
        job.result = result or job.result
        self._notify(job)
        if self._folder is not None and time.monotonic() - self._saved >= SAVE_SECONDS:
            self._saved = time.monotonic()
            self._save(job)

    async def finish(
        self,
        job: Job,
        state: JobState,
        result: dict[str, Any] | None = None,
        error: str | None = None,
    ) -> None:
        """See `JobStore`."""
        if not job.active:
            raise Lost("the evaluation was cancelled")
        job.result, job.error = result or job.result, error
        self._end(job, state)

    async def put_back(self, job: Job, journal: bytes | None) -> None:
        """See `JobStore`. There is nothing to do: the next service continues it from the disk."""

    async def hand_over(self) -> None:
        """See `JobStore`. There is no other process."""

    async def stop(self) -> None:
        """See `JobStore`."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait({self._worker})
        self._end_unstored("cancelled")
        for job in self._jobs.values():
            if job.state == "running" and not self._device_failed:
                job.state = "queued"  # it did not die
                self._try_to_save(job)

    async def close(self) -> None:
        """See `JobStore`."""
        if self._folder is not None:
            self._folder.close()

    async def _work(self, run: Run) -> None:
        while True:
            while not self._queue:
                self._queued.clear()
                await self._queued.wait()
            job = self._queue.popleft()
            job.state = "running"
            self._notify(job)
            self._try_to_save(job)  # before anything that could end the process
            task = asyncio.ensure_future(run(job))
            self._current = job, task
            try:
                await asyncio.wait({task})
            finally:
                self._current = None
                if not task.done():
                    task.cancel()
                    await asyncio.wait({task})
                if error := None if task.cancelled() else task.exception():
                    logger.error("evaluation %s was interrupted: %r", job.id, error)
            if isinstance(error, EngineStopped):
                self._device_failed = True
                self._end_unstored("failed", "The device failed; the service's log says why.")
                return

    def _end_unstored(self, state: JobState, error: str | None = None) -> None:
        """End the active jobs, unless the next service can continue them from the folder."""
        for job in self._jobs.values():
            if self._folder is None and job.active:
                job.error = error
                self._end(job, state)

    def _end(self, job: Job, state: JobState) -> None:
        job.state, job.finished = state, datetime.now(UTC)
        job.bytes = len(str(job.result))
        self._images.pop(job.id, None)
        self._expires[job.id] = self._expiry(job)
        self._deaths.pop(job.id, None)
        self._notify(job)
        # If it can't be saved nothing is lost: the next service finishes it from its journal.
        if self._folder is not None and self._try_to_save(job):
            self._folder.release(job.id)

    def _try_to_save(self, job: Job) -> bool:
        """Save the job in the folder, if there is one; returns whether that worked."""
        try:
            if self._folder is not None:
                self._save(job)
        except StoreError as error:
            logger.error("%s", error)
            return False
        return True

    def _save(self, job: Job) -> None:
        assert self._folder is not None
        deaths = self._deaths.get(job.id, Deaths())
        self._folder.save(job.id, job.created.timestamp(), _to_stored(job, deaths))

    def _notify(self, job: Job) -> None:
        job.version += 1
        self.changes.notify(job.id)

    def _expiry(self, job: Job) -> float:
        """When a finished job expires, on the monotonic clock.

        At most the full time from now, even if the system's clock was set back.
        """
        assert job.finished is not None
        expiry = self._settings.job_expiry_seconds
        passed = (datetime.now(UTC) - job.finished).total_seconds()
        return time.monotonic() + min(max(expiry - passed, 0.0), expiry)

    def _expire(self) -> None:
        now = time.monotonic()
        ended = [job for job in self._jobs.values() if not job.active]
        surplus = {job.id for job in ended[: max(len(ended) - MAX_FINISHED, 0)]}
        for job in ended:
            if self._expires[job.id] <= now or job.id in surplus:
                del self._jobs[job.id], self._expires[job.id]
                try:
                    self._forget_stored(job)
                except StoreError as error:  # the next service removes it
                    logger.error("%s", error)

    def _forget_stored(self, job: Job) -> None:
        if self._folder is not None:
            self._folder.forget(job.id)


def check_room(job: Job, *, active: int, stored_bytes: int, settings: Settings) -> None:
    """Raise Full or TooLarge if there is no room for `job`."""
    if job.bytes > settings.jobs_bytes:
        raise TooLarge(settings.jobs_bytes)
    if active >= settings.max_jobs:
        raise Full(f"{settings.max_jobs} evaluations are queued or running.", reason="jobs")
    if stored_bytes + job.bytes > settings.jobs_bytes:
        raise Full("The stored evaluations leave no room for this one.", reason="bytes")


@dataclass(frozen=True)
class Deaths:
    """How often in a row the service died while running a job, without progress in between."""

    count: int = 0
    rows: int = 0  # of the job's journal at the last of them

    def one_more(self, rows: int) -> Deaths:
        """One death more; the first one again if the journal has grown since the last."""
        return Deaths(self.count + 1 if rows <= self.rows else 1, rows)


def _to_stored(job: Job, deaths: Deaths) -> dict[str, Any]:
    return {
        **job.about(),
        "state": job.state,
        "result": job.result,
        "error": job.error,
        "finished": None if job.finished is None else job.finished.isoformat(),
        # Only where needed: older services can't read it.
        **({"deaths": [deaths.count, deaths.rows]} if deaths.count else {}),
    }


def _from_stored(id: str, stored: dict[str, Any]) -> tuple[Job, Deaths]:
    about = {name: value for name, value in stored.items() if name != "version"}
    count, rows = map(int, about.pop("deaths", (0, 0)))
    state, result, error, finished = map(about.pop, ("state", "result", "error", "finished"))
    job = Job.from_about(id, about)
    job.state, job.result, job.error = state, result, error
    job.finished = None if finished is None else datetime.fromisoformat(finished)
    return job, Deaths(count, rows)

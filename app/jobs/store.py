"""The interface of a job store, which stores evaluation jobs and runs them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

from app.jobs.job import Job, JobState
from robust.datasets import Dataset

MAX_LOST = 3  # a job fails once this many services died running it, without progress in between
MAX_FINISHED = 1000  # the most finished jobs that are stored

Run = Callable[[Job], Awaitable[None]]


class StoreError(ValueError):
    """Jobs can't be stored or looked up; the message says why."""


class Unreachable(StoreError):
    """The jobs' database does not respond."""


class Full(StoreError):
    """There is no room for another job now; `reason` is its label in the metrics."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class TooLarge(StoreError):
    """The job would not fit into an empty store."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"expected at most {limit} bytes of images and journal")
        self.limit = limit


class KeyUsed(StoreError):
    """The idempotency key belongs to another job."""


class Damaged(StoreError):
    """The job's images are missing or have changed."""


class Lost(StoreError):
    """The job no longer belongs to this run: it was cancelled, or another replica runs it."""


class JobStore(Protocol):
    """Jobs and their images, journals and results.

    `add` queues a job, and the function given to `start` runs it and ends it with `finish`;
    `cancel` cancels that function. Two jobs of the same model, images and settings are one, unless
    their keys differ. Finished jobs expire. Every method raises StoreError if the store can't be
    reached or written.
    """

    changes: Changes
    alone: bool
    """Whether this process runs every job that is added here."""
    show_seconds: float
    """The least time between two calls of `show`."""
    journal_seconds: float | None
    """How often `show` needs the journal; None if the store keeps the journal's file itself."""

    def count(self, state: JobState) -> int:
        """The number of jobs in that state, when the store last counted."""

    async def start(self, run: Run) -> None:
        """Run the queued jobs with `run`, one at a time, until it raises EngineStopped.

        If cancelled, `run` calls `put_back`.
        """

    async def add(self, job: Job, dataset: Dataset) -> Job:
        """Queue `job`, or return the existing job that is the same.

        Raises Full, TooLarge or KeyUsed.
        """

    async def get(self, id: str) -> Job | None:
        """The job with that id; None if there is none, or it has expired."""

    async def all(self, owner: str | None = None) -> list[Job]:
        """All jobs, or those of `owner`, newest first."""

    async def cancel(self, id: str) -> None:
        """Stop a job, and keep its result so far."""

    async def forget(self, id: str) -> None:
        """Remove a finished job."""

    async def images(self, job: Job) -> Dataset:
        """The labeled images to evaluate on. Raises Damaged."""

    def journal(self, job: Job) -> AbstractAsyncContextManager[Path | None]:
        """The file of the evaluation's journal; None without one."""

    async def show(self, job: Job, result: dict[str, Any] | None, journal: bytes | None) -> None:
        """Record that `job` is running, and its result so far. Raises Lost."""

    async def finish(
        self,
        job: Job,
        state: JobState,
        result: dict[str, Any] | None = None,
        error: str | None = None,
    ) -> None:
        """End `job`. Raises Lost."""

    async def put_back(self, job: Job, journal: bytes | None) -> None:
        """Queue the interrupted `job` again, for this process or another."""

    async def hand_over(self) -> None:
        """Stop running jobs if another process can run them; it continues the running job."""

    async def stop(self) -> None:
        """Stop running jobs. The next service continues stored jobs; other jobs are cancelled."""

    async def close(self) -> None:
        """Close the store. Call after `stop`."""


class Changes:
    """An event for the next change of each watched job. For the event loop only."""

    def __init__(self) -> None:
        # An event lives as long as someone waits for it: a finished job never changes.
        self._events: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()

    def next(self, id: str) -> asyncio.Event:
        """The event that the job's next change sets. Get it before reading the job."""
        return self._events.setdefault(id, asyncio.Event())

    def notify(self, id: str) -> None:
        """Set the event of a job that has changed."""
        if event := self._events.pop(id, None):
            event.set()

    def notify_all(self) -> None:
        """Set all events: any job may have changed."""
        for id in list(self._events):
            self.notify(id)

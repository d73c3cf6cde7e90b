"""What keeps evaluation jobs and hands them out to be run, wherever they are kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

from app.job import Job
from app.schemas import JobState
from robust.datasets import Dataset

MAX_FINISHED = 1000  # results are small, but neither memory nor disk is endless

Run = Callable[[Job], Awaitable[None]]


class StoreError(ValueError):
    """Jobs can't be kept or looked up; the message says why."""


class Full(StoreError):
    """One job more would be too many, or too large. `reason` is for the metrics."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class TooLarge(StoreError):
    """A job that would never fit, however empty the store is."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"expected at most {limit} bytes of images and journal")
        self.limit = limit


class KeyUsed(StoreError):
    """A key by which the client has named another job."""


class Damaged(StoreError):
    """The images of a job are gone, or not what they were."""


class Lost(StoreError):
    """A job that is no longer in the hands of this run: cancelled, or taken over by another."""


class JobStore(Protocol):
    """Jobs and their images, journals and results.

    A job is queued by `add`, handed to the function given to `start`, and ended by `finish`, or by
    `cancel`, which cancels that function. What is asked for the same model, images and settings is
    one job, unless a key says that it is another. Finished jobs expire. Every method raises
    StoreError where the store can't be reached or written to.
    """

    changes: Changes
    alone: bool
    """Whether whatever is added here is run here."""
    show_seconds: float
    """Least time between two calls of `show`."""
    journal_seconds: float | None
    """So often `show` wants the journal, where it does not outlive this machine."""

    def count(self, state: JobState) -> int:
        """How many jobs are in that state, as far as is known."""

    async def start(self, run: Run) -> None:
        """Have `run` do the queued jobs, one after the other. Cancelled, it calls `put_back`."""

    async def add(self, job: Job, dataset: Dataset) -> Job:
        """Queue `job`, or return the same one. Raises Full, TooLarge or KeyUsed."""

    async def get(self, id: str) -> Job | None:
        """The job of that id, unless it has expired."""

    async def all(self) -> list[Job]:
        """Every job, the newest first."""

    async def cancel(self, id: str) -> None:
        """Stop a job, keeping what came out so far."""

    async def forget(self, id: str) -> None:
        """Remove a job that has ended."""

    async def images(self, job: Job) -> Dataset:
        """What it is to be evaluated on. Raises Damaged."""

    def journal(self, job: Job) -> AbstractAsyncContextManager[Path | None]:
        """Where the evaluation of `job` keeps what it has finished, if it does."""

    async def show(self, job: Job, result: dict[str, Any] | None, journal: bytes | None) -> None:
        """Say that `job` is running, and what came out so far. Raises Lost."""

    async def finish(
        self,
        job: Job,
        state: JobState,
        result: dict[str, Any] | None = None,
        error: str | None = None,
    ) -> None:
        """End `job`. Raises Lost."""

    async def put_back(self, job: Job, journal: bytes | None) -> None:
        """Let `job`, which was cut short, be run again, here or elsewhere."""

    async def hand_over(self) -> None:
        """Run nothing more where others can; what runs is cancelled and goes on there."""

    async def stop(self) -> None:
        """Run nothing more. What is kept goes on with the next service, all else is cancelled."""

    async def close(self) -> None:
        """Let go of what keeps the jobs. Call after `stop`."""


class Changes:
    """Wakes whoever waits for a job to change. Used on the event loop only."""

    def __init__(self) -> None:
        self._events: dict[str, asyncio.Event] = {}

    def next(self, id: str) -> asyncio.Event:
        """Set at the next change of the job; ask for it before looking at the job."""
        return self._events.setdefault(id, asyncio.Event())

    def tell(self, id: str) -> None:
        """The job has changed."""
        if event := self._events.pop(id, None):
            event.set()

    def tell_all(self) -> None:
        """Any job may have changed."""
        for id in list(self._events):
            self.tell(id)

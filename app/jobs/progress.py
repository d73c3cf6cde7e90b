"""Passes the result so far of an evaluation from the device thread to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.engine.session import Session
from robust.evaluation import Evaluation


class Progress:
    """The latest result of one run, and its journal every `every` seconds.

    Create it on the event loop. A result is skipped if a newer one arrives before it is read, or if
    less of the work is done than in `shown`, the result of an earlier run of the same job: a run
    that continues reads its journal stage by stage.
    """

    def __init__(
        self, journal: Path | None, *, every: float | None, shown: dict[str, Any] | None = None
    ) -> None:
        self.result = shown  # as JSON values
        self._path = journal if every is not None else None
        self._every = every or 0.0
        self._journal_read = time.monotonic()
        self._journal: bytes | None = None
        self._loop = asyncio.get_running_loop()
        self._changed, self._stopped = asyncio.Event(), asyncio.Event()
        self._begun = False

    def tracked(self, work: Callable[[Session], Evaluation]) -> Callable[[Session], Evaluation]:
        """A function for the device that runs `work`, and records that it starts and ends."""

        def run(session: Session) -> Evaluation:
            self._begun = True
            self._call_on_loop(self._changed.set)
            try:
                return work(session)
            finally:
                self._call_on_loop(self._stopped.set)

        return run

    def show(self, evaluation: Evaluation) -> None:
        """Pass on the result so far. Called on the device thread, which writes the journal."""
        journal = None
        if self._path is not None and time.monotonic() - self._journal_read >= self._every:
            journal, self._journal_read = self._path.read_bytes(), time.monotonic()
        self._call_on_loop(self._update, as_json(evaluation), journal)

    def _update(self, result: dict[str, Any], journal: bytes | None) -> None:
        self._journal = journal or self._journal
        if self.result is None or result["done"] >= self.result["done"]:
            self.result = result
        self._changed.set()

    def _call_on_loop(self, function: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed
            pass

    async def changed(self) -> None:
        """Wait until the run has started, or there is a new result."""
        await self._changed.wait()
        self._changed.clear()

    def take_journal(self) -> bytes | None:
        """The journal, if there is a newer one than at the last call."""
        journal, self._journal = self._journal, None
        return journal

    async def last_journal(self, seconds: float) -> bytes | None:
        """The journal, once the device thread has closed it; None if that takes too long."""
        if self._begun:
            try:
                async with asyncio.timeout(seconds):
                    await self._stopped.wait()
            except TimeoutError:
                return None
        if self._path is None or not self._path.exists():
            return None
        return await asyncio.to_thread(self._path.read_bytes)


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """The result of an evaluation as JSON values, with the fraction of the work done."""
    return {**evaluation.to_dict(), "done": evaluation.done}

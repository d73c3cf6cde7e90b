"""What an evaluation has found so far, on its way from the device thread to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.engine import Session
from robust.evaluation import Evaluation


class Progress:
    """The latest result of one run, and its journal every so many seconds.

    Made on the event loop; what comes faster than it is asked for is skipped.
    """

    def __init__(self, journal: Path | None, *, every: float | None) -> None:
        self.result: dict[str, Any] | None = None  # as JSON values
        self._path = journal if every is not None else None
        self._every = every or 0.0
        self._kept = time.monotonic()
        self._journal: bytes | None = None
        self._loop = asyncio.get_running_loop()
        self._changed, self._stopped = asyncio.Event(), asyncio.Event()
        self._begun = False

    def framed(self, work: Callable[[Session], Evaluation]) -> Callable[[Session], Evaluation]:
        """`work` for the device, told of when it begins and when it has come to its end."""

        def run(session: Session) -> Evaluation:
            self._begun = True
            self._tell(self._changed.set)
            try:
                return work(session)
            finally:
                self._tell(self._stopped.set)

        return run

    def show(self, evaluation: Evaluation) -> None:
        """Take over the result so far. Called on the device thread, which writes the journal."""
        journal = None
        if self._path is not None and time.monotonic() - self._kept >= self._every:
            journal, self._kept = self._path.read_bytes(), time.monotonic()
        self._tell(self._take, as_json(evaluation), journal)

    def _take(self, result: dict[str, Any], journal: bytes | None) -> None:
        self.result, self._journal = result, journal or self._journal
        self._changed.set()

    def _tell(self, function: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has been closed: nobody wants to know any more
            pass

    async def changed(self) -> None:
        """Wait until there is something new."""
        await self._changed.wait()
        self._changed.clear()

    def take_journal(self) -> bytes | None:
        """The journal, if there is one that was not yet taken."""
        journal, self._journal = self._journal, None
        return journal

    async def last_journal(self, seconds: float) -> bytes | None:
        """The journal once the device thread has let go of it; None if that takes too long."""
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
    """The result of an evaluation, and the share of the work that is done."""
    return {**evaluation.to_dict(), "done": evaluation.done}

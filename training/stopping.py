"""Stopping a run by a signal, at the end of a step."""

from __future__ import annotations

import signal
from typing import Any


class StopRequest:
    """Catches SIGTERM and Ctrl-C while the block runs; the run asks `requested` between steps."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> StopRequest:
        self._before = [signal.signal(number, self._note) for number in self.SIGNALS]
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in zip(self.SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        self.signal = number

    def requested(self) -> bool:
        """Whether a signal has been caught."""
        return self.signal != 0

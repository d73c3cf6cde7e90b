"""Stops a run at the end of a step after a signal."""

from __future__ import annotations

import signal
from typing import Any


class StopRequest:
    """Catches SIGTERM and Ctrl-C while the block runs; the run calls `requested` between steps."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> StopRequest:
        self._before = [signal.signal(number, self._handle) for number in self.SIGNALS]
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in zip(self.SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # at a second Ctrl-C, without waiting for the step
        self.signal = number

    def requested(self) -> bool:
        """Whether a signal has been caught."""
        return self.signal != 0

"""Waiting for something that must come true."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS = 280.0  # a slow machine gets the time that pytest gives a test, less what comes after


def until(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """Wait for a condition that must come true."""
    latest = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < latest, "waited in vain"
        time.sleep(0.005)

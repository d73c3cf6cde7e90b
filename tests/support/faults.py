"""Shared by the fault tests: bare sockets, and checks for after a fault."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.engine.queue import Kind
from tests.support.serving import Running, png, until

# Pools of the service and of asyncio: bounded, and kept for the next request.
_POOLS = ("codec", "asyncio", "uvloop", "AnyIO")


@contextmanager
def unharmed(running: Running) -> Iterator[None]:
    """After the block everything has been let go of, and an image is answered as before it."""
    before, held = prediction(running), _held(running)
    yield
    in_flight, shares = running.service.in_flight, running.service.shares
    until(lambda: (in_flight.count, in_flight.posts, shares.bytes) == (0, 0, 0))
    until(lambda: not any(waiting(running, kind) for kind in (Kind.PREDICT, Kind.ATTACK)))
    assert prediction(running) == before
    # Asking lets the client close what the service has closed already.
    until(lambda: running.client.get("/readyz").status_code == 200 and _held(running) <= held)


def prediction(running: Running) -> dict[str, Any]:
    """What the service says of one image."""
    response = running.client.post("/predict", content=png(seed=1))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def waiting(running: Running, kind: Kind) -> float:
    """Work of that kind admitted and not finished, in forward passes."""
    registry = running.service.metrics.registry
    return registry.get_sample_value("robust_queued_forwards", {"kind": kind.label}) or 0.0


def _held(running: Running) -> tuple[int, int]:
    """File descriptors and threads of this process, without those of pools."""
    threads = [thread.name for thread in threading.enumerate()]
    service = running.service
    pools = service.quick_workers, service.image_workers, service.set_workers
    descriptors = len(os.listdir("/proc/self/fd")) - sum(len(pool._idle) for pool in pools)
    return descriptors, sum(not name.startswith(_POOLS) for name in threads)


def statuses(running: Running) -> Counter[str]:
    """How many requests were answered with each status so far, as the service counts them."""
    counted = Counter[str]()
    for metric in running.service.metrics.registry.collect():
        for sample in metric.samples:
            if sample.name == "robust_requests_total":
                counted[sample.labels["status"]] += int(sample.value)
    return counted


def connect(running: Running, *, receive_buffer: int | None = None) -> socket.socket:
    """A connection to the service."""
    host, port = running.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(60)
    connection.connect((host, int(port)))
    return connection


def vanish(connection: socket.socket, *, reset: bool) -> None:
    """End a connection without a word: as a process that ends does, or as one that crashes."""
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


class Peak:
    """The most memory of a process, in bytes, since this was made."""

    def __init__(self, pid: int | str = "self") -> None:
        self._folder = Path("/proc") / str(pid)
        (self._folder / "clear_refs").write_text("5")
        self.before = self._kilobytes("VmRSS")

    def grown(self) -> int:
        """By how many bytes the peak is above what was held at the start."""
        return 1024 * (self._kilobytes("VmHWM") - self.before)

    def _kilobytes(self, name: str) -> int:
        lines = (self._folder / "status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

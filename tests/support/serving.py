"""A service to talk to over real HTTP, in a thread of the test."""

from __future__ import annotations

import asyncio
import io
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import httpx
import numpy as np
import torch
import uvicorn
from PIL import Image
from torch import Tensor

from app.application import create_app
from app.http.connection import connection_class
from app.service import Service
from app.settings import Settings
from robust.images import encode_png
from tests.support.waiting import SECONDS, until

CLASSES = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZE = 32
T = TypeVar("T")


@dataclass
class Running:
    """A service that answers at `url`."""

    service: Service
    client: httpx.Client
    url: str
    loop: asyncio.AbstractEventLoop

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin something on the service's own event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def evaluation_cancelled(self) -> bool:
        """Whether the work on the device, such as one that waits at a gate, is cancelled."""
        return all(work.abandoned for work in list(self.service.engine._queue.running))

    def stop_jobs(self, gate: Gate) -> None:
        """Stop the evaluations, as at the end of the service, while one waits at `gate`."""
        stopping = self.begin(self.service.jobs.stop())
        until(self.evaluation_cancelled)
        gate.open.set()
        stopping.result(SECONDS)


@contextmanager
def serving(settings: Settings) -> Iterator[Running]:
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        port=0,
        http=connection_class(settings.upload_seconds),
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
    )
    server = uvicorn.Server(config)
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=SECONDS) as client:
            yield Running(app.state.service, client, url, loops[0])
    finally:
        server.should_exit = True
        thread.join()


def pixels(seed: int = 0, n: int = 1) -> Tensor:
    """Random images uint8 (n, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def png(seed: int = 0) -> bytes:
    return encode_png(pixels(seed)[0])


def jpeg(seed: int = 0, size: tuple[int, int] = (60, 40)) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="JPEG")
    return buffer.getvalue()


def labeled(n: int = 30, seed: int = 0, **changed: Any) -> bytes:
    """An npz of random images and labels."""
    arrays = {"images": pixels(seed, n).numpy(), "labels": np.arange(n) % len(CLASSES)} | changed
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def anew() -> dict[str, str]:
    """A header that asks for a new evaluation, whatever other tests have evaluated."""
    return {"Idempotency-Key": uuid.uuid4().hex}


class Gate:
    """A stand-in for a classifier that waits at each call until it is opened."""

    def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
        self.inner, self.calls, self.waiting = inner, 0, 0
        self.open = threading.Event()
        self.batches: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.batches.append(len(x))
        self.waiting += 1
        assert self.open.wait(SECONDS)
        self.waiting -= 1
        return self.inner(x)


class Brake:
    """Lets so many passes of the model through, and then waits until it is released."""

    def __init__(self, gate: Gate, passes: int) -> None:
        self._inner, self._left = gate.inner, passes
        self.waiting, self.released = threading.Event(), threading.Event()
        gate.inner = self
        gate.open.set()

    def __call__(self, x: Tensor) -> Tensor:
        self._left -= 1
        if self._left < 0:
            self.waiting.set()
            assert self.released.wait(SECONDS)
        return self._inner(x)


@contextmanager
def gated(service: Service) -> Iterator[Gate]:
    """Let the served model wait until the gate is opened, and put the real one back after."""
    models = service.models
    current = models.current
    gate = Gate(current.exact())
    models._current = replace(current, classifier=gate, fast=None, plan=None, bf16=None)  # type: ignore[arg-type]
    try:
        yield gate
    finally:
        gate.open.set()
        models._current = current

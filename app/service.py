"""One service: its settings and everything that lives as long as it does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from contextvars import copy_context
from typing import TypeVar

import torch
from starlette.requests import Request

from app.engine import Engine
from app.errors import ClientGone
from app.jobs import Jobs
from app.metrics import Metrics
from app.model import ServedModel
from app.models import Models
from app.settings import Settings
from app.tracing import tracing_for
from robust.classifier import resolve_device
from robust.environment import device_in_words, project_version, unused_gpu

logger = logging.getLogger(__name__)
T = TypeVar("T")

WORKERS = 4  # threads that decode and encode; Pillow releases the interpreter meanwhile


class Service:
    """What the routes share.

    Raises ValueError for a device that is not there, or traces without the extra for them.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.tracing = tracing_for(settings.traces, project_version())
        device = resolve_device(settings.device)
        self.models = Models(
            settings.checkpoint,
            device=device,
            metrics=self.metrics,
            threads=settings.threads,
        )
        self.engine = Engine(
            queue_limit=settings.queue_limit,
            max_batch=settings.max_batch,
            threads=settings.threads,
            metrics=self.metrics,
            tracing=self.tracing,
        )
        self.jobs = Jobs(self.engine, self.models, settings, self.metrics)
        self.in_flight = InFlight(self.metrics)
        self.ready = False
        self.draining = False
        self.reading_sets = asyncio.Semaphore(1)  # each may need the memory of the largest one
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="codec")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load and warm the model, serve, and stop. Raises CheckpointError."""
        if not self.models.loaded:
            await asyncio.to_thread(self.models.load)
        logger.info("serving on %s", device_in_words(self.models.current.device))
        if self.settings.device == "auto" and unused_gpu(self.models.current.device):
            logger.warning(
                "there is an NVIDIA GPU that torch %s can't use; is its driver too old?",
                torch.__version__,
            )
        self.engine.start()
        watcher = None
        try:
            await self.models.warm(self.engine)
            await self.jobs.start()
            watcher = asyncio.create_task(
                self.models.watch(self.engine, self.settings.reload_seconds)
            )
            self.ready = True
            yield
        finally:
            self.ready = False
            if watcher:
                watcher.cancel()
            await self.jobs.stop()
            await asyncio.to_thread(self.engine.stop, self.settings.grace_seconds)
            await self.jobs.close()
            self.models.drop()
            self._workers.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(self.tracing.close)

    async def drain(self) -> None:
        """Take no new work and wait for the requests in hand, as long as the grace time.

        An evaluation goes on at once on another replica, if there is one. Else it does as long as
        work is waited for, and is stopped then: those who only watch one are told and leave.
        """
        self.draining = True
        try:
            async with asyncio.timeout(self.settings.grace_seconds):
                await self.jobs.hand_over()
                await self.in_flight.until(lambda: not self.in_flight.posts)
                await self.jobs.stop()
                await self.in_flight.until(lambda: not self.in_flight.count)
        except TimeoutError:
            logger.warning("%d requests did not finish in time", self.in_flight.count)

    async def beside(self, function: Callable[..., T], *arguments: object) -> T:
        """Run `function` in a worker thread: decoding and encoding never hold the event loop."""
        loop = asyncio.get_running_loop()
        context = copy_context()  # so that its log lines name the request
        return await loop.run_in_executor(self._workers, context.run, function, *arguments)

    def model_for(self, request: Request) -> ServedModel:
        """The model to answer `request` with; the answer will name it. Raises NotReady."""
        model = self.models.current
        request.state.model_sha256 = model.sha256
        return model

    def deadline(self, request: Request) -> float:
        """When the answer is due, on the monotonic clock."""
        arrived: float = request.state.arrived
        return arrived + self.settings.deadline_seconds


class InFlight:
    """Counts the requests in hand, and what of them is in memory."""

    def __init__(self, metrics: Metrics) -> None:
        self.count = 0
        self.posts = 0
        self.bytes = 0  # of their bodies, as far as they have arrived
        self._metrics = metrics
        self._changed = asyncio.Event()

    @contextmanager
    def track(self, method: str) -> Iterator[None]:
        """Count one request as long as the block runs."""
        self._add(1, method)
        try:
            yield
        finally:
            self._add(-1, method)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition`, which depends on the counts, holds."""
        while not condition():
            await self._changed.wait()

    def _add(self, change: int, method: str) -> None:
        self.count += change
        self.posts += change * (method == "POST")
        self._metrics.in_flight.set(self.count)
        self._changed.set()
        self._changed = asyncio.Event()


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, or, when the client hangs up first, ClientGone and `work` cancelled.

    The body must have been read: what comes after it is only the hanging up.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("The client hung up.")
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""The service: its settings, and all objects that live as long as it."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import copy_context
from typing import Any, TypeVar

import torch
from starlette.requests import Request

from app.decoding.pool import WorkerPool
from app.decoding.semaphores import Budget, FairSemaphore
from app.engine.compare import load_compare, mismatch
from app.engine.engine import Engine
from app.engine.gc_tuning import release_memory
from app.engine.model_reloader import ModelReloader, warm
from app.engine.served_model import ServedModel
from app.errors import ClientGone, NotReady
from app.jobs.service import Jobs
from app.metrics import Metrics
from app.settings import Settings
from app.tracing import tracing_for
from robust.classifier import resolve_device
from robust.environment import project_version, unused_gpu

logger = logging.getLogger(__name__)
T = TypeVar("T")

CODEC_THREADS = 4  # for decoding and encoding; Pillow releases the GIL
DRAIN_SHARE = 0.75  # of the grace time, for open requests; the rest is for shutting down
QUICK_SECONDS = 1.0  # CPU time limit of a quick image, as it delays other clients' images
ABORT_SECONDS = 1.0  # to send the 503s of requests that did not finish in time


class Service:
    """The state that the routes share: models, engine, jobs, decode workers and limits.

    Raises ValueError for a missing device, invalid model options, or traces without the extra
    `otel`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.tracing = tracing_for(settings.traces, project_version())
        with _naming("ROBUST_DEVICE"):
            device = resolve_device(settings.device)
        with _naming("ROBUST_CLASSES"):  # `Settings` has checked the other options
            options = settings.model_options()
        self.models = ModelReloader(
            settings.checkpoint,
            device=device,
            metrics=self.metrics,
            options=options,
            fall_back=settings.device == "auto",
            threads=settings.threads,
            precision=settings.precision,
        )
        self._compare: ServedModel | None = None
        self.engine = Engine(
            queue_limit=settings.queue_limit,
            max_batch=settings.max_batch,
            client_share=settings.client_share,
            threads=settings.threads,
            metrics=self.metrics,
            tracing=self.tracing,
        )
        self.jobs = Jobs(self.engine, self.models, settings, self.metrics)
        self.in_flight = InFlight(self.metrics)
        self.shares = Shares(settings)
        self.ready = False
        self.draining = False
        # One dataset at a time, as each may need the most memory; cheap ones don't wait for it.
        self.set_slots = FairSemaphore(1, per_client=1)
        self.cheap_set_slots = FairSemaphore(1, per_client=1)
        budget = Budget(settings.decode_memory)
        self.set_memory = budget.total * 3 // 4
        self.image_workers = WorkerPool(
            size=settings.decode_workers, budget=budget, seconds=settings.decode_seconds
        )
        self.quick_memory = budget.total // 4
        self.quick_workers = WorkerPool(
            size=settings.decode_workers,
            budget=Budget(2 * self.quick_memory),
            seconds=settings.decode_seconds,
            cpu_seconds=QUICK_SECONDS,
            niceness=5,
        )
        self.set_workers = WorkerPool(size=1, budget=budget, seconds=3 * settings.decode_seconds)
        # So that the threads alternate between clients, however many images one request has.
        self.thread_slots = FairSemaphore(CODEC_THREADS, per_client=CODEC_THREADS)
        self._workers = ThreadPoolExecutor(CODEC_THREADS, thread_name_prefix="codec")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load and warm the models, serve, and stop. Raises what `load` raises."""
        if not self.models.loaded:
            await asyncio.to_thread(self.load)
        logger.info("serving on %s", self.models.device_in_words)
        if self.settings.device == "auto" and unused_gpu(self.models.current.device):
            logger.warning(
                "torch %s can't use this machine's NVIDIA GPU; is its driver too old?",
                torch.__version__,
            )
        self.engine.start()
        watcher = None
        try:
            await self.models.warm(self.engine)
            if self._compare is not None:
                self._compare = await warm(
                    self.engine, self._compare, self.metrics, self.settings.precision
                )
                release_memory()
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
            for workers in (self.quick_workers, self.image_workers, self.set_workers):
                workers.close()
            await asyncio.to_thread(self.engine.stop, self.settings.grace_seconds)
            await self.jobs.close()
            self.models.drop()
            self._compare = None
            self._workers.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(self.tracing.close)

    def load(self) -> None:
        """Load the models. Raises CheckpointError, or ValueError for the comparison model."""
        self.models.load()
        path = self.settings.compare_path
        if path is not None:
            with _naming("ROBUST_COMPARE"):
                self._compare = load_compare(
                    path,
                    self.models.current.device,
                    served=self.models.current,
                    required=self.settings.compare != "auto",
                    precision=self.settings.precision,
                )

    def compare_with(self, model: ServedModel) -> ServedModel | None:
        """The comparison model for `model`; None if there is none or its classes differ."""
        compare = self._compare
        return None if compare is None or mismatch(compare, model) else compare

    async def drain(self) -> None:
        """Accept no new work and wait for open requests, up to most of the grace time.

        If there is another replica, it takes over the evaluation immediately. Otherwise the
        evaluation runs until the open requests are done, and is then stopped; its watchers are
        notified.
        """
        self.draining = True
        try:
            async with asyncio.timeout(DRAIN_SHARE * self.settings.grace_seconds):
                await self.jobs.hand_over()
                await self.in_flight.until(lambda: not self.in_flight.posts)
                await self.jobs.stop()
                await self.in_flight.until(lambda: not self.in_flight.count)
        except TimeoutError:
            logger.warning("%d requests did not finish in time", self.in_flight.count)

    async def abort_requests(self) -> None:
        """Answer the requests that are still open with 503."""
        self.in_flight.abort()
        with suppress(TimeoutError):
            async with asyncio.timeout(ABORT_SECONDS):
                await self.in_flight.until(lambda: not self.in_flight.count)

    async def run_in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """Run `function` in a worker thread, so that codecs never block the event loop."""
        loop = asyncio.get_running_loop()
        context = copy_context()  # so that its log lines name the request
        return await loop.run_in_executor(self._workers, context.run, function, *arguments)

    def model_for(self, request: Request) -> ServedModel:
        """The model for `request`, which the response headers will name. Raises NotReady."""
        model = self.models.current
        request.state.model_sha256 = model.sha256
        request.state.precision = model.precision
        return model

    def check_ready(self) -> None:
        """Raise NotReady unless the service accepts requests."""
        if not self.ready or self.draining or not self.engine.alive:
            raise NotReady("The service is loading, shutting down or broken.")

    def deadline(self, request: Request) -> float:
        """The deadline of `request`, on the monotonic clock."""
        arrived: float = request.state.arrived
        return arrived + self.settings.deadline_seconds


@contextmanager
def _naming(variable: str) -> Iterator[None]:
    """Put the variable's name in front of a ValueError's message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{variable}: {error}") from None


class Shares:
    """Counts what each client uses: slots for active requests, and bytes of request bodies."""

    def __init__(self, settings: Settings) -> None:
        self.max_slots = settings.max_requests
        share = settings.client_share
        self.client_bytes = max(1, int(share * settings.max_held_bytes))
        self.client_slots = max(1, int(share * self.max_slots))
        self._slots, self._bytes = Counter[str](), Counter[str]()
        self._watching = Counter[str]()
        self.slots = 0  # taken by all clients
        self.bytes = 0  # of all clients

    def reason_against(self, client: str) -> str | None:
        """Why another request of this client gets no slot, or None."""
        if self._slots[client] >= self.client_slots:
            return f"You have {self.client_slots} requests in progress, which is your share."
        if self.slots >= self.max_slots:
            return "Too many requests are in progress."
        return None

    def slots_left(self, client: str) -> int:
        """How many more requests of this client get a slot."""
        return min(self.client_slots - self._slots[client], self.max_slots - self.slots)

    def take_slot(self, client: str) -> None:
        """Count one more active request of the client."""
        self.slots += 1
        _add(self._slots, client, 1)

    def release_slot(self, client: str) -> None:
        """Count one active request less."""
        self.slots -= 1
        _add(self._slots, client, -1)

    def may_watch(self, client: str) -> bool:
        """Whether the client may watch or wait for one more evaluation: each change costs time."""
        return self._watching[client] < self.client_slots

    @contextmanager
    def watching(self, client: str) -> Iterator[None]:
        """Count the client as a watcher while the block runs."""
        _add(self._watching, client, 1)
        try:
            yield
        finally:
            _add(self._watching, client, -1)

    def add_bytes(self, client: str, size: int) -> int:
        """Add `size` bytes, possibly negative, to the client's total, and return that."""
        self.bytes += size
        _add(self._bytes, client, size)
        return self._bytes[client]


def _add(counter: Counter[str], key: str, change: int) -> None:
    counter[key] += change
    if not counter[key]:
        del counter[key]


class InFlight:
    """Counts the open requests."""

    def __init__(self, metrics: Metrics) -> None:
        self.count = 0
        self.posts = 0
        self.aborted = False  # whether the open requests were cancelled
        self._tasks: set[asyncio.Task[Any]] = set()
        self._metrics = metrics
        self._changed = asyncio.Event()

    @contextmanager
    def track(self, method: str) -> Iterator[None]:
        """Count this task's request while the block runs."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._add(1, method)
        try:
            yield
        finally:
            self._add(-1, method)
            self._tasks.discard(task)

    def abort(self) -> None:
        """Cancel the open requests; the middleware answers them with 503."""
        self.aborted = True
        for task in list(self._tasks):
            task.cancel()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition`, which depends on the counts, is true."""
        while not condition():
            await self._changed.wait()

    def _add(self, change: int, method: str) -> None:
        self.count += change
        self.posts += change * (method == "POST")
        self._metrics.in_flight.set(self.count)
        self._changed.set()
        self._changed = asyncio.Event()


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`; if the client disconnects first, cancels `work` and raises ClientGone.

    The request's body must have been read, so that the next ASGI message is the disconnect.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("The client disconnected.")
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

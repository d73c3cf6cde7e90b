"""The engine: one thread that owns the device and keeps it busy while there is work."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from app import logs
from app.engine.cpu_limits import device_threads
from app.engine.gc_tuning import release_memory
from app.engine.numpy_ops import concatenate
from app.engine.predictor import OUT_OF_MEMORY, Predictor, empty_cache
from app.engine.queue import Kind, Work, WorkQueue
from app.engine.served_model import ServedModel
from app.engine.session import Session
from app.errors import DeadlineExceeded, EngineStopped, OutOfMemory, ServiceError
from app.metrics import Metrics
from app.tracing import Tracing
from robust.evaluation.precision import full_float32
from robust.memory import is_out_of_memory

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_SHARED = 8  # attacks from several requests in one pass: more would delay predictions too long
MAX_NESTED_ATTACKS = 4  # attacks begun and not finished: each waits for the one it yielded to
_STOPPED = "The device thread has stopped."


class _DeviceLost(BaseException):
    """The device is unusable in this process; not an Exception, so that it ends the thread."""


class Engine:
    """Runs predictions in shared batches, and attacks and evaluations one after another.

    The thread takes queued work as soon as the device is free. On a CPU, predictions first wait
    briefly for images that are still being decoded. Between the steps of an evaluation, predictions
    and attacks run; between the steps of an attack, predictions and other clients' small attacks.
    Works with equal `share` run as one batch.
    """

    def __init__(
        self,
        *,
        queue_limit: int,
        max_batch: int,
        client_share: float = 1.0,
        threads: int = 0,
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._tracing = tracing or Tracing()
        self._queue = WorkQueue(queue_limit, self._metrics, client_share=client_share)
        self.max_batch = max_batch
        """The most images of one forward pass of predictions."""
        self._threads = threads
        self._predictor = Predictor(max_batch, self._metrics)
        self._thread = threading.Thread(target=self._main, name="device", daemon=True)
        self._started = 0.0  # when the innermost running work started
        self._nested = 0.0  # seconds of work nested in it
        self._running_kinds: list[Kind] = []  # innermost last

    @property
    def alive(self) -> bool:
        """Whether the device thread is running."""
        return self._thread.is_alive()

    def check_alive(self) -> None:
        """Raise EngineStopped unless the device thread is running."""
        if not self.alive:
            raise EngineStopped(_STOPPED)

    def start(self) -> None:
        """Start the device thread."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Refuse further work, stop running work at its next step, and wait for the thread."""
        self._queue.close("The service is shutting down.")
        for work in list(self._queue.running):
            work.abandoned = True
        if self._thread.is_alive():
            self._thread.join(timeout)

    def retry_after(self, kind: Kind, *, ahead: int = 0) -> int:
        """Whole seconds until there should be room for work of that kind.

        `ahead` counts the forward passes of waiting work that is not in this queue.
        """
        return self._queue.retry_after(kind, ahead=ahead)

    def decoding(self) -> AbstractContextManager[None]:
        """Context manager for decoding the images of a prediction.

        On a CPU the device waits for them briefly, because decoding needs the same cores: one
        batch of all images takes less CPU time than two, and doesn't compete with decoding. It
        doesn't wait if a larger batch would save nothing.
        """
        return self._queue.decoding()

    async def predict(
        self, model: ServedModel, images: Tensor, *, deadline: float | None = None
    ) -> Tensor:
        """Probabilities float32 (n, K) of images (n, 3, H, W) of the model's size.

        The images are uint8, or float32 in [0, 1]. Raises Overloaded, DeadlineExceeded,
        OutOfMemory or EngineStopped.
        """
        work = Work(
            kind=Kind.PREDICT, model=model, cost=len(images), deadline=deadline, images=images
        )
        probabilities: Tensor
        (probabilities,) = await self.run_shared([work])
        return probabilities

    async def run(
        self,
        kind: Kind,
        model: ServedModel,
        function: Callable[[Session], T],
        *,
        cost: int,
        deadline: float | None = None,
    ) -> T:
        """Run `function` on the device thread; cancelling the call stops it between two steps.

        Raises the function's exceptions, Overloaded, DeadlineExceeded or EngineStopped.
        """
        work = Work(kind=kind, model=model, cost=cost, deadline=deadline, function=function)
        result: T
        (result,) = await self.run_shared([work])
        return result

    async def run_shared(self, works: Sequence[Work]) -> list[Any]:
        """The results of works of one kind, admitted together; each may share passes with others.

        A result that is an exception fails only that work. Raises the first failure, Overloaded,
        DeadlineExceeded or EngineStopped; then, or if this call is cancelled, all are cancelled.
        """
        try:
            works[0].check()
            self._queue.put(*works)
            return [await self._finished(work) for work in works]
        finally:
            for work in works:
                work.abandon()

    async def _finished(self, work: Work) -> Any:
        left = None if work.deadline is None else work.deadline - time.monotonic()
        try:
            async with asyncio.timeout(left):
                return await asyncio.wrap_future(work.future)
        except TimeoutError:
            raise DeadlineExceeded("The work did not finish before its deadline.") from None
        finally:
            self._tracing.work(work.kind.label, admitted=work.admitted, began=work.began)

    # The methods below run on the device thread.

    def serve(self, *, below: Kind) -> None:
        """Run the queued work that is more urgent than `below`."""
        now = time.monotonic()
        while work := self._queue.take(below=below, admitted_before=now):
            self._do(work)

    def serve_sooner(self, batch: Sequence[Work]) -> None:
        """Run the attacks of other clients that are due before the running `batch`."""
        running_attacks = self._running_kinds.count(Kind.ATTACK)
        if batch[0].kind is not Kind.ATTACK or running_attacks >= MAX_NESTED_ATTACKS:
            return
        while work := self._queue.take_sooner(batch):
            self._do(work)

    def own_seconds(self) -> float:
        """Time since the innermost running work started, excluding work nested in it."""
        return time.perf_counter() - self._started - self._nested

    def _main(self) -> None:
        try:
            torch.set_num_threads(device_threads(self._threads))
            with full_float32():
                while self._queue.wait():
                    if work := self._queue.take():
                        self._do(work)
                    work = None  # otherwise it keeps its model in memory until the next work
        except BaseException:
            logger.critical("the device thread died", exc_info=True)
        finally:
            self._queue.close(_STOPPED)

    def _do(self, work: Work) -> None:
        if work.kind is not Kind.PREDICT:
            sharing = [] if work.share is None else self._queue.take_sharing(work, MAX_SHARED - 1)
            batch = [item for item in (work, *sharing) if self._begin(item)]
            if work.share is not None and batch:
                self._metrics.attack_images.observe(len(batch))
            if batch:
                self._run(batch)
            if work.kind is Kind.EVALUATE:
                release_memory()
            return
        batch = [work, *self._queue.take_compatible(work, self.max_batch - work.cost)]
        batch = [item for item in batch if self._begin(item)]
        if batch:
            self._predict(batch)

    def _begin(self, work: Work) -> bool:
        """Mark `work` as running; False if it was cancelled or its deadline has passed."""
        if not work.future.set_running_or_notify_cancel():
            self._metrics.rejected.labels("cancelled").inc()
            return False
        work.began = time.monotonic()
        self._metrics.queue_wait.labels(work.kind.label).observe(work.began - work.admitted)
        try:
            work.check()
        except ServiceError as error:
            self._metrics.rejected.labels("deadline").inc()
            work.future.set_exception(error)
            return False
        return True

    def _predict(self, batch: list[Work]) -> None:
        model = batch[0].model
        images = concatenate([work.images for work in batch if work.images is not None])
        probabilities = self._attempt(
            batch, lambda: self._predictor.probabilities(model, images), each=self._predict
        )
        if probabilities is None:
            return
        begin, rows = 0, probabilities.numpy()
        for work in batch:
            work.future.set_result(torch.from_numpy(rows[begin : begin + work.cost]))
            begin += work.cost

    def _run(self, batch: list[Work]) -> None:
        """Run the first work's function for all of `batch`; if it fails, run each work alone."""
        session = Session(self, batch)
        results = self._attempt(batch, lambda: _call(batch, session), each=self._run)
        if results is None:
            return
        for work, result, error in zip(batch, results, session.errors, strict=True):
            if error is not None or isinstance(result, Exception):
                work.future.set_exception(error or result)
            else:
                work.future.set_result(result)

    def _attempt(
        self, batch: list[Work], function: Callable[[], T], *, each: Callable[[list[Work]], None]
    ) -> T | None:
        """The result of `function` for the batch; None if it failed, with the futures' errors set.

        If several works fail together, `each` is called with every work alone. By then the
        exception and its frames are gone, and with them their memory on the device.
        """
        try:
            with self._on_device(batch):
                return function()
        except Exception as error:
            if _is_lost(error):
                _fail(batch)
                raise _DeviceLost from error
            if len(batch) == 1:
                batch[0].future.set_exception(_client_error(error))
                return None
            if not isinstance(error, ServiceError):
                logger.warning("work for %d requests failed; trying each alone", len(batch))
        except BaseException:
            _fail(batch)
            raise
        empty_cache(batch[0].model)
        for work in batch:
            each([work])
        return None

    @contextmanager
    def _on_device(self, batch: list[Work]) -> Iterator[None]:
        """Charge the time of the block to `batch`, not to the work that it interrupts.

        The block runs in the default precision and gradient mode, whatever the interrupted work
        has set.
        """
        kind, cost = batch[0].kind, sum(work.cost for work in batch)
        outer = self._started, self._nested
        self._started, self._nested = time.perf_counter(), 0.0
        self._queue.running += batch
        self._running_kinds.append(kind)
        token = logs.request_id.set(",".join(dict.fromkeys(work.request_id for work in batch)))
        try:
            with (
                torch.autocast(batch[0].model.device.type, enabled=False),
                torch.inference_mode(False),
                torch.enable_grad(),
            ):
                yield
            self._queue.measure(kind, cost, self.own_seconds())
        finally:
            own, total = self.own_seconds(), time.perf_counter() - self._started
            self._metrics.device_seconds.labels(kind.label).inc(own)
            self._started, self._nested = outer[0], outer[1] + total
            del self._queue.running[-len(batch) :]
            self._running_kinds.pop()
            logs.request_id.reset(token)


def _call(batch: list[Work], session: Session) -> list[Any]:
    function = batch[0].function
    assert function is not None
    if batch[0].share is None:
        return [function(session)]
    results: list[Any] = function(session, [work.item for work in batch])
    return results


def _fail(batch: list[Work]) -> None:
    for work in batch:
        if not work.future.done():
            work.future.set_exception(EngineStopped(_STOPPED))


def _is_lost(error: Exception) -> bool:
    """Whether the device is unusable from now on, as after an illegal memory access."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def _client_error(error: Exception) -> Exception:
    """The error for the client: OutOfMemory, which may be temporary, or `error` itself."""
    if is_out_of_memory(error):
        return OutOfMemory(OUT_OF_MEMORY)
    return error

"""The engine: one thread that owns the device and never lets it idle while there is work."""

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
from app.errors import DeadlineExceeded, EngineStopped, OutOfMemory, ServiceError
from app.memory import give_back
from app.metrics import Metrics
from app.model import ServedModel
from app.pixels import together
from app.processors import device_threads
from app.queue import Kind, Work, WorkQueue
from app.tracing import Tracing
from robust.classifier import Classifier
from robust.evaluation.precision import full_float32
from robust.inference import FEW
from robust.memory import is_out_of_memory

logger = logging.getLogger(__name__)
T = TypeVar("T")

_STOPPED = EngineStopped("The device thread has stopped.")
_FITTED_OFTEN = 100  # forward passes after which twice as many images are tried


class _DeviceLost(BaseException):
    """The device does nothing more for this process, whose end this is: no Exception to handle."""


class Session:
    """What a function on the device gets: a model to call, with pauses for more urgent work.

    Calling it maps images to logits as any model does. Before that it serves what goes ahead, and
    raises Cancelled or DeadlineExceeded when nobody waits for any of the results any more.
    """

    def __init__(self, engine: Engine, batch: list[Work]) -> None:
        self._engine, self._batch = engine, batch
        self.errors: list[ServiceError | None] = [None] * len(batch)
        self.model = batch[0].model
        self.device = batch[0].model.device
        self._exact: Classifier | None = None

    def __call__(self, x: Tensor) -> Tensor:
        self.pause()
        return self.model.logits(x)

    def exact(self, x: Tensor) -> Tensor:
        """The same from the classifier itself, not from its faster copy."""
        self.pause()
        if self._exact is None:
            self._exact = self.model.exact()
        logits: Tensor = self._exact(x)
        return logits

    def given_up(self) -> Tensor:
        """For which of the works that share this session nobody waits any more, bool (n,)."""
        return torch.tensor([error is not None for error in self.errors])

    def pause(self) -> None:
        """Serve what goes ahead, and end here when nobody waits for any of the results."""
        self._engine.serve(below=self._batch[0].kind)
        for place, work in enumerate(self._batch):
            try:
                work.check()
            except ServiceError as error:
                self.errors[place] = self.errors[place] or error
        first = self.errors[0]
        if first is not None and all(self.errors):
            raise first

    def seconds(self) -> float:
        """Time on the device so far, without what was served in between."""
        return self._engine.own_seconds()


class Engine:
    """Runs predictions in shared batches, and attacks and evaluations one after the other.

    The thread takes what is queued as soon as the device is free. On a CPU predictions wait first
    for those that are being decoded; one that is alone waits for nothing. Predictions go ahead of
    attacks, and both of evaluations, between the steps of the latter. Works that `share` the same
    run as one.
    """

    def __init__(
        self,
        *,
        queue_limit: int,
        max_batch: int,
        threads: int = 0,
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._tracing = tracing or Tracing()
        self._queue = WorkQueue(queue_limit, self._metrics)
        self._max_batch, self._threads = max_batch, threads
        self._fitting = max_batch  # images that one forward pass has memory for, as far as is known
        self._fitted = 0  # so often in a row
        self._thread = threading.Thread(target=self._main, name="device", daemon=True)
        self._started, self._nested = 0.0, 0.0  # of the work on top of the stack
        self._running: list[Work] = []

    @property
    def max_batch(self) -> int:
        """Most images of a prediction's pass."""
        return self._max_batch

    @property
    def alive(self) -> bool:
        """Whether the thread that owns the device runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Refuse further work, stop what runs at its next step, and wait for the thread."""
        self._queue.close(EngineStopped("The service is shutting down."))
        for work in list(self._running):
            work.abandoned = True
        if self._thread.is_alive():
            self._thread.join(timeout)

    def retry_after(self, kind: Kind, *, ahead: int = 0) -> int:
        """Whole seconds after which there should be room again for work of that kind.

        `ahead` counts forward passes that wait elsewhere.
        """
        return self._queue.retry_after(kind, ahead=ahead)

    def coming(self) -> AbstractContextManager[None]:
        """To be entered while the images of a prediction are decoded.

        On a CPU the device then waits for them, as decoding needs the same processors: a batch of
        all that came takes less of them than one of the first and one of the rest, and neither
        slows the other down. Where it takes no less, the device does not wait.
        """
        return self._queue.coming()

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
        probabilities: Tensor = await self._result(work)
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
        """Run `function` on the device thread; cancelling this stops it between two steps.

        Raises what the function raises, Overloaded, DeadlineExceeded or EngineStopped.
        """
        work = Work(kind=kind, model=model, cost=cost, deadline=deadline, function=function)
        result: T = await self._result(work)
        return result

    async def run_shared(self, works: Sequence[Work]) -> list[Any]:
        """The results of works of one kind, let in together, each shared with others like it.

        A result that is an exception fails that work alone. Raises the first failure, Overloaded,
        DeadlineExceeded or EngineStopped; then, and when this is cancelled, all are given up.
        """
        try:
            works[0].check()
            self._queue.put(*works)
            return [await self._finished(work) for work in works]
        finally:
            for work in works:
                work.abandon()

    async def _result(self, work: Work) -> Any:
        work.check()
        self._queue.put(work)
        return await self._finished(work)

    async def _finished(self, work: Work) -> Any:
        left = None if work.deadline is None else work.deadline - time.monotonic()
        try:
            async with asyncio.timeout(left):
                return await asyncio.wrap_future(work.future)
        except TimeoutError:
            raise DeadlineExceeded("The work did not finish before its deadline.") from None
        finally:
            work.abandon()
            self._tracing.work(work.kind.label, admitted=work.admitted, began=work.began)

    # What follows runs on the device thread.

    def serve(self, *, below: Kind) -> None:
        """Do what waits now and goes ahead of `below`; what comes meanwhile waits for next time."""
        now = time.monotonic()
        while work := self._queue.take(below=below, admitted_before=now):
            self._do(work)

    def own_seconds(self) -> float:
        """Time since the work on top of the stack began, without work nested in it."""
        return time.perf_counter() - self._started - self._nested

    def _main(self) -> None:
        try:
            torch.set_num_threads(device_threads(self._threads))
            with full_float32():
                while self._queue.wait():
                    if work := self._queue.take():
                        self._do(work)
        except BaseException:
            logger.critical("the device thread died", exc_info=True)
        finally:
            self._queue.close(_STOPPED)

    def _do(self, work: Work) -> None:
        if work.kind is not Kind.PREDICT:
            sharing = [] if work.share is None else self._queue.take_sharing(work, FEW - 1)
            batch = [item for item in (work, *sharing) if self._begin(item)]
            if work.share is not None and batch:
                self._metrics.attack_images.observe(len(batch))
            if batch:
                self._run(batch)
            if work.kind is Kind.EVALUATE:
                give_back()
            return
        batch = [work, *self._queue.take_fellows(work, self._max_batch - work.cost)]
        batch = [item for item in batch if self._begin(item)]
        if batch:
            self._predict(batch)

    def _begin(self, work: Work) -> bool:
        """Whether to do this work: not if its client has gone or its deadline has passed."""
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
        images = together([work.images for work in batch if work.images is not None])
        probabilities = self._attempt(
            batch, lambda: self._classify(model, images), each=self._predict
        )
        if probabilities is None:
            return
        begin, rows = 0, probabilities.numpy()
        for work in batch:
            work.future.set_result(torch.from_numpy(rows[begin : begin + work.cost]))
            begin += work.cost

    def _classify(self, model: ServedModel, images: Tensor) -> Tensor:
        """Probabilities float32 (n, K), in as many parts as the memory makes necessary.

        Each lack of memory halves what is tried at once, and many full parts that went well
        double it. Raises OutOfMemory when it does not suffice for a single image.
        """
        done: list[Tensor] = []
        while len(images):
            size = min(self._fitting, len(images))
            some = images if size == len(images) else images[:size]
            part = _without_memory(lambda: self._forward(model, some))  # noqa: B023
            if part is None:
                self._metrics.out_of_memory.inc()
                _empty_cache(model)
                if size == 1:
                    raise OutOfMemory("There is not enough memory for this now.")
                self._fitting, self._fitted = size // 2, 0
                logger.warning("out of memory with %d images; trying %d", size, self._fitting)
                continue
            done.append(part)
            images = images[size:]
            self._fitted += size == self._fitting < self._max_batch
            if self._fitted >= _FITTED_OFTEN:
                self._fitting, self._fitted = min(2 * self._fitting, self._max_batch), 0
        return done[0] if len(done) == 1 else torch.cat(done)

    def _forward(self, model: ServedModel, images: Tensor) -> Tensor:
        self._metrics.batch_images.observe(len(images))
        return model.classify(images)

    def _run(self, batch: list[Work]) -> None:
        """Run the function of the first work for all; after a failure each alone."""
        session = Session(self, batch)
        results = self._attempt(batch, lambda: _call(batch, session), each=self._run)
        if results is None:
            return
        for work, result, given_up in zip(batch, results, session.errors, strict=True):
            if given_up is not None or isinstance(result, Exception):
                work.future.set_exception(given_up or result)
            else:
                work.future.set_result(result)

    def _attempt(
        self, batch: list[Work], function: Callable[[], T], *, each: Callable[[list[Work]], None]
    ) -> T | None:
        """What `function` gives for the batch, or None: then it failed and the works know.

        Several that fail together are tried again, `each` alone: after the error is gone, and
        with it the frames that hold what there was on the device.
        """
        try:
            with self._on_device(batch):
                return function()
        except Exception as error:
            if _is_lost(error):
                _fail(batch)
                raise _DeviceLost from error
            if len(batch) == 1:
                batch[0].future.set_exception(_told(error))
                return None
            if not isinstance(error, ServiceError):
                logger.warning("work for %d requests failed; trying each alone", len(batch))
        except BaseException:
            _fail(batch)
            raise
        _empty_cache(batch[0].model)
        for work in batch:
            each([work])
        return None

    @contextmanager
    def _on_device(self, batch: list[Work]) -> Iterator[None]:
        """Count the time of `batch` as its own, not as that of the work it goes ahead of.

        Nor is it computed in that work's precision.
        """
        kind, cost = batch[0].kind, sum(work.cost for work in batch)
        outer = self._started, self._nested
        self._started, self._nested = time.perf_counter(), 0.0
        self._running += batch
        token = logs.request_id.set(",".join(dict.fromkeys(work.request_id for work in batch)))
        try:
            with torch.autocast(batch[0].model.device.type, enabled=False):
                yield
            self._queue.measure(kind, cost, self.own_seconds())
        finally:
            own, total = self.own_seconds(), time.perf_counter() - self._started
            self._metrics.device_seconds.labels(kind.label).inc(own)
            self._started, self._nested = outer[0], outer[1] + total
            del self._running[-len(batch) :]
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
            work.future.set_exception(_STOPPED)


def _without_memory(function: Callable[[], T]) -> T | None:
    """The result of `function`, None when memory ran out.

    The error ends here, and with it the frames that hold the tensors of what failed.
    """
    try:
        return function()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return None


def _is_lost(error: Exception) -> bool:
    """Whether every later call to the device will fail as this one, as after an illegal access."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def _empty_cache(model: ServedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def _told(error: Exception) -> Exception:
    """What to tell of an error: a lack of memory may be over when the client asks again."""
    if is_out_of_memory(error):
        return OutOfMemory("There is not enough memory for this now.")
    return error

"""Work waiting for the device: who goes first, and how much is let in."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any

from torch import Tensor

from app import logs
from app.errors import Cancelled, DeadlineExceeded, EngineStopped, Overloaded
from app.metrics import Metrics
from app.model import ServedModel

MAX_RETRY_SECONDS = 120
PATIENCE_SECONDS = 0.01  # longest wait for predictions on their way


class Kind(IntEnum):
    """Kinds of work; the lower goes ahead of the higher between the latter's steps."""

    PREDICT = 0
    ATTACK = 1
    EVALUATE = 2

    @property
    def label(self) -> str:
        """The name in metrics."""
        return self.name.lower()


@dataclass(eq=False, kw_only=True)
class Work:
    """Something for the device: images to classify together with others, or a function to run.

    `cost` counts forward passes, a backward pass as one; `deadline` is on the monotonic clock.
    Work of one kind and model that `share` the same, and not None, may run together: `function`
    of the first then takes the `item` of each, and gives back as many results.
    """

    kind: Kind
    model: ServedModel
    cost: int
    deadline: float | None = None
    images: Tensor | None = None  # uint8, or float32 in [0, 1], (n, 3, H, W)
    function: Callable[..., Any] | None = None
    share: Hashable = None
    item: Any = None
    future: Future[Any] = field(default_factory=Future)
    admitted: float = field(default_factory=time.monotonic)
    began: float | None = None  # when the device took it up
    abandoned: bool = False
    request_id: str = field(default_factory=logs.request_id.get)

    def check(self) -> None:
        """Raise Cancelled or DeadlineExceeded when nobody waits for the result any more."""
        if self.abandoned:
            raise Cancelled("The work was given up.")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise DeadlineExceeded("The work did not finish before its deadline.")

    def abandon(self) -> None:
        """Nobody waits for this: drop it from the queue, or stop it at its next step."""
        self.abandoned = True
        self.future.cancel()


class WorkQueue:
    """A bounded queue for each kind of work, for one consuming thread and any producers.

    Work is let in while it and what goes ahead of it cost at most `limit` forward passes, and could
    be done before its deadline at the pace measured. Evaluations are bounded by their number
    elsewhere.
    """

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit, self._metrics = limit, metrics
        self._changed = threading.Condition()
        self._queues: dict[Kind, deque[Work]] = {kind: deque() for kind in Kind}
        self._pending = dict.fromkeys(Kind, 0)  # admitted and not finished
        self._pace: dict[Kind, float] = {}  # seconds for one forward pass, measured
        self._closed: EngineStopped | None = None
        self._coming = 0

    def put(self, *works: Work) -> None:
        """Let work of one kind in, all or none.

        Raises Overloaded past the limit, EngineStopped after `close`.
        """
        with self._changed:
            if self._closed:
                raise self._closed
            kind = works[0].kind
            if kind is not Kind.EVALUATE and not self._fits(works):
                self._metrics.rejected.labels("queue").inc()
                retry_after = self._in_seconds(self._wait(kind))
                raise Overloaded("The queue is full.", retry_after=retry_after)
            for work in works:
                self._count(kind, work.cost)
                self._queues[kind].append(work)
            self._changed.notify()
        for work in works:
            work.future.add_done_callback(partial(self._leave, work))

    def take(self, *, below: Kind | None = None, admitted_before: float = math.inf) -> Work | None:
        """The next work, of a kind that goes ahead of `below`; None when there is none."""
        with self._changed:
            for kind in Kind:
                queue = self._queues[kind]
                if below is not None and kind >= below:
                    return None
                if queue and queue[0].admitted < admitted_before:
                    return queue.popleft()
        return None

    def take_fellows(self, first: Work, room: int) -> list[Work]:
        """Further work of the same kind and model, in order, costing at most `room`."""
        fellows: list[Work] = []
        with self._changed:
            queue = self._queues[first.kind]
            while queue and queue[0].model is first.model and queue[0].cost <= room:
                fellows.append(queue.popleft())
                room -= fellows[-1].cost
        return fellows

    def take_sharing(self, first: Work, most: int) -> list[Work]:
        """At most so many that share with `first`, in order, whatever waits between them."""
        with self._changed:
            queue = self._queues[first.kind]
            same = [w for w in queue if w.share == first.share and w.model is first.model]
            for work in same[:most]:
                queue.remove(work)
        return same[:most]

    def wait(self) -> bool:
        """Sleep until there is work; False once closed.

        A prediction then waits for others that are `coming`, as long as more images make a pass
        cheaper for each, but never long.
        """
        waiting = self._queues[Kind.PREDICT]
        with self._changed:
            self._changed.wait_for(lambda: self._closed or any(self._queues.values()))
            if waiting and self._coming:
                enough = waiting[0].model.enough
                self._changed.wait_for(
                    lambda: (
                        self._closed
                        or not self._coming
                        or sum(work.cost for work in waiting) >= enough
                    ),
                    PATIENCE_SECONDS,
                )
            return self._closed is None

    @contextmanager
    def coming(self) -> Iterator[None]:
        """While the block runs, a prediction is on its way: its body is there, and decoded."""
        with self._changed:
            self._coming += 1
        try:
            yield
        finally:
            with self._changed:
                self._coming -= 1
                if not self._coming:
                    self._changed.notify()

    def measure(self, kind: Kind, cost: int, seconds: float) -> None:
        """Remember how long `cost` forward passes took."""
        if not cost:  # a warm-up, slower than anything after it
            return
        pace = seconds / cost
        with self._changed:
            # By what it cost: under load large batches come, and a single image is no measure.
            keep = 0.97**cost
            self._pace[kind] = keep * self._pace.get(kind, pace) + (1 - keep) * pace

    def close(self, reason: EngineStopped) -> None:
        """Refuse further work and fail what waits."""
        with self._changed:
            self._closed = self._closed or reason
            waiting = [work for queue in self._queues.values() for work in queue]
            self._changed.notify_all()
        for work in waiting:
            if work.future.set_running_or_notify_cancel():
                work.future.set_exception(reason)

    def retry_after(self, kind: Kind, *, ahead: int = 0) -> int:
        """Whole seconds until what goes ahead of new work of that kind should be done.

        `ahead` counts forward passes of such work that was not yet let in.
        """
        with self._changed:
            return self._in_seconds(self._wait(kind) + ahead * self._pace.get(kind, 0.0))

    def _fits(self, works: tuple[Work, ...]) -> bool:
        kind, deadline = works[0].kind, works[0].deadline
        ahead = sum(self._pending[other] for other in Kind if other <= kind)
        late = deadline and time.monotonic() + self._wait(kind) > deadline
        return ahead + sum(work.cost for work in works) <= self._limit and not late

    def _wait(self, kind: Kind) -> float:
        return sum(self._pending[k] * self._pace.get(k, 0.0) for k in Kind if k <= kind)

    @staticmethod
    def _in_seconds(wait: float) -> int:
        return min(max(math.ceil(wait), 1), MAX_RETRY_SECONDS)

    def _leave(self, work: Work, _: Future[Any]) -> None:
        with self._changed:
            self._count(work.kind, -work.cost)
            if work in self._queues[work.kind]:  # given up before its turn
                self._queues[work.kind].remove(work)

    def _count(self, kind: Kind, cost: int) -> None:
        self._pending[kind] += cost
        self._metrics.queued.labels(kind.label).set(self._pending[kind])

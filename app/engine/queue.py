"""The queue of work for the device: its order, and admission."""

from __future__ import annotations

import math
import threading
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any

from torch import Tensor

from app import logs
from app.engine.served_model import ServedModel
from app.errors import Cancelled, DeadlineExceeded, EngineStopped, Overloaded
from app.metrics import Metrics

MAX_RETRY_SECONDS = 120
current_client: ContextVar[str] = ContextVar("current_client", default="")
"""The client of this task's request: see `app.http.auth.Caller`."""

DECODE_WAIT_SECONDS = 0.01  # longest wait for predictions that are being decoded


class Kind(IntEnum):
    """Kinds of work; a lower one runs between the steps of a higher one."""

    PREDICT = 0
    ATTACK = 1
    EVALUATE = 2

    @property
    def label(self) -> str:
        """The name in metrics."""
        return self.name.lower()


@dataclass(eq=False, kw_only=True)
class Work:
    """Work for the device: images to classify, or a function to run.

    `cost` counts forward plus backward passes; `deadline` is on the monotonic clock. Works of one
    kind and model with the same `share` (not None) may run as one batch: the `function` of the
    first then gets the `item` of each, and returns one result per item.
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
    began: float | None = None  # when the device started it
    abandoned: bool = False
    request_id: str = field(default_factory=logs.request_id.get)
    client: str = field(default_factory=current_client.get)
    # When its turn begins and ends in the queue's virtual time; see `WorkQueue`.
    turn_begins: float = 0.0
    turn_ends: float = 0.0
    leave_queue: Callable[[], None] | None = None

    def check(self) -> None:
        """Raise Cancelled or DeadlineExceeded once no client waits for the result."""
        if self.abandoned:
            raise Cancelled("The work was cancelled.")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise DeadlineExceeded("The work did not finish before its deadline.")

    def abandon(self) -> None:
        """Cancel the work: it leaves the queue, or stops at its next step."""
        self.abandoned = True
        self.future.cancel()
        if self.leave_queue is not None:
            self.leave_queue()


class WorkQueue:
    """A bounded queue for each kind of work, for one consumer thread and any number of producers.

    Work is admitted if, together with the work ahead of it, it costs at most `limit` forward
    passes, if its client's work costs at most `client_share` of that, and if it can start before
    its deadline at the measured rate. Evaluations are limited elsewhere, by their number.

    Clients share the device by cost, with self-clocked fair queueing (Golestani 1994). Each work
    has a turn in virtual time, which advances with the work that starts: its turn begins when the
    client's previous turn ends, and is as long as its cost. The work whose turn ends first runs
    first. So small work runs before other clients' large work, and no client gets ahead by more
    than the cost of one piece of work.
    """

    def __init__(self, limit: int, metrics: Metrics, *, client_share: float = 1.0) -> None:
        self._limit, self._metrics = limit, metrics
        self._client_limit = max(1, int(client_share * limit))
        self._time = dict.fromkeys(Kind, 0.0)  # virtual
        self._ends: dict[Kind, dict[str, float]] = {kind: {} for kind in Kind}  # by client
        self._held: dict[Kind, Counter[str]] = {kind: Counter() for kind in Kind}  # cost by client
        self._changed = threading.Condition()
        self._queues: dict[Kind, list[Work]] = {kind: [] for kind in Kind}  # by `turn_ends`
        self._pending = dict.fromkeys(Kind, 0)  # admitted and not finished
        self._pace: dict[Kind, float] = {}  # measured seconds per forward pass
        self.running: list[Work] = []  # the innermost last
        self._closed: str | None = None  # why it is closed
        self._decoding = 0

    def put(self, *works: Work) -> None:
        """Admit works of one kind, all or none.

        Raises Overloaded if a limit is reached, and EngineStopped after `close`.
        """
        with self._changed:
            if self._closed:
                # A new exception each time: each raise adds frames to its traceback, which keep the
                # images of their request in memory.
                raise EngineStopped(self._closed)
            kind = works[0].kind
            self._assign_turns(works)
            if kind is not Kind.EVALUATE and (reason := self._reason_against(works)):
                self._metrics.rejected.labels("queue").inc()
                retry_after = self._whole_seconds(self._wait(kind))
                raise Overloaded(reason, retry_after=retry_after)
            for work in works:
                self._count(work, work.cost)
                self._ends[kind][work.client] = work.turn_ends
                insort(self._queues[kind], work, key=_turn_ends)
                work.leave_queue = partial(self._leave, work)
            self._changed.notify()
        for work in works:
            work.future.add_done_callback(partial(self._leave, work))

    def take(self, *, below: Kind | None = None, admitted_before: float = math.inf) -> Work | None:
        """The next work of a kind more urgent than `below`; None if there is none."""
        with self._changed:
            for kind in Kind:
                if below is not None and kind >= below:
                    return None
                for place, work in enumerate(self._queues[kind]):
                    if work.admitted < admitted_before:
                        return self._pop(kind, place)
        return None

    def take_sooner(self, batch: Sequence[Work]) -> Work | None:
        """The next work of the kind of `batch`, if its turn ends before that of all of `batch`."""
        kind, latest = batch[0].kind, min(work.turn_ends for work in batch)
        with self._changed:
            queue = self._queues[kind]
            return self._pop(kind, 0) if queue and queue[0].turn_ends < latest else None

    def _pop(self, kind: Kind, place: int) -> Work:
        work = self._queues[kind].pop(place)
        self._time[kind] = max(self._time[kind], work.turn_begins)
        return work

    def take_compatible(self, first: Work, room: int) -> list[Work]:
        """Further work of the same kind and model, in order, costing at most `room`."""
        compatible: list[Work] = []
        with self._changed:
            queue = self._queues[first.kind]
            while queue and queue[0].model is first.model and queue[0].cost <= room:
                compatible.append(self._pop(first.kind, 0))
                room -= compatible[-1].cost
        return compatible

    def take_sharing(self, first: Work, most: int) -> list[Work]:
        """At most `most` works that can run with `first`, in order."""
        with self._changed:
            queue = self._queues[first.kind]
            # Out of turn: in the batch of the first they take nearly no extra time.
            same = [w for w in queue if w.share == first.share and w.model is first.model]
            for work in same[:most]:
                queue.remove(work)
        return same[:most]

    def wait(self) -> bool:
        """Wait until there is work; False once the queue is closed.

        If the work is a prediction, wait a little longer for others that are being decoded, as long
        as a larger batch is cheaper per image.
        """
        waiting = self._queues[Kind.PREDICT]
        with self._changed:
            self._changed.wait_for(lambda: self._closed or any(self._queues.values()))
            if waiting and self._decoding:
                enough = waiting[0].model.efficient_batch
                self._changed.wait_for(
                    lambda: (
                        self._closed
                        or not self._decoding
                        or sum(work.cost for work in waiting) >= enough
                    ),
                    DECODE_WAIT_SECONDS,
                )
            return self._closed is None

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Mark that a prediction is being decoded while the block runs."""
        with self._changed:
            self._decoding += 1
        try:
            yield
        finally:
            with self._changed:
                self._decoding -= 1
                if not self._decoding:
                    self._changed.notify()

    def measure(self, kind: Kind, cost: int, seconds: float) -> None:
        """Update the measured rate: `cost` forward passes took `seconds`."""
        if not cost:  # a warm-up, which is slower than later work
            return
        pace = seconds / cost
        with self._changed:
            # Weighted by cost: batches are large under load, so a single image says little.
            keep = 0.97**cost
            self._pace[kind] = keep * self._pace.get(kind, pace) + (1 - keep) * pace

    def close(self, reason: str) -> None:
        """Refuse further work, and fail the queued work, with an EngineStopped of that text."""
        with self._changed:
            self._closed = self._closed or reason
            waiting = [work for queue in self._queues.values() for work in queue]
            for queue in self._queues.values():
                queue.clear()  # so that the device thread does not start it
            self._changed.notify_all()
        for work in waiting:
            if work.future.set_running_or_notify_cancel():
                work.future.set_exception(EngineStopped(reason))

    def retry_after(self, kind: Kind, *, ahead: int = 0) -> int:
        """Whole seconds until the work ahead of new work of that kind should be done.

        `ahead` counts the forward passes of such work that is not in this queue yet.
        """
        with self._changed:
            return self._whole_seconds(self._wait(kind) + ahead * self._pace.get(kind, 0.0))

    def _assign_turns(self, works: tuple[Work, ...]) -> None:
        kind, client = works[0].kind, works[0].client
        begins = max(self._time[kind], self._ends[kind].get(client, 0.0))
        for work in works:
            work.turn_begins, begins = begins, begins + work.cost
            work.turn_ends = begins

    def _reason_against(self, works: tuple[Work, ...]) -> str | None:
        """The reason not to admit `works`, or None."""
        kind, deadline = works[0].kind, works[0].deadline
        cost = sum(work.cost for work in works)
        if self._held[kind][works[0].client] + cost > self._client_limit:
            return "Your share of the queue is full."
        if sum(self._pending[other] for other in Kind if other <= kind) + cost > self._limit:
            return "The queue is full."
        if deadline and time.monotonic() + self._wait(kind, works[0]) > deadline:
            return "The queue is too long for the deadline."
        return None

    def _wait(self, kind: Kind, work: Work | None = None) -> float:
        """Seconds until new work of that kind begins, or until `work` does if given."""
        pending = dict(self._pending)
        if work is not None and len(self._held[kind]) > (work.client in self._held[kind]):
            later = [w for w in self._queues[kind] if w.turn_ends > work.turn_ends]
            pending[kind] -= sum(w.cost for w in later)
            if kind is Kind.ATTACK:  # a running attack yields between its steps
                pending[kind] -= sum(w.cost for w in self.running if w.turn_ends > work.turn_ends)
        return sum(pending[k] * self._pace.get(k, 0.0) for k in Kind if k <= kind)

    @staticmethod
    def _whole_seconds(wait: float) -> int:
        return min(max(math.ceil(wait), 1), MAX_RETRY_SECONDS)

    def _leave(self, work: Work, _: Future[Any] | None = None) -> None:
        """Stop counting the cost of work that has ended or is cancelled; later calls do nothing."""
        kind = work.kind
        with self._changed:
            if work.leave_queue is None:
                return
            work.leave_queue = None
            self._count(work, -work.cost)
            if work in self._queues[kind]:  # cancelled while queued
                self._queues[kind].remove(work)
                if self._ends[kind].get(work.client) == work.turn_ends:
                    self._ends[kind][work.client] = work.turn_begins
            if not self._held[kind]:  # no work is left: restart virtual time
                self._time[kind] = 0.0
                self._ends[kind].clear()

    def _count(self, work: Work, cost: int) -> None:
        kind, held = work.kind, self._held[work.kind]
        self._pending[kind] += cost
        self._metrics.queued.labels(kind.label).set(self._pending[kind])
        held[work.client] += cost
        if cost < 0 and held[work.client] <= 0:
            del held[work.client]


def _turn_ends(work: Work) -> float:
    return work.turn_ends

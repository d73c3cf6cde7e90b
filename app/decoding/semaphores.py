"""Semaphores for the event loop: slots shared fairly by clients, and a budget of bytes."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

HALF_LIFE_SECONDS = 10.0  # the recent use of a client halves in this time
_MAX_CLIENTS = 1000  # above it, clients with negligible recent use are forgotten
_NEGLIGIBLE_SECONDS = 0.001


class FairSemaphore:
    """A semaphore with `count` slots, of which one client holds at most `per_client`.

    A free slot goes to the waiting client that holds the fewest slots; among equals, to the one
    that used slots for the least time lately. Each client's requests are served in order.
    """

    def __init__(self, count: int, *, per_client: int) -> None:
        self._free, self._per_client = count, per_client
        self._held = Counter[Hashable]()
        self._used: dict[Hashable, tuple[float, float]] = {}  # recent seconds, as of which time
        self._waiting: dict[Hashable, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def hold(self, client: Hashable) -> AsyncIterator[None]:
        """Wait for a slot, and hold it while the block runs."""
        await self._acquire(client)
        begun = time.monotonic()
        try:
            yield
        finally:
            self._record_use(client, time.monotonic() - begun)
            self._release(client)

    async def _acquire(self, client: Hashable) -> None:
        if self._free and not self._waiting and self._held[client] < self._per_client:
            self._grant(client)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        self._hand_out()
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():  # it got a slot at the same moment
                self._release(client)
            else:
                self._stop_waiting(client, turn)
            raise

    def _grant(self, client: Hashable) -> None:
        self._free -= 1
        self._held[client] += 1

    def _release(self, client: Hashable) -> None:
        self._free += 1
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]
        self._hand_out()

    def _record_use(self, client: Hashable, seconds: float) -> None:
        now = time.monotonic()
        self._used[client] = (self._recent_use(client, now) + seconds, now)
        if len(self._used) > _MAX_CLIENTS:
            recent = {who: self._recent_use(who, now) for who in self._used}
            self._used = {who: (n, now) for who, n in recent.items() if n > _NEGLIGIBLE_SECONDS}

    def _recent_use(self, client: Hashable, now: float) -> float:
        """Seconds that the client has held slots, with older ones weighted less."""
        seconds, then = self._used.get(client, (0.0, now))
        return seconds * math.exp2((then - now) / HALF_LIFE_SECONDS)

    def _stop_waiting(self, client: Hashable, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(client, deque())
        if turn not in turns:  # already removed by `_hand_out`
            return
        turns.remove(turn)
        if not turns:
            del self._waiting[client]

    def _hand_out(self) -> None:
        while self._free and self._waiting:
            able = [who for who in self._waiting if self._held[who] < self._per_client]
            if not able:
                return
            now = time.monotonic()
            client = min(able, key=lambda who: (self._held[who], self._recent_use(who, now)))
            turn = self._waiting[client][0]
            self._stop_waiting(client, turn)
            if not turn.done():  # else it was cancelled; its task has not run since
                self._grant(client)
                turn.set_result(None)


class Budget:
    """A semaphore that counts bytes; waiters are served in order."""

    def __init__(self, total: int) -> None:
        self.total = self._left = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, amount: int) -> AsyncIterator[None]:
        """Wait until `amount` bytes are free, and hold them while the block runs.

        `amount` is at most the total.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, turn))
        self._hand_out()
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self._left += amount
            self._waiting = deque(item for item in self._waiting if item[1] is not turn)
            self._hand_out()
            raise
        try:
            yield
        finally:
            self._left += amount
            self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting:
            amount, turn = self._waiting[0]
            if not turn.done():
                if amount > self._left:
                    return
                self._left -= amount
                turn.set_result(None)
            self._waiting.popleft()

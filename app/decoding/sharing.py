"""Fair semaphores: slots per client, and a budget of bytes."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

HALF_LIFE_SECONDS = 10.0  # of the weight of the time that a client held a slot
_MAX_USED = 1000  # remembered clients, before those with negligible use are dropped
_NO_ACCOUNT_SECONDS = 0.001


class Places:
    """A semaphore of which one client holds at most `per_client` slots.

    Among waiting clients, the one with the fewest slots goes first, then the one with the least
    recent use; each client's requests are in order.
    """

    def __init__(self, count: int, *, per_client: int) -> None:
        self._free, self._per_client = count, per_client
        self._held = Counter[Hashable]()
        self._used: dict[Hashable, tuple[float, float]] = {}  # seconds, and as of when
        self._waiting: dict[Hashable, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def hold(self, client: Hashable) -> AsyncIterator[None]:
        """Wait for a slot, and hold it while the block runs."""
        await self._take(client)
        begun = time.monotonic()
        try:
            yield
        finally:
            self._count(client, time.monotonic() - begun)
            self._give_back(client)

    async def _take(self, client: Hashable) -> None:
        if self._free and not self._waiting and self._held[client] < self._per_client:
            self._serve(client)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        self._hand_out()
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():  # it got a slot at the same moment
                self._give_back(client)
            else:
                self._leave(client, turn)
            raise

    def _serve(self, client: Hashable) -> None:
        self._free -= 1
        self._held[client] += 1

    def _give_back(self, client: Hashable) -> None:
        self._free += 1
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]
        self._hand_out()

    def _count(self, client: Hashable, seconds: float) -> None:
        now = time.monotonic()
        self._used[client] = (self._lately(client, now) + seconds, now)
        if len(self._used) > _MAX_USED:
            recent = {who: self._lately(who, now) for who in self._used}
            self._used = {who: (n, now) for who, n in recent.items() if n > _NO_ACCOUNT_SECONDS}

    def _lately(self, client: Hashable, now: float) -> float:
        """Seconds that the client has held slots, with older ones weighted less."""
        seconds, then = self._used.get(client, (0.0, now))
        return seconds * math.exp2((then - now) / HALF_LIFE_SECONDS)

    def _leave(self, client: Hashable, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(client, deque())
        if turn not in turns:  # it was removed
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
            client = min(able, key=lambda who: (self._held[who], self._lately(who, now)))
            turn = self._waiting[client][0]
            self._leave(client, turn)
            if not turn.done():  # else it was cancelled, and is about to say so
                self._serve(client)
                turn.set_result(None)


class Budget:
    """A semaphore counted in bytes; waiters are served in order."""

    def __init__(self, total: int) -> None:
        self.total = self._left = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, amount: int) -> AsyncIterator[None]:
        """Wait until `amount`, at most the total, is free, and hold it while the block runs."""
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

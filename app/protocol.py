"""Connections that don't wait for ever for a request."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def patient_for(seconds: float) -> Any:
    """What `uvicorn.Config(http=...)` takes: connections patient for so long."""
    return partial(Connection, patience=seconds)


class Connection(H11Protocol):
    """A connection that is closed when a request's head takes longer than `patience` seconds.

    uvicorn itself waits without end for the first request, and as long as each byte is followed by
    another one. Bodies are timed by the middleware, which can answer; what is left of one after the
    answer counts as the head of what comes next. A client that takes none of its answer for so long
    is given up too.
    """

    def __init__(self, *arguments: Any, patience: float, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._patience = patience
        self._timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._disarm_reader()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._disarm()
        if self._idle and self._timer is None:
            self._arm()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._disarm_reader()
        self._reader_timer = self.loop.call_later(self._patience, self.transport.abort)

    def resume_writing(self) -> None:
        self._disarm_reader()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP where no answer has begun, and tell the request it was part of."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()
        if self.cycle is not None:  # else it would answer once more
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _arm(self) -> None:
        self._timer = self.loop.call_later(self._patience, self._give_up)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _disarm_reader(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self._idle and not self.transport.is_closing():
            self.transport.close()

"""Connections that don't wait for ever for a request, and take no head without end."""

from __future__ import annotations

import asyncio
import uuid
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.middleware import HEADERS
from app.problem import problem

MAX_HEAD_BYTES = 64 * 2**10


def patient_for(seconds: float) -> Any:
    """What `uvicorn.Config(http=...)` takes: connections patient for so long."""
    return partial(Connection, patience=seconds)


class Connection(HttpToolsProtocol):
    """A connection that is closed when a request's head takes longer than `patience` seconds.

    uvicorn itself waits without end for the first request, and as long as each byte is followed by
    another one. Bodies are timed by the middleware, which can answer; what is left of one after the
    answer counts as the head of what comes next. A client that takes none of its answer for so long
    is given up too. A head of over 64 KiB is refused, what is no HTTP gets a problem document, and
    a request that would rather go on in another protocol is taken as it is.
    """

    def __init__(self, *arguments: Any, patience: float, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._patience = patience
        self._timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None
        self._in_head, self._head_bytes = False, 0
        self._broken = False  # what came was no HTTP; nothing after it is read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._disarm_reader()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._broken:
            return
        before = self.cycle
        self._unset_keepalive_if_required()
        self._parse(data)
        if self.cycle is not before:
            self._disarm()
        self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
        if self._head_bytes > MAX_HEAD_BYTES and not self._broken:
            self.send_400_response(f"The head of the request is over {MAX_HEAD_BYTES} bytes.")
        if self._idle and self._timer is None:
            self._arm()

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The parser took the body for the other protocol's.
            head = self._head_without_upgrade()
            self.parser = httptools.HttpRequestParser(self)
            self._parse(head + data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("What was sent is not HTTP.")

    def _head_without_upgrade(self) -> bytes:
        lines = [b"%s %s HTTP/1.1" % (self.parser.get_method(), self.url)]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(token for token in tokens if token.lower() != b"upgrade")
            if name != b"upgrade":
                lines.append(b"%s: %s" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # what stands after a body in chunks says nothing about the request
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts != 1 and self.parser.get_http_version() == "1.1":
            raise httptools.HttpParserError("expected one header Host")
        if self.parser.get_method() == b"CONNECT":
            raise httptools.HttpParserError("expected a method other than CONNECT")
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._disarm_reader()
        self._reader_timer = self.loop.call_later(self._patience, self.transport.abort)

    def resume_writing(self) -> None:
        self._disarm_reader()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, after the answers to what came before it.

        A request whose body it was part of is told that its client has gone; one whose answer has
        begun can't be answered otherwise any more.
        """
        self._broken = True
        cycle = self.cycle
        if not self._idle and not cycle.more_body:
            cycle.keep_alive = False
            return
        if self._idle or not cycle.response_started:
            self.transport.write(_bad_request(msg))
        self.transport.close()
        if cycle is not None:  # else it would answer once more
            cycle.disconnected = True
            cycle.message_event.set()

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


def _bad_request(detail: str) -> bytes:
    request_id = uuid.uuid4().hex
    more = {"X-Request-ID": request_id, "Cache-Control": "no-store", "Connection": "close"}
    answer = problem(request_id, 400, "Bad request", detail, headers={**HEADERS, **more})
    lines = [b"HTTP/1.1 400 Bad Request", *(b"%s: %s" % header for header in answer.raw_headers)]
    return b"\r\n".join([*lines, b"", bytes(answer.body)])

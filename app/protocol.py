"""Connections that don't wait for ever for a request, and take no head without end."""

from __future__ import annotations

import asyncio
import logging
import uuid
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.middleware import HEADERS
from app.problem import problem

MAX_HEAD_BYTES = 64 * 2**10
SLICE_BYTES = 16 * 2**10  # are parsed at once: by so many a head may be longer
MAX_PIPELINED = 16  # requests of one connection that wait for the answers to those before them

logger = logging.getLogger(__name__)


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
        self._running: RequestResponseCycle | None = None  # the request that is answered now
        # Where in a request the parser stands. What follows the chunks of a body is like a head.
        self._in_head = self._in_body = self._in_trailer = False
        self._head_bytes = 0
        self._broken = False  # what came was no HTTP; nothing after it is read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._disarm_reader()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        self._unset_keepalive_if_required()
        for begin in range(0, len(data), SLICE_BYTES):
            if self._broken:
                return
            self._take(data[begin : begin + SLICE_BYTES])
        if self.cycle is not before:
            self._disarm()
        if self._idle and self._timer is None:
            self._arm()

    def _take(self, data: bytes) -> None:
        """Parse some of what came, and count what belongs to a head that goes on."""
        self._parse(data)
        self._head_bytes = self._head_bytes + len(data) if self._in_head or self._in_trailer else 0
        if self._head_bytes > MAX_HEAD_BYTES and not self._broken:
            self.send_400_response(f"The head of the request is over {MAX_HEAD_BYTES} bytes.")

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # The parser took the body for the other protocol's.
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                continue
            except httptools.HttpParserError:
                self.send_400_response("What was sent is not HTTP.")
            return

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(token for token in tokens if token.lower() != b"upgrade")
            if name != b"upgrade":
                lines.append(b"%s: %s" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

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
        if len(self.pipeline) >= MAX_PIPELINED:
            raise httptools.HttpParserError("expected fewer requests before their answers")
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            self._in_body = True
            if not self.pipeline:
                self._running = self.cycle

    def on_chunk_header(self) -> None:
        self._in_trailer = True  # unless something of the chunk follows

    def on_chunk_complete(self) -> None:
        self._in_trailer = False

    def on_body(self, body: bytes) -> None:
        self._in_trailer = False
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            self._in_body = self._in_trailer = False
            super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._running = self.pipeline[-1][0]
        super().on_response_complete()

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
        if self._in_body and self.pipeline and cycle is self.pipeline[0][0]:
            self.pipeline.popleft()  # it waited for the answers to others, and gets none
            assert self._running is not None
            cycle = self.cycle = self.pipeline[0][0] if self.pipeline else self._running
            cycle.keep_alive = False
        elif self._in_body:
            if not cycle.response_started:
                self.transport.write(_bad_request(msg))
            self.transport.close()
            cycle.disconnected = True  # else it would answer once more
            cycle.message_event.set()
        elif not self._idle:
            cycle.keep_alive = False
        else:
            self.transport.write(_bad_request(msg))
            self.transport.close()

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
    logger.info("400 [%s] %s", request_id, detail)
    more = {"X-Request-ID": request_id, "Cache-Control": "no-store", "Connection": "close"}
    answer = problem(request_id, 400, "Bad request", detail, headers={**HEADERS, **more})
    lines = [b"HTTP/1.1 400 Bad Request", *(b"%s: %s" % header for header in answer.raw_headers)]
    return b"\r\n".join([*lines, b"", bytes(answer.body)])

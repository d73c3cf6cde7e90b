"""HTTP connections with time and size limits on request heads."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import Container
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.http.doors import client_address
from app.http.middleware import HEADERS
from app.http.problem import problem

MAX_HEAD_BYTES = 64 * 2**10
SLICE_BYTES = 16 * 2**10  # parsed at a time; a head may exceed its limit by this much
MAX_PIPELINED = 16  # pipelined requests waiting on one connection
# What stands around the chunks of a body: sizes, extensions and line ends.
MAX_FRAMING_BYTES = 64 * 2**10
FRAMING_SHARE = 16  # and beyond that a sixteenth of the content: chunks of 80 bytes and more

logger = logging.getLogger(__name__)


class OpenConnections:
    """Counts the open connections; one address has at most `share` of `most`.

    Addresses of `proxies`, which speak for many clients, may have them all.
    """

    def __init__(self, most: int, *, share: float, proxies: Container[str] = ()) -> None:
        self._most, self._proxies = most, proxies
        self._each = max(1, int(share * most))
        self._open, self._count = Counter[str](), 0

    def admit(self, address: str) -> bool:
        """Whether one more of that address is admitted; if so, `leave` it when it is closed."""
        each = self._most if not address or address in self._proxies else self._each
        if self._count >= self._most or self._open[address] >= each:
            return False
        self._open[address] += 1
        self._count += 1
        return True

    def leave(self, address: str) -> None:
        """A connection of that address is closed."""
        self._open[address] -= 1
        self._count -= 1
        if not self._open[address]:
            del self._open[address]


def connection_class(seconds: float, connections: OpenConnections | None = None) -> Any:
    """What `uvicorn.Config(http=...)` takes: connections that wait at most that long."""
    return partial(
        Connection, patience=seconds, connections=connections or OpenConnections(2**16, share=1.0)
    )


class Connection(HttpToolsProtocol):
    """A connection that is closed when a request's head takes longer than `patience` seconds.

    One beyond what its address may have is closed at once.
    uvicorn itself waits forever for the first request and for slow heads. Bodies are timed by the
    middleware, which can answer; what remains of one after the answer counts as the next head. A
    client that reads none of its answer for that long is disconnected too. A head of over 64 KiB
    is refused, and so are chunks that take much more than their content: each costs the event
    loop as much as a kilobyte. Invalid HTTP gets a problem document. A request to upgrade the
    protocol is answered without upgrading.
    """

    def __init__(
        self, *arguments: Any, patience: float, connections: OpenConnections, **named: Any
    ) -> None:
        super().__init__(*arguments, **named)
        self._connections, self._address = connections, ""
        self._admitted = False
        self._patience = patience
        self._timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None  # the request being answered
        # The parser's position in a request. Trailers after a chunked body are limited like a head.
        self._in_head = self._in_body = self._in_trailer = False
        self._head_bytes = 0
        self._body_bytes = self._framing_bytes = 0  # without and around chunks
        self._broken = False  # invalid HTTP was received; nothing after it is read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.client:  # none for a Unix socket
            self._address = client_address({"client": self.client})
        self._admitted = self._connections.admit(self._address)
        if self._admitted:
            self._arm()
        else:
            self._broken = True
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._disarm_reader()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self.pipeline.clear()
        if self._admitted:
            self._connections.leave(self._address)
            self._admitted = False
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
        """Parse a slice of the received bytes, and count those of an unfinished head."""
        in_body, body_bytes, request = self._in_body, self._body_bytes, self.cycle
        self._parse(data)
        if in_body and self._in_body and self.cycle is request:
            self._framing_bytes += len(data) - (self._body_bytes - body_bytes)
        if self._framing_bytes > MAX_FRAMING_BYTES + self._body_bytes // FRAMING_SHARE:
            self._refuse(413, "Too large", "expected a body in fewer chunks, or larger ones")
        self._head_bytes = self._head_bytes + len(data) if self._in_head or self._in_trailer else 0
        if self._head_bytes > MAX_HEAD_BYTES and not self._broken:
            self.send_400_response(f"The request head exceeds {MAX_HEAD_BYTES} bytes.")

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # The parser treated the body as the other protocol's.
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
        self._body_bytes = self._framing_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # what stands after a body in chunks says nothing about the request
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts != 1 and self.parser.get_http_version() == "1.1":
            raise httptools.HttpParserError("expected one header Host")
        if not self.url.startswith((b"/", b"*")) and self._host() != urlsplit(self.url).netloc:
            raise httptools.HttpParserError("expected the host of the address in the header Host")
        if self.parser.get_method() == b"CONNECT":
            raise httptools.HttpParserError("expected a method other than CONNECT")
        if len(self.pipeline) >= MAX_PIPELINED:
            raise httptools.HttpParserError("expected fewer requests before their answers")
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            self._in_body = True
            if not self.pipeline:
                self._running = self.cycle

    def _host(self) -> bytes | None:
        return next((value for name, value in self.headers if name == b"host"), None)

    def on_chunk_header(self) -> None:
        self._in_trailer = True  # unless something of the chunk follows

    def on_chunk_complete(self) -> None:
        self._in_trailer = False

    def on_body(self, body: bytes) -> None:
        self._in_trailer = False
        self._body_bytes += len(body)
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
        """Answer invalid HTTP."""
        self._refuse(400, "Bad request", msg)

    def _refuse(self, status: int, title: str, detail: str) -> None:
        """Refuse what was received, after answering the requests before it, and read no more.

        If it was part of a body, that request sees its client disconnect. A response that has
        started can't be changed any more.
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
                self.transport.write(_refusal(status, title, detail))
            self.transport.close()
            cycle.disconnected = True  # else it would answer once more
            cycle.message_event.set()
        elif not self._idle:
            cycle.keep_alive = False
        else:
            self.transport.write(_refusal(status, title, detail))
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


def _refusal(status: int, title: str, detail: str) -> bytes:
    request_id = uuid.uuid4().hex
    logger.info("%d [%s] %s", status, request_id, detail)
    more = {"X-Request-ID": request_id, "Cache-Control": "no-store", "Connection": "close"}
    answer = problem(request_id, status, title, detail, headers={**HEADERS, **more})
    reason = HTTPStatus(status).phrase.encode()
    lines = [b"HTTP/1.1 %d %s" % (status, reason)]
    lines += [b"%s: %s" % header for header in answer.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(answer.body)])

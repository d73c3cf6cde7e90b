"""HTTP connections with limits on their number, and on the time and size of request heads."""

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

from app.http.middleware import HEADERS
from app.http.problem import problem
from app.http.trust import client_address

MAX_HEAD_BYTES = 64 * 2**10
SLICE_BYTES = 16 * 2**10  # parsed at a time; a head may exceed its limit by this much
MAX_PIPELINED = 16  # pipelined requests waiting on one connection
# A chunked body may have this many bytes of framing (chunk sizes, extensions and line ends), plus
# a sixteenth of its content, which suffices for chunks of at least 80 bytes.
MAX_FRAMING_BYTES = 64 * 2**10
FRAMING_SHARE = 16

logger = logging.getLogger(__name__)


class OpenConnections:
    """Limits open connections to `most` in all, and one address to a `share` of them.

    Addresses in `proxies`, which stand for many clients, have no limit of their own.
    """

    def __init__(self, most: int, *, share: float, proxies: Container[str] = ()) -> None:
        self._most, self._proxies = most, proxies
        self._most_per_address = max(1, int(share * most))
        self._open, self._count = Counter[str](), 0

    def admit(self, address: str) -> bool:
        """Count one more connection of `address`; False, without counting, if a limit is reached.

        Call `leave` when an admitted connection is closed.
        """
        limited = address and address not in self._proxies
        most = self._most_per_address if limited else self._most
        if self._count >= self._most or self._open[address] >= most:
            return False
        self._open[address] += 1
        self._count += 1
        return True

    def leave(self, address: str) -> None:
        """Count one connection of `address` less."""
        self._open[address] -= 1
        self._count -= 1
        if not self._open[address]:
            del self._open[address]


def connection_class(seconds: float, connections: OpenConnections | None = None) -> Any:
    """A protocol factory for `uvicorn.Config(http=...)`, with a timeout of `seconds`."""
    return partial(
        Connection, timeout=seconds, connections=connections or OpenConnections(2**16, share=1.0)
    )


class Connection(HttpToolsProtocol):
    """uvicorn's HTTP connection, with limits that protect the service from slow or hostile clients.

    - The connection is closed at once if `connections` does not admit it.
    - It is closed if a request's head takes longer than `timeout` seconds; uvicorn itself waits
      forever for the first request and for slow heads. The middleware limits the time of a body,
      because it can send an error response. Body bytes after the response count as the next head.
    - It is closed if the client does not read the response for `timeout` seconds, also when it
      is to be closed after that response: closing alone waits for the client forever.
    - A head of over 64 KiB is refused, and so is a chunked body whose framing is much larger than
      its content: each chunk costs the event loop as much time as a kilobyte.
    - Invalid HTTP gets a problem document. A request to upgrade the protocol is handled as if it
      had not asked for that.
    """

    def __init__(
        self, *arguments: Any, timeout: float, connections: OpenConnections, **named: Any
    ) -> None:
        super().__init__(*arguments, **named)
        self._connections, self._address = connections, ""
        self._admitted = False
        self._timeout = timeout
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None  # the request whose response is next
        # The parser's position in a request. Trailers after a chunked body are limited like a head.
        self._in_head = self._in_body = self._in_trailer = False
        self._head_bytes = 0
        self._body_bytes = self._framing_bytes = 0  # content and framing of the current body
        self._refused = False  # a request was refused; nothing after it is read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.client:  # none for a Unix socket
            self._address = client_address({"client": self.client})
        self._admitted = self._connections.admit(self._address)
        if self._admitted:
            self._start_head_timer()
        else:
            self._refused = True
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
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
            if self._refused:
                return
            self._parse_within_limits(data[begin : begin + SLICE_BYTES])
        if self.cycle is not before:
            self._stop_head_timer()
        if self._idle and self._head_timer is None:
            self._start_head_timer()

    def _parse_within_limits(self, data: bytes) -> None:
        """Parse a slice of the received bytes; refuse a head or framing that is too long."""
        in_body, body_bytes, request = self._in_body, self._body_bytes, self.cycle
        self._parse(data)
        if in_body and self._in_body and self.cycle is request:
            self._framing_bytes += len(data) - (self._body_bytes - body_bytes)
        if self._framing_bytes > MAX_FRAMING_BYTES + self._body_bytes // FRAMING_SHARE:
            self._refuse(413, "Too large", "expected a body in fewer chunks, or larger ones")
        self._head_bytes = self._head_bytes + len(data) if self._in_head or self._in_trailer else 0
        if self._head_bytes > MAX_HEAD_BYTES and not self._refused:
            self.send_400_response(f"The request head exceeds {MAX_HEAD_BYTES} bytes.")

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # The parser stops after the head, as if the other protocol followed. Parse the
                # request again without the upgrade, so that its body is read as one.
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                continue
            except httptools.HttpParserError:
                self.send_400_response("The request is not valid HTTP.")
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
        if self._in_head:  # trailers are ignored
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts != 1 and self.parser.get_http_version() == "1.1":
            raise httptools.HttpParserError("expected one Host header")
        if not self.url.startswith((b"/", b"*")) and self._host() != urlsplit(self.url).netloc:
            raise httptools.HttpParserError("expected the host of the URL in the Host header")
        if self.parser.get_method() == b"CONNECT":
            raise httptools.HttpParserError("expected a method other than CONNECT")
        if len(self.pipeline) >= MAX_PIPELINED:
            raise httptools.HttpParserError("expected fewer pipelined requests")
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            self._in_body = True
            if not self.pipeline:
                self._running = self.cycle

    def _host(self) -> bytes | None:
        return next((value for name, value in self.headers if name == b"host"), None)

    def on_chunk_header(self) -> None:
        self._in_trailer = True  # unless the chunk has content

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
        if self.transport.is_closing():
            self._close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_write_timer()

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()
        if self.transport.is_closing():
            self._close()

    def timeout_keep_alive_handler(self) -> None:
        """Close the idle connection."""
        self._close()

    def _close(self) -> None:
        """Close the connection once the client has read everything, or takes too long."""
        self.transport.close()
        if self.transport.get_write_buffer_size() and self._write_timer is None:
            self._start_write_timer()

    def send_400_response(self, msg: str) -> None:
        """Refuse invalid HTTP with a problem document."""
        self._refuse(400, "Bad request", msg)

    def _refuse(self, status: int, title: str, detail: str) -> None:
        """Refuse the request being received and read no more; close after pending responses.

        If its body is being received, its handler sees the client disconnect. It gets the error
        response unless its response has started, or earlier requests still wait for theirs.
        """
        self._refused = True
        cycle = self.cycle
        if self._in_body and self.pipeline and cycle is self.pipeline[0][0]:
            self.pipeline.popleft()  # it waits for earlier responses, and gets none itself
            assert self._running is not None
            cycle = self.cycle = self.pipeline[0][0] if self.pipeline else self._running
            cycle.keep_alive = False
        elif self._in_body:
            if not cycle.response_started:
                self.transport.write(_refusal(status, title, detail))
            self._close()
            cycle.disconnected = True  # so that its handler sends no second response
            cycle.message_event.set()
        elif not self._idle:
            cycle.keep_alive = False
        else:
            self.transport.write(_refusal(status, title, detail))
            self._close()

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self._timeout, self._close_if_idle)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _start_write_timer(self) -> None:
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(self._timeout, self.transport.abort)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _close_if_idle(self) -> None:
        self._head_timer = None
        if self._idle:
            self._close()


def _refusal(status: int, title: str, detail: str) -> bytes:
    """The bytes of an error response."""
    request_id = uuid.uuid4().hex
    logger.info("%d [%s] %s", status, request_id, detail)
    more = {"X-Request-ID": request_id, "Cache-Control": "no-store", "Connection": "close"}
    response = problem(request_id, status, title, detail, headers={**HEADERS, **more})
    reason = HTTPStatus(status).phrase.encode()
    lines = [b"HTTP/1.1 %d %s" % (status, reason)]
    lines += [b"%s: %s" % header for header in response.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])

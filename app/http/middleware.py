"""Middleware: request ids, logs, metrics and response headers; limits on requests and bodies."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
import time
from functools import lru_cache
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import logs
from app.engine.queue import Kind, current_client
from app.errors import (
    BadRequest,
    BodyTooLarge,
    NotReady,
    Overloaded,
    ServiceError,
    SlowBody,
    Unauthorized,
    UnknownHost,
)
from app.http.auth import Keys
from app.http.compression import Inflater
from app.http.headers import headers_of
from app.http.paths import PROBE_PATHS, route_path
from app.http.problem import error_response
from app.http.trust import check_host, check_origin
from app.service import Service

logger = logging.getLogger(__name__)

DISCARD_SECONDS = 1.0  # how long the rest of a refused body is read before the connection closes
# A refused body of at most this size is read completely, so that the connection stays usable.
SMALL_BODY = 2**20
# Responses are data: never execute, frame, sniff or cache them. HTML pages set their own headers.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
_RELATIVE = re.compile(r"^[a-z]+://[^/]*")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestMiddleware:
    """Gives each request an id, logs and measures it, and turns uncaught errors into a 500."""

    def __init__(self, app: ASGIApp, *, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = time.monotonic()
        given = headers_of(scope).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        scope.setdefault("state", {}).update(request_id=request_id, arrived=arrived)
        token = logs.request_id.set(request_id)
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(message, scope["state"])
            await send(message)

        service = self._service
        with service.in_flight.track(scope["method"]), service.tracing.request(scope) as traced:
            try:
                if scope["method"] == "HEAD":
                    await answer_head(self._app, scope, receive, send_with_headers)
                else:
                    await self._app(scope, receive, send_with_headers)
            except asyncio.CancelledError:
                if not service.in_flight.aborted:
                    raise
                if not status:
                    error = NotReady("The service is shutting down.")
                    await error_response(scope, error)(scope, receive, send_with_headers)
            except Exception as error:
                logger.exception("the request failed")
                if not status:
                    await error_response(scope, error)(scope, receive, send_with_headers)
            finally:
                self._record(scope, status, time.monotonic() - arrived)
                traced(_route_of(scope), status)
                logs.request_id.reset(token)

    def _add_headers(self, message: Message, state: dict[str, Any]) -> None:
        if message["status"] in (307, 308):  # a relative redirect works behind any proxy
            headers = MutableHeaders(scope=message)
            headers["Location"] = _RELATIVE.sub("", headers.get("Location", "/"))
        raw = [*message["headers"], (b"x-request-id", state["request_id"].encode())]
        given = {name for name, _ in raw}
        raw += [item for item in _RAW_HEADERS if item[0] not in given]
        if b"etag" not in given and b"cache-control" not in given:
            raw.append((b"cache-control", b"no-store"))
        # A request without a caller was refused: the model is not revealed. The handler stores
        # the model that it used in `state`, because another one may be current by now.
        models, accepted = self._service.models, "caller" in state and "unknown_host" not in state
        if accepted and (sha256 := state.get("model_sha256") or models.sha256):
            precision = state.get("precision") or models.precision
            raw.append((b"x-model-sha256", sha256.encode()))
            raw.append((b"x-model-precision", precision.encode()))
        message["headers"] = raw

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route, metrics = _route_of(scope), self._service.metrics
        metrics.requests.labels(route, _method_of(scope), str(status)).inc()
        metrics.latency.labels(route).observe(seconds)
        level = logging.DEBUG if route in ("/livez", "/readyz", "/metrics") else logging.INFO
        logger.log(level, "%s %s %d %.1f ms", _method_of(scope), route, status, 1000 * seconds)


async def answer_head(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Respond to HEAD with the headers of `app`'s GET response; stops `app` if it streams."""
    inner, streams = {**scope, "method": "GET"}, asyncio.Event()

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b""})
        elif message.get("more_body", False):
            streams.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(app(inner, receive, send_head))
    waiting = asyncio.ensure_future(streams.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        scope["route"] = inner.get("route")
        for item in (task, waiting):
            item.cancel()
        await asyncio.wait({task, waiting})


class LimitMiddleware:
    """Checks host, origin, key and limits before the body is read, and limits the body itself."""

    def __init__(self, app: ASGIApp, *, service: Service) -> None:
        self._app, self._service = app, service
        settings = service.settings
        self._keys = Keys(
            [key.get_secret_value() for key in settings.api_keys],
            [key.get_secret_value() for key in settings.admin_keys],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _RequestBody(self._service, scope, receive, send)
        try:
            self._admit(scope)
            if scope["method"] == "POST" and (encoding := _encoding(scope)):
                body.inflater = Inflater(encoding)
        except ServiceError as error:
            body.stop_reading = _declared_bytes(scope) > SMALL_BODY
            await error_response(scope, error)(scope, body.receive, body.send)
            return
        token = current_client.set(scope["state"]["caller"].client)
        scope["state"]["body"] = body
        try:
            await self._app(scope, body.receive, body.send)
        finally:
            body.release()
            current_client.reset(token)

    def _admit(self, scope: Scope) -> None:
        service, settings = self._service, self._service.settings
        headers, path = headers_of(scope), route_path(scope)
        try:
            check_host(headers, settings.allowed_hosts)
        except UnknownHost:
            if path not in PROBE_PATHS:
                raise
            scope["state"]["unknown_host"] = True
        check_origin(scope["method"], headers, settings.cors_origins)
        try:
            scope["state"]["caller"] = self._keys.identify(scope, path)
        except Unauthorized:
            service.metrics.rejected.labels("key").inc()
            raise
        if math.inf > _declared_bytes(scope) > settings.max_body_bytes:
            service.metrics.rejected.labels("body").inc()
            raise BodyTooLarge(settings.max_body_bytes)
        if scope["method"] != "POST":
            return
        if service.draining:
            raise NotReady("The service is shutting down.")
        if reason := service.shares.reason_against(scope["state"]["caller"].client):
            service.metrics.rejected.labels("requests").inc()
            raise _overloaded(service, reason)


class _RequestBody:
    """The body of one request, read within its limits: `receive` and `send` of the inner app.

    Only POST needs a body; that of another request is dropped. Counts the bytes in memory. Once the
    body of a POST is complete, the request takes one of the slots for active requests.
    """

    def __init__(self, service: Service, scope: Scope, receive: Receive, send: Send) -> None:
        settings = service.settings
        self.stop_reading = False
        """Whether the response closes the connection instead of waiting for the whole body."""
        self.inflater: Inflater | None = None
        self._arrived = False  # whether all of a compressed body has been received
        self._service = service
        self._max_bytes, self._rejected = settings.max_body_bytes, service.metrics.rejected
        self._deadline = scope["state"]["arrived"] + settings.upload_seconds
        self._receive, self._send = receive, send
        self._size, self._complete, self._has_slot = 0, False, False
        self._is_post = scope["method"] == "POST"
        self._state = scope["state"]

    async def receive(self) -> Message:
        if not self._is_post:
            return await self._drop_body()
        if self._complete:  # the next message is the client's disconnect
            return await self._receive()
        if self.inflater is None:
            message = await self._receive_in_time()
        else:
            message = await self._receive_inflated(self.inflater)
        self._count_bytes(len(message.get("body", b"")))
        self._complete = not message.get("more_body", False)
        if self._size > self._max_bytes:
            self.stop_reading = True
            self._rejected.labels("body").inc()
            raise BodyTooLarge(self._max_bytes)
        if self._complete:
            self._take_slot()
        return message

    async def _drop_body(self) -> Message:
        """An empty body, at once; then the client's disconnect. What arrives is not kept."""
        if not self._complete:
            self._complete = True
            return {"type": "http.request", "body": b"", "more_body": False}
        while (message := await self._receive())["type"] == "http.request":
            pass
        return message

    async def _receive_in_time(self) -> Message:
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                return await self._receive()
        except TimeoutError:
            self.stop_reading = True
            self._rejected.labels("slow").inc()
            raise SlowBody("The body did not arrive in time.") from None

    async def _receive_inflated(self, inflater: Inflater) -> Message:
        """The next small piece of a compressed body; other requests run in between."""
        data = b""
        if inflater.waiting or self._arrived:
            await asyncio.sleep(0)
        else:
            message = await self._receive_in_time()
            if message["type"] != "http.request":
                return message
            data, self._arrived = message.get("body", b""), not message.get("more_body", False)
        piece = inflater.inflate(data)
        more = bool(piece or inflater.waiting) or not self._arrived
        if not more and not inflater.complete:
            raise BadRequest("The compressed body is incomplete.")
        return {"type": "http.request", "body": piece, "more_body": more}

    def _take_slot(self) -> None:
        shares = self._service.shares
        if reason := shares.reason_against(self._client):
            self._rejected.labels("requests").inc()
            raise _overloaded(self._service, reason)
        shares.take_slot(self._client)
        self._has_slot = True

    @property
    def _client(self) -> str:
        client: str = self._state["caller"].client
        return client

    def _count_bytes(self, more: int) -> None:
        shares, most = self._service.shares, self._service.settings.max_held_bytes
        self._size += more
        of_client = shares.add_bytes(self._client, more)
        if shares.bytes > most or of_client > shares.client_bytes:
            self.stop_reading = True
            self._rejected.labels("held").inc()
            raise _overloaded(self._service, "Too many request bytes are held in memory.")

    def release(self) -> None:
        """Release the request's bytes and slot: its body is no longer needed."""
        shares = self._service.shares
        if self._size:
            shares.add_bytes(self._client, -self._size)
        self._size = 0
        if self._has_slot:
            shares.release_slot(self._client)
            self._has_slot = False

    async def send(self, message: Message) -> None:
        if self._is_post and message["type"] == "http.response.start" and "caller" in self._state:
            self._add_ratelimit(message)
        if self.stop_reading and message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Connection"] = "close"
        elif self.stop_reading and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._discard_rest()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    def _add_ratelimit(self, message: Message) -> None:
        shares = self._service.shares
        left = shares.slots_left(self._client) + self._has_slot  # its own becomes free
        policy, limit = _ratelimit_headers(shares.client_slots, max(left, 0))
        retry_after = [value for name, value in message["headers"] if name == b"retry-after"]
        if retry_after:
            limit = limit[0], limit[1] + b";t=" + retry_after[0]
        message["headers"] = [*message["headers"], policy, limit]

    async def _discard_rest(self) -> None:
        """Read and discard the rest of the body for a while.

        Closing while the client still sends would reset the connection, and the client might never
        see the response.
        """
        try:
            async with asyncio.timeout(DISCARD_SECONDS):
                while (await self._receive()).get("more_body", False):
                    pass
        except TimeoutError:
            pass


def _overloaded(service: Service, reason: str) -> Overloaded:
    return Overloaded(reason, retry_after=service.engine.retry_after(Kind.ATTACK))


@lru_cache(4096)
def _ratelimit_headers(slots: int, left: int) -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
    """RateLimit-Policy and RateLimit, as in draft-ietf-httpapi-ratelimit-headers-10."""
    policy = b'"places";q=%d;qu="concurrent-requests"' % slots
    return (b"ratelimit-policy", policy), (b"ratelimit", b'"places";r=%d' % left)


def _declared_bytes(scope: Scope) -> float:
    """The declared length of the body in bytes; infinite for a chunked body."""
    headers = headers_of(scope)
    if b"transfer-encoding" in headers:
        return math.inf
    declared = headers.get(b"content-length", b"0")
    return int(declared[:20]) if declared.isdigit() else 0


def _encoding(scope: Scope) -> str:
    """The Content-Encoding of the body in lowercase; empty for none."""
    encoding = headers_of(scope).get(b"content-encoding", b"").decode("latin-1").strip().lower()
    return "" if encoding == "identity" else encoding


def _route_of(scope: Scope) -> str:
    """The route's path template, for metrics; the path itself may have any value."""
    return getattr(scope.get("route"), "path", None) or "unmatched"


def _method_of(scope: Scope) -> str:
    known = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
    return scope["method"] if scope["method"] in known else "other"

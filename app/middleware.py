"""Around every request: its id, its log line and metrics, and limits that hold before routing."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import logs
from app.access import Keys
from app.errors import (
    BodyTooLarge,
    NotReady,
    Overloaded,
    ServiceError,
    SlowBody,
    Unauthorized,
)
from app.problem import answer_to
from app.queue import Kind
from app.service import Service

logger = logging.getLogger(__name__)

LINGER_SECONDS = 1.0
# A refused body of at most this size is taken in, so that the client can keep its connection.
SMALL_BODY = 2**20
# An answer is data: nothing in it is to be run, framed, guessed at or kept. Pages set their own.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestMiddleware:
    """Names, counts, times and logs each request, and answers what nothing inside did."""

    def __init__(self, app: ASGIApp, *, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, arrived=arrived)
        token = logs.request_id.set(request_id)
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._name(MutableHeaders(scope=message), scope["state"])
            await send(message)

        service = self._service
        with service.in_flight.track(scope["method"]), service.tracing.request(scope) as traced:
            try:
                await self._app(scope, receive, send_named)
            except Exception as error:
                logger.exception("the request failed")
                if not status:
                    await answer_to(scope, error)(scope, receive, send_named)
            finally:
                self._count(scope, status, time.monotonic() - arrived)
                traced(_route_of(scope), status)
                logs.request_id.reset(token)

    def _name(self, headers: MutableHeaders, state: dict[str, Any]) -> None:
        headers["X-Request-ID"] = state["request_id"]
        for name, value in HEADERS.items():
            headers.setdefault(name, value)
        if "ETag" not in headers:
            headers.setdefault("Cache-Control", "no-store")
        # Set by the route, as another model may be current by now.
        if sha256 := state.get("model_sha256") or self._service.models.sha256:
            headers["X-Model-SHA256"] = sha256

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route, metrics = _route_of(scope), self._service.metrics
        metrics.requests.labels(route, _method_of(scope), str(status)).inc()
        metrics.latency.labels(route).observe(seconds)
        level = logging.DEBUG if route in ("/livez", "/readyz", "/metrics") else logging.INFO
        logger.log(level, "%s %s %d %.1f ms", _method_of(scope), route, status, 1000 * seconds)


class LimitMiddleware:
    """Turns work away before its body is read, and stops bodies that grow too large or too slow."""

    def __init__(self, app: ASGIApp, *, service: Service) -> None:
        self._app, self._service = app, service
        self._keys = Keys(key.get_secret_value() for key in service.settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(self._service, scope, receive, send)
        try:
            self._admit(scope)
        except ServiceError as error:
            exchange.cut = _declared(scope) > SMALL_BODY
            await answer_to(scope, error)(scope, exchange.receive, exchange.send)
            return
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            exchange.release()

    def _admit(self, scope: Scope) -> None:
        service, settings = self._service, self._service.settings
        if not self._keys.admit(scope):
            service.metrics.rejected.labels("key").inc()
            raise Unauthorized(
                "expected a key in the header Authorization: Bearer KEY, or X-API-Key"
            )
        if math.inf > _declared(scope) > settings.max_body_bytes:
            service.metrics.rejected.labels("body").inc()
            raise BodyTooLarge(settings.max_body_bytes)
        if scope["method"] != "POST":
            return
        if service.draining:
            raise NotReady("The service is shutting down.")
        if service.in_flight.posts > settings.max_requests:
            service.metrics.rejected.labels("requests").inc()
            raise _overloaded(service, "Too many requests are in hand.")


class _Exchange:
    """The body of one request on its way in, and the answer that may cut it off."""

    def __init__(self, service: Service, scope: Scope, receive: Receive, send: Send) -> None:
        settings = service.settings
        self.cut = False
        self._service = service
        self._most, self._rejected = settings.max_body_bytes, service.metrics.rejected
        self._latest = scope["state"]["arrived"] + settings.upload_seconds
        self._receive, self._send = receive, send
        self._size, self._complete = 0, False

    async def receive(self) -> Message:
        if self._complete:  # what comes now is the client hanging up, whenever it likes
            return await self._receive()
        try:
            async with asyncio.timeout(self._latest - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            self.cut = True
            self._rejected.labels("slow").inc()
            raise SlowBody("The body did not arrive in time.") from None
        self._hold(len(message.get("body", b"")))
        self._complete = not message.get("more_body", False)
        if self._size > self._most:
            self.cut = True
            self._rejected.labels("body").inc()
            raise BodyTooLarge(self._most)
        return message

    def _hold(self, more: int) -> None:
        in_flight, settings = self._service.in_flight, self._service.settings
        self._size += more
        in_flight.bytes += more
        if in_flight.bytes > settings.max_held_bytes:
            self.cut = True
            self._rejected.labels("held").inc()
            raise _overloaded(self._service, "Too much of other requests is in hand.")

    def release(self) -> None:
        """The body is of no more use to anybody."""
        self._service.in_flight.bytes -= self._size
        self._size = 0

    async def send(self, message: Message) -> None:
        if self.cut and message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Connection"] = "close"
        elif self.cut and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _linger(self) -> None:
        """Closing on a client that still writes would reset the connection and lose the answer."""
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while (await self._receive()).get("more_body", False):
                    pass
        except TimeoutError:
            pass


def _overloaded(service: Service, reason: str) -> Overloaded:
    return Overloaded(reason, retry_after=service.engine.retry_after(Kind.ATTACK))


def _declared(scope: Scope) -> float:
    """Bytes of the body by the request's own word; infinite for one that comes in chunks."""
    headers = Headers(scope=scope)
    if "transfer-encoding" in headers:
        return math.inf
    declared = headers.get("content-length", "0")
    return int(declared[:20]) if declared.isascii() and declared.isdigit() else 0


def _route_of(scope: Scope) -> str:
    """The route's template: the path itself may be anything."""
    return getattr(scope.get("route"), "path", None) or "unmatched"


def _method_of(scope: Scope) -> str:
    known = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
    return scope["method"] if scope["method"] in known else "other"

"""Around every request: its id, log line and metrics, and the limits checked before routing."""

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
)
from app.http.auth import Keys
from app.http.compression import Inflater
from app.http.doors import check_host, check_origin
from app.http.fields import fields_of
from app.http.paths import route_path
from app.http.problem import answer_to
from app.service import Service

logger = logging.getLogger(__name__)

LINGER_SECONDS = 1.0
# A refused body of at most this size is read, so that the client can keep its connection.
SMALL_BODY = 2**20
# Answers are data: not to be executed, framed, sniffed or cached. Pages set their own headers.
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
    """Gives each request an id, counts, times and logs it, and answers uncaught errors."""

    def __init__(self, app: ASGIApp, *, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = time.monotonic()
        given = fields_of(scope).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        scope.setdefault("state", {}).update(request_id=request_id, arrived=arrived)
        token = logs.request_id.set(request_id)
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._name(message, scope["state"])
            await send(message)

        service = self._service
        with service.in_flight.track(scope["method"]), service.tracing.request(scope) as traced:
            try:
                if scope["method"] == "HEAD":
                    await answer_head(self._app, scope, receive, send_named)
                else:
                    await self._app(scope, receive, send_named)
            except asyncio.CancelledError:
                if not service.in_flight.aborted:
                    raise
                if not status:
                    error = NotReady("The service is shutting down.")
                    await answer_to(scope, error)(scope, receive, send_named)
            except Exception as error:
                logger.exception("the request failed")
                if not status:
                    await answer_to(scope, error)(scope, receive, send_named)
            finally:
                self._count(scope, status, time.monotonic() - arrived)
                traced(_route_of(scope), status)
                logs.request_id.reset(token)

    def _name(self, message: Message, state: dict[str, Any]) -> None:
        if message["status"] in (307, 308):  # relative, so that it holds for any host and prefix
            headers = MutableHeaders(scope=message)
            headers["Location"] = _RELATIVE.sub("", headers.get("Location", "/"))
        raw = [*message["headers"], (b"x-request-id", state["request_id"].encode())]
        given = {name for name, _ in raw}
        raw += [item for item in _RAW_HEADERS if item[0] not in given]
        if b"etag" not in given and b"cache-control" not in given:
            raw.append((b"cache-control", b"no-store"))
        # Without a caller, it was refused before the handler: the model is not revealed. The
        # handler has set its model, as another one may be current by now.
        models = self._service.models
        if "caller" in state and (sha256 := state.get("model_sha256") or models.sha256):
            precision = state.get("precision") or models.precision
            raw.append((b"x-model-sha256", sha256.encode()))
            raw.append((b"x-model-precision", precision.encode()))
        message["headers"] = raw

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route, metrics = _route_of(scope), self._service.metrics
        metrics.requests.labels(route, _method_of(scope), str(status)).inc()
        metrics.latency.labels(route).observe(seconds)
        level = logging.DEBUG if route in ("/livez", "/readyz", "/metrics") else logging.INFO
        logger.log(level, "%s %s %d %.1f ms", _method_of(scope), route, status, 1000 * seconds)


async def answer_head(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer HEAD as `app` answers GET, without the body; a streamed body is not generated."""
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
    """Refuses requests before their bodies are read, and bodies that are too large or too slow."""

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
        body = _Body(self._service, scope, receive, send)
        try:
            self._admit(scope)
        except ServiceError as error:
            body.cut = _declared(scope) > SMALL_BODY
            await answer_to(scope, error)(scope, body.receive, body.send)
            return
        if encoding := _encoding(scope):
            try:
                body.inflater = Inflater(encoding)
            except ServiceError as error:
                await answer_to(scope, error)(scope, body.receive, body.send)
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
        fields = fields_of(scope)
        check_host(fields, settings.allowed_hosts)
        check_origin(scope["method"], fields, settings.cors_origins)
        try:
            scope["state"]["caller"] = self._keys.identify(scope, route_path(scope))
        except Unauthorized:
            service.metrics.rejected.labels("key").inc()
            raise
        if math.inf > _declared(scope) > settings.max_body_bytes:
            service.metrics.rejected.labels("body").inc()
            raise BodyTooLarge(settings.max_body_bytes)
        if scope["method"] != "POST":
            return
        if service.draining:
            raise NotReady("The service is shutting down.")
        if reason := service.shares.full_for(scope["state"]["caller"].client):
            service.metrics.rejected.labels("requests").inc()
            raise _overloaded(service, reason)


class _Body:
    """The incoming body of one request, and the answer that may cut it off.

    Once a POST's body is complete, the request takes one of the places for computing.
    """

    def __init__(self, service: Service, scope: Scope, receive: Receive, send: Send) -> None:
        settings = service.settings
        self.cut = False
        self.inflater: Inflater | None = None
        self._arrived = False  # of a compressed body, whether all has been read
        self._service = service
        self._most, self._rejected = settings.max_body_bytes, service.metrics.rejected
        self._latest = scope["state"]["arrived"] + settings.upload_seconds
        self._receive, self._send = receive, send
        self._size, self._complete, self._placed = 0, False, False
        self._post = scope["method"] == "POST"
        self._state = scope["state"]

    async def receive(self) -> Message:
        if self._complete:  # the next message is the client's disconnect
            return await self._receive()
        message = await self._arriving() if self.inflater is None else await self._inflated()
        self._hold(len(message.get("body", b"")))
        self._complete = not message.get("more_body", False)
        if self._size > self._most:
            self.cut = True
            self._rejected.labels("body").inc()
            raise BodyTooLarge(self._most)
        if self._complete and self._post:
            self._take_place()
        return message

    async def _arriving(self) -> Message:
        try:
            async with asyncio.timeout(self._latest - time.monotonic()):
                return await self._receive()
        except TimeoutError:
            self.cut = True
            self._rejected.labels("slow").inc()
            raise SlowBody("The body did not arrive in time.") from None

    async def _inflated(self) -> Message:
        """The next small piece of a compressed body; yields to other requests in between."""
        assert self.inflater is not None
        data = b""
        if self.inflater.waiting or self._arrived:
            await asyncio.sleep(0)
        else:
            message = await self._arriving()
            if message["type"] != "http.request":
                return message
            data, self._arrived = message.get("body", b""), not message.get("more_body", False)
        piece = self.inflater.inflate(data)
        more = bool(piece or self.inflater.waiting) or not self._arrived
        if not more and not self.inflater.complete:
            raise BadRequest("The compressed body is cut short.")
        return {"type": "http.request", "body": piece, "more_body": more}

    def _take_place(self) -> None:
        shares = self._service.shares
        if reason := shares.full_for(self._caller):
            self._rejected.labels("requests").inc()
            raise _overloaded(self._service, reason)
        shares.take_place(self._caller)
        self._placed = True

    @property
    def _caller(self) -> str:
        client: str = self._state["caller"].client
        return client

    def _hold(self, more: int) -> None:
        in_flight, settings = self._service.in_flight, self._service.settings
        self._size += more
        in_flight.bytes += more
        if not self._post:
            return
        held = self._service.shares.hold(self._caller, more)
        if in_flight.bytes > settings.max_held_bytes or held > self._service.shares.client_bytes:
            self.cut = True
            self._rejected.labels("held").inc()
            raise _overloaded(self._service, "Too many request bytes are held in memory.")

    def release(self) -> None:
        """Release the request's bytes and place: its body is no longer needed."""
        shares = self._service.shares
        self._service.in_flight.bytes -= self._size
        if self._post and self._size:
            shares.hold(self._caller, -self._size)
        self._size = 0
        if self._placed:
            shares.take_place(self._caller, -1)
            self._placed = False

    async def send(self, message: Message) -> None:
        if self._post and message["type"] == "http.response.start" and "caller" in self._state:
            self._tell_share(message)
        if self.cut and message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Connection"] = "close"
        elif self.cut and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    def _tell_share(self, message: Message) -> None:
        shares = self._service.shares
        left = shares.places_left(self._caller) + self._placed  # its own will be free
        policy, share = _share_fields(shares.client_places, max(left, 0))
        after = [value for name, value in message["headers"] if name == b"retry-after"]
        if after:
            share = share[0], share[1] + b";t=" + after[0]
        message["headers"] = [*message["headers"], policy, share]

    async def _linger(self) -> None:
        """Read on: closing while the client still writes would reset the connection."""
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while (await self._receive()).get("more_body", False):
                    pass
        except TimeoutError:
            pass


def _overloaded(service: Service, reason: str) -> Overloaded:
    return Overloaded(reason, retry_after=service.engine.retry_after(Kind.ATTACK))


@lru_cache(4096)
def _share_fields(places: int, left: int) -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
    """The fields of draft-ietf-httpapi-ratelimit-headers-10."""
    policy = b'"places";q=%d;qu="concurrent-requests"' % places
    return (b"ratelimit-policy", policy), (b"ratelimit", b'"places";r=%d' % left)


def _declared(scope: Scope) -> float:
    """The declared length of the body in bytes; infinite for a chunked body."""
    fields = fields_of(scope)
    if b"transfer-encoding" in fields:
        return math.inf
    declared = fields.get(b"content-length", b"0")
    return int(declared[:20]) if declared.isdigit() else 0


def _encoding(scope: Scope) -> str:
    """The Content-Encoding of the body in lower case; empty for none."""
    encoding = fields_of(scope).get(b"content-encoding", b"").decode("latin-1").strip().lower()
    return "" if encoding == "identity" else encoding


def _route_of(scope: Scope) -> str:
    """The route's path template, for metrics; the path itself may be anything."""
    return getattr(scope.get("route"), "path", None) or "unmatched"


def _method_of(scope: Scope) -> str:
    known = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
    return scope["method"] if scope["method"] in known else "other"

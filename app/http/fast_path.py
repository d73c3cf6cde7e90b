"""A shortcut to the most frequently used route."""

from __future__ import annotations

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import ServiceError
from app.http.paths import route_path
from app.http.problem import error_response


class FastPathMiddleware:
    """Calls the handler of `route` directly, without FastAPI's routing and dependencies.

    The handler must take a Request and return a Response, so it needs neither, and they would take
    a seventh of the event loop's time per prediction. The route stays registered for the OpenAPI
    document.
    """

    def __init__(self, app: ASGIApp, *, route: APIRoute) -> None:
        self._app, self._route, self._methods = app, route, route.methods or set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._route
        if (
            scope["type"] != "http"
            or route_path(scope) != route.path
            or scope["method"] not in self._methods
        ):
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        try:
            response = await route.endpoint(Request(scope, receive, send))
        except ServiceError as error:
            response = error_response(scope, error)
        await response(scope, receive, send)

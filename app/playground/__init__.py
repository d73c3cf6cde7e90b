"""The playground: one page at `/` that uses the routes like any other client.

Plain files, served as they are: no build step, and nothing from outside.
"""

from __future__ import annotations

import os
from importlib.resources import files as package_files

from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

# Nothing inline, nothing from elsewhere; the images that the service answers come as data.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data: blob:; frame-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for again each time, and mostly answered by 304
}


# What the examples are shown from also when the service is away.
EXAMPLE_HEADERS = {**HEADERS, "Cache-Control": "max-age=86400"}

# The frame that shows a report, which brings its styles and drawings with it.
FRAME = "report.html"
FRAME_HEADERS = {
    **HEADERS,
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    ),
    "X-Frame-Options": "SAMEORIGIN",
}


class _Assets(StaticFiles):
    def file_response(
        self,
        full_path: str | os.PathLike[str],
        stat_result: os.stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        folder, name = os.path.split(full_path)
        example = os.path.basename(folder) == "examples"
        headers = EXAMPLE_HEADERS if example else FRAME_HEADERS if name == FRAME else HEADERS
        response.headers.update(headers)
        return response


def install(app: FastAPI) -> None:
    """Add the page at / and what it is made of."""
    folder = package_files("app.playground") / "assets"
    assets = _Assets(directory=str(folder))
    routes = APIRouter(include_in_schema=False)

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def root(request: Request) -> Response:
        return await assets.get_response("index.html", request.scope)

    # A route rather than a mount: the log and the metrics know it by name.
    @routes.api_route("/playground/{path:path}", methods=["GET", "HEAD"])
    async def asset(path: str, request: Request) -> Response:
        return await assets.get_response(path, request.scope)

    app.include_router(routes)

"""The playground: a web page at `/` that uses the API like any other client.

Its files are served as they are, without a build step or anything from other sites.
"""

from __future__ import annotations

import os
from importlib.resources import files as package_files

from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

# No inline scripts or styles, and nothing from other sites; images in responses are data URLs.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data: blob:; frame-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # revalidated each time, mostly with a 304
}


# Cached, so that the example images also appear while the service is down.
EXAMPLE_HEADERS = {**HEADERS, "Cache-Control": "max-age=86400"}

# The page of the iframe that shows a report, whose styles and plots are inline.
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
    """Add the page at / and its files to `app`."""
    folder = package_files("app.playground") / "assets"
    assets = _Assets(directory=str(folder))
    routes = APIRouter(include_in_schema=False)

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def root(request: Request) -> Response:
        return await assets.get_response("index.html", request.scope)

    # A route rather than a mount, so that logs and metrics have its path template.
    @routes.api_route("/playground/{path:path}", methods=["GET", "HEAD"])
    async def asset(path: str, request: Request) -> Response:
        return await assets.get_response(path, request.scope)

    app.include_router(routes)

"""The path of a request without the proxy's prefix."""

from __future__ import annotations

from starlette.types import Scope


def route_path(scope: Scope) -> str:
    """The path of a request without the prefix that a proxy, or `--root-path`, puts before it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))

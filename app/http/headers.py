"""The headers of a request as a dict, built once per request: several functions need them."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Scope

_KEY = "robust.headers"


def headers_of(scope: Scope) -> Mapping[bytes, bytes]:
    """The request's headers by lowercase name; the first value of a repeated one."""
    headers: dict[bytes, bytes] | None = scope.get(_KEY)
    if headers is None:
        headers = scope[_KEY] = dict(reversed(scope["headers"]))
    return headers

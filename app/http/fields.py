"""The header fields of a request, parsed once: every request asks for several."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Scope

_KEY = "robust.fields"


def fields_of(scope: Scope) -> Mapping[bytes, bytes]:
    """The first value of each header field, by its name in lower case."""
    fields: dict[bytes, bytes] | None = scope.get(_KEY)
    if fields is None:
        fields = scope[_KEY] = dict(reversed(scope["headers"]))
    return fields

"""Who may ask: the keys of the service, and the addresses that need none."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.types import Scope

# Probes, and pages that hold nothing but the way to ask: a browser that opens one sends no key.
OPEN = frozenset(
    {"/", "/docs", "/openapi.json", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready"}
)
OPEN_BELOW = ("/docs/assets/", "/playground/")


class Keys:
    """The keys that open the service; none means that everybody may ask."""

    def __init__(self, keys: Iterable[str]) -> None:
        # Of equal length whatever the key's, so that comparing tells nothing of it.
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def admit(self, scope: Scope) -> bool:
        """Whether this request may go on: it needs no key, or carries a right one.

        The time this takes depends neither on which key fits nor on how much of it does.
        """
        path: str = scope["path"]
        if not self._digests or is_open(path.removeprefix(scope.get("root_path", ""))):
            return True
        digest = sha256(_given(Headers(scope=scope))).digest()
        return sum([hmac.compare_digest(digest, known) for known in self._digests]) > 0


def is_open(path: str) -> bool:
    """Whether the address needs no key."""
    return path in OPEN or path.startswith(OPEN_BELOW)


def _given(headers: Headers) -> bytes:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip().encode("latin-1")
    return headers.get("x-api-key", "").encode("latin-1")

"""Authentication: API keys, and the paths that need none."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from starlette.types import Scope

from app.errors import Unauthorized
from app.http.headers import headers_of
from app.http.paths import PROBE_PATHS
from app.http.trust import client_address

# Health probes and static pages: a browser that opens a page can't send a key.
PUBLIC_PATHS = PROBE_PATHS | {"/", "/docs", "/openapi.json"}
PUBLIC_PREFIXES = ("/docs/assets/", "/playground/")
NOBODY = "nobody"  # an owner without evaluations


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The sender of a request."""

    client: str
    """Identifies the client for its share of the service: a hash of its key, or its address."""
    owner: str | None
    """Owner of the evaluations that it may see; None: all evaluations."""


class Keys:
    """The API keys of the service; without any, every request is accepted.

    A caller sees the evaluations that were started with its key; `admin_keys` see all.
    """

    def __init__(self, keys: Iterable[str], admin_keys: Iterable[str] = ()) -> None:
        # All of one length, so that the time of a comparison reveals nothing about a key.
        self._digests = [sha256(key.encode()).digest() for key in keys]
        self._admin_digests = [sha256(key.encode()).digest() for key in admin_keys]

    def identify(self, scope: Scope, path: str) -> Caller:
        """The caller that requests `path`. Raises Unauthorized if it needs a valid key.

        The time this takes does not depend on which key matches, or how much of it.
        """
        address = client_address(scope)
        if not self._digests and not self._admin_digests:
            return Caller(client=address, owner=None)
        digest = sha256(_key_in(headers_of(scope))).digest()
        is_admin = _contains(self._admin_digests, digest)
        is_user = _contains(self._digests, digest)
        if is_admin or is_user:
            owner = digest.hex()
            return Caller(client=owner, owner=None if is_admin else owner)
        if is_public(path):
            return Caller(client=address, owner=NOBODY)
        raise Unauthorized("expected a key in the header Authorization: Bearer KEY, or X-API-Key")


def is_public(path: str) -> bool:
    """Whether the path needs no key."""
    return path in PUBLIC_PATHS or path.startswith(PUBLIC_PREFIXES)


def _contains(digests: list[bytes], digest: bytes) -> bool:
    # Compares with every digest: stopping at a match would reveal its position.
    return sum([hmac.compare_digest(digest, item) for item in digests]) > 0


def _key_in(headers: Mapping[bytes, bytes]) -> bytes:
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return token.strip()
    return headers.get(b"x-api-key", b"")

"""Who asks: the keys of the service, and the addresses that need none."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from starlette.types import Scope

from app.errors import Unauthorized
from app.http.doors import client_address
from app.http.fields import fields_of

# Probes, and pages that hold nothing but the way to ask: a browser that opens one sends no key.
OPEN = frozenset(
    {"/", "/docs", "/openapi.json", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready"}
)
OPEN_BELOW = ("/docs/assets/", "/playground/")
NOBODY = "nobody"  # owns no evaluation


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who sent a request."""

    client: str
    """The same for all requests of one key, or, without a key, of one address."""
    owner: str | None
    """Whose evaluations it may see; None: all."""


class Keys:
    """The keys that open the service; none means that everybody may ask.

    A caller sees the evaluations that were started with the same key. `admin_keys` see all.
    """

    def __init__(self, keys: Iterable[str], admin_keys: Iterable[str] = ()) -> None:
        # Of equal length whatever the key's, so that comparing tells nothing of it.
        self._digests = [sha256(key.encode()).digest() for key in keys]
        self._admin_digests = [sha256(key.encode()).digest() for key in admin_keys]

    def identify(self, scope: Scope, path: str) -> Caller:
        """Who asks for `path`. Raises Unauthorized without a right key where one is needed.

        The time this takes depends neither on which key fits nor on how much of it does.
        """
        address = client_address(scope)
        if not self._digests and not self._admin_digests:
            return Caller(client=address, owner=None)
        digest = sha256(_given(fields_of(scope))).digest()
        admin, known = _among(digest, self._admin_digests), _among(digest, self._digests)
        if admin or known:
            owner = digest.hex()
            return Caller(client=owner, owner=None if admin else owner)
        if is_open(path):
            return Caller(client=address, owner=NOBODY)
        raise Unauthorized("expected a key in the header Authorization: Bearer KEY, or X-API-Key")


def is_open(path: str) -> bool:
    """Whether the address needs no key."""
    return path in OPEN or path.startswith(OPEN_BELOW)


def _among(digest: bytes, known: list[bytes]) -> bool:
    return sum([hmac.compare_digest(digest, item) for item in known]) > 0


def _given(fields: Mapping[bytes, bytes]) -> bytes:
    scheme, _, token = fields.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return token.strip()
    return fields.get(b"x-api-key", b"")

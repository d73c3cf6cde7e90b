"""Checks of where a request comes from: trusted proxies, allowed hosts, and web origins."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from app.errors import Forbidden, UnknownHost
from app.http.headers import headers_of

LOOPBACK_HOSTS = ("localhost", "*.localhost", "127.0.0.1", "::1")
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]*)?")
_IPV6_CLIENT_BITS = 64  # a /64 network usually belongs to one household
_MAX_HOST = 300  # characters of a host or address; longer ones are invalid, and not cached
_CACHE_SIZE = 4096


class ProxyMiddleware:
    """Applies X-Forwarded-For, -Proto and -Prefix, from trusted proxies only.

    `root_path` is the path prefix if the proxy sends none. Routes match with and without it.
    """

    def __init__(self, app: ASGIApp, *, trusted: Sequence[str], root_path: str = "") -> None:
        self._app, self._root_path = app, root_path
        self._proxied: Any = ProxyHeadersMiddleware(app, list(trusted))  # type: ignore[arg-type]
        self._trusted = self._proxied.trusted_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        prefix = self._root_path
        if (scope.get("client") or ("",))[0] in self._trusted:
            given = headers_of(scope).get(b"x-forwarded-prefix", b"").decode("latin-1").rstrip("/")
            if _PREFIX.fullmatch(given):
                prefix = given
        if prefix:
            scope["root_path"] = prefix
            if not f"{scope['path']}/".startswith(f"{prefix}/"):  # the proxy stripped it
                scope["path"] = prefix + scope["path"]
        await self._proxied(scope, receive, send)


def trusted_addresses(trusted: Sequence[str]) -> Container[str]:
    """A container of the proxies' addresses, for membership tests; `trusted` may have networks."""
    proxies: Any = ProxyHeadersMiddleware(None, list(trusted))  # type: ignore[arg-type]
    addresses: Container[str] = proxies.trusted_hosts
    return addresses


def client_address(scope: Mapping[str, Any]) -> str:
    """The client's IP address; for IPv6 its /64 network, as one client usually has all of it."""
    host: str = (scope.get("client") or ("unknown", 0))[0]
    return host if ":" not in host or len(host) > _MAX_HOST else _network_of(host)


@lru_cache(_CACHE_SIZE)
def _network_of(host: str) -> str:
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, IPv6Address) and address.ipv4_mapped:  # all share one /64
        return str(address.ipv4_mapped)
    return str(ip_network((address, _IPV6_CLIENT_BITS), strict=False))


def check_host(headers: Mapping[bytes, bytes], allowed: tuple[str, ...]) -> None:
    """Raise UnknownHost unless the Host header is one of `allowed`; an empty tuple allows all.

    This prevents DNS rebinding: a malicious web page can point its own domain name at this
    service, but the browser then sends that name as Host.
    """
    if not allowed or "*" in allowed:
        return
    host = headers.get(b"host", b"")
    if len(host) > _MAX_HOST or not _is_allowed(host, allowed):
        raise UnknownHost("The Host header is not one of ROBUST_ALLOWED_HOSTS.")


@lru_cache(_CACHE_SIZE)
def _is_allowed(host: bytes, allowed: tuple[str, ...]) -> bool:
    name = _host_name(host.decode("latin-1"))
    for pattern in allowed:
        if name == pattern or (pattern.startswith("*.") and name.endswith(pattern[1:])):
            return True
        if pattern == "127.0.0.1" and re.fullmatch(r"127(\.[0-9]{1,3}){3}", name):
            return True
    return False


def check_origin(method: str, headers: Mapping[bytes, bytes], allowed: Sequence[str]) -> None:
    """Raise Forbidden for a request with an unsafe method from a web page of another origin.

    Browsers send the page's origin in Sec-Fetch-Site and Origin; other clients send neither.
    """
    if method in SAFE_METHODS:
        return
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if origin is None and site is None:
        return
    if site in (b"same-origin", b"none") or "*" in allowed:
        return
    if origin is not None and origin.decode("latin-1") in allowed:
        return
    if origin is not None and site is None:  # an older browser
        page_host, own_host = origin.lower().partition(b"://")[2], headers.get(b"host", b"").lower()
        if page_host and page_host == own_host:
            return
    raise Forbidden("Pages of another origin may not do this; see ROBUST_CORS_ORIGINS.")


def _host_name(host: str) -> str:
    """The host in lowercase, without port and brackets; empty if it is invalid."""
    match = _HOST.fullmatch(host.strip().lower())
    return (match[1] or match[2] or "") if match else ""

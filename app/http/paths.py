"""The path of a request as the routes know it, and the paths of the health probes."""

from __future__ import annotations

from starlette._utils import get_route_path
from starlette.types import Scope

# Anyone may request these: Kubernetes sends no key, and the pod's IP address as Host.
PROBE_PATHS = frozenset(
    {"/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/v2/models/robust/ready"}
)


def route_path(scope: Scope) -> str:
    """The path of a request without the prefix that a proxy or `--root-path` adds.

    Everything that decides by path must use it: Starlette's router chooses the route with the same
    function. With another one, a path could be public here and a protected route there.
    """
    return get_route_path(scope) or "/"

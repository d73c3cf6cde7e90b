"""The path of a request as the routes know it, and the paths of the health probes."""

from __future__ import annotations

from starlette.types import Scope

# Anyone may request these: Kubernetes sends no key, and the pod's IP address as Host.
PROBE_PATHS = frozenset(
    {"/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/v2/models/robust/ready"}
)


def route_path(scope: Scope) -> str:
    """The path of a request without the prefix that a proxy or `--root-path` adds."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"

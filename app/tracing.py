"""OpenTelemetry traces of requests and their work on the device, if enabled."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import Scope

SERVER_ERROR = 500
SECONDS = 3  # timeout for sending traces, also at shutdown


class Tracing:
    """A tracer that does nothing, for a service without ROBUST_TRACES."""

    @contextmanager
    def request(self, scope: Scope) -> Iterator[Callable[[str, int], None]]:
        """Trace a request while the block runs; yields a function to call with route and status."""
        yield lambda route, status: None

    def work(self, kind: str, *, admitted: float, began: float | None) -> None:
        """Trace work that has just ended, from its times on the monotonic clock."""

    def close(self) -> None:
        """Send the remaining traces."""


class OpenTelemetry(Tracing):
    """A tracer that sends a span per request, with child spans for queue and device."""

    def __init__(self, endpoint: str, version: str) -> None:
        from opentelemetry import propagate, trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        # As usual with OpenTelemetry, OTEL_SERVICE_NAME and OTEL_TRACES_SAMPLER apply.
        name = os.environ.get("OTEL_SERVICE_NAME", "robust")
        resource = Resource.create({"service.name": name, "service.version": version})
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=SECONDS)
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("robust", version)
        self._extract, self._trace = propagate.extract, trace

    @contextmanager
    def request(self, scope: Scope) -> Iterator[Callable[[str, int], None]]:
        headers = Headers(scope=scope)
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        method = scope["method"]
        attributes = {
            "http.request.method": method,
            "url.scheme": scope["scheme"],
            "robust.request_id": scope["state"]["request_id"],
        }
        with self._tracer.start_as_current_span(
            method,
            context=self._extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes=attributes,
        ) as span:

            def done(route: str, status: int) -> None:
                span.update_name(f"{method} {route}")
                span.set_attributes({"http.route": route, "http.response.status_code": status})
                if status >= SERVER_ERROR:
                    span.set_status(self._trace.StatusCode.ERROR)

            yield done

    def work(self, kind: str, *, admitted: float, began: float | None) -> None:
        ended, epoch = time.monotonic(), time.time_ns() - time.monotonic_ns()
        spans = [("queue", admitted, began or ended), ("device", began, ended)]
        for name, start, end in spans:
            if start is not None:
                span = self._tracer.start_span(
                    name, attributes={"robust.kind": kind}, start_time=epoch + int(start * 1e9)
                )
                span.end(epoch + int(end * 1e9))

    def close(self) -> None:
        self._provider.shutdown()


def tracing_for(endpoint: str | None, version: str) -> Tracing:
    """A tracer for `endpoint`. Raises ValueError if the extra ``otel`` is not installed."""
    if not endpoint:
        return Tracing()
    try:
        return OpenTelemetry(endpoint, version)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"ROBUST_TRACES: expected the extra otel (pip install 'robust[otel]'), "
            f"found no {error.name}"
        ) from None

"""Traces are sent to the configured collector, and nowhere without one."""

import gzip
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from app.settings import Settings
from app.tracing import Tracing, tracing_for
from tests.support.serving import Running, gated, labeled, png, serving, until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CLOCKS = 50_000_000  # ns between the clock of requests and that of their work, on any machine


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend((span, resource.resource) for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    server.shutdown()
    thread.join()
    server.server_close()


def attributes(item: Any) -> dict[str, Any]:
    return {pair.key: pair.value.int_value or pair.value.string_value for pair in item.attributes}


def test_request_queue_wait_and_device_time_are_traced(
    checkpoint: Path, collector: tuple[str, list[Any]]
) -> None:
    endpoint, sent = collector
    settings = Settings(checkpoint=checkpoint, threads=1, device="cpu", traces=endpoint)
    with serving(settings) as running:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-ID": "mine"}
        assert running.client.post("/predict", content=png(), headers=headers).is_success
        assert running.client.post("/attack?attack=fgsm", content=png()).is_success
        assert running.client.post("/predict", content=b"").status_code == 400
        running.service.draining = True
        assert running.client.post("/predict", content=png()).status_code == 503
        assert running.client.get("/a/path/of/somebodys/own").status_code == 404
    requests = [(span, resource) for span, resource in sent if " " in span.name]
    told = [(span.name, attributes(span)["http.response.status_code"]) for span, _ in requests]
    assert told == [
        ("POST /predict", 200),
        ("POST /attack", 200),
        ("POST /predict", 400),
        ("POST unmatched", 503),
        ("GET unmatched", 404),
    ]
    first, resource = requests[0]
    assert attributes(resource)["service.name"] == "robust"
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE, PARENT)
    assert attributes(first)["robust.request_id"] == "mine"
    assert [span.status.code for span, _ in requests] == [0, 0, 0, 2, 0]
    for (request, _), kind in zip(requests[:2], ("predict", "attack"), strict=True):
        below = {s.name: s for s, _ in sent if s.parent_span_id == request.span_id}
        assert set(below) == {"queue", "device"}
        queue, device = below["queue"], below["device"]
        assert attributes(queue) == attributes(device) == {"robust.kind": kind}
        assert request.trace_id == queue.trace_id == device.trace_id
        times = [queue.start_time_unix_nano, queue.end_time_unix_nano]
        times += [device.start_time_unix_nano, device.end_time_unix_nano]
        assert times == sorted(times)
        assert abs(times[1] - times[2]) < 1000
        assert request.start_time_unix_nano <= times[0] + CLOCKS
        assert times[3] <= request.end_time_unix_nano + CLOCKS


def test_work_that_never_started_has_only_a_wait_span(
    checkpoint: Path, collector: tuple[str, list[Any]]
) -> None:
    endpoint, sent = collector
    settings = Settings(
        checkpoint=checkpoint, threads=1, device="cpu", traces=endpoint, deadline_seconds=2
    )
    with serving(settings) as running, gated(running.service) as gate:
        job = running.client.post("/evaluate?attack=fgsm", files={"file": labeled(3)}).json()
        until(lambda: gate.waiting)
        assert running.client.post("/predict", content=png()).status_code == 504
        running.client.delete(f"/evaluate/{job['id']}")
        gate.open.set()
    (late,) = (span for span, _ in sent if span.name == "POST /predict")
    assert [span.name for span, _ in sent if span.parent_span_id == late.span_id] == ["queue"]


def test_missing_collector_does_no_harm(checkpoint: Path) -> None:
    settings = Settings(
        checkpoint=checkpoint, threads=1, device="cpu", traces="http://127.0.0.1:9/v1/traces"
    )
    with serving(settings) as running:
        assert running.client.post("/predict", content=png()).status_code == 200


def test_opentelemetry_is_not_imported_unless_enabled(running: Running) -> None:
    assert type(running.service.tracing) is Tracing
    code = "import sys, app.tracing; print('opentelemetry.sdk' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_missing_extra_is_named_at_startup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ValueError, match="extra otel"):
        tracing_for("http://127.0.0.1:9/v1/traces", "1")


def test_endpoint_must_be_a_url() -> None:
    with pytest.raises(ValueError, match="traces"):
        Settings(traces="collector:4318")

"""What benchmarks/serving relies on: load, ratios, and stopping servers."""

import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from app.http.images import CHEAP
from benchmarks.serving import bench, limit, load, servers, table
from robust.checkpoint import load_checkpoint
from robust.image_decoding import read_cheap_pixels

ANSWERS = """Running 1s test @ http://127.0.0.1:1/predict
{"seconds": 2.0, "p50_ms": 4.5, "p99_ms": 9.0, "broken": 1, "timeouts": 0, "statuses": {"200": 30, "429": 10}}
"""  # noqa: E501


def test_throughput_counts_only_200_responses() -> None:
    found = load.read_load(ANSWERS, 16)
    assert found.throughput == 15
    assert found.requests == 40
    assert found.errors() == "10 429, 1 broken"


def test_image_has_the_stated_size() -> None:
    image = load.small_png(32)
    assert 2000 < len(image) < 3000
    assert read_cheap_pixels(image, 32, most=CHEAP, max_pixels=1024).shape == (3, 32, 32)


@pytest.mark.skipif(shutil.which("wrk") is None, reason="needs the load generator wrk")
def test_wrk_sends_the_form_and_counts_statuses(tmp_path: Path) -> None:
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(429 if len(bodies) % 3 == 0 else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    body = tmp_path / "body"
    body.write_bytes(load.form(load.small_png(32)))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/predict"
        found = load.generate(url, body, clients=1, seconds=1)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert set(bodies) == {body.read_bytes()}
    assert found.requests > 10
    assert abs(found.statuses[429] - found.requests / 3) <= 1
    assert found.broken == 0
    assert 0 < found.p50_ms <= found.p99_ms


@pytest.mark.parametrize("name", servers.KINDS)
def test_every_server_is_told_the_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, str]] = []
    monkeypatch.setattr(bench, "started", lambda *arguments: given.append(arguments[-1]))
    arguments = SimpleNamespace(peers=Path("peers"), precision="bf16")
    one = SimpleNamespace(arguments=arguments, weights=Path("model.pt"), image=b"")
    bench.Bench.started(one, servers.KINDS[name], {"SERVING_BATCH": "16"})  # type: ignore[arg-type]
    variable = "ROBUST_PRECISION" if name == "robust" else "SERVING_PRECISION"
    assert given == [{"SERVING_BATCH": "16", variable: "bf16"}]


def test_peer_network_computes_in_the_given_precision(
    checkpoint_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = runpy.run_path(str(servers.PEERS / "network.py"))
    monkeypatch.setenv("SERVING_WEIGHTS", str(checkpoint_path))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        monkeypatch.setenv("SERVING_PRECISION", precision)
        network = peers["load_network"]()
        assert {weights.dtype for weights in network.parameters()} == {dtype}
        with torch.inference_mode():
            logits[precision] = network(x)
            expected = load_checkpoint(checkpoint_path).classifier(x)
        assert logits[precision].dtype == torch.float32
    torch.testing.assert_close(logits["fp32"], expected)
    assert 0 < (logits["bf16"] - expected).abs().max() < 0.05 * expected.abs().max()


def test_ratios_are_computed_within_a_round() -> None:
    rates = {("robust", 0): 80.0, ("litserve", 0): 20.0, ("robust", 1): 30.0, ("litserve", 1): 10.0}
    loads = [
        {"stem": "cifar", "turn": turn, "clients": 16, "server": server, "throughput": rate}
        | {"p50_ms": 20.0, "p99_ms": 30.0, "cpu_ms": 1.0, "memory_bytes": 10, "errors": ""}
        for (server, turn), rate in rates.items()
    ]
    limits = [
        {"stem": "cifar", "turn": turn, "images_per_second": rate, "p50_ms": 15.0}
        for turn, rate in enumerate((100.0, 50.0))
    ]
    ours, theirs = table.summarize(loads, limits)
    assert ours["throughput"] == {"median": 55, "least": 30, "most": 80}
    assert ours["to_limit"] == {"median": pytest.approx(0.7), "least": 0.6, "most": 0.8}
    assert ours["to_litserve"] == {"median": 3.5, "least": 3, "most": 4}
    assert theirs["to_litserve"]["median"] == 1
    met = {target["figure"]: target["met"] for target in table.check_targets([ours, theirs])}
    assert met == {"throughput": False, "to_limit": False, "to_litserve": True}


def test_limit_counts_images(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def forward(x: np.ndarray) -> np.ndarray:
        now[0] += 0.01
        return x

    monkeypatch.setattr(limit, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    found = limit.measure(forward, np.zeros((8, 1), dtype=np.float32), 0.1)
    assert found["images_per_second"] == pytest.approx(800)
    assert found["p50_ms"] == pytest.approx(10)


def test_server_ends_with_all_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "LEFT_SECONDS", 0.5)
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    process = subprocess.Popen([sys.executable, "-c", sleeper], stdin=subprocess.PIPE)
    latest = time.monotonic() + 280
    while len(servers.family(process.pid)) < 2:
        assert time.monotonic() < latest
        time.sleep(0.02)
    child = servers.family(process.pid)[1]
    servers.end(process)
    assert process.stdin is not None
    process.stdin.close()
    assert not servers._running(child)
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)

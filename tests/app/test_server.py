"""``robust serve`` as a process: startup, signals and exit."""

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from robust.checkpoint import sidecar_path
from tests.app.conftest import write_checkpoint
from tests.support.serving import labeled, png, until

ROOT = Path(__file__).parents[2]
SERVE = "from app.commands import serve; serve(prog_name='robust serve')"


def start(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVE, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ROBUST_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fails(*arguments: str, **environment: str) -> str:
    """The one line of a start that fails with exit code 2."""
    process = start(*arguments, **environment)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (2, "")
    (line,) = errors.strip().splitlines()
    return line


class Server:
    def __init__(self, path: Path, **environment: str) -> None:
        settings = {"ROBUST_RELOAD_SECONDS": "60", "ROBUST_GRACE_SECONDS": "90", **environment}
        self.process = start("--port", "0", "--checkpoint", str(path), **settings)
        assert self.process.stdout is not None
        self.lines = [self.process.stdout.readline() for _ in range(2)]
        self.url = re.findall(r"http://127\.0\.0\.1:\d+", self.lines[0])[0]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    path = tmp_path / "robust_model.pt"
    write_checkpoint(path, arch="resnet18")
    server = Server(path, ROBUST_APIKEYS="secret")
    yield server
    if server.process.poll() is None:
        server.process.kill()
    server.process.communicate()


def test_service_from_start_to_sigterm(server: Server, tmp_path: Path) -> None:
    # The line to paste works as it is, where there is curl.
    command = re.fullmatch(r"  (curl -F file=@(\S+) (\S+))\n", server.lines[1])
    assert command is not None
    assert command[2] in ("examples/horse.jpg", "photo.jpg")  # the model is right about it
    photo = ROOT / command[2] if (ROOT / command[2]).exists() else None
    data = photo.read_bytes() if photo else png()
    answer = httpx.post(command[3], files={"file": data}, timeout=120)
    assert answer.status_code == 200
    old = answer.json()["model_sha256"]

    new = write_checkpoint(tmp_path / "robust_model.pt", seed=7, arch="resnet18")
    server.process.send_signal(signal.SIGHUP)  # no need to wait for the next look
    until(lambda: httpx.get(f"{server.url}/model", timeout=120).json()["sha256"] == new)
    assert new != old

    job = httpx.post(f"{server.url}/evaluate?attack=pgd-200", content=labeled(500), timeout=120)
    assert job.status_code == 202
    events = f"{server.url}{job.headers['Location']}/events"
    with httpx.stream("GET", events, timeout=120) as stream:
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert "event: cancelled" in list(stream.iter_lines())
    _, errors = server.process.communicate(timeout=120)
    assert server.process.returncode == 0
    assert time.monotonic() - begun < 60  # not the whole grace time for one who only watches
    assert "Traceback" not in errors
    assert errors.count("POST /predict 200") == 1
    assert "WARNING" in next(line for line in errors.splitlines() if "ROBUST_APIKEYS" in line)


def test_running_request_finishes_after_sigterm(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    data = png()
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        head = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data[:10])
        in_flight = "robust_requests_in_flight 2.0"  # that one and this
        until(lambda: in_flight in httpx.get(f"{server.url}/metrics", timeout=120).text)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{server.url}/readyz", timeout=120).status_code == 503)
        assert httpx.post(f"{server.url}/predict", content=data, timeout=120).status_code == 503
        connection.sendall(data[10:])
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert server.process.wait(280) == 0


def test_second_signal_exits_immediately(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n."
        )
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{server.url}/readyz", timeout=120).status_code == 503)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(280) == 0
        assert time.monotonic() - begun < 60


def test_port_in_use_is_reported_before_loading() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = fails("--port", port, "--checkpoint", "/no/such/file")
    assert re.search(rf"port {port} is in use", line)


def test_startup_errors_are_one_line(checkpoint: Path, tmp_path: Path) -> None:
    assert "not an address of this machine" in fails("--host", "192.0.2.1", "--port", "0")
    line = fails("--port", "0", "--checkpoint", str(checkpoint), ROBUST_MAX_STEPS="0")
    assert "ROBUST_MAX_STEPS" in line
    assert "greater than or equal to 1" in line


@pytest.mark.parametrize("how", ["missing", "truncated", "other hash", "no device"])
def test_unusable_checkpoint_fails_startup(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    import click

    import app.commands
    from robust.checkpoint import CheckpointError

    path = tmp_path / "robust_model.pt"
    if how != "missing":
        path.write_bytes(checkpoint.read_bytes()[: 1000 if how == "truncated" else None])
        text = sidecar_path(checkpoint).read_text()
        other = re.sub(r'"weights_sha256": "..', '"weights_sha256": "00', text)
        sidecar_path(path).write_text(other if how == "other hash" else text)
    arguments = ["--port", "0", "--checkpoint", str(path)]
    arguments += ["--device", "teapot"] if how == "no device" else []
    monkeypatch.setattr(gc, "freeze", lambda: None)  # other tests expect their garbage collected
    with pytest.raises((CheckpointError, ValueError, click.ClickException)) as caught:
        app.commands.serve.main(arguments, standalone_mode=False)
    assert "\n" not in str(caught.value)
    assert ("teapot" if how == "no device" else str(path)) in str(caught.value)


def test_help_is_quick_to_import() -> None:
    code = "import sys, app.commands; print('torch' in sys.modules or 'fastapi' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False"

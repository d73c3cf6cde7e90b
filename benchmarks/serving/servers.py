"""The compared servers: how each is started, monitored and stopped."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import httpx

from benchmarks.serving.load import predict

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
ROOT = HERE.parents[1]
START_SECONDS = 300.0
END_SECONDS = 30.0  # for a server to stop after SIGTERM
LEFT_SECONDS = 3.0  # for its children to stop after it
PORTS = range(20_000, 32_000)  # Linux uses ports from 32,768 on for outgoing connections
TICKS = os.sysconf("SC_CLK_TCK")

Settings = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of server, with the environment variables to try in tuning as `settings`."""

    name: str
    command: Callable[[Path, Path, int], list[str]]  # of the peers' Python, weights and port
    settings: tuple[Settings, ...] = ({},)


def _ours(_: Path, weights: Path, port: int) -> list[str]:
    serve = [sys.executable, "-m", "robust_cli", "serve"]
    return [*serve, "--port", str(port), "--checkpoint", str(weights)]


def _fastapi(python: Path, _: Path, port: int) -> list[str]:
    return [str(python), "-m", "uvicorn", "sync_endpoint:app", "--port", str(port)]


def _litserve(python: Path, _: Path, port: int) -> list[str]:
    return [str(python), "lit.py", str(port)]


def _bentoml(python: Path, _: Path, port: int) -> list[str]:
    serve = [str(python), "-m", "bentoml", "serve", "bento:Classify", "--working-dir", "."]
    return [*serve, "--host", "127.0.0.1", "--port", str(port)]


def _each(**values: tuple[str, ...]) -> tuple[Settings, ...]:
    names = [f"SERVING_{name}" for name in values]
    return tuple(dict(zip(names, row, strict=True)) for row in product(*values.values()))


KINDS = {
    kind.name: kind
    for kind in (
        Kind(name="robust", command=_ours),
        Kind(name="fastapi", command=_fastapi),
        Kind(
            name="litserve",
            command=_litserve,
            settings=_each(BATCH=("16", "64"), WAIT_MS=("1", "5"), FAST_QUEUE=("0", "1")),
        ),
        Kind(
            name="bentoml",
            command=_bentoml,
            settings=_each(BATCH=("16", "32", "64"), WAIT_MS=("1000", "60000")),
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server that responds at `url`."""

    pid: int
    url: str
    ready_seconds: float  # from the start to the first response

    def cpu_seconds(self) -> float:
        """CPU time of all its processes so far."""
        return sum(_cpu_seconds(pid) for pid in family(self.pid))

    def memory_bytes(self) -> int:
        """Memory of all its processes, with shared memory counted once."""
        return sum(_kilobytes(pid, "smaps_rollup", "Pss:") for pid in family(self.pid)) * 1024

    def resident_bytes(self) -> int:
        """VmRSS of its first process."""
        return _kilobytes(self.pid, "status", "VmRSS:") * 1024


@contextmanager
def started(
    kind: Kind, python: Path, weights: Path, image: bytes, settings: Settings | None = None
) -> Iterator[Server]:
    """A fresh server, which has responded once. Raises ValueError if it does not start."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/predict"
    ours = {name: value for name, value in os.environ.items() if not name.startswith("ROBUST_")}
    given = {"SERVING_WEIGHTS": str(weights.resolve()), "BENTOML_DO_NOT_TRACK": "1"}
    if kind.name == "robust":
        ours["PYTHONPATH"] = os.pathsep.join([str(ROOT), ours.get("PYTHONPATH", "")])
    else:
        ours.pop("PYTHONPATH", None)
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            kind.command(python, weights.resolve(), port),
            cwd=ROOT if kind.name == "robust" else PEERS,
            env=ours | given | (settings or {}),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            if not _responds(process, url, image):
                log.seek(0)
                raise ValueError(f"expected {kind.name} to serve: {log.read()[-2000:].decode()}")
            yield Server(pid=process.pid, url=url, ready_seconds=time.monotonic() - began)
        finally:
            end(process)


def free_port() -> int:
    """A free port outside the range of outgoing connections.

    Polling a server on a port in that range before it listens can connect the client to itself,
    and then the port is taken when the server starts.
    """
    for port in random.sample(PORTS, len(PORTS)):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise ValueError(f"expected a free port of {PORTS.start} to {PORTS.stop - 1}, got none")


def _responds(process: subprocess.Popen[bytes], url: str, image: bytes) -> bool:
    """Wait for the first response; returns False if the server ends or takes too long."""
    latest = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < latest:
        try:
            predict(url, image, seconds=END_SECONDS)
            return True
        except httpx.HTTPError:
            time.sleep(0.05)
    return False


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a server and its descendants, each by its own id."""
    left = family(process.pid)[1:]
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _until_gone(left)
    for pid in filter(_running, left):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _until_gone(left)


def _until_gone(pids: list[int]) -> None:
    latest = time.monotonic() + LEFT_SECONDS
    while any(map(_running, pids)) and time.monotonic() < latest:
        time.sleep(0.05)


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := _fields(int(folder.name))):
            parents[int(folder.name)] = int(fields[1])
    found = [pid]
    for one in found:  # the list grows in the loop
        found += [child for child, parent in parents.items() if parent == one]
    return found


def _fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _running(pid: int) -> bool:
    fields = _fields(pid)
    return bool(fields) and fields[0] != "Z"


def _cpu_seconds(pid: int) -> float:
    fields = _fields(pid)
    return (int(fields[11]) + int(fields[12])) / TICKS if fields else 0.0


def _kilobytes(pid: int, file: str, name: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)

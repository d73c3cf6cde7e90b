"""Loads a server with one small PNG in a form, sent repeatedly by a number of clients."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from robust.images import decode_image, encode_png, fit_image

HERE = Path(__file__).resolve().parent
PHOTO = HERE.parents[1] / "examples" / "dog.jpg"
BOUNDARY = "----robust-benchmark"
OK = 200
TIMEOUT_SECONDS = 60  # for one response; the slowest server takes 10 at 256 clients


@dataclass(frozen=True, kw_only=True)
class Load:
    """The result of loading a server. Latencies are over all responses of any status."""

    clients: int
    seconds: float
    statuses: dict[int, int]  # responses by status
    p50_ms: float
    p99_ms: float
    broken: int  # connections that failed
    timeouts: int  # responses that took longer than TIMEOUT_SECONDS

    @property
    def throughput(self) -> float:
        """Responses with status 200 per second."""
        return self.statuses.get(OK, 0) / self.seconds

    @property
    def requests(self) -> int:
        """Number of responses of any status."""
        return sum(self.statuses.values())

    def errors(self) -> str:
        """The failed requests by kind, as text; empty if there are none."""
        other = {str(status): n for status, n in self.statuses.items() if status != OK}
        other |= {"broken": self.broken, "timeouts": self.timeouts}
        return ", ".join(f"{n} {name}" for name, n in other.items() if n)


def small_png(size: int) -> bytes:
    """A photo as PNG in the network's input size, 2.4 KB at 32 pixels."""
    return encode_png(fit_image(decode_image(PHOTO.read_bytes()), size))


def form(image: bytes) -> bytes:
    """A multipart form with the image in the field `file`."""
    disposition = 'Content-Disposition: form-data; name="file"; filename="image.png"'
    head = f"--{BOUNDARY}\r\n{disposition}\r\nContent-Type: image/png\r\n\r\n"
    return head.encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode()


def predict(url: str, image: bytes, *, seconds: float = TIMEOUT_SECONDS) -> Any:
    """The JSON of one prediction. Raises httpx.HTTPError for an error or no response."""
    answer = httpx.post(url, files={"file": ("image.png", image, "image/png")}, timeout=seconds)
    return answer.raise_for_status().json()


def generate(url: str, body: Path, *, clients: int, seconds: float) -> Load:
    """Let wrk send the form in `body` from `clients` concurrent clients."""
    done = subprocess.run(
        [
            *(_wrk(), "--threads", "1", "--connections", str(clients)),
            *("--duration", f"{max(1, round(seconds))}s", "--timeout", f"{TIMEOUT_SECONDS}s"),
            *("--script", str(HERE / "load.lua"), url, "--", str(body), BOUNDARY),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return read_load(done.stdout, clients)


def version_of_wrk() -> str:
    """The name and version of wrk. Raises ValueError if it is not installed."""
    done = subprocess.run([_wrk(), "--version"], capture_output=True, text=True)
    return done.stdout.partition(" Copyright")[0]


def _wrk() -> str:
    if path := shutil.which("wrk"):
        return path
    raise ValueError("expected the load generator wrk, found none: apt-get install wrk")


def read_load(output: str, clients: int) -> Load:
    """The result in the last line of wrk's output."""
    values = json.loads(output.splitlines()[-1])
    statuses = {int(status): n for status, n in values.pop("statuses").items()}
    return Load(clients=clients, statuses=statuses, **values)

"""The load on a server: one small PNG in a form, again and again, from a number of clients."""

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
PATIENCE_SECONDS = 60  # for one answer: at 256 clients the slowest server needs 10


@dataclass(frozen=True, kw_only=True)
class Load:
    """What came of loading a server. Latencies are of all answers, whatever their status."""

    clients: int
    seconds: float
    statuses: dict[int, int]  # answers by status
    p50_ms: float
    p99_ms: float
    broken: int  # connections that failed
    timeouts: int  # answers that took longer than the patience

    @property
    def throughput(self) -> float:
        """Requests answered with 200, a second."""
        return self.statuses.get(OK, 0) / self.seconds

    @property
    def requests(self) -> int:
        """Requests answered, whatever the status."""
        return sum(self.statuses.values())

    def errors(self) -> str:
        """What was not answered with 200, in words; empty when nothing."""
        other = {str(status): n for status, n in self.statuses.items() if status != OK}
        other |= {"broken": self.broken, "timeouts": self.timeouts}
        return ", ".join(f"{n} {name}" for name, n in other.items() if n)


def small_png(size: int) -> bytes:
    """A photo as PNG of the size the network takes, 2.4 KB at 32 pixels."""
    return encode_png(fit_image(decode_image(PHOTO.read_bytes()), size))


def form(image: bytes) -> bytes:
    """A multipart form with the image in the field `file`."""
    disposition = 'Content-Disposition: form-data; name="file"; filename="image.png"'
    head = f"--{BOUNDARY}\r\n{disposition}\r\nContent-Type: image/png\r\n\r\n"
    return head.encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode()


def ask(url: str, image: bytes, *, seconds: float = PATIENCE_SECONDS) -> Any:
    """The answer to one request. Raises httpx.HTTPError when there is none, or an error."""
    answer = httpx.post(url, files={"file": ("image.png", image, "image/png")}, timeout=seconds)
    return answer.raise_for_status().json()


def generate(url: str, body: Path, *, clients: int, seconds: float) -> Load:
    """Let wrk send the form in `body` from so many clients at once."""
    done = subprocess.run(
        [
            *(_wrk(), "--threads", "1", "--connections", str(clients)),
            *("--duration", f"{max(1, round(seconds))}s", "--timeout", f"{PATIENCE_SECONDS}s"),
            *("--script", str(HERE / "load.lua"), url, "--", str(body), BOUNDARY),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return read_load(done.stdout, clients)


def version_of_wrk() -> str:
    """Its name and version. Raises ValueError where it is not installed."""
    done = subprocess.run([_wrk(), "--version"], capture_output=True, text=True)
    return done.stdout.partition(" Copyright")[0]


def _wrk() -> str:
    if path := shutil.which("wrk"):
        return path
    raise ValueError("expected the load generator wrk, found none: apt-get install wrk")


def read_load(output: str, clients: int) -> Load:
    """The last line of what wrk printed."""
    values = json.loads(output.splitlines()[-1])
    statuses = {int(status): n for status, n in values.pop("statuses").items()}
    return Load(clients=clients, statuses=statuses, **values)

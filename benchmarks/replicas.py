"""Kills one of two replicas behind nginx, during an evaluation and under load.

    python benchmarks/replicas.py

Starts a private PostgreSQL in a temporary folder, two `robust serve`, and nginx with
`deploy/replicas/nginx.conf`. Runs an evaluation undisturbed, and then again while a few clients
request predictions, and kills the replica that runs it with SIGKILL. Exits with 1 unless every
prediction was answered and the evaluation finished on the other replica with the same result.
Needs the extra postgres, and Debian's packages postgresql and nginx.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.private_postgres import PrivatePostgres, why_not  # noqa: E402
from benchmarks.serving.servers import free_port  # noqa: E402
from robust.checkpoint import load_checkpoint  # noqa: E402
from robust.images import to_float  # noqa: E402

PHOTO = ROOT / "examples" / "cat.jpg"
CONFIGURATION = ROOT / "deploy" / "replicas" / "nginx.conf"
TIMEOUT_SECONDS = 1800.0  # for each wait


@dataclass
class Replica:
    """A `robust serve` process."""

    name: str
    process: subprocess.Popen[str]
    url: str


def missing() -> str | None:
    """The reason if something is not installed here, else None."""
    if shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
        return "nginx is not installed"
    return why_not()


def main() -> int:
    """Run the experiment; returns the exit status."""
    options = parse()
    if reason := missing():
        click.echo(f"not run: {reason}", err=True)
        return 2
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="replicas-")))
        postgres = stack.enter_context(PrivatePostgres())
        database = postgres.database()
        replicas = [
            stack.enter_context(replica(name, database, folder, options)) for name in ("A", "B")
        ]
        url = stack.enter_context(nginx(folder, replicas))
        say(f"replicas A and B on one PostgreSQL, nginx in front of them at {url}")
        return show(url, replicas, folder, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    add = parser.add_argument
    add("--checkpoint", type=Path, default=ROOT / "models" / "robust_model.pt")
    add("--images", type=int, default=200, help="images to evaluate")
    add("--attack", default="pgd-40")
    add("--eps", default="2/255")
    add("--clients", type=int, default=4, help="clients that request predictions")
    add("--kill-at", type=float, default=0.4, help="share of the evaluation done at the kill")
    add("--lost-seconds", type=float, default=10.0, help="ROBUST_LOST_SECONDS")
    add("--threads", type=int, default=1, help="threads per replica")
    return parser.parse_args()


def show(url: str, replicas: list[Replica], folder: Path, options: argparse.Namespace) -> int:
    """Evaluate twice, the second time with a kill, and compare; returns the exit status."""
    data = labeled(options.checkpoint, options.images)
    with httpx.Client(base_url=url, timeout=120) as client:
        start = time.monotonic()
        expected = finished(client, submit(client, data, options, "undisturbed"))
        say(f"undisturbed: {accuracies(expected)}, {time.monotonic() - start:.1f} s")
        with load(url, options.clients) as answers:
            start = time.monotonic()
            id = submit(client, data, options, "disturbed")
            killed, survivor = kill(client, id, replicas, options)
            found = finished(client, id)
            say(f"disturbed: {accuracies(found)}, {time.monotonic() - start:.1f} s")
    different = differences(without_seconds(expected), without_seconds(found))
    say(f"the same result: {'NO: ' + '; '.join(different[:10]) if different else 'yes'}")
    lost = {status: count for status, count in answers.items() if status != "200"}
    say(f"predictions: {answers['200']} answered, {sum(lost.values())} not {lost or ''}")
    say(f"{repeats(folder / 'access.log')} of them were sent to {killed.name} first, and then "
        f"answered by {survivor.name}")  # fmt: skip
    return 1 if different or lost else 0


def kill(
    client: httpx.Client, id: str, replicas: list[Replica], options: argparse.Namespace
) -> tuple[Replica, Replica]:
    """Kill the replica that runs the evaluation; returns it and the one that takes over."""
    wait(lambda: done(client, id) >= options.kill_at)
    killed = next(item for item in replicas if is_evaluating(item))
    survivor = next(item for item in replicas if item is not killed)
    share, killed_at = done(client, id), time.monotonic()
    killed.process.kill()
    killed.process.wait()
    say(f"killed {killed.name}, which had done {100 * share:.0f}% of it, "
        f"while {options.clients} clients requested predictions")  # fmt: skip
    wait(lambda: is_evaluating(survivor))
    say(f"{survivor.name} took over after {time.monotonic() - killed_at:.1f} s")
    return killed, survivor


def say(line: str) -> None:
    """Print a line and flush it, also to a pipe."""
    click.echo(line)


def labeled(checkpoint: Path, n: int) -> bytes:
    """An npz of random images, labeled with the model's own predictions."""
    classifier = load_checkpoint(checkpoint).classifier
    size = classifier.architecture.input_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        labels = torch.cat([classifier(to_float(part)).argmax(1) for part in images.split(50)])
    buffer = io.BytesIO()
    np.savez(buffer, images=images.numpy(), labels=labels.numpy())
    return buffer.getvalue()


def submit(client: httpx.Client, data: bytes, options: argparse.Namespace, key: str) -> str:
    """Start the evaluation; returns its id."""
    answer = client.post(
        "/evaluate",
        files={"file": data},
        data={"attack": options.attack, "eps": options.eps},
        headers={"Idempotency-Key": key},
    )
    answer.raise_for_status()
    id: str = answer.json()["id"]
    return id


def status(client: httpx.Client, id: str) -> dict[str, Any]:
    """The state of the evaluation, from whichever replica nginx picks."""
    found: dict[str, Any] = client.get(f"/evaluate/{id}").raise_for_status().json()
    return found


def done(client: httpx.Client, id: str) -> float:
    """The share of the evaluation that is done."""
    share: float = (status(client, id)["evaluation"] or {"done": 0.0})["done"]
    return share


def finished(client: httpx.Client, id: str) -> dict[str, Any]:
    """Wait for the evaluation; returns its result."""
    wait(lambda: status(client, id)["state"] not in ("queued", "running"))
    job = status(client, id)
    if job["state"] != "done":
        raise RuntimeError(f"the evaluation is {job['state']}: {job['error']}")
    result: dict[str, Any] = job["evaluation"]
    return result


def is_evaluating(replica: Replica) -> bool:
    """Whether the replica runs an evaluation, according to its metrics."""
    text = httpx.get(f"{replica.url}/metrics", timeout=60).text
    found = re.search(r'^robust_queued_forwards\{kind="evaluate"\} (\S+)$', text, re.MULTILINE)
    return found is not None and float(found[1]) > 0


@contextmanager
def load(url: str, clients: int) -> Iterator[Counter[str]]:
    """Request predictions without a pause during the block; yields the count by status."""
    answers: Counter[str] = Counter()
    photo, stop, lock = PHOTO.read_bytes(), threading.Event(), threading.Lock()

    def run_client() -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            while not stop.is_set():
                try:
                    answer = str(client.post("/predict", content=photo).status_code)
                except httpx.HTTPError as error:
                    answer = type(error).__name__
                with lock:
                    answers[answer] += 1

    threads = [threading.Thread(target=run_client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@contextmanager
def replica(
    name: str, database: str, folder: Path, options: argparse.Namespace
) -> Iterator[Replica]:
    """A `robust serve` on a free port, with its log in `folder`."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "ROBUST_DATABASE_URL": database,
        "ROBUST_LOST_SECONDS": str(options.lost_seconds),
        "ROBUST_THREADS": str(options.threads),
        "ROBUST_DEVICE": "cpu",
    }
    command = [sys.executable, "-m", "robust_cli", "serve", "--port", "0"]
    command += ["--checkpoint", str(options.checkpoint)]
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            if found is None:
                raise RuntimeError((folder / f"{name}.log").read_text())
            yield Replica(name, process, found[0])
        finally:
            process.terminate()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@contextmanager
def nginx(folder: Path, replicas: list[Replica]) -> Iterator[str]:
    """nginx in front of the replicas; yields its address."""
    port = free_port()
    text = CONFIGURATION.read_text().replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    for item, place in zip(replicas, ("127.0.0.1:8001", "127.0.0.1:8002"), strict=True):
        text = text.replace(place, item.url.removeprefix("http://"))
    (folder / "nginx.conf").write_text(text)
    folder.chmod(0o777)  # its workers run as another user
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    assert program is not None
    command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    with (folder / "nginx.log").open("w") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            wait(lambda: process.poll() is not None or answers(f"http://127.0.0.1:{port}/livez"))
            if process.poll() is not None:
                raise RuntimeError((folder / "nginx.log").read_text())
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def answers(url: str) -> bool:
    """Whether `url` responds successfully."""
    try:
        return httpx.get(url, timeout=10).is_success
    except httpx.HTTPError:
        return False


def repeats(log: Path) -> int:
    """The number of predictions that nginx sent to a second replica."""
    lines = [line.split() for line in log.read_text().splitlines()]
    return sum(line[:2] == ["POST", "/predict"] and line[3].endswith(",") for line in lines)


def accuracies(result: dict[str, Any]) -> str:
    """The accuracy under each attack, as text."""
    return ", ".join(
        f"{item['attack']} {item['correct']}/{item['n']}" for item in result["results"]
    )


def without_seconds(value: Any) -> Any:
    """A result without the times, which differ from run to run."""
    if isinstance(value, dict):
        return {n: without_seconds(v) for n, v in value.items() if n not in ("seconds", "times")}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def differences(expected: Any, found: Any, where: str = "") -> list[str]:
    """The paths where two results differ, with both values."""
    if isinstance(expected, dict) and isinstance(found, dict):
        names = dict.fromkeys([*expected, *found])
        pairs = [(f"{where}.{name}", expected.get(name), found.get(name)) for name in names]
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = [
            (f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(expected, found, strict=True))
        ]
    else:
        return [] if expected == found else [f"{where} {expected} and {found}"]
    return [line for place, a, b in pairs for line in differences(a, b, place)]


def wait(condition: Callable[[], bool]) -> None:
    """Wait until `condition` is true. Raises TimeoutError."""
    latest = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        if time.monotonic() > latest:
            raise TimeoutError(f"nothing happened for {TIMEOUT_SECONDS:.0f} s")
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())

"""Measures how long predictions wait while an evaluation runs, against an idle service.

    python benchmarks/priority.py --checkpoint models/robust_model.pt --seconds 20

One client requests one prediction at a time over HTTP; printed are p50 and p99. A step is the
longest pass of an evaluation: the gradient of a full evaluation batch, in the precision of the
service's search. The goal is a p50 during the evaluation of at most twice the idle p50 plus a step.
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, quantiles

import click
import httpx
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where it is not installed

from app.engine.cpu_limits import available_processors
from app.engine.served_model import ServedModel, load_model
from robust.evaluation.precision import Precision
from robust.images import encode_png

ROOT = Path(__file__).resolve().parents[1]


def waits(client: httpx.Client, data: bytes, seconds: float) -> list[float]:
    """Milliseconds of consecutive predictions."""
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        client.post("/predict", content=data).raise_for_status()
        found.append(1000 * (time.perf_counter() - began))
    return found


def shown(name: str, values: list[float]) -> str:
    p99 = quantiles(values, n=100)[98]
    return f"{name:18} p50 {median(values):7.1f} ms, p99 {p99:7.1f} ms, {len(values)} predictions"


def step(model: ServedModel, images: int, repeats: int = 7) -> float:
    """Median milliseconds of a gradient of `images` images."""
    torch.set_num_threads(min(torch.get_num_threads(), available_processors()))
    search = model.bf16 or model.logits
    x = torch.rand(images, 3, model.input_size, model.input_size, requires_grad=True)
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        torch.autograd.grad(search(x)[:, 0].sum(), x)
        times.append(1000 * (time.perf_counter() - began))
    return median(times[1:])


def labeled(n: int, size: int, classes: int) -> bytes:
    """An upload of `n` random labeled images, to keep an evaluation busy."""
    generator, buffer = np.random.default_rng(0), io.BytesIO()
    images = generator.integers(0, 256, (n, 3, size, size), dtype=np.uint8)
    np.savez(buffer, images=images, labels=generator.integers(0, classes, n))
    return buffer.getvalue()


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit("the service did not start")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "models" / "robust_model.pt")
    parser.add_argument(
        "--seconds", type=float, default=20, help="seconds of predictions, idle and busy"
    )
    parser.add_argument("--images", type=int, default=5000, help="images to evaluate")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()

    cpu = torch.device("cpu")
    model = load_model(args.checkpoint, cpu, attacks_only=True)
    upload = labeled(args.images, model.input_size, len(model.classes))
    photo = torch.randint(0, 256, (3, model.input_size, model.input_size), dtype=torch.uint8)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "robust_cli", "serve", "--port", str(port)],
        cwd=ROOT,
        env=os.environ
        | {
            "ROBUST_CHECKPOINT": str(args.checkpoint.resolve()),
            "ROBUST_DEVICE": "cpu",
            "ROBUST_EVALUATION_BATCH": str(args.batch),
            "ROBUST_LOG_LEVEL": "warning",
        },
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            wait_until_ready(client, process)
            searched = client.get("/model").json()["search_precision"]
            data = encode_png(photo)
            waits(client, data, 1)  # warm up
            idle = waits(client, data, args.seconds)
            job = client.post(
                "/evaluate", files={"file": upload}, data={"attack": ["pgd-200"]}
            ).raise_for_status()
            location = job.headers["Location"]
            while client.get(location).json()["state"] == "queued":
                time.sleep(0.05)
            busy = waits(client, data, args.seconds)
            state = client.get(location).json()["state"]
            client.delete(location)
    finally:
        process.terminate()
        process.wait(60)
    if state != "running":
        raise SystemExit(f"the evaluation is {state}: use more --images or fewer --seconds")
    precision: Precision = "bf16" if searched.startswith("bf16") else "fp32"
    model = load_model(args.checkpoint, cpu, attacks_only=True, precision=precision)
    longest = step(model, args.batch)
    goal = 2 * median(idle) + longest
    click.echo(shown("idle", idle))
    click.echo(shown("during evaluation", busy))
    click.echo(f"{'step':18} {longest:11.1f} ms, a gradient of {args.batch} images in {searched}")
    click.echo(f"{'goal':18} {goal:11.1f} ms: {'met' if median(busy) <= goal else 'missed'}")


if __name__ == "__main__":
    main()

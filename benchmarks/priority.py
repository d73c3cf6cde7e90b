"""Measures how long predictions wait while an evaluation runs, against an idle service.

    python benchmarks/priority.py --checkpoint models/robust_model.pt --seconds 20

One client requests one prediction at a time over HTTP, in blocks of time without and with an
evaluation in turn. Printed are p50 and p99 of all blocks and, in parentheses, the least and most
p50 of a block. A step is the longest pass of an evaluation: the gradient of a full evaluation
batch, in the precision of the service's search. The goal is a p50 during the evaluation of at most
twice the idle p50 plus a step.
"""

from __future__ import annotations

import argparse
import io
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
from benchmarks.common import ROOT, service
from robust.evaluation.precision import Precision
from robust.images import encode_png


def waits(client: httpx.Client, data: bytes, seconds: float) -> list[float]:
    """Milliseconds of consecutive predictions."""
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        client.post("/predict", content=data).raise_for_status()
        found.append(1000 * (time.perf_counter() - began))
    return found


def pooled(blocks: list[list[float]]) -> list[float]:
    return [value for block in blocks for value in block]


def shown(name: str, blocks: list[list[float]]) -> str:
    """The quantiles of all predictions and, in parentheses, the least and most p50 of a block."""
    values, middles = pooled(blocks), [median(block) for block in blocks]
    p99 = quantiles(values, n=100)[98]
    return (
        f"{name:18} p50 {median(values):7.1f} ms ({min(middles):.1f} to {max(middles):.1f}), "
        f"p99 {p99:7.1f} ms, {len(values)} predictions"
    )


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


def evaluate(client: httpx.Client, upload: bytes) -> str:
    """Start an evaluation; returns its URL once it runs."""
    job = client.post(
        "/evaluate", files={"file": upload}, data={"attack": ["pgd-200"]}
    ).raise_for_status()
    location: str = job.headers["Location"]
    while client.get(location).json()["state"] == "queued":
        time.sleep(0.05)
    return location


def cancel(client: httpx.Client, location: str) -> None:
    """End an evaluation. Raises SystemExit if it has ended by itself."""
    state = client.get(location).json()["state"]
    if state != "running":
        raise SystemExit(f"the evaluation is {state}: use more --images or fewer --seconds")
    client.delete(location).raise_for_status()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "models" / "robust_model.pt")
    parser.add_argument(
        "--seconds", type=float, default=20, help="seconds of predictions, idle and busy"
    )
    parser.add_argument("--blocks", type=int, default=4, help="blocks of idle and busy seconds")
    parser.add_argument("--images", type=int, default=5000, help="images to evaluate")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()

    cpu = torch.device("cpu")
    model = load_model(args.checkpoint, cpu, attacks_only=True)
    upload = labeled(args.images, model.input_size, len(model.classes))
    photo = torch.randint(0, 256, (3, model.input_size, model.input_size), dtype=torch.uint8)
    idle: list[list[float]] = []
    busy: list[list[float]] = []
    address = service(
        ROBUST_CHECKPOINT=str(args.checkpoint.resolve()),
        ROBUST_DEVICE="cpu",
        ROBUST_EVALUATION_BATCH=str(args.batch),
        ROBUST_LOG_LEVEL="warning",
    )
    with address as url, httpx.Client(base_url=url, timeout=120) as client:
        searched = client.get("/model").json()["search_precision"]
        data = encode_png(photo)
        for _ in range(args.blocks):
            waits(client, data, 1)  # warm up, or until the last step of an evaluation has ended
            idle.append(waits(client, data, args.seconds / args.blocks))
            location = evaluate(client, upload)
            busy.append(waits(client, data, args.seconds / args.blocks))
            cancel(client, location)
    precision: Precision = "bf16" if searched.startswith("bf16") else "fp32"
    model = load_model(args.checkpoint, cpu, attacks_only=True, precision=precision)
    longest = step(model, args.batch)
    goal = 2 * median(pooled(idle)) + longest
    met = median(pooled(busy)) <= goal
    click.echo(shown("idle", idle))
    click.echo(shown("during evaluation", busy))
    click.echo(f"{'step':18} {longest:11.1f} ms, a gradient of {args.batch} images in {searched}")
    click.echo(f"{'goal':18} {goal:11.1f} ms: {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()

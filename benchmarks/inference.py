"""How much faster is a classifier's copy for inference? Prints images/s, forward and gradient.

    python benchmarks/inference.py --arch resnet50 --batch 1 8 32 100 200

Both take turns, so that a machine that others use slows both; given are the median and, after
it, the fastest and slowest of the repeats.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where it is not installed

from robust.classifier import ARCHS, STEMS, Architecture, Classifier, resolve_device
from robust.environment import device_in_words, versions
from robust.inference import for_inference


def forward(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def gradient(model: nn.Module, x: Tensor) -> None:
    """What a step of an attack costs."""
    x = x.detach().requires_grad_()
    torch.autograd.grad(model(x)[:, 0].sum(), x)


def seconds(run: Callable[[nn.Module, Tensor], None], model: nn.Module, x: Tensor) -> float:
    began = time.perf_counter()
    run(model, x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - began


def rates(times: list[float], n: int) -> str:
    middle, best, worst = n / median(times), n / min(times), n / max(times)
    return f"{middle:7.0f} ({worst:5.0f}-{best:5.0f})"


def hardware(device: torch.device) -> str:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((li.split(":")[1].strip() for li in lines if "model name" in li), name)
    words = ", ".join(f"{key} {value}" for key, value in versions().items())
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device_in_words(device)}, {name}, {capability}; {words}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=ARCHS, default="resnet50")
    parser.add_argument("--stem", choices=STEMS, nargs="+", default=list(STEMS))
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 100, 200])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    args = parser.parse_args()
    device = resolve_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)

    click.echo(hardware(device))
    click.echo(
        f"{args.arch}, {args.size}x{args.size}, float32, images/s: median (slowest-fastest)\n"
    )
    click.echo(f"{'stem':8} {'':8} {'batch':>5} {'classifier':>22} {'for inference':>22}  ratio")
    for stem in args.stem:
        architecture = Architecture(arch=args.arch, stem=stem, input_size=args.size)
        classifier = Classifier(architecture).eval().requires_grad_(False).to(device)
        models = (classifier, for_inference(classifier))
        for run in (forward, gradient):
            for n in args.batch:
                x = torch.rand(n, 3, args.size, args.size, device=device)
                for model in models:  # warm up
                    seconds(run, model, x)
                turns = [[seconds(run, model, x) for model in models] for _ in range(args.repeats)]
                plain, ours = map(list, zip(*turns, strict=True))
                ratio = median(plain) / median(ours)
                row = f"{rates(plain, n):>22} {rates(ours, n):>22} {ratio:6.2f}"
                click.echo(f"{stem:8} {run.__name__:8} {n:5} {row}")


if __name__ == "__main__":
    main()

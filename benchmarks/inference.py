"""Compares the speed of the ways to run a classifier: images/s of forward and gradient.

    python benchmarks/inference.py --arch resnet50 --batch 1 8 32 100 200

`classifier` is the network as trained, `for inference` its faster copy, and `packed` that copy with
packed weights on a CPU, in float32 and bfloat16; `onnxruntime` and `openvino` run the graph of that
copy on a CPU, if they are installed. Only torch computes gradients. All take turns, so that other
load slows all of them. Printed are the median and, in parentheses, the slowest and fastest of the
repeats. `gap` is the largest difference of a logit from the classifier's.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where it is not installed

from app.engine.runtime import onnx_runtime, openvino_bf16
from app.engine.runtime_plan import examples
from benchmarks.common import processor_name
from robust.classifier import (
    ACTIVATIONS,
    ARCHS,
    STEMS,
    Architecture,
    Classifier,
    resolve_device,
)
from robust.environment import device_in_words, versions
from robust.graph import build_onnx
from robust.inference import for_inference
from robust.packed import NotPackable, Packed

Model = Callable[[Tensor], Tensor]
DIFFERENTIABLE = ("classifier", "for inference", "packed", "packed bf16")


def forward(model: Model, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def gradient(model: Model, x: Tensor) -> None:
    """The computation of one step of an attack."""
    x = x.detach().requires_grad_()
    torch.autograd.grad(model(x)[:, 0].sum(), x)


def seconds(run: Callable[[Model, Tensor], None], model: Model, x: Tensor) -> float:
    began = time.perf_counter()
    run(model, x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - began


def rates(times: list[float], n: int) -> str:
    middle, best, worst = n / median(times), n / min(times), n / max(times)
    return f"{middle:7.0f} ({worst:5.0f}-{best:5.0f})"


def hardware(device: torch.device) -> str:
    words = ", ".join(f"{key} {value}" for key, value in versions().items())
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device_in_words(device)}, {processor_name()}, {capability}; {words}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=ARCHS, default="resnet50")
    parser.add_argument("--stem", choices=STEMS, nargs="+", default=list(STEMS))
    parser.add_argument("--activation", choices=ACTIVATIONS, default="relu")
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
        f"{args.arch}, {args.activation}, {args.size}x{args.size}, images/s: "
        "median (slowest-fastest)\n"
    )
    for stem in args.stem:
        architecture = Architecture(
            arch=args.arch, stem=stem, activation=args.activation, input_size=args.size
        )
        classifier = Classifier(architecture).eval().requires_grad_(False).to(device)
        models = models_of(classifier)
        show(stem, "", "batch", list(models))
        show(stem, "gap", 8, [f"{gap(model, classifier):.1g}" for model in models.values()])
        for run in (forward, gradient):
            compared = [
                model for name, model in models.items() if run is forward or name in DIFFERENTIABLE
            ]
            for n in args.batch:
                x = torch.rand(n, 3, args.size, args.size, device=device)
                for model in compared:  # warm up
                    seconds(run, model, x)
                turns = [
                    [seconds(run, model, x) for model in compared] for _ in range(args.repeats)
                ]
                show(
                    stem,
                    run.__name__,
                    n,
                    [rates(list(times), n) for times in zip(*turns, strict=True)],
                )
        click.echo()


def models_of(classifier: Classifier) -> dict[str, Model]:
    """The available ways to run `classifier`, torch's first."""
    fast = for_inference(classifier)
    models: dict[str, Model] = {"classifier": classifier, "for inference": fast}
    if fast.device.type != "cpu":
        return models
    for name, dtype in (("packed", torch.float32), ("packed bf16", torch.bfloat16)):
        with contextlib.suppress(NotPackable, RuntimeError, AttributeError):
            models[name] = Packed(fast, dtype)
    threads = torch.get_num_threads()
    for name, build in (
        ("onnxruntime", onnx_runtime),
        ("openvino", openvino),
        ("openvino bf16", openvino_bf16),
    ):
        with contextlib.suppress(ImportError):
            models[name] = build(build_onnx(fast).SerializeToString(), threads)
    return models


def openvino(graph: bytes, threads: int) -> Model:
    """The graph in OpenVINO. Raises ImportError if it is not installed."""
    from openvino import Core

    core = Core()
    config = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(graph), "CPU", config).create_infer_request()

    def logits(x: Tensor) -> Tensor:
        request.infer([x.numpy()], share_inputs=True)
        return torch.from_numpy(request.get_output_tensor().data.copy())

    return logits


def gap(model: Model, classifier: Classifier) -> float:
    """The largest difference of a logit on a few images."""
    side = classifier.architecture.input_size
    x = examples(8, side).to(classifier.mean.device)
    with torch.no_grad():
        return float((model(x) - classifier(x)).abs().amax())


def show(stem: str, what: str, batch: object, cells: list[str]) -> None:
    click.echo(f"{stem:8} {what:8} {batch:>5} " + " ".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main()

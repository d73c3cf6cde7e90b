"""Measures how many images per second this machine can classify without a server.

    python benchmarks/serving/limit.py WEIGHTS FOLDER PRECISION SECONDS BATCH...

Runs the forward pass in fp32 or bf16, in each installed runtime that supports the precision, at
each batch size for SECONDS each. Prints JSON: for each runtime and batch size the images per second
and the median time of a batch in ms, and the missing runtimes. The ONNX graph, the same as the
service's, is cached in FOLDER.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also where it is not installed

from app.engine.cpu_limits import available_processors
from app.engine.numpy_ops import softmax
from robust.checkpoint import Checkpoint, load_checkpoint
from robust.evaluation.precision import in_bf16
from robust.graph import build_onnx
from robust.inference import for_inference

Forward = Callable[[np.ndarray], np.ndarray]
PRECISIONS = ("fp32", "bf16")
TOLERANCE = {"fp32": 1e-4, "bf16": 0.01}  # largest difference of a probability
WARM_UP = 3  # passes per shape


def torch_copy(checkpoint: Checkpoint, _: Path, precision: str) -> Forward:
    """The inference copy that attacks and evaluations use."""
    model: Callable[[Tensor], Tensor] = for_inference(checkpoint.classifier)
    if precision == "bf16":
        model = in_bf16(model, torch.device("cpu"))

    def forward(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = model(torch.from_numpy(x)).numpy()
        return logits

    return forward


def onnx_runtime(_: Checkpoint, onnx: Path, precision: str) -> Forward:
    import onnxruntime

    if precision != "fp32":
        raise ImportError("ONNX Runtime has no convolutions in bfloat16 on a CPU")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_processors()
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"images": x})[0]


def openvino(_: Checkpoint, onnx: Path, precision: str) -> Forward:
    import openvino

    config = {
        "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else "bf16",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": available_processors(),
    }
    core = openvino.Core()
    requests: dict[int, Any] = {}

    def forward(x: np.ndarray) -> np.ndarray:
        if len(x) not in requests:  # one per batch size, as fixed shapes are fastest
            model = core.read_model(onnx)
            model.reshape(list(x.shape))
            requests[len(x)] = core.compile_model(model, "CPU", config).create_infer_request()
        logits: np.ndarray = requests[len(x)].infer([x], share_inputs=True)[0]
        return logits

    return forward


RUNTIMES: dict[str, Callable[[Checkpoint, Path, str], Forward]] = {
    "torch": torch_copy,
    "onnxruntime": onnx_runtime,
    "openvino": openvino,
}


def measure(forward: Forward, x: np.ndarray, seconds: float) -> dict[str, float]:
    """Images per second and the median pass in ms, over `seconds` seconds."""
    for _ in range(WARM_UP):
        forward(x)
    times = []
    latest = time.perf_counter() + seconds
    while time.perf_counter() < latest:
        began = time.perf_counter()
        forward(x)
        times.append(time.perf_counter() - began)
    return {"images_per_second": len(x) * len(times) / sum(times), "p50_ms": 1000 * median(times)}


def main() -> None:
    weights, folder, precision = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    seconds, batches = float(sys.argv[4]), [int(batch) for batch in sys.argv[5:]]
    checkpoint = load_checkpoint(weights)
    torch.set_num_threads(available_processors())
    onnx = folder / f"{checkpoint.sha256}.onnx"
    if not onnx.exists():
        onnx.write_bytes(build_onnx(for_inference(checkpoint.classifier)).SerializeToString())
    size = checkpoint.classifier.architecture.input_size
    x = np.random.default_rng(0).random((max(batches), 3, size, size), dtype=np.float32)
    with torch.inference_mode():
        expected = checkpoint.classifier(torch.from_numpy(x)).softmax(dim=1).numpy()
    found: dict[str, Any] = {"runtimes": {}, "missing": []}
    for name, build in RUNTIMES.items():
        try:
            forward = build(checkpoint, onnx, precision)
            gap = float(np.abs(softmax(forward(x)) - expected).max())
        except ImportError:
            found["missing"].append(name)
            continue
        limit = TOLERANCE[precision]
        if gap > limit:
            raise SystemExit(f"expected {name} within {limit} of the classifier, got {gap:g}")
        found["runtimes"][name] = {n: measure(forward, x[:n], seconds) for n in batches}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

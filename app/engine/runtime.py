"""Runtimes for predictions: torch, ONNX Runtime and OpenVINO, in float32 and bfloat16."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from app.metrics import Metrics
from robust.graph import build_onnx
from robust.inference import InferenceClassifier

logger = logging.getLogger(__name__)

TORCH = "torch"
ONNX_RUNTIME = "onnxruntime"
OPENVINO = "openvino"

Logits = Callable[[Tensor], Tensor]
Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Runtime:
    """Something that maps images float32 (N, 3, S, S) in [0, 1] to logits float32 (N, K)."""

    name: str
    logits: Logits
    precision: Dtype = "fp32"  # of its matrix products


def runtimes_for(
    model: InferenceClassifier,
    *,
    threads: int,
    metrics: Metrics,
    fp32: Logits | None = None,
    bf16: Logits | None = None,
) -> tuple[Runtime, ...]:
    """Torch and the other installed runtimes that can run the model; on a GPU only torch.

    Torch also calls an ONNX file or a service, which has no network to build again.

    `fp32` is a faster copy of the model, if there is one, and `bf16` one in bfloat16, if bfloat16
    should be tried.
    """
    runtimes = [Runtime(name=TORCH, logits=fp32 or model)]
    if bf16 is not None:
        runtimes.append(Runtime(name=TORCH, logits=bf16, precision="bf16"))
    if model.device.type != "cpu" or not model.classifier.differentiable:  # no torch network
        return tuple(runtimes)
    try:
        graph = build_onnx(model).SerializeToString()
    except ImportError:
        logger.info("predictions use torch: onnx is not installed")
        return tuple(runtimes)
    except Exception as error:
        give_up(ONNX_RUNTIME, "failed", metrics, error)
        return tuple(runtimes)
    try:
        runtimes.append(Runtime(name=ONNX_RUNTIME, logits=onnx_runtime(graph, threads)))
    except ImportError:
        logger.info("predictions don't use ONNX Runtime, which is not installed")
    except Exception as error:
        give_up(ONNX_RUNTIME, "failed", metrics, error)
    if bf16 is None:
        return tuple(runtimes)
    try:
        logits = openvino_bf16(graph, threads)
        runtimes.append(Runtime(name=OPENVINO, logits=logits, precision="bf16"))
    except ImportError:
        logger.info("predictions don't use OpenVINO, which is not installed")
    except Exception as error:
        give_up(OPENVINO, "failed", metrics, error)
    return tuple(runtimes)


def onnx_runtime(graph: bytes, threads: int) -> Logits:
    """An ONNX graph in ONNX Runtime on the CPU. Raises ImportError if it is not installed."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Small blocks of work: if one thread loses its core for a while, the others do its share.
    options.add_session_config_entry("session.dynamic_block_base", "4")
    # Its threads spin during a pass; after the pass they would take cores from torch's threads.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def logits(x: Tensor) -> Tensor:
        (values,) = session.run(["logits"], {"images": x.numpy()})
        return torch.from_numpy(values)

    return logits


def openvino_bf16(graph: bytes, threads: int) -> Logits:
    """An ONNX graph in OpenVINO on the CPU, in bfloat16. Raises ImportError if not installed."""
    import openvino

    core: Any = openvino.Core()
    options = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    request = core.compile_model(core.read_model(graph), "CPU", options).create_infer_request()

    def logits(x: Tensor) -> Tensor:
        found = request.infer({"images": x.numpy()}, share_inputs=True)
        return torch.from_numpy(found["logits"].copy())

    return logits


def give_up(runtime: str, reason: str, metrics: Metrics, error: Exception) -> None:
    """Count and log a runtime's failure; torch takes its place."""
    metrics.runtime_failures.labels(runtime, reason).inc()
    logger.error("%s %s, predictions use torch: %s", runtime, reason, error)

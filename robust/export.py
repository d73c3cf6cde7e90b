"""Exports a model as a state dict, safetensors, ONNX or a Hugging Face folder."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from robust import files
from robust.checkpoint import Checkpoint, sidecar_path
from robust.classifier import Architecture, Classifier
from robust.graph import traced_onnx
from robust.networks import given, resnet

Format = Literal["torchvision", "safetensors", "onnx", "hub"]
FORMATS: tuple[Format, ...] = get_args(Format)
HUB_FILES = ("model.safetensors", "README.md", "config.json")
# Suffixes of the files; another one would make loaders take them for another format.
SUFFIXES: dict[str, tuple[str, ...]] = {
    "torchvision": (".pt", ".pth", ".bin"),
    "safetensors": (".safetensors",),
    "onnx": (".onnx",),
}
TOLERANCE = 1e-4  # largest error of an exported model's logit, relative to the largest logit


def export_checkpoint(checkpoint: Checkpoint, path: Path | str, format: Format) -> str:
    """Write the float32 weights to `path`, atomically; return Python statements that load it.

    `torchvision` is a state dict for torchvision's own model, and `safetensors` the same with all
    other properties as metadata; `onnx` is the whole model, `images` float32 (N, 3, S, S) in
    [0, 1] to `logits`; `hub` is a folder for the Hugging Face hub. Raises ValueError for another
    format or suffix, an output that would overwrite the checkpoint, a hub folder with other
    files, or a model that the format can't represent exactly, and OSError.
    """
    path = Path(path)
    if checkpoint.sidecar.architecture.arch in given.KINDS:
        raise ValueError(
            f"expected weights of a network to export, got a {checkpoint.sidecar.architecture.arch}"
            " model"
        )
    inputs = {item.resolve() for item in (checkpoint.path, sidecar_path(checkpoint.path))}
    written = {path.resolve()} if format != "hub" else {(path / f).resolve() for f in HUB_FILES}
    if written & inputs:
        raise ValueError(f"expected another file than the checkpoint itself, got {path}")
    if format == "torchvision" and sidecar_path(path).resolve() in inputs:
        raise ValueError(
            "expected another name than the checkpoint's, whose sidecar does not match this file, "
            f"got {path}"
        )
    if format == "hub":
        return _write_hub(checkpoint, path)
    writers = {"torchvision": _torchvision, "safetensors": _safetensors, "onnx": _onnx}
    if format not in writers:
        raise ValueError(f"expected format to be one of {', '.join(FORMATS)}, got {format!r}")
    if path.suffix not in SUFFIXES[format]:
        raise ValueError(
            f"expected a file that ends in {' or '.join(SUFFIXES[format])} for the {format} "
            f"format, got {path}"
        )
    data, usage = writers[format](checkpoint, path)
    files.write_bytes(path, data)
    return usage


def _write_hub(checkpoint: Checkpoint, folder: Path) -> str:
    """Write a folder for the Hugging Face hub; the configuration last, after the other files."""
    from robust.hub import hub_config, model_card

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected a folder for the hub format, got the file {folder}")
    _check_hub_folder(folder)
    name = folder.resolve().name
    weights, _ = _safetensors(checkpoint, folder)
    card = model_card(checkpoint, name).encode()
    weights_name, card_name, config_name = HUB_FILES
    files.write_bytes(folder / weights_name, weights)
    files.write_bytes(folder / card_name, card)
    files.write_json(folder / config_name, hub_config(checkpoint))
    return f"import robust; model = robust.load_model({str(folder)!r})"


def _check_hub_folder(folder: Path) -> None:
    """Raise ValueError if the folder has files that no earlier export wrote."""
    # Hidden files may stay: .git and .gitattributes in a clone of a hub repository.
    own = HUB_FILES if _is_own_config(folder / "config.json") else ()
    others = sorted(path.name for path in folder.glob("[!.]*") if path.name not in own)
    if others:
        raise ValueError(
            f"expected a new or empty folder, or one of an earlier export, got {folder} with "
            f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''}"
        )


def _is_own_config(path: Path) -> bool:
    try:
        config = files.from_json(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "robust" in config


def _torchvision(checkpoint: Checkpoint, path: Path) -> tuple[bytes, str]:
    architecture = checkpoint.classifier.architecture
    if not _is_torchvision(architecture):
        raise ValueError(
            f"expected {', '.join(resnet.FAMILY.archs)}, loaded without --arch torchvision:NAME, "
            f"for the torchvision format, got {architecture.arch}: use onnx or safetensors"
        )
    if architecture.normalizes:
        # Folding it into conv1 would be wrong at the border, where zero padding follows it.
        raise ValueError(
            "expected a model without normalization for the torchvision format, got mean "
            f"{architecture.mean} and std {architecture.std}: use onnx or safetensors"
        )
    buffer = io.BytesIO()
    torch.save(_float32_state(checkpoint.classifier), buffer)
    load = f"model.load_state_dict(torch.load({str(path)!r}, weights_only=True))"
    return buffer.getvalue(), f"import {_rebuild(architecture)}; {load}; model.eval()"


def _safetensors(checkpoint: Checkpoint, path: Path) -> tuple[bytes, str]:
    from safetensors.torch import save

    architecture = checkpoint.classifier.architecture
    metadata = {
        "format": "pt",
        **_describe(checkpoint),
        "mean": json.dumps(architecture.mean),
        "std": json.dumps(architecture.std),
    }
    data: bytes = save(_float32_state(checkpoint.classifier), metadata=metadata)
    if not _is_torchvision(architecture):
        return data, f"import robust; model = robust.load_model({str(path)!r})"
    load = f"model.load_state_dict(safetensors.torch.load_file({str(path)!r}))"
    usage = f"import safetensors.torch, {_rebuild(architecture)}; {load}; model.eval()"
    if architecture.normalizes:
        mean, std = list(architecture.mean), list(architecture.std)
        scale = f"torch.tensor({mean}).view(3, 1, 1)) / torch.tensor({std}).view(3, 1, 1)"
        usage += f"; normalize = lambda images: (images - {scale}"
    return data, usage


def _onnx(checkpoint: Checkpoint, path: Path) -> tuple[bytes, str]:
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError:
        raise ValueError(
            "expected the packages onnx and onnxscript, found none: pip install 'robust[onnx]'"
        ) from None
    classifier = Classifier(checkpoint.classifier.architecture)
    classifier.load_state_dict(checkpoint.classifier.state_dict())
    classifier.eval()
    size = classifier.architecture.input_size
    model = traced_onnx(classifier)
    onnx.helper.set_model_props(model, _describe(checkpoint))
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    _check_onnx(data, classifier)
    usage = (
        f"import onnxruntime; session = onnxruntime.InferenceSession({str(path)!r}); "
        "(logits,) = session.run(['logits'], {'images': images})"
        f"  # float32 (N, 3, {size}, {size}) in [0, 1]"
    )
    return data, usage


def _check_onnx(data: bytes, classifier: Classifier) -> None:
    """Raise RuntimeError if the graph disagrees, at another batch size than the traced one."""
    size = classifier.architecture.input_size
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = classifier(images).numpy()
    gap = np.abs(_run_onnx(data, images.numpy()) - expected).max()
    error = float(gap / max(np.abs(expected).max(), 1e-12))
    if not error <= TOLERANCE:
        raise RuntimeError(f"the exported model is off by {error:.2g} of its largest logit")


def _run_onnx(data: bytes, images: np.ndarray) -> np.ndarray:
    try:
        import onnxruntime
    except ImportError:  # not required: ONNX's own evaluator can check too, slowly
        from onnx.reference import ReferenceEvaluator

        (logits,) = ReferenceEvaluator(data).run(["logits"], {"images": images})
        return np.asarray(logits)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images})
    return np.asarray(logits)


def _float32_state(classifier: Classifier) -> dict[str, Tensor]:
    return {
        key: value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
        for key, value in classifier.net.state_dict().items()
    }


def _describe(checkpoint: Checkpoint) -> dict[str, str]:
    architecture = checkpoint.classifier.architecture
    return {
        "architecture": architecture.arch,
        "stem": architecture.stem,
        "activation": architecture.activation,
        **({"variant": architecture.variant} if architecture.variant else {}),
        "classes": json.dumps(checkpoint.sidecar.classes, ensure_ascii=False),
        "input_size": str(architecture.input_size),
        "source_sha256": checkpoint.sha256,
    }


def _is_torchvision(architecture: Architecture) -> bool:
    return architecture.arch in resnet.FAMILY.archs


def _rebuild(architecture: Architecture) -> str:
    """The modules to import, followed by the statements that build the bare network."""
    build = f"torchvision.models.{architecture.arch}(num_classes={architecture.num_classes})"
    lines = ["torch, torchvision", f"model = {build}"]
    if architecture.stem in resnet.SMALL_STEMS:
        stride, pools = resnet.SMALL_STEMS[architecture.stem]
        step = f"stride={stride}, " if stride > 1 else ""
        lines.append(f"model.conv1 = torch.nn.Conv2d(3, 64, 3, {step}padding=1, bias=False)")
        if not pools:
            lines.append("model.maxpool = torch.nn.Identity()")
    if architecture.activation == "silu":
        lines.append(
            "[setattr(m, 'relu', torch.nn.SiLU()) for m in model.modules() if hasattr(m, 'relu')]"
        )
    return "; ".join(lines)

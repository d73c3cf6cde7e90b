"""A checkpoint as a folder for the Hugging Face hub: weights, configuration and model card."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from robust import networks
from robust.checkpoint import Checkpoint
from robust.networks import resnet
from robust.networks.layers import SkipInitialization
from robust.threat_model import format_eps


def hub_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """``config.json``: for timm, if it has the network, and for our own loader."""
    sidecar = checkpoint.sidecar
    architecture, classes = sidecar.architecture, list(sidecar.classes)
    size, family = architecture.input_size, networks.family_of(architecture.arch)
    return {
        **_for_timm(checkpoint),
        "num_classes": len(classes),
        "label_names": classes,
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "mean": list(architecture.mean),
            "std": list(architecture.std),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "num_classes": len(classes),
            **({"first_conv": "conv1"} if family is resnet.FAMILY else {}),
            "classifier": family.head(checkpoint.classifier.net),
        },
        "robust": sidecar.to_dict()["architecture"],
    }


def _for_timm(checkpoint: Checkpoint) -> dict[str, Any]:
    """What timm needs to build the network; nothing if it would build another one."""
    if not timm_reads(checkpoint):
        return {}
    architecture = checkpoint.sidecar.architecture
    name = architecture.arch.removeprefix("timm:")
    arguments = {"img_size": architecture.input_size}
    if architecture.arch == name or not _accepts(name, arguments):
        return {"architecture": name}
    return {"architecture": name, "model_args": arguments}


def _accepts(name: str, arguments: dict[str, Any]) -> bool:
    """Whether timm's network has these arguments, such as the size for position embeddings."""
    import timm

    with SkipInitialization(), suppress(TypeError):
        timm.create_model(name, **arguments)
        return True
    return False


def model_card(checkpoint: Checkpoint, name: str) -> str:
    """``README.md``: metadata with a model index of the measured results, and a page."""
    sidecar = checkpoint.sidecar
    metadata: dict[str, Any] = {
        "library_name": "timm" if timm_reads(checkpoint) else "robust",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "adversarial-robustness", "robust"],
    }
    index = _model_index(sidecar.evaluation, name)
    if index:
        metadata["model-index"] = index
    # JSON is valid YAML: names of datasets or classes can't break out of it.
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())
    return f"---\n{front}\n---\n\n{_page(checkpoint, name)}"


def timm_reads(checkpoint: Checkpoint) -> bool:
    """Whether timm builds the same network from the same keys."""
    architecture = checkpoint.sidecar.architecture
    if architecture.arch.startswith("timm:"):
        return True
    own = architecture.arch in resnet.FAMILY.archs
    return own and (architecture.stem, architecture.activation) == ("imagenet", "relu")


def _model_index(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Measured accuracies by dataset, without those that have warnings."""
    results: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.get("flags") or "accuracy" not in row:
            continue
        data = str(row.get("data"))
        result = results.setdefault(
            data,
            {
                "task": {"type": "image-classification", "name": "Image Classification"},
                "dataset": {"type": data, "name": data},
                "metrics": [],
            },
        )
        result["metrics"].append(
            {"type": "accuracy", "value": row["accuracy"], "name": _measure(row)}
        )
    return [{"name": name, "results": list(results.values())}] if results else []


def _measure(row: dict[str, Any]) -> str:
    count = f", {row['n']} images" if "n" in row else ""
    if row["attack"] == "clean":
        return f"clean accuracy{count}"
    return f"robust accuracy ({row['attack']}, {row['norm']} {format_eps(row['eps'])}{count})"


def _page(checkpoint: Checkpoint, name: str) -> str:
    sidecar = checkpoint.sidecar
    architecture = sidecar.architecture
    size = architecture.input_size
    lines = [
        f"# {name}",
        "",
        f"An image classifier: {architecture.arch}, {size}x{size} pixels, "
        f"{architecture.num_classes} classes"
        + (f", trained for {sidecar.threat_model}" if sidecar.threat_model else "")
        + ".",
        "",
        "```python",
        "import robust",
        f"model = robust.load_model({name!r})  # images in [0, 1] to logits",
        "```",
    ]
    if timm_reads(checkpoint):
        lines += [
            "",
            "```python",
            "import timm",
            f"model = timm.create_model('local-dir:{name}', pretrained=True).eval()",
            "```",
            "",
            "timm's model takes normalized images, with mean "
            f"{list(architecture.mean)} and std {list(architecture.std)}.",
        ]
    rows = [row for row in sidecar.evaluation if "accuracy" in row]
    if rows:
        lines += ["", "| data | measure | accuracy | warnings |", "| --- | --- | --- | --- |"]
        for row in rows:
            cells = (
                str(row.get("data")),
                _measure(row),
                f"{100 * row['accuracy']:.2f}%",
                ", ".join(row.get("flags") or ()) or "none",
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", f"Weights converted from SHA-256 `{checkpoint.sha256}`.", ""]
    return "\n".join(lines)

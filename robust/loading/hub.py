"""A folder as on the Hugging Face hub: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from robust import files, networks
from robust.loading.errors import CheckpointError, reason
from robust.loading.options import ModelOptions, model_options

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"


def open_folder(folder: Path, options: ModelOptions) -> tuple[Path, ModelOptions]:
    """The weights in a folder, with options from its configuration and from the user.

    The user's options win. Raises CheckpointError.
    """
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        names = sorted(item.name for item in folder.iterdir())
        raise CheckpointError(
            folder, f"{' or '.join(WEIGHTS)} in the folder", ", ".join(names[:5]) or "nothing"
        )
    config = _read(folder / CONFIG)
    if "robust" in config:  # our own export: the weights file contains everything
        return weights, options
    try:
        configured = model_options(**_configured(config, _read(folder / PREPROCESSOR)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(folder / CONFIG, "a configuration", str(error)) from None
    if config.get("architectures") and options.arch is None:
        raise CheckpointError(
            folder,
            "a network of ours, timm or torchvision",
            f"transformers' {config['architectures'][0]}; load it by file.py:function",
        )
    return weights, replace(configured, **options.given())  # type: ignore[arg-type]


def _configured(config: dict[str, Any], preprocessor: dict[str, Any]) -> dict[str, Any]:
    """The options in the configuration of timm or transformers."""
    options: dict[str, Any] = {}
    size = None
    cfg = config.get("pretrained_cfg") or {}
    if "architecture" in config:
        options["arch"] = f"timm:{config['architecture']}"
        cfg = cfg or config  # timm's older files have one level
        arguments = config.get("model_args") or {}
        if names := networks.other_arguments(options["arch"], arguments):
            raise ValueError(
                f"expected timm's own {config['architecture']}, got one with "
                f"{', '.join(names)} in model_args: load it by file.py:function"
            )
        size = arguments.get("img_size")
        if cfg.get("label_offset"):  # the head may have more rows than there are labels
            raise ValueError(
                f"expected weights of exactly the labels, got label_offset {cfg['label_offset']}: "
                "load it with timm by file.py:function"
            )
    for name, key in (("mean", "image_mean"), ("std", "image_std")):
        value = cfg.get(name, preprocessor.get(key))
        if value is not None:
            options[name] = value
    for entry in (cfg.get("input_size"), preprocessor.get("crop_size"), preprocessor.get("size")):
        size = entry if size is None else size
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    if size is not None:
        options["input_size"] = int(size[-1] if isinstance(size, list) else size)
    labels = config.get("label_names") or cfg.get("label_names") or cfg.get("labels")
    if labels is None and "id2label" in config:
        names = config["id2label"]
        missing = [str(index) for index in range(len(names)) if str(index) not in names]
        if missing:
            raise ValueError(f"id2label of {len(names)} classes without {', '.join(missing[:5])}")
        labels = [names[str(index)] for index in range(len(names))]
    if labels is not None:
        options["classes"] = list(labels)
    return options


def _read(path: Path) -> dict[str, Any]:
    try:
        value = files.read_json(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(path, "a configuration", reason(error)) from None
    except ValueError as error:
        raise CheckpointError(path, "JSON", str(error)) from None
    if not isinstance(value, dict):
        raise CheckpointError(path, "a JSON object", type(value).__name__)
    return value

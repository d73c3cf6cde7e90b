"""Evaluate and attack any model in one call, with the names and defaults of the command line."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust.attack_registry import DEFAULT_ATTACKS
from robust.attacks import AttackResult, AttackSettings, Model, frozen
from robust.attacks.checks import as_whole, check_callable, check_range, check_seed, try_model
from robust.attacks.passes import Passes
from robust.attacks.rows import to_images
from robust.classifier import Classifier
from robust.commands.options import resolve_attacks
from robust.commands.output import Progress
from robust.datasets import Dataset
from robust.device import resolve_device
from robust.evaluation import Evaluation, evaluate_batches
from robust.evaluation.precision import Precision, full_float32
from robust.matching import match_classes
from robust.threat_model import Norm, parse_eps

logger = logging.getLogger(__name__)

ROUNDING = 1e-6  # how far float images may lie outside [0, 1]; they are clipped

Images = Tensor | Any  # a Dataset, a tensor or array (N, C, H, W), or batches of (images, labels)
Labels = Tensor | Any | None


def evaluate(
    model: Model,
    images: Images,
    labels: Labels = None,
    *,
    attacks: str | Sequence[str | AttackSettings] = DEFAULT_ATTACKS,
    norm: Norm | None = None,
    eps: float | str | None = None,
    alpha: float | str | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    seed: int | None = None,
    num_classes: int | None = None,
    batch_size: int = 100,
    curve: int = 100,
    precision: Precision = "auto",
    journal: Path | str | None = None,
    model_id: str | None = None,
    allow_probabilities: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure clean and robust accuracy of `model`, like ``robust evaluate``.

    `model` maps images float32 (N, C, H, W) in [0, 1] to logits (N, K): a module or any callable.
    `images` is a tensor or numpy array (N, C, H, W), uint8 or float in [0, 1], with N integer
    `labels`; or, without `labels`, the result of `load_dataset`, a data loader or any other
    iterable of (images, labels). The classes of a dataset are matched with those of the model.
    Float images are scored as they are, never rounded to 8 bits; `image_dtype` of the result
    records their type. `eps` and `alpha` are in pixel units, ``"8/255"`` or a number. They,
    `norm` (default linf), `steps`, `restarts` and `seed` (default 0) apply to the attacks given by
    name.

    The result prints as a table, and has `to_json()`, `to_markdown()` and `to_pandas()`.
    `num_classes` defaults to the number of the model's logits. `device` defaults to the model's
    device; if given, a module must already be there. ``"auto"`` is the accelerator that torch
    finds, else the CPU, as in `load_model`.
    With `journal` a stopped evaluation resumes from that file; for a callable that is not a
    module, or a module that changes its own attributes (a counter), this needs a `model_id`.
    `progress` shows a bar or lines on standard error.

    Raises ValueError for invalid arguments, images or labels, ModelError for a model that can't
    be evaluated, and JournalError for a journal of another evaluation.
    """
    where = _device_of(model, device)
    batch_size, curve = as_whole("batch_size", batch_size), as_whole("curve", curve, least=0)
    num_classes = None if num_classes is None else as_whole("num_classes", num_classes)
    x, y, dtype = _labeled(model, images, labels)
    chosen = _resolve(
        attacks, norm=norm, eps=eps, alpha=alpha, steps=steps, restarts=restarts, seed=seed
    )
    logits = _count_logits(model, x, where)
    bar = Progress(100, title="evaluate", unit="%", quiet=not progress)
    try:
        for result in evaluate_batches(
            model,
            x,
            y,
            num_classes=num_classes or logits,
            attacks=chosen,
            device=where,
            batch_size=batch_size,
            curve=curve,
            precision=precision,
            allow_probabilities=allow_probabilities,
            journal=None if journal is None else Path(journal),
            model_id=model_id,
            image_dtype=dtype,
            watch=bar.tick,
            on_forecast=bar.show_forecast,
        ):
            bar.update(int(100 * result.done), result.stage or "done")
    finally:
        bar.close()
    return result


def attack(
    model: Model,
    images: Images,
    labels: Labels = None,
    attack: str | AttackSettings = "pgd",
    *,
    norm: Norm | None = None,
    eps: float | str | None = None,
    alpha: float | str | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    seed: int | None = None,
    target: Labels = None,
    batch_size: int = 100,
    device: torch.device | str | None = None,
) -> AttackResult:
    """Compute adversarial images `x_adv`, float32 (N, C, H, W), with logits, success and distance.

    Arguments and errors are those of `evaluate`. Without labels the attack is away from the
    prediction; with `target`, one integer or N, it is toward those classes. The result is on
    the model's device, in the order of the images.
    """
    where, batch_size = _device_of(model, device), as_whole("batch_size", batch_size)
    if labels is None and _is_array(images):
        x, _ = _as_images(images)
        y = None
    else:
        x, y, _ = _labeled(model, images, labels)
    (settings,) = _resolve(
        [attack], norm=norm, eps=eps, alpha=alpha, steps=steps, restarts=restarts, seed=seed
    )
    _count_logits(model, x, where)  # a cheap check before the attack
    x = to_images(x.to(where))
    y = _predictions(model, x, batch_size) if y is None else y.to(where)
    with full_float32():
        return settings.run(
            model,
            x,
            y,
            target=None if target is None else _as_target(target, len(x)).to(where),
            batch_size=batch_size,
        )


def _resolve(
    attacks: str | Sequence[str | AttackSettings],
    *,
    eps: float | str | None,
    alpha: float | str | None,
    norm: Norm | None,
    steps: int | None,
    restarts: int | None,
    seed: int | None,
) -> list[AttackSettings]:
    """The settings of each attack, in the given order. Raises ValueError."""
    several = isinstance(attacks, Iterable) and not isinstance(attacks, str)
    given: list[Any] = list(attacks) if several else [attacks]
    for item in given:
        if not isinstance(item, str | AttackSettings):
            raise ValueError(
                f"expected an attack by name or as AttackSettings, got a {type(item).__name__}"
            )
    options: dict[str, Any] = {"norm": norm, "eps": eps, "alpha": alpha, "steps": steps}
    options |= {"restarts": restarts, "seed": seed}
    unused = [name for name, value in options.items() if value is not None]
    seed = 0 if seed is None else seed
    check_seed(seed)
    if not given:
        return []
    if unused and not any(isinstance(item, str) for item in given):
        raise ValueError(
            f"expected an attack given by name with {', '.join(unused)}, got only AttackSettings"
        )
    return resolve_attacks(
        given,
        norm="linf" if norm is None else norm,
        eps=None if eps is None else parse_eps(eps),
        alpha=None if alpha is None else parse_eps(alpha),
        steps=None if steps is None else as_whole("steps", steps),
        restarts=None if restarts is None else as_whole("restarts", restarts),
        seed=int(seed),
    )


def _device_of(model: Model, device: torch.device | str | None) -> torch.device:
    """The device to compute on. Raises ValueError if all of a module is on another one."""
    check_callable(model)
    found: list[torch.device] = []
    if isinstance(model, nn.Module):
        found = [tensor.device for tensor in (*model.parameters(), *model.buffers())]
    if device is None:
        return found[0] if found else torch.device("cpu")
    where = resolve_device(device)
    if not found:
        return where
    for own in found:
        if own.type == where.type and where.index in (None, own.index or 0):
            return own
    raise ValueError(
        f"expected the model on {where}, got one on {found[0]}; move it there with "
        f"model.to({str(where)!r}), or leave device out"
    )


def _is_array(values: object) -> bool:
    return isinstance(values, Tensor) or hasattr(values, "__array__")


def _labeled(model: Model, images: Images, labels: Labels) -> tuple[Tensor, Tensor, str]:
    """Images uint8 or float32 in [0, 1], labels int64, and the original dtype of the images."""
    if isinstance(images, Dataset):
        if labels is not None:
            raise ValueError("expected no labels beside a Dataset, which has its own")
        matched = match_classes(images, model.classes) if isinstance(model, Classifier) else images
        for line in matched.changes[len(images.changes) :]:
            logger.warning("%s: %s", images.name, line)
        images, labels = matched.images, matched.labels
    if not _is_array(images):
        if not hasattr(images, "__iter__") and not hasattr(images, "__getitem__"):
            raise ValueError(f"expected images as an array, got a {type(images).__name__}")
        if labels is not None:
            images = torch.stack(_check_sizes([_as_tensor(image) for image in images]))
        else:
            images, labels = _collect(images)
    if labels is None:
        raise ValueError("expected labels with an array of images, got none")
    x, dtype = _as_images(images)
    return x, _as_labels(labels, len(x)), dtype


def _as_tensor(values: Any, what: str = "images and labels") -> Tensor:
    try:
        return torch.as_tensor(values)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(
            f"expected {what} as tensors or arrays, got a {type(values).__name__}"
        ) from None


def _check_sizes(images: list[Tensor]) -> list[Tensor]:
    """The same images. Raises ValueError if there are none, or if their sizes differ."""
    if not images:
        raise ValueError("expected at least 1 image, got none")
    if len({image.shape[-3:] for image in images}) > 1:
        shapes = sorted({tuple(image.shape[-3:]) for image in images})
        raise ValueError(
            f"expected images of one size, got {', '.join(map(str, shapes[:3]))}; resize them first"
        )
    return images


def _collect(batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """The images and labels of all batches, or of all pairs of one image and its label."""
    pairs = []
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                "expected images as an array (N, C, H, W), or batches of (images, labels), got "
                f"batches of {type(batch).__name__}"
            )
        x, y = (_as_tensor(part) for part in batch)
        pairs.append((x, y) if x.ndim == 4 else (x[None], y.reshape(-1)))
    images = torch.cat(_check_sizes([x for x, _ in pairs]))
    return images, torch.cat([y for _, y in pairs])


def _as_images(values: Any) -> tuple[Tensor, str]:
    """Images uint8 or float32 in [0, 1], and their original dtype. Raises ValueError."""
    x = _as_tensor(values).detach()
    dtype = str(x.dtype).removeprefix("torch.")
    if x.ndim != 4 or not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise ValueError(
            f"expected images (N, C, H, W), uint8 or float in [0, 1], got {dtype} {tuple(x.shape)}"
        )
    if x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        raise ValueError(
            f"expected images (N, C, H, W), got {tuple(x.shape)}, which looks like (N, H, W, C); "
            "move the last axis to position 1"
        )
    if x.dtype == torch.uint8 or not len(x):
        return x, dtype
    check_range(x, tolerance=ROUNDING)
    return x.float().clamp(0, 1), dtype


def _as_labels(values: Any, n: int) -> Tensor:
    """Labels int64 (n,). Raises ValueError."""
    labels = _as_tensor(values)
    if labels.shape != (n,) or not _is_whole(labels):
        raise ValueError(f"expected {n} labels as integers, got {_form(labels)}")
    return labels.long()


def _as_target(values: Any, n: int) -> Tensor:
    """Target classes int64 (n,), of one class for all or one each. Raises ValueError."""
    target = _as_tensor(values, "target")
    if target.shape not in ((), (n,)) or not _is_whole(target):
        raise ValueError(
            f"expected target as an integer for all images or {n} of them, got {_form(target)}"
        )
    return target.long().expand(n)


def _is_whole(values: Tensor) -> bool:
    return not values.is_floating_point() and values.dtype != torch.bool


def _form(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} {tuple(values.shape)}"


def _predictions(model: Model, x: Tensor, batch_size: int) -> Tensor:
    """The predicted class of each image, int64 (N,). Raises ValueError and ModelError."""
    if not len(x):
        raise ValueError("expected at least 1 image, got none")
    with frozen(model, x.device), full_float32():
        return Passes(model, batch_size).logits(x).argmax(dim=1)


def _count_logits(model: Model, x: Tensor, device: torch.device) -> int:
    """The number of logits; 1 if there are no images, which the evaluation then reports.

    Raises ModelError if the model can't be called.
    """
    if not len(x):
        return 1
    with frozen(model, device):
        return try_model(model, to_images(x[:1].to(device))).shape[1]

"""Evaluating a model: clean, attack after attack, every success asked again."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from robust.attacks import AttackSettings, Model, frozen
from robust.attacks.noise import image_keys
from robust.attacks.search import to_images
from robust.classifier import Classifier
from robust.evaluation.journal import Journal, data_digest, model_digest
from robust.evaluation.precision import (
    Precision,
    full_float32,
    in_bf16,
    repeatable,
    searches_in_bf16,
)
from robust.evaluation.result import Evaluation
from robust.evaluation.work import CURVE_ATTACK, Work, filled
from robust.inference import for_inference
from robust.ranks import ALONE, Ranks

__all__ = ["CURVE_ATTACK", "Precision", "evaluate", "evaluate_batches"]


def evaluate(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    attacks: Sequence[AttackSettings],
    device: torch.device,
    batch_size: int = 100,
    curve: int = 0,
    precision: Precision = "auto",
    allow_probabilities: bool = False,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """The last result of `evaluate_batches`."""
    *_, last = evaluate_batches(
        model,
        images,
        labels,
        num_classes=num_classes,
        attacks=attacks,
        device=device,
        batch_size=batch_size,
        curve=curve,
        precision=precision,
        allow_probabilities=allow_probabilities,
        ranks=ranks,
    )
    return last


def evaluate_batches(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    attacks: Sequence[AttackSettings],
    device: torch.device,
    batch_size: int = 100,
    curve: int = 0,
    precision: Precision = "auto",
    allow_probabilities: bool = False,
    fast: Model | None = None,
    journal: Path | None = None,
    model_id: str | None = None,
    watch: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> Generator[Evaluation]:
    """Score images uint8 (N, 3, H, W) with labels int64 (N,), attack after attack.

    Yields the result so far again and again, so that the caller can show it or stop; `watch` is
    called before each pass of the model besides, and while the images are sorted. An image counts
    as robust if it is right when clean and at every iterate of the attack; images wrong when clean
    are not attacked. Every success is asked again of `model` itself in float32, its distance and
    range are checked, and what does not hold counts as right and is told. With `curve` so many
    images, picked at random, are attacked once more at growing eps. What comes out depends neither
    on the order of the images nor on `batch_size`.

    A `Classifier` is searched through a faster copy of the same function, and any other model
    through `fast` where that is given; `precision` bf16 searches in bfloat16 (`auto`: on CUDA) and
    takes a success only where float32 agrees. With `journal` what is finished is kept in that
    file, and the same evaluation goes on from there;
    `model_id` tells models apart that are no modules.

    Several `ranks` share the images out, each with a journal of its own (`Ranks.own_file`); all
    are given the same model and images. Before the last result, which is of all, each yields what
    it knows of its own share.

    Raises ValueError when there is nothing to score or a label does not fit the model, ModelError
    for a model that can't be evaluated, and JournalError for a journal of another evaluation.
    """
    _check_data(images, labels, num_classes)
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
    bf16 = searches_in_bf16(precision, device)
    with torch.inference_mode(False):  # what is kept is changed in place and differentiated
        if fast is None:
            fast = _faster(model, images, device)
        order = shuffled(images, labels, watch)
        work = Work(
            model,
            images[order.to(images.device)],
            labels.cpu()[order],
            num_classes=num_classes,
            attacks=attacks,
            device=device,
            batch_size=batch_size,
            curve=curve,
            fast=fast,
            searched=in_bf16(filled(fast), device) if bf16 else fast,
            confirm=model if bf16 else None,
            watch=watch,
            ranks=ranks,
        )
    if journal is not None:
        work.open_journal = lambda: Journal(
            ranks.own_file(journal),
            {
                "model": model_id or model_digest(model),
                "data": data_digest(work.images, work.labels),
                "attacks": [str(attack) for attack in attacks],
                "precision": work.precision,
            },
        )
    iterator = work.loop(allow_probabilities=allow_probabilities)
    try:
        while True:
            # Held only while computing: whoever takes a result has the model as it was.
            with frozen(model, device), frozen(fast, device), full_float32(), repeatable():
                try:
                    result = next(iterator)
                except StopIteration:
                    return
            yield result
    finally:
        iterator.close()
        if work.journal is not None:
            work.journal.close()


def _faster(model: Model, images: Tensor, device: torch.device) -> Model:
    if isinstance(model, Classifier):
        size = model.architecture.input_size
        if images.shape[2:] == (size, size):
            return for_inference(model, device)
    return model


def shuffled(images: Tensor, labels: Tensor, watch: Callable[[], None] = lambda: None) -> Tensor:
    """An order int64 (N,) that looks random and is of the images alone, not of how they came.

    In a set sorted by class no beginning is like the whole; and neither the images picked for a
    curve nor a journal shall depend on how a set was read.
    """
    parts = torch.split(images, max(1, 2**20 // images[0].numel()))
    keys = []
    for part in parts:
        watch()
        keys.append(image_keys(to_images(part), 0).cpu())
    by_label = labels.cpu().argsort(stable=True)  # for the same image twice
    return by_label[torch.cat(keys)[by_label].argsort(stable=True)]


def _check_data(images: Tensor, labels: Tensor, num_classes: int) -> None:
    if images.ndim != 4 or images.dtype != torch.uint8:
        raise ValueError(
            f"expected uint8 images (N, C, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    if not len(images):
        raise ValueError("expected at least 1 image, got none")
    if labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise ValueError(
            f"expected labels int64 ({len(images)},), got {labels.dtype} {tuple(labels.shape)}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"expected labels from 0 to {num_classes - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )

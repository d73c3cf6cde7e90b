"""Evaluates a model: clean, then attack after attack, with every success verified."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from robust.attacks import AttackSettings, Model, frozen
from robust.attacks.checks import check_range
from robust.attacks.noise import image_keys
from robust.attacks.rows import to_images
from robust.classifier import Architecture, Classifier
from robust.distributed import SINGLE, World
from robust.evaluation.curve import CURVE_ATTACK
from robust.evaluation.forecast import Forecast, count_passes
from robust.evaluation.journal import (
    Journal,
    attack_text,
    check_processes,
    data_digest,
    model_digest,
    recorded,
)
from robust.evaluation.models import Models, fast_copy
from robust.evaluation.precision import (
    MORE_PROBES,
    Precision,
    SearchPrecision,
    choose_precision,
    full_float32,
    packed_float32,
)
from robust.evaluation.result import Evaluation, Times
from robust.evaluation.work import Work

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
    world: World = SINGLE,
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
        world=world,
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
    bf16: Model | None = None,
    journal: Path | None = None,
    model_id: str | None = None,
    architecture: Architecture | None = None,
    image_dtype: str | None = None,
    watch: Callable[[], None] = lambda: None,
    on_forecast: Callable[[Forecast], None] = lambda _: None,
    world: World = SINGLE,
) -> Generator[Evaluation]:
    """Score images (N, 3, H, W) with labels int64 (N,), attack after attack.

    Images are uint8, or float32 in [0, 1], which are scored as given. An image counts as robust if
    it is classified correctly before the attack and at every iterate; misclassified images are not
    attacked. Every success is re-checked on `model` itself in float32, with its distance and range;
    an unconfirmed success counts as robust and is reported. `curve` random images are attacked
    again at increasing eps. Results depend on the order of the images and on `batch_size` only
    through rounding: a search that ends near the decision boundary may end differently.

    Yields the result so far at least every second, or after a pass that takes longer, so that the
    caller can show it or stop. `watch` runs before each pass of the model and while the images are
    sorted. `on_forecast` gets an upper bound on the time, before the first attack and after each
    stage of a multi-stage attack.

    Attacks query a faster copy of a `Classifier`; for any other model they query `fast` if given.
    `precision` bf16 searches in bfloat16 (`auto`: if it agrees and, on a CPU, is faster), through
    the copy `bf16` if given; a success counts only if float32 agrees. With `journal`, finished
    images are recorded in that file, and the same evaluation resumes from it, in the precision it
    started with; `model_id` identifies a model that is not a module, with its `architecture` if it
    wraps a classifier. `image_dtype` is the type of the images before they became float32, for the
    result.

    The processes of `world` share the images, each with its own journal (`World.per_rank_path`);
    all get the same model and images. Each yields results of its own shard until the last result,
    which covers all images.

    Raises ValueError if there is nothing to score or a label is out of range, ModelError for a
    model that can't be evaluated, and JournalError for a journal of another evaluation.
    """
    begin = time.perf_counter()
    _check_data(images, labels, num_classes)
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
    with torch.inference_mode(False):  # tensors are changed in place and differentiated
        if fast is None:
            fast = fast_copy(model, images, device)
        if journal is not None:
            check_processes(journal, size=world.size)
        resumed: Precision = "auto"
        if journal is not None and precision == "auto":
            precision = resumed = _journal_precision(world.per_rank_path(journal))
        order = shuffled(images, labels, watch)
        watch()
        with frozen(model, device), frozen(fast, device), full_float32():
            few = slice(min(MORE_PROBES, batch_size))
            x, y = to_images(images[few].to(device)), labels[few].to(device)
            passes = count_passes(images, attacks, curve) // world.size
            chosen, search = _choose(precision, fast, x, y, passes=passes, bf16=bf16, world=world)
        if resumed != "auto":
            chosen = replace(chosen, reason="as the journal was begun")
        models = Models(model, fast=fast, search=search, precision=chosen, watch=watch)
        work = Work(
            models,
            images[order.to(images.device)],
            labels.cpu()[order],
            positions=order,
            num_classes=num_classes,
            attacks=attacks,
            device=device,
            batch_size=batch_size,
            curve=curve,
            image_dtype=image_dtype or str(images.dtype).removeprefix("torch."),
            on_forecast=on_forecast,
            world=world,
        )

    def open_journal() -> Journal | None:
        if journal is None:
            return None
        described = model.architecture if isinstance(model, Classifier) else architecture
        manifest = {
            **(vars(described) if described else {}),
            "model": model_id or model_digest(model),
            "data": data_digest(work.images, work.labels),
            "attacks": [attack_text(attack) for attack in attacks],
            "precision": str(chosen),
        }
        return Journal(world.per_rank_path(journal), manifest)

    results = work.loop(allow_probabilities=allow_probabilities, open_journal=open_journal)
    try:
        while True:
            # Frozen only while computing: between yields the caller sees the model as it was.
            with models.hold(device):
                try:
                    result = next(results)
                except StopIteration:
                    return
            meter = work.stages.meter
            # Passes on an accelerator are asynchronous, so they are not timed.
            timed = device.type == "cpu"
            times = Times(
                evaluation=time.perf_counter() - begin,
                passes=meter.seconds if timed else None,
                limit=meter.limit if timed else None,
            )
            yield replace(result, times=times)
    finally:
        results.close()
        work.close()


def _journal_precision(journal: Path) -> Precision:
    """The precision of an existing journal, which can't be resumed in another; else `auto`."""
    found = recorded(journal, "precision")
    if found is None:
        return "auto"
    return "bf16" if str(found).startswith("bf16") else "fp32"


def _choose(
    precision: Precision,
    fast: Model,
    x: Tensor,
    y: Tensor,
    *,
    passes: int,
    bf16: Model | None,
    world: World,
) -> tuple[SearchPrecision, Model]:
    """The same precision for all processes: bfloat16 if each of them would choose it."""
    chosen, searched = choose_precision(precision, fast, x, y, passes=passes, bf16=bf16)
    agreed = all(other.bf16 for other in world.gather(chosen))
    if chosen.bf16 and not agreed:
        reason = "another process stays in float32"
        return SearchPrecision(bf16=False, reason=reason), packed_float32(fast, x.device)
    return chosen, searched


def shuffled(images: Tensor, labels: Tensor, watch: Callable[[], None] = lambda: None) -> Tensor:
    """A random-looking order int64 (N,) that depends only on the images, not on their order.

    The first images of a set sorted by class are not representative, and neither the images of
    the curve nor a journal should depend on the order in which a set was read.
    """
    parts = torch.split(images, max(1, 2**20 // images[0].numel()))
    keys = []
    for part in parts:
        watch()
        keys.append(image_keys(to_images(part), 0).cpu())
    by_label = labels.cpu().argsort(stable=True)  # decides between equal images
    return by_label[torch.cat(keys)[by_label].argsort(stable=True)]


def _check_data(images: Tensor, labels: Tensor, num_classes: int) -> None:
    if images.ndim != 4 or images.dtype not in (torch.uint8, torch.float32):
        raise ValueError(
            "expected uint8 or float32 images (N, C, H, W), got "
            f"{images.dtype} {tuple(images.shape)}"
        )
    if not len(images):
        raise ValueError("expected at least 1 image, got none")
    if images.is_floating_point():
        check_range(images)
    if labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise ValueError(
            f"expected labels int64 ({len(images)},), got {labels.dtype} {tuple(labels.shape)}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"expected labels from 0 to {num_classes - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )

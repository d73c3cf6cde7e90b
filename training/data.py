"""The training images and the held-out images of a run, and warnings about them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robust.datasets import Dataset, stratified_split
from robust.matching import match_classes
from training.data_checks import (
    ClassCount,
    balanced_weights,
    class_warnings,
    count_classes,
    describe_counts,
    held_out_warning,
    shared_images,
)
from training.recipe import Recipe
from training.state import TrainingError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The training images of a run, as uint8 on the device, and its held-out images."""

    images: Tensor  # uint8 (N, 3, H, W), on the device
    labels: Tensor  # int64 (N,), on the device
    held_images: Tensor
    held_labels: Tensor
    monitored: Tensor  # indices of the held-out images that are scored during the run
    counts: tuple[ClassCount, ...]
    held_source: dict[str, str]  # describes the held-out images in the sidecar
    class_weights: Tensor | None  # for the loss, float32 (K,), on the device

    @classmethod
    def split(
        cls,
        dataset: Dataset,
        recipe: Recipe,
        *,
        seed: int,
        device: torch.device,
        validation: Dataset | None = None,
    ) -> TrainingData:
        """Hold out some images of `dataset`, or use `validation`; logs warnings about them.

        Raises TrainingError for images of another size, or for too few.
        """
        _check_size(dataset, recipe.input_size)
        if validation is None:
            try:
                kept, held = stratified_split(dataset.labels, recipe.held_out, seed=seed)
            except ValueError as error:
                raise TrainingError(f"{dataset.name}: held_out: {error}") from None
            held_out = dataset.subset(held)
            source = {"data": "held out from training"}
        else:
            _check_size(validation, recipe.input_size)
            kept = torch.arange(len(dataset))
            held_out = match_classes(validation, dataset.classes)
            source = {"data": validation.name, "data_sha256": held_out.sha256}
        if len(kept) < recipe.batch_size:
            fits = 1 << max(len(kept).bit_length() - 1, 0)  # the largest power of 2
            raise TrainingError(
                f"{dataset.name}: expected at least one batch of {recipe.batch_size} images to "
                f"train on, found {len(kept)} (and {len(held_out)} held out)"
                + (f"; try --set batch_size={fits}" if fits > 1 else "")
            )
        if not len(held_out):
            raise TrainingError(f"{held_out.name}: expected held-out images, found none")
        images, labels = dataset.images[kept], dataset.labels[kept]
        counts = count_classes(dataset.classes, labels, held_out.labels)
        weights = None
        if recipe.class_weights == "balanced":
            weights = balanced_weights(counts).to(device)
        count = recipe.monitor_limit or len(held_out)
        shuffled = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))
        few = held_out_warning(len(held_out), validation=validation is not None)
        shared = 0 if validation is None else shared_images(images, held_out.images)
        _log(counts, recipe, few, shared)
        return cls(
            images=images.to(device),
            labels=labels.to(device),
            held_images=held_out.images,
            held_labels=held_out.labels,
            monitored=shuffled[:count].sort().values,  # data may be sorted by class
            counts=counts,
            held_source=source,
            class_weights=weights,
        )

    def count_record(self) -> dict[str, Any]:
        """The images per class as JSON values."""
        return {item.name: {"train": item.train, "held_out": item.held_out} for item in self.counts}


def _check_size(dataset: Dataset, size: int) -> None:
    if dataset.images.shape[2:] != (size, size):
        raise TrainingError(
            f"{dataset.name}: expected images of {size} x {size} pixels, as the recipe's "
            f"input_size says, found {' x '.join(map(str, dataset.images.shape[2:]))}"
        )


def _log(counts: tuple[ClassCount, ...], recipe: Recipe, few: str | None, shared: int) -> None:
    logger.info("%s", describe_counts(counts))
    messages = class_warnings(counts, class_weights=recipe.class_weights)
    if few:
        messages.append(few)
    if shared:
        messages.append(
            f"{shared} of the held-out images are also training images: their scores say nothing "
            "about new images"
        )
    for message in messages:
        logger.warning("%s", message)

"""Warnings about the images of a run, before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from robust.evaluation import wilson_interval

IMBALANCE = 10  # ratio of the largest to the smallest class that gives a warning
FEW_HELD_OUT = 100  # with fewer, an accuracy of 50% has an error of almost 10 points or more
_MAX_NAMED = 8  # classes named in a message


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    """The numbers of training images and held-out images of a class."""

    name: str
    train: int
    held_out: int

    @property
    def total(self) -> int:
        """All images of the class."""
        return self.train + self.held_out


def count_classes(
    classes: Sequence[str], labels: Tensor, held_labels: Tensor
) -> tuple[ClassCount, ...]:
    """The counts per class, from the training labels int64 (N,) and held-out labels (M,)."""
    train, held = (part.cpu().bincount(minlength=len(classes)) for part in (labels, held_labels))
    return tuple(
        ClassCount(name=name, train=int(train[k]), held_out=int(held[k]))
        for k, name in enumerate(classes)
    )


def describe_counts(counts: Sequence[ClassCount]) -> str:
    """The images per class in one line; for more than 20 classes only the extremes and median."""
    if len(counts) <= 20:
        each = (f"{item.name} {item.train} + {item.held_out}" for item in counts)
        return f"images per class, training + held out: {', '.join(each)}"
    ordered = sorted(counts, key=lambda item: item.total)
    ends = f"{ordered[0].total} ({ordered[0].name}) to {ordered[-1].total} ({ordered[-1].name})"
    return f"images per class: {ends}, median {ordered[len(ordered) // 2].total}"


def class_warnings(counts: Sequence[ClassCount], *, class_weights: str = "none") -> list[str]:
    """Warnings about classes that lead to a bad model or meaningless scores."""
    found = []
    empty = [item.name for item in counts if item.total == 0]
    untrained = [item.name for item in counts if item.train == 0 < item.held_out]
    unscored = [item for item in counts if item.held_out == 0 < item.train]
    if empty:
        first_label = " (do the labels begin at 1?)" if empty == ["0"] else ""
        found.append(
            f"{_listed('class', empty)} without images{first_label}: the model will have outputs "
            "that it never learns"
        )
    if untrained:
        found.append(f"{_listed('class', untrained)} without training images, only held out")
    if unscored:
        names = [f"{item.name} ({_images(item.total)})" for item in unscored]
        found.append(
            f"{_listed('class', names)} without held-out images: no score during the run "
            "says how well the model knows it"
        )
    present = [item for item in counts if item.train]
    if present:
        small = min(present, key=lambda item: item.train)
        large = max(present, key=lambda item: item.train)
        if large.train >= IMBALANCE * small.train:
            hint = "" if class_weights == "balanced" else "; --set class_weights=balanced helps"
            found.append(
                f"uneven classes: {large.name} has {_images(large.train)} to train on, "
                f"{large.train / small.train:.0f} times as many as {small.name} "
                f"({small.train}){hint}"
            )
    return found


def held_out_warning(count: int, *, validation: bool) -> str | None:
    """A warning with the confidence interval if there are few held-out images, else None.

    `validation`: they are images of their own, not a share of the training images.
    """
    if count >= FEW_HELD_OUT:
        return None
    low, high = wilson_interval(round(count / 2), count)
    return (
        f"only {_images(count)} held out: a measured accuracy of 50% may be anything from "
        f"{100 * low:.0f} to {100 * high:.0f}% (95% interval), too coarse to choose between "
        f"epochs; provide more with --val{'' if validation else ' PATH or --set held_out=0.2'}"
    )


def shared_images(images: Tensor, others: Tensor) -> int:
    """Number of images in `others` that are identical to one in `images`; uint8 (N, 3, H, W)."""
    known = {_digest(image) for image in images}
    return sum(_digest(image) in known for image in others)


def balanced_weights(counts: Sequence[ClassCount]) -> Tensor:
    """A loss weight per class, float32 (K,), inversely proportional to its training images.

    n / (K n_k) with the K classes that have images, so that the mean over all images is 1; 0 for
    the others.
    """
    train = torch.tensor([item.train for item in counts], dtype=torch.float32)
    weights = train.sum() / (train.count_nonzero() * train.clamp_min(1))
    return torch.where(train > 0, weights, 0.0)


def _digest(image: Tensor) -> bytes:
    return blake2b(image.contiguous().numpy().tobytes(), digest_size=16).digest()


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _listed(noun: str, names: Sequence[str]) -> str:
    """``class a``, ``3 classes: a, b, c`` or ``20 classes: a, b, ...``, shortened."""
    if len(names) == 1:
        return f"{noun} {names[0]}"
    more = ", ..." if len(names) > _MAX_NAMED else ""
    return f"{len(names)} {noun}es ({', '.join(names[:_MAX_NAMED])}{more})"

"""How accurate a model is, clean and under attack."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robust.attacks import AttackSettings, Model, frozen
from robust.threat_model import format_eps


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How many of n images were classified right, clean (`attack` None) or under attack."""

    attack: AttackSettings | None
    correct: int
    n: int
    per_class: tuple[tuple[int, int], ...]  # right and all, for each class
    seconds: float = field(default=0.0, compare=False)  # spent on it

    @property
    def label(self) -> str:
        """``clean`` or the attack with its budget."""
        return self.attack.label if self.attack else "clean"

    @property
    def value(self) -> float:
        """The accuracy, in [0, 1]; NaN before the first image."""
        return self.correct / self.n if self.n else math.nan

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with the Wilson 95% interval."""
        low, high = wilson_interval(self.correct, self.n)
        values: dict[str, Any] = {
            "attack": self.label,
            "accuracy": self.value,
            "correct": self.correct,
            "n": self.n,
            "interval": [low, high],
            "per_class": [right / n if n else None for right, n in self.per_class],
            "seconds": self.seconds,
        }
        if self.attack:
            values |= {
                "norm": self.attack.threat_model.norm,
                "eps": self.attack.threat_model.eps,
                "eps_text": format_eps(self.attack.threat_model.eps),
                "alpha": self.attack.alpha,
                "steps": self.attack.steps,
                "restarts": self.attack.restarts,
                "seed": self.attack.seed,
            }
        return values


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results over the first `n` of `total` images: clean, each attack, and the worst of them."""

    n: int
    total: int
    clean: Accuracy
    attacks: tuple[Accuracy, ...]
    worst_correct: int  # images right when clean and under every attack

    @property
    def accuracies(self) -> tuple[Accuracy, ...]:
        """Clean first, then the attacks in order."""
        return (self.clean, *self.attacks)

    def accuracy(self, label: str) -> float:
        """The accuracy under the attack of that label, or ``clean``. KeyError for another."""
        return {item.label: item.value for item in self.accuracies}[label]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        low, high = wilson_interval(self.worst_correct, self.n)
        return {
            "n": self.n,
            "total": self.total,
            "results": [item.to_dict() for item in self.accuracies],
            "worst_case": {
                "accuracy": self.worst_correct / self.n if self.n else None,
                "correct": self.worst_correct,
                "n": self.n,
                "interval": [low, high],
            },
        }


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share, 95% by default; (0, 1) for n = 0.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22, 209-212.
    """
    if n == 0:
        return 0.0, 1.0
    share, square = correct / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    reach = z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def evaluate(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    attacks: Sequence[AttackSettings],
    device: torch.device,
    batch_size: int = 100,
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
) -> Iterator[Evaluation]:
    """Score images uint8 (N, 3, H, W) with labels int64 (N,), batch by batch.

    Yields the result so far after each batch, so that the caller can show it or stop. An image
    counts as robust if it is right when clean and at every iterate of the attack; images wrong
    when clean are not attacked. Raises ValueError when there is nothing to score or a label
    does not fit the model.
    """
    if images.ndim != 4 or images.dtype != torch.uint8 or len(images) != len(labels):
        raise ValueError(
            f"expected uint8 images (N, C, H, W) and N labels, got {images.dtype} "
            f"{tuple(images.shape)} and {len(labels)}"
        )
    if not len(images):
        raise ValueError("expected at least 1 image, got none")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"expected labels from 0 to {num_classes - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    seen, right = _Tally(num_classes), _Tally(num_classes)
    robust, worst = [_Tally(num_classes) for _ in attacks], _Tally(num_classes)
    for start in range(0, len(images), batch_size):
        x = images[start : start + batch_size].to(device).float() / 255
        y = labels[start : start + batch_size].to(device)
        begin = time.perf_counter()
        correct = _predict(model, x) == y
        seen.add(y)
        right.add(y[correct])
        right.seconds += time.perf_counter() - begin
        survives = correct.clone()
        for attack, tally in zip(attacks, robust, strict=True):
            begin = time.perf_counter()
            withstood = correct.clone()
            if bool(correct.any()):
                withstood[correct] = _withstands(model, attack, x[correct], y[correct], start)
            tally.add(y[withstood])
            tally.seconds += time.perf_counter() - begin
            survives &= withstood
        worst.add(y[survives])

        def accuracy(tally: _Tally, attack: AttackSettings | None) -> Accuracy:
            per_class = tuple(zip(tally.counts, seen.counts, strict=True))
            return Accuracy(
                attack=attack,
                correct=tally.sum,
                n=seen.sum,
                per_class=per_class,
                seconds=tally.seconds,
            )

        yield Evaluation(
            n=seen.sum,
            total=len(images),
            clean=accuracy(right, None),
            attacks=tuple(map(accuracy, robust, attacks)),
            worst_correct=worst.sum,
        )


class _Tally:
    """Counts of images of each class, and the time they took."""

    def __init__(self, num_classes: int) -> None:
        self.counts = [0] * num_classes
        self.seconds = 0.0

    def add(self, labels: Tensor) -> None:
        for k, count in enumerate(labels.bincount(minlength=len(self.counts)).tolist()):
            self.counts[k] += count

    @property
    def sum(self) -> int:
        return sum(self.counts)


def _predict(model: Model, x: Tensor) -> Tensor:
    with frozen(model, x.device), torch.no_grad():
        return model(x).argmax(dim=1)


def _withstands(model: Model, attack: AttackSettings, x: Tensor, y: Tensor, start: int) -> Tensor:
    return ~attack.run(model, x, y, early_stop=True).success

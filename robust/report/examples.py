"""Attacks on a few images, and the model's loss around some of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robust.attacks import AttackSettings, Model, resolve_attack
from robust.attacks.losses import margin
from robust.attacks.passes import Passes
from robust.checkpoint import Checkpoint
from robust.datasets import Dataset
from robust.images import to_float
from robust.inference import for_inference
from robust.matching import first_images, match_classes
from robust.prediction import AttackOutcome, attack_image
from robust.threat_model import ThreatModel

ATTACK = "pgd-20"
BLACK_BOX, QUERIES = "square", 500  # for a model without gradients
SURFACES = 4  # images
SIDE = 21  # points along each direction


@dataclass(frozen=True, kw_only=True)
class Surface:
    """The cross-entropy around an image in two directions, each from -eps to eps.

    `loss` and `margin` are (SIDE, SIDE): columns go along the steepest direction of the gradient,
    rows along a random one; the margin is above 0 where the image is misclassified.
    `expected` is the rise of the loss at eps along the gradient, by linear extrapolation.
    """

    number: int  # index of the image in the gallery, from 0
    label: int
    loss: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    margin: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    expected: float

    @property
    def at_image(self) -> float:
        """The loss of the image itself."""
        return float(self.loss[SIDE // 2, SIDE // 2])

    @property
    def along_gradient(self) -> float:
        """The loss at eps along the gradient."""
        return float(self.loss[SIDE // 2, -1])

    @property
    def at_random(self) -> float:
        """The larger loss at eps along the random direction, forward or backward."""
        return float(max(self.loss[0, SIDE // 2], self.loss[-1, SIDE // 2]))

    @property
    def follows_gradient(self) -> bool:
        """Whether the loss rises most along the gradient; otherwise gradients may be masked."""
        rise, other = self.along_gradient - self.at_image, self.at_random - self.at_image
        return rise > max(0.0, other) and rise > 0.25 * self.expected


@dataclass(frozen=True, kw_only=True)
class Examples:
    """A few attacked images of `data`, and the loss around the correctly classified ones."""

    data: Dataset  # only these images, as uint8
    settings: AttackSettings
    outcomes: tuple[AttackOutcome, ...]
    surfaces: tuple[Surface, ...]


def show_examples(
    checkpoint: Checkpoint, dataset: Dataset, *, count: int, device: torch.device
) -> Examples:
    """Attack the first `count` images, or evenly spaced ones if the data is sorted by class.

    They are not selected by their results. Raises DatasetError for unknown classes.
    """
    model = for_inference(checkpoint.classifier, device)
    threat_model = checkpoint.sidecar.threat_model or ThreatModel()
    differentiable = checkpoint.classifier.differentiable
    settings = (
        resolve_attack(ATTACK, threat_model)
        if differentiable
        else resolve_attack(BLACK_BOX, threat_model, steps=QUERIES)
    )
    most = SURFACES if differentiable and threat_model.eps > 0 else 0
    chosen = first_images(match_classes(dataset, checkpoint.sidecar.classes), count)
    outcomes: list[AttackOutcome] = []
    surfaces: list[Surface] = []
    for number, (image, label) in enumerate(
        zip(chosen.images, chosen.labels.tolist(), strict=True)
    ):
        outcome = attack_image(model, image.to(device), label, settings=settings)
        outcomes.append(outcome)
        if not outcome.already_wrong and len(surfaces) < most:
            x = to_float(image.to(device)).unsqueeze(0)
            surfaces.append(
                measure_surface(model, x, label, threat_model=threat_model, number=number)
            )
    return Examples(
        data=chosen, settings=settings, outcomes=tuple(outcomes), surfaces=tuple(surfaces)
    )


def measure_surface(
    model: Model, x: Tensor, label: int, *, threat_model: ThreatModel, number: int
) -> Surface:
    """The loss surface around the image `x`, float32 (1, 3, H, W). Raises ModelError."""
    passes, y = Passes(model), torch.tensor([label], device=x.device)

    def cross_entropy(logits: Tensor, part: slice) -> Tensor:
        return F.cross_entropy(logits, y[part], reduction="none")

    generator = torch.Generator().manual_seed(number)
    random = torch.randn(x.shape, generator=generator).to(x.device)
    _, _, gradient = passes.gradient(x, cross_entropy)
    along_gradient = threat_model.eps * threat_model.steepest(gradient)
    along_random = threat_model.eps * threat_model.steepest(random)
    steps = torch.linspace(-1, 1, SIDE, device=x.device).view(SIDE, 1, 1, 1)
    loss, margins = [], []
    for step in steps.flatten().tolist():
        logits = passes.logits((x + step * along_random + steps * along_gradient).clamp(0, 1))
        labels = y.expand(SIDE)
        loss.append(F.cross_entropy(logits, labels, reduction="none").cpu().double().numpy())
        margins.append(margin(logits, labels).cpu().double().numpy())
    return Surface(
        number=number,
        label=label,
        loss=np.stack(loss),
        margin=np.stack(margins),
        # For the part of the step that stays in [0, 1].
        expected=float((gradient * ((x + along_gradient).clamp(0, 1) - x)).sum()),
    )

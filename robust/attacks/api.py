"""The attacks as functions; `AttackSettings.run` runs the same by name.

Each takes images float32 (N, C, H, W) in [0, 1], labels int64 (N,) and, by keyword:

- `threat_model`: the ball that the attack stays in;
- `eps` float32 (N,): a radius per image instead of the threat model's;
- `target` int64 (N,): the target classes, if the attack supports them;
- `seed`: random numbers depend only on it and on the image;
- `batch_size`: maximum images per pass; all at once by default;
- `cancelled`: returns the mask of cancelled images, bool (N,), and is called between passes.

Each raises ValueError for images, labels or settings out of range, and ModelError for a model that
can't be attacked.
"""

from __future__ import annotations

from typing import Required, TypedDict, Unpack

from torch import Tensor

from robust.attack_registry import REGISTRY, TARGETS
from robust.attacks.apgd import APGD, TargetedAPGD
from robust.attacks.fab import FAB
from robust.attacks.frozen import Model
from robust.attacks.losses import Loss
from robust.attacks.malt import MALT
from robust.attacks.minimal import ROUNDS, Minimal
from robust.attacks.pgd import PGD, relative
from robust.attacks.result import AttackResult
from robust.attacks.run import run_algorithm
from robust.attacks.search import Cancelled
from robust.attacks.square import Square
from robust.threat_model import ThreatModel


class Call(TypedDict, total=False):
    """Keywords that all attacks share."""

    threat_model: Required[ThreatModel]
    eps: Tensor | None
    seed: int
    batch_size: int | None
    cancelled: Cancelled | None


class TargetedCall(Call, total=False):
    """Keywords of attacks that take a target."""

    target: Tensor | None


def fgsm(model: Model, x: Tensor, y: Tensor, **call: Unpack[TargetedCall]) -> AttackResult:
    """One step of length eps along the gradient.

    Under `linf` this is the fast gradient sign method; under `l2` the step follows the gradient
    itself. Source: Goodfellow et al. 2015, arXiv:1412.6572.
    """
    algorithm = PGD(
        norm=call["threat_model"].norm,
        steps=1,
        relative_alpha=1.0,
        random_start=False,
        early_stop=False,
        targeted=call.get("target") is not None,
    )
    return run_algorithm(model, algorithm, x, y, **call)


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    alpha: float,
    steps: int,
    restarts: int = 1,
    random_start: bool = True,
    early_stop: bool = False,
    loss: Loss = "ce",
    **call: Unpack[TargetedCall],
) -> AttackResult:
    """Maximize `loss` in `steps` steps of length `alpha`, each projected into the ball.

    `alpha` is in pixel units. With `target` the loss of that class is minimized instead. With
    per-image `eps`, `alpha` scales with it. Every iterate is scored, including the last; the
    iterate with the highest loss is kept, among those that fool the model if there are any.
    Restarts run on the images that are not fooled yet. With `early_stop` an image is finished as
    soon as it is fooled, and `x_adv` is its first success. Without `random_start` the first run
    starts at the image. Source: Madry et al. 2018, arXiv:1706.06083.
    """
    threat_model = call["threat_model"]
    if call.get("eps") is not None and not threat_model.eps:
        raise ValueError("expected a threat model with eps above 0, as alpha scales with it, got 0")
    algorithm = PGD(
        norm=threat_model.norm,
        steps=steps,
        runs=restarts,
        relative_alpha=relative(alpha, threat_model.eps),
        random_start=random_start,
        early_stop=early_stop,
        loss_name=loss,
        targeted=call.get("target") is not None,
    )
    return run_algorithm(model, algorithm, x, y, **call)


def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    loss: Loss = "ce",
    steps: int = REGISTRY["apgd-ce"].budget,
    restarts: int = 1,
    early_stop: bool = True,
    **call: Unpack[TargetedCall],
) -> AttackResult:
    """Auto-PGD on the cross-entropy (`ce`) or the difference of logits ratio (`dlr`).

    Arguments and result are those of `pgd`. Also raises ValueError if the model has too few
    classes for the loss. Source: Croce, Hein 2020, arXiv:2003.01690.
    """
    algorithm = APGD(
        norm=call["threat_model"].norm,
        steps=steps,
        runs=restarts,
        early_stop=early_stop,
        loss_name=loss,
        targeted=call.get("target") is not None,
    )
    return run_algorithm(model, algorithm, x, y, **call)


def apgd_t(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    targets: int = TARGETS,
    steps: int = REGISTRY["apgd-t"].budget,
    early_stop: bool = True,
    **call: Unpack[Call],
) -> AttackResult:
    """Auto-PGD on the targeted difference of logits ratio, one target class after the other.

    The `targets` likeliest other classes (or all, if there are fewer) are tried in turn, each with
    `steps` steps, until one run fools the model; any wrong class counts. With 3 classes or fewer
    the loss is the targeted margin, as the ratio needs 4.
    Source: Croce, Hein 2020, arXiv:2003.01690.
    """
    norm = call["threat_model"].norm
    algorithm = TargetedAPGD(norm=norm, steps=steps, runs=targets, early_stop=early_stop)
    return run_algorithm(model, algorithm, x, y, **call)


def malt(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    targets: int = REGISTRY["malt"].targets,
    steps: int = REGISTRY["malt"].budget,
    early_stop: bool = True,
    **call: Unpack[Call],
) -> AttackResult:
    """Auto-PGD on the targeted difference of logits ratio, to the classes closest by linearization.

    One query with gradient measures how close each of the 100 likeliest other classes is; then the
    `targets` closest are attacked as in `apgd_t`. Source: Melamed et al. 2024, arXiv:2407.02240.
    """
    norm = call["threat_model"].norm
    algorithm = MALT(norm=norm, steps=steps, targets=targets, early_stop=early_stop)
    return run_algorithm(model, algorithm, x, y, **call)


def pma(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = REGISTRY["pma"].budget,
    restarts: int = 1,
    early_stop: bool = True,
    **call: Unpack[TargetedCall],
) -> AttackResult:
    """Auto-PGD on the margin of the probabilities; arguments and result are those of `apgd`.

    Source: Xie et al. 2024, arXiv:2411.15210.
    """
    return apgd(
        model, x, y, loss="pm", steps=steps, restarts=restarts, early_stop=early_stop, **call
    )


def fab_t(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    targets: int = TARGETS,
    steps: int = REGISTRY["fab-t"].budget,
    early_stop: bool = True,
    **call: Unpack[Call],
) -> AttackResult:
    """Find a close adversarial image by projecting onto the linearized decision boundary.

    The `targets` likeliest other classes (or all, if there are fewer) are tried in turn. A point
    counts as soon as it fools the model within eps; without `early_stop` the search continues for
    a closer one. Source: Croce, Hein 2020, arXiv:1907.02044.
    """
    norm = call["threat_model"].norm
    algorithm = FAB(norm=norm, steps=steps, runs=targets, early_stop=early_stop)
    return run_algorithm(model, algorithm, x, y, **call)


def square(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    queries: int = REGISTRY["square"].budget,
    restarts: int = 1,
    early_stop: bool = True,
    **call: Unpack[TargetedCall],
) -> AttackResult:
    """Change random squares and keep the changes that raise the margin; needs no gradient.

    Makes one forward pass at the starting point and then `queries` more.
    Source: Andriushchenko et al. 2020, arXiv:1912.00049.
    """
    algorithm = Square(
        norm=call["threat_model"].norm,
        steps=queries,
        runs=restarts,
        early_stop=early_stop,
        targeted=call.get("target") is not None,
    )
    return run_algorithm(model, algorithm, x, y, **call)


def minimal(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = REGISTRY["minimal"].budget,
    restarts: int = 1,
    rounds: int = ROUNDS,
    **call: Unpack[TargetedCall],
) -> AttackResult:
    """Find the smallest eps at which PGD on the margin fools the model, by bisection.

    `distance` is that of the closest adversarial image found, an upper bound on the smallest eps;
    where `success` is False none was found within eps. A misclassified image has distance 0.
    """
    algorithm = Minimal(
        norm=call["threat_model"].norm,
        steps=steps,
        restarts=restarts,
        rounds=rounds,
        targeted=call.get("target") is not None,
    )
    return run_algorithm(model, algorithm, x, y, **call)

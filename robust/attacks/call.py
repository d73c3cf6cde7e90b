"""One call of an attack: inputs checked, all images searched, results in their order."""

from __future__ import annotations

import torch
from torch import Tensor

from robust.attacks.frozen import Model
from robust.attacks.result import AttackResult
from robust.attacks.search import Algorithm, GivenUp, search
from robust.threat_model import ThreatModel


def attack(
    model: Model,
    algorithm: Algorithm,
    x: Tensor,
    y: Tensor,
    *,
    threat_model: ThreatModel,
    eps: Tensor | None = None,
    target: Tensor | None = None,
    clean: Tensor | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    given_up: GivenUp | None = None,
) -> AttackResult:
    """Run `algorithm` on images float32 (N, C, H, W) in [0, 1] with labels int64 (N,).

    `eps` float32 (N,) replaces that of the threat model, image by image. Raises ValueError for
    images, labels, targets or sizes out of range.
    """
    check_inputs(x, y, target)
    if not -(2**63) <= seed < 2**63 - 1:
        raise ValueError(f"expected a seed that fits 64 bits, got {seed}")
    sizes = sizes_of(eps, threat_model, x)
    parts = list(
        search(
            model,
            algorithm,
            x,
            y,
            eps=sizes,
            target=target,
            clean=clean,
            seed=seed,
            batch_size=batch_size,
            given_up=given_up,
        )
    )
    order = torch.cat([part.index for part in parts]).argsort().to(x.device)
    names = vars(parts[0].result)
    return AttackResult(
        **{name: torch.cat([getattr(part.result, name) for part in parts])[order] for name in names}
    )


def sizes_of(eps: Tensor | None, threat_model: ThreatModel, x: Tensor) -> Tensor:
    """The radius around each image, float32 (N,). Raises ValueError for one out of range."""
    if eps is None:
        return torch.full((len(x),), threat_model.eps, device=x.device)
    if not isinstance(eps, Tensor) or eps.shape != (len(x),) or not eps.is_floating_point():
        raise ValueError(
            f"expected eps float ({len(x)},), one for each image (one for all is that of the "
            f"threat model), got {_form(eps)}"
        )
    most = 1.0 if threat_model.norm == "linf" else torch.inf
    low, high = eps.min().item(), eps.max().item()
    if not (low >= 0 and high <= most):
        raise ValueError(f"expected eps from 0 to {most:g}, got {low:g} to {high:g}")
    return eps.float().to(x.device)


def check_inputs(x: Tensor, y: Tensor, target: Tensor | None = None) -> None:
    """Raise ValueError unless images, labels and targets have the shapes and ranges expected."""
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"expected float images (N, C, H, W), got {_form(x)}")
    if not len(x):
        raise ValueError("expected at least 1 image, got none")
    for name, labels in (("labels", y), ("targets", target)):
        if labels is None:
            continue
        if (
            not isinstance(labels, Tensor)
            or labels.shape != (len(x),)
            or labels.dtype != torch.int64
        ):
            raise ValueError(f"expected {name} int64 ({len(x)},), got {_form(labels)}")
    low, high = x.min().item(), x.max().item()
    if not (low >= 0 and high <= 1):  # also refuses NaN
        raise ValueError(f"expected images in [0, 1], got values from {low:g} to {high:g}")
    if target is not None and bool((target == y).any()):
        raise ValueError("expected a target other than the label, got the label itself")


def check_counts(**counts: int) -> None:
    """Raise ValueError unless all are whole numbers of at least 1."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"expected {name} as a whole number of at least 1, got {count!r}")


def _form(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"a {type(value).__name__}"

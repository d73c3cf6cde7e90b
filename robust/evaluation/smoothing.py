"""Certified accuracy by randomized smoothing: no attack within the radius changes the prediction.

The certificate is for the smoothed classifier, the class that the model predicts most often under
Gaussian noise, not for the model alone. Source: Cohen et al. 2019, arXiv:1902.02918.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from robust.attacks import Model, frozen
from robust.attacks.checks import check_counts
from robust.evaluation.models import check_finite
from robust.evaluation.precision import full_float32

ABSTAINED = -1
SELECTED = 100  # noisy copies that select the class; further ones estimate its probability
STEPS = 60  # bisections, which give all digits of a float64


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The smoothed prediction for one image, and the L2 radius within which it can't change."""

    predicted: int  # ABSTAINED if no class is likely enough
    radius: float  # in pixel units; 0 if it abstained


@full_float32()
def certify(
    model: Model,
    image: Tensor,
    *,
    sigma: float,
    samples: int = 1000,
    alpha: float = 0.001,
    batch_size: int = 100,
    generator: torch.Generator,
) -> Certificate:
    """Certify an image float32 (C, H, W) in [0, 1] under Gaussian noise of deviation `sigma`.

    `samples` noisy copies are classified, in full float32; the radius is wrong with probability
    `alpha` at most. `generator` is on the CPU. Raises ValueError for an invalid sigma, alpha or
    count, and ModelError for logits that are not finite.
    """
    if not 0 < sigma < math.inf or not 0 < alpha < 1:
        raise ValueError(
            f"expected sigma above 0 and alpha between 0 and 1, got {sigma:g} and {alpha:g}"
        )
    check_counts(samples=samples, batch_size=batch_size)

    def counts(n: int) -> Tensor:
        found = torch.zeros(0, dtype=torch.int64)
        for start in range(0, n, batch_size):
            size = (min(batch_size, n - start), *image.shape)
            noise = torch.randn(size, generator=generator).to(image.device)
            logits = model(image + sigma * noise)
            check_finite(logits)
            here = torch.bincount(logits.argmax(dim=1).cpu(), minlength=logits.shape[1])
            found = here if not len(found) else found + here
        return found

    with frozen(model, image.device), torch.no_grad():
        likeliest = int(counts(SELECTED).argmax())
        seen = int(counts(samples)[likeliest])
    share = least_share(seen, samples, alpha=alpha)
    if share <= 0.5:
        return Certificate(predicted=ABSTAINED, radius=0.0)
    return Certificate(predicted=likeliest, radius=sigma * NormalDist().inv_cdf(share))


def largest_radius(*, sigma: float, samples: int, alpha: float) -> float:
    """The radius of an image if all its noisy copies agree; no image can have a larger one."""
    share = least_share(samples, samples, alpha=alpha)
    return max(0.0, sigma * NormalDist().inv_cdf(share))


def least_share(seen: int, n: int, *, alpha: float) -> float:
    """The one-sided Clopper-Pearson lower bound on a proportion, from `seen` of `n`.

    The true proportion is lower with probability at most `alpha`.
    """
    if seen == 0:
        return 0.0
    if seen == n:
        return float(alpha ** (1 / n))
    k = torch.arange(seen, n + 1, dtype=torch.float64)
    total = torch.tensor(float(n + 1), dtype=torch.float64)
    choices = torch.lgamma(total) - torch.lgamma(k + 1) - torch.lgamma(total - k)
    low, high = 0.0, seen / n
    for _ in range(STEPS):
        middle = (low + high) / 2
        tail = (choices + k * math.log(middle) + (n - k) * math.log1p(-middle)).logsumexp(0).exp()
        low, high = (middle, high) if float(tail) < alpha else (low, middle)
    return low

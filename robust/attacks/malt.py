"""MALT: Auto-PGD toward the classes that are closest by linear extrapolation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust.attacks.apgd import APGD, APGDState
from robust.attacks.checks import check_counts
from robust.attacks.losses import logit_gap, targeted_dlr
from robust.attacks.rows import Rows
from robust.choices import Norm
from robust.geometry import column, lengths

CANDIDATES = 100  # maximum target classes to measure, the likeliest first


@dataclass(kw_only=True)
class MALTState(APGDState):
    """Columns of `MALT`; C is the number of candidates."""

    candidates: Tensor  # int64 (N, C): the likeliest other classes, in order
    radii: Tensor  # float32 (N, C): eps at which the linearized network predicts each of them
    measured: Tensor  # int64 (N,): how many of them are measured; the attack starts at C
    target_number: Tensor  # int64 (N,): which of the closest classes is the target, from 0


@dataclass(frozen=True, kw_only=True)
class MALT(APGD):
    """Auto-PGD on the targeted difference of logits ratio, to the `targets` closest classes.

    The network is linearized at the image: it predicts another class at an eps equal to the gap
    between the two logits divided by the dual norm of the difference of their gradients. One query
    with gradient measures this for each of the 100 likeliest other classes; then the closest
    ones are attacked in turn. Source: Melamed et al. 2024, arXiv:2407.02240.
    """

    targets: int = 1

    needs_clean_logits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(targets=self.targets)

    @property
    def cost(self) -> int:
        return 1 + 2 * CANDIDATES + self.targets * (2 * self.steps + 1)

    def begin(self, rows: Rows[Any]) -> MALTState:
        assert rows.clean_logits is not None
        others = rows.clean_logits.scatter(1, rows.y.unsqueeze(1), -torch.inf)
        count = min(CANDIDATES, others.shape[1] - 1)
        candidates = others.topk(count, dim=1).indices
        zeros = torch.zeros_like(rows.y)
        rows.target = candidates[:, 0]
        return MALTState(
            **vars(self.fresh(rows, zeros)),
            candidates=candidates,
            radii=torch.full_like(candidates, torch.inf, dtype=torch.float32),
            measured=zeros,
            target_number=zeros,
        )

    def needs_gradient(self, rows: Rows[Any]) -> Tensor:
        return _measuring(rows.state) | super().needs_gradient(rows)

    def loss(self, logits: Tensor, rows: Rows[Any]) -> Tensor:
        gap = logit_gap(logits, rows.y, rows.target)
        attack = targeted_dlr(logits, rows.y, rows.target)
        return torch.where(_measuring(rows.state), gap, attack)

    def score(self, rows: Rows[Any], logits: Tensor, loss: Tensor) -> Tensor:
        return targeted_dlr(logits, rows.y, rows.target)

    def advance(
        self, rows: Rows[Any], logits: Tensor, loss: Tensor, gradient: Tensor | None
    ) -> Tensor:
        state: MALTState = rows.state
        measuring = _measuring(state)
        done = super().advance(rows, logits, loss, gradient)
        if gradient is None:  # the attack on one target has ended
            state.target_number = state.target_number + 1
            starts = state.target_number < min(self.targets, state.candidates.shape[1])
            done = ~starts
        else:
            self._measure(rows, measuring, loss, gradient)
            starts = measuring & ~_measuring(state)
        if bool(starts.any()):
            self._start(rows, starts)
        return done

    def _measure(self, rows: Rows[Any], measuring: Tensor, loss: Tensor, gradient: Tensor) -> None:
        """Record the radius of the candidate just queried, and stay at the image for the next."""
        if not bool(measuring.any()):
            return
        state: MALTState = rows.state
        radius = -loss / _dual_norm(gradient, self.norm).clamp_min(1e-30)
        radii = state.radii.scatter(1, _place(state), radius.unsqueeze(1))
        state.radii = torch.where(measuring.unsqueeze(1), radii, state.radii)
        state.measured = state.measured + measuring
        candidate = state.candidates.gather(1, _place(state)).squeeze(1)
        rows.target = torch.where(measuring, candidate, rows.target)
        rows.x_adv = torch.where(column(measuring), rows.x, rows.x_adv)
        state.iteration = torch.where(measuring, 0, state.iteration)

    def _start(self, rows: Rows[Any], starts: Tensor) -> None:
        """Start the attack on the next closest class."""
        state: MALTState = rows.state
        closest = state.candidates.gather(1, state.radii.argsort(dim=1))
        number = state.target_number.clamp_max(closest.shape[1] - 1).unsqueeze(1)
        rows.target = torch.where(starts, closest.gather(1, number).squeeze(1), rows.target)
        for name, fresh in vars(self.fresh(rows, state.target_number)).items():
            old = getattr(state, name)
            which = starts if old.ndim == 1 else column(starts)
            setattr(state, name, torch.where(which, fresh, old))
        rows.x_adv = torch.where(column(starts), state.x_old, rows.x_adv)


def _measuring(state: MALTState) -> Tensor:
    return state.measured < state.candidates.shape[1]


def _place(state: MALTState) -> Tensor:
    """The column of the candidate being measured, int64 (N, 1)."""
    return state.measured.clamp_max(state.candidates.shape[1] - 1).unsqueeze(1)


def _dual_norm(gradient: Tensor, norm: Norm) -> Tensor:
    """The largest change by a step of length one along this gradient, float32 (N,)."""
    if norm == "linf":
        return gradient.abs().flatten(1).sum(dim=1)
    return lengths(gradient).flatten()

"""The attack runs in progress as a table: one row per run, one typed column per value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from robust.attacks.noise import image_keys
from robust.images import to_float


@dataclass(kw_only=True)
class Table:
    """Columns of equal length: each a tensor, another table, or None until known."""

    def take(self, which: Tensor | slice) -> Self:
        """The rows selected by a mask, by indices or by a slice, as a new table."""
        return self._with({name: _take(column, which) for name, column in vars(self).items()})

    def join(self, other: Self) -> Self:
        """The rows of both tables; a column that only one of them has is filled with zeros."""
        more = vars(other)
        return self._with(
            {name: _join(column, more[name], self, other) for name, column in vars(self).items()}
        )

    def __len__(self) -> int:
        return next(len(column) for column in vars(self).values() if column is not None)

    def _with(self, columns: Mapping[str, Any]) -> Self:
        table = object.__new__(type(self))  # without __init__: this runs at every query
        table.__dict__.update(columns)
        return table


S = TypeVar("S", bound=Table)


@dataclass(kw_only=True)
class Rows(Table, Generic[S]):
    """N runs of an attack, each on one image.

    The search sets the inputs and keeps the best iterate of each run. The algorithm sets `x_adv`
    and `state`, and `target` if it chooses its own targets.
    """

    # Inputs
    image: Tensor  # int64 (N,): index of the image in the call
    run: Tensor  # int64 (N,): which restart or target of that image, from 0
    x: Tensor  # float32 (N, C, H, W): the image
    y: Tensor  # int64 (N,): its label
    target: Tensor  # int64 (N,): the target class; the label if there is none
    eps: Tensor  # float32 (N, 1, 1, 1): radius of the ball around the image
    key: Tensor  # int64 (N,): seed of its random numbers, see `noise`
    clean_logits: Tensor | None  # float32 (N, K): of `x`, where the algorithm needs them

    # Set by the algorithm
    x_adv: Tensor  # float32 (N, C, H, W): what to score next
    state: S  # the algorithm's own columns

    # Kept by the search
    forwards: Tensor  # int64 (N,): passes spent
    backwards: Tensor  # int64 (N,)
    best_x: Tensor  # float32 (N, C, H, W): the best iterate so far, `x` before there is one
    best_logits: Tensor | None  # float32 (N, K): its logits, None before the first query
    best_score: Tensor  # float32 (N,): its score, -inf before the first query
    fooled: Tensor  # bool (N,): whether the best iterate fools the model
    fools: Tensor  # bool (N,): whether the last scored iterate fools the model

    def __len__(self) -> int:
        return self.image.shape[0]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The arguments of `search`."""

    x: Tensor  # float32 or uint8 (N, C, H, W), on any device
    y: Tensor  # int64 (N,), on the device that computes, as the others
    eps: Tensor  # float32 (N,)
    target: Tensor | None  # int64 (N,)
    seed: int

    @property
    def device(self) -> torch.device:
        return self.y.device

    def images(self, index: Tensor) -> Tensor:
        """The images at `index` int64 (M,), as float32 on the device that computes."""
        return to_images(self.x[index.to(self.x.device)].to(self.device))

    def rows(self, images: Tensor, runs: Tensor, clean_logits: Tensor | None) -> Rows[Any]:
        """New rows for `images` and `runs`, int64 (M,), without `x_adv` and `state`."""
        at = images.to(self.device)
        x, y, eps = self.images(images), self.y[at], self.eps[at]
        zeros, never = torch.zeros_like(y), torch.zeros_like(y, dtype=torch.bool)
        return Rows(
            image=at,
            run=runs.to(self.device),
            x=x,
            y=y,
            target=y if self.target is None else self.target[at],
            eps=eps.view(-1, 1, 1, 1),
            key=image_keys(x, self.seed),
            clean_logits=None if clean_logits is None else clean_logits[at],
            x_adv=x,
            state=None,
            forwards=zeros,
            backwards=zeros,
            best_x=x,
            best_logits=None,
            best_score=torch.full_like(eps, -torch.inf),
            fooled=never,
            fools=never,
        )


def to_images(x: Tensor) -> Tensor:
    """Float32 or uint8 images as float32 in [0, 1]."""
    return to_float(x) if x.dtype == torch.uint8 else x.float()


def _take(column: Tensor | Table | None, which: Tensor | slice) -> Tensor | Table | None:
    if column is None:
        return None
    return column.take(which) if isinstance(column, Table) else column[which]


def _join(one: Any, other: Any, first: Table, second: Table) -> Tensor | Table | None:
    if one is None and other is None:
        return None
    if one is None:
        one = other.new_zeros(len(first), *other.shape[1:])
    elif other is None:
        other = one.new_zeros(len(second), *one.shape[1:])
    return one.join(other) if isinstance(one, Table) else torch.cat([one, other])

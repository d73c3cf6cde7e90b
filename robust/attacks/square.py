"""Square attack: a random search that uses only the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.algorithm import Algorithm
from robust.attacks.checks import check_counts
from robust.attacks.losses import margin
from robust.attacks.noise import uniform
from robust.attacks.rows import Rows, Table
from robust.geometry import column, lengths

P = 0.8  # fraction of the image that the first squares cover
DRAWN = 32  # queries per block, whose random numbers are generated together
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(kw_only=True)
class SquareState(Table):
    """Columns of `Square`."""

    query: Tensor  # int64 (N,): queries made after the start
    x_top: Tensor  # float32 (N, C, H, W): the image of the highest margin
    loss_top: Tensor  # float32 (N,): its margin
    draws: Tensor  # float32 (N, DRAWN, 5 + C): random numbers for the queries of one block
    block: Tensor  # int64 (N,): which block, from 0; -1 before the first


@dataclass(frozen=True, kw_only=True)
class Square(Algorithm[SquareState]):
    """Keeps random changes of squares that raise the margin; see `robust.attacks.square`.

    A step is one query.
    """

    uses_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(queries=self.steps, restarts=self.runs)

    def begin(self, rows: Rows[SquareState]) -> SquareState:
        start = self._stripes if self.norm == "linf" else self._tiles
        rows.x_adv = start(rows)
        n, channels = rows.x.shape[:2]
        return SquareState(
            query=torch.zeros_like(rows.y),
            x_top=rows.x_adv,
            loss_top=torch.full_like(rows.eps.flatten(), -torch.inf),
            draws=rows.x.new_zeros(n, DRAWN, 5 + channels),
            block=torch.full_like(rows.y, -1),
        )

    def loss(self, logits: Tensor, rows: Rows[SquareState]) -> Tensor:
        return margin(logits, rows.y, rows.target if self.targeted else None)

    def advance(
        self, rows: Rows[SquareState], logits: Tensor, loss: Tensor, gradient: Tensor | None
    ) -> Tensor:
        state = rows.state
        better = loss > state.loss_top
        if bool(better.any()):  # rare
            state.x_top = torch.where(column(better), rows.x_adv, state.x_top)
            state.loss_top = torch.where(better, loss, state.loss_top)
        done = state.query >= self.steps
        rows.x_adv = self._next(rows, state.query)
        state.query = state.query + 1
        return done

    def speculate(self, rows: Rows[SquareState], count: int) -> list[Tensor]:
        """The next squares applied to the current best image, as few squares are kept."""
        return [self._next(rows, rows.state.query + later) for later in range(count)]

    def _next(self, rows: Rows[SquareState], query: Tensor) -> Tensor:
        return self._square(rows, query) if self.norm == "linf" else self._windows(rows, query)

    def _draws(self, rows: Rows[SquareState], stream: Tensor | int, count: int) -> Tensor:
        """Numbers in [0, 1), float32 (N, count); stream 0 is the start, 1 the first query."""
        return uniform(rows.key, rows.run * 2**32 + stream, count)

    def _draws_of(self, rows: Rows[SquareState], query: Tensor) -> Tensor:
        """Random numbers float32 (N, 5 + C) of `query` int64 (N,), generated block by block."""
        state, block = rows.state, query // DRAWN
        if not torch.equal(block, state.block):
            n, _, count = state.draws.shape
            stream = 1 + block.unsqueeze(1) * DRAWN + torch.arange(DRAWN, device=query.device)
            stream = rows.run.unsqueeze(1) * 2**32 + stream
            drawn = uniform(rows.key.repeat_interleave(DRAWN), stream.flatten(), count)
            state.draws, state.block = drawn.view(n, DRAWN, count), block
        return state.draws[torch.arange(len(query), device=query.device), query % DRAWN]

    def _stripes(self, rows: Rows[SquareState]) -> Tensor:
        x, eps = rows.x, rows.eps
        _, channels, _, width = x.shape
        signs = _signs(self._draws(rows, 0, channels * width)).view(-1, channels, 1, width)
        return (x + eps * signs).clamp(0, 1)

    def _square(self, rows: Rows[SquareState], query: Tensor) -> Tensor:
        x, eps = rows.x, rows.eps
        channels = x.shape[1]
        draws = self._draws_of(rows, query)[:, : 2 + channels]
        inside, _, _ = _window(x, square_sides(query, x, least=1), draws[:, 0], draws[:, 1])
        change = 2 * eps * _signs(draws[:, 2:]).view(-1, channels, 1, 1)
        x_new = torch.addcmul(rows.state.x_top, inside, change)
        return torch.minimum(torch.maximum(x_new, x - eps), x + eps).clamp(0, 1)

    # L2: a window gets the perturbation of another window, and what is left of eps.

    def _tiles(self, rows: Rows[SquareState]) -> Tensor:
        x = rows.x
        n, channels, height, width = x.shape
        side = max(height // 5, 1)
        down, across = height // side, width // side
        draws = self._draws(rows, 0, channels * down * across + down * across)
        signs = _signs(draws[:, : channels * down * across]).view(n, channels, down, across)
        turned = draws[:, channels * down * across :].view(n, 1, down, across) > 0.5
        tile = _bumps(side, x.device)
        upright = tile.expand(n, 1, down, across, side, side)
        tiles = torch.where(turned[..., None, None], upright.transpose(-1, -2), upright)
        tiles = (tiles * signs[..., None, None]).permute(0, 1, 2, 4, 3, 5)
        offset = torch.zeros_like(x)
        top = (height - side * 5) // 2 if height >= 5 else 0
        tiles = tiles.reshape(n, channels, down * side, across * side)
        tiles = tiles[..., : height - top, : width - top]
        offset[..., top : top + tiles.shape[2], top : top + tiles.shape[3]] = tiles
        return (x + rows.eps * offset / lengths(offset).clamp_min(1e-12)).clamp(0, 1)

    def _windows(self, rows: Rows[SquareState], query: Tensor) -> Tensor:
        x, eps = rows.x, rows.eps
        n, channels = x.shape[:2]
        draws = self._draws_of(rows, query)
        sides = square_sides(query, x, least=3)
        delta = rows.state.x_top - x
        inside, down, across = _window(x, sides, draws[:, 0], draws[:, 1])
        other, _, _ = _window(x, sides, draws[:, 2], draws[:, 3])
        outside = 1 - torch.maximum(inside, other)
        left = (eps.square() - lengths(delta).square()).clamp_min(0) / channels
        change = delta * inside
        change.div_(_norms(change).clamp_min(1e-12))
        pattern = _patterns(sides, down, across, draws[:, 4] > 0.5).mul_(inside)
        change.addcmul_(pattern, _signs(draws[:, 5:]).view(n, channels, 1, 1))
        rest = delta * outside
        budget = (left + _norms(delta - rest).square()).sqrt()
        change.mul_(budget / _norms(change).clamp_min(1e-12))
        delta = change.add_(rest)
        return delta.mul_(eps / lengths(delta).clamp_min(1e-12)).add_(x).clamp_(0, 1)


def square_sides(query: Tensor, x: Tensor, *, least: int) -> Tensor:
    """Sides of the squares of queries int64 (N,) on images like `x`, int64 (N,)."""
    height, width = x.shape[2:]
    edges, table = _schedule(height, width, least, x.device)
    return table[torch.bucketize(query, edges)]


@cache
def _schedule(height: int, width: int, least: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The queries after which squares shrink (M,), and the sides before and after each (M + 1,)."""
    sides = []
    for halvings in range(len(HALVED_AFTER) + 1):
        side = max(round(math.sqrt(P / 2**halvings * height * width)), least)
        side += least > 1 and side % 2 == 0
        sides.append(min(side, height, width))
    return torch.tensor(HALVED_AFTER, device=device), torch.tensor(sides, device=device)


def _signs(draws: Tensor) -> Tensor:
    return (draws >= 0.5).float() * 2 - 1


def _norms(delta: Tensor) -> Tensor:
    """Length of each channel, (N, C, 1, 1)."""
    norms: Tensor = torch.linalg.vector_norm(delta, dim=(2, 3), keepdim=True)
    return norms


def _window(
    x: Tensor, sides: Tensor, down: Tensor, across: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Random squares: a mask float32 (N, 1, H, W), and row and column offsets within them."""
    height, width = x.shape[2:]
    place_y = torch.arange(height, device=x.device) - (down * (height - sides)).long().unsqueeze(1)
    place_x = torch.arange(width, device=x.device) - (across * (width - sides)).long().unsqueeze(1)
    within_y = (place_y >= 0) & (place_y < sides.unsqueeze(1))
    within_x = (place_x >= 0) & (place_x < sides.unsqueeze(1))
    inside = (within_y.unsqueeze(2) & within_x.unsqueeze(1)).unsqueeze(1).float()
    return inside, place_y, place_x


def _patterns(sides: Tensor, down: Tensor, across: Tensor, turned: Tensor) -> Tensor:
    """The pattern of each window at its position, float32 (N, 1, H, W); undefined outside it.

    `sides` (N,); `down` (N, H) and `across` (N, W) are offsets within the window.
    """
    values, first = _all_bumps(down.shape[1], across.shape[1], sides.device)
    side, last = sides.view(-1, 1, 1), (sides - 1).unsqueeze(1)
    at_y = down.clamp_min(0).minimum(last).unsqueeze(2)
    at_x = across.clamp_min(0).minimum(last).unsqueeze(1)
    along = torch.where(turned.view(-1, 1, 1), at_x * side + at_y, at_y * side + at_x)
    return values[along + first[sides].view(-1, 1, 1)].unsqueeze(1)


@cache
def _all_bumps(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The patterns of every side in the schedule, flattened and concatenated, and their offsets."""
    parts, first, count = [], [0] * (min(height, width) + 1), 0
    for side in set(_schedule(height, width, 3, device)[1].tolist()):
        parts.append(_bumps(side, device).flatten())
        first[side] = count
        count += side * side
    return torch.cat(parts), torch.tensor(first, device=device)


@cache
def _bumps(side: int, device: torch.device) -> Tensor:
    """A pattern of a hill above a valley, with an L2 norm of 1, float32 (side, side)."""
    half = side // 2
    whole = torch.cat([_hill(half, side), -_hill(side - half, side)])
    return (whole / whole.square().sum().sqrt().clamp_min(1e-12)).to(device)


def _hill(height: int, width: int) -> Tensor:
    """A hill of nested rectangles, float32 (height, width)."""
    hill = torch.zeros(height, width)
    middle_y, middle_x = height // 2 + 1, width // 2 + 1
    top, left = middle_y - 1, middle_x - 1
    for ring in range(max(middle_y, middle_x)):
        bottom, right = top + 2 * ring + 1, left + 2 * ring + 1
        hill[max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)] += (
            1 / (ring + 1) ** 2
        )
        top, left = top - 1, left - 1
    return hill / hill.square().sum().sqrt().clamp_min(1e-12)

"""Square attack: a random search that sees nothing but the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from robust.attacks.call import attack, check_counts
from robust.attacks.frozen import Model
from robust.attacks.losses import margin
from robust.attacks.noise import uniform
from robust.attacks.result import AttackResult
from robust.attacks.search import Rows
from robust.geometry import Norm, lengths
from robust.threat_model import ThreatModel

QUERIES = 5000
P = 0.8  # share of the image that the first squares cover
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat_model: ThreatModel,
    queries: int = QUERIES,
    restarts: int = 1,
    early_stop: bool = True,
    target: Tensor | None = None,
    eps: Tensor | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> AttackResult:
    """Change squares at random places and keep what raises the margin; no gradient is taken.

    `queries` forward passes follow the one of the start. Arguments, result and errors as those of
    `pgd`. Source: Andriushchenko et al. 2020, arXiv:1912.00049.
    """
    algorithm = Square(
        norm=threat_model.norm,
        queries=queries,
        runs=restarts,
        early_stop=early_stop,
        targeted=target is not None,
    )
    return attack(
        model,
        algorithm,
        x,
        y,
        threat_model=threat_model,
        eps=eps,
        target=target,
        seed=seed,
        batch_size=batch_size,
    )


@dataclass(frozen=True, kw_only=True)
class Square:
    """`square` between two queries, see `search.Algorithm`."""

    norm: Norm
    queries: int = QUERIES
    runs: int = 1
    early_stop: bool = True
    targeted: bool = False

    ahead = False
    needs_clean = False
    differentiates = False

    def __post_init__(self) -> None:
        check_counts(queries=self.queries, restarts=self.runs)

    def begin(self, rows: Rows) -> None:
        start = self._stripes if self.norm == "linf" else self._tiles
        rows["x_adv"] = rows["x_top"] = start(rows)
        rows["query"] = torch.zeros_like(rows["y"])
        rows["loss_top"] = torch.full_like(rows["eps"].flatten(), -torch.inf)

    def wants_gradient(self, rows: Rows) -> Tensor:
        return torch.zeros_like(rows["fooled"])

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        return margin(logits, rows["y"], rows["target"] if self.targeted else None)

    def score(self, rows: Rows, logits: Tensor, loss: Tensor) -> Tensor:
        return loss

    def advance(self, rows: Rows, logits: Tensor, loss: Tensor, gradient: Tensor | None) -> Tensor:
        better = loss > rows["loss_top"]
        rows["x_top"] = torch.where(better.view(-1, 1, 1, 1), rows["x_adv"], rows["x_top"])
        rows["loss_top"] = torch.where(better, loss, rows["loss_top"])
        spent = rows["query"] >= self.queries
        rows["x_adv"] = self._next(rows)
        rows["query"] = rows["query"] + 1
        return spent

    def guess(self, rows: Rows, most: int) -> list[Tensor]:
        """Few squares are kept, so the next ones change the best image there is now."""
        return [self._next({**rows, "query": rows["query"] + ahead}) for ahead in range(most)]

    def _next(self, rows: Rows) -> Tensor:
        return self._square(rows) if self.norm == "linf" else self._windows(rows)

    def _draws(self, rows: Rows, count: int) -> Tensor:
        """Numbers in [0, 1), float32 (N, count), anew for the start and each query."""
        query = rows["query"] + 1 if "query" in rows else torch.zeros_like(rows["y"])
        return uniform(rows["key"], rows["run"] * 2**32 + query, count)

    def _stripes(self, rows: Rows) -> Tensor:
        x, eps = rows["x"], rows["eps"]
        _, channels, _, width = x.shape
        signs = _signs(self._draws(rows, channels * width)).view(-1, channels, 1, width)
        return (x + eps * signs).clamp(0, 1)

    def _square(self, rows: Rows) -> Tensor:
        x, eps = rows["x"], rows["eps"]
        channels = x.shape[1]
        draws = self._draws(rows, 2 + channels)
        inside, _, _ = _window(x, self._sides(rows, least=1), draws[:, 0], draws[:, 1])
        change = inside * 2 * eps * _signs(draws[:, 2:]).view(-1, channels, 1, 1)
        x_new = rows["x_top"] + change
        return torch.minimum(torch.maximum(x_new, x - eps), x + eps).clamp(0, 1)

    def _sides(self, rows: Rows, *, least: int) -> Tensor:
        """Sides of the squares, int64 (N,): they shrink as the search goes on."""
        height, width = rows["x"].shape[2:]
        edges, table = _schedule(height, width, least, rows["x"].device)
        return table[torch.bucketize(rows["query"], edges)]

    # L2: mass moves from one window to another, and what is left of eps goes in with it.

    def _tiles(self, rows: Rows) -> Tensor:
        x = rows["x"]
        n, channels, height, width = x.shape
        side = max(height // 5, 1)
        down, across = height // side, width // side
        draws = self._draws(rows, channels * down * across + down * across)
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
        return (x + rows["eps"] * offset / lengths(offset).clamp_min(1e-12)).clamp(0, 1)

    def _windows(self, rows: Rows) -> Tensor:
        x, eps = rows["x"], rows["eps"]
        n, channels = x.shape[:2]
        draws = self._draws(rows, 5 + channels)
        sides = self._sides(rows, least=3)
        delta = rows["x_top"] - x
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


@cache
def _schedule(height: int, width: int, least: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """After which queries the squares shrink, and the side before, between and after those."""
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
    """Squares at random places: 1 inside, float32 (N, 1, H, W), and their rows and columns."""
    height, width = x.shape[2:]
    place_y = torch.arange(height, device=x.device) - (down * (height - sides)).long().unsqueeze(1)
    place_x = torch.arange(width, device=x.device) - (across * (width - sides)).long().unsqueeze(1)
    within_y = (place_y >= 0) & (place_y < sides.unsqueeze(1))
    within_x = (place_x >= 0) & (place_x < sides.unsqueeze(1))
    inside = (within_y.unsqueeze(2) & within_x.unsqueeze(1)).unsqueeze(1).float()
    return inside, place_y, place_x


def _patterns(sides: Tensor, down: Tensor, across: Tensor, turned: Tensor) -> Tensor:
    """The bumps of each row's window at its place, float32 (N, 1, H, W); any value outside it.

    `sides` (N,), `down` (N, H) and `across` (N, W): places within the window.
    """
    values, first = _all_bumps(down.shape[1], across.shape[1], sides.device)
    side, last = sides.view(-1, 1, 1), (sides - 1).unsqueeze(1)
    at_y = down.clamp_min(0).minimum(last).unsqueeze(2)
    at_x = across.clamp_min(0).minimum(last).unsqueeze(1)
    along = torch.where(turned.view(-1, 1, 1), at_x * side + at_y, at_y * side + at_x)
    return values[along + first[sides].view(-1, 1, 1)].unsqueeze(1)


@cache
def _all_bumps(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The bumps of every side that comes up, one after the other, and where each begins."""
    parts, first, count = [], [0] * (min(height, width) + 1), 0
    for side in set(_schedule(height, width, 3, device)[1].tolist()):
        parts.append(_bumps(side, device).flatten())
        first[side] = count
        count += side * side
    return torch.cat(parts), torch.tensor(first, device=device)


@cache
def _bumps(side: int, device: torch.device) -> Tensor:
    """A hill above a valley, of length 1, float32 (side, side)."""
    half = side // 2
    whole = torch.cat([_hill(half, side), -_hill(side - half, side)])
    return (whole / whole.square().sum().sqrt().clamp_min(1e-12)).to(device)


def _hill(height: int, width: int) -> Tensor:
    """Nested rectangles that weigh less the wider they are."""
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

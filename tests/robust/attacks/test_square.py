import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robust.attacks import AttackResult, square
from robust.attacks.square import HALVED_AFTER, _window, square_sides
from robust.choices import Norm
from robust.geometry import distance
from robust.threat_model import ThreatModel
from tests.robust.attacks.conftest import Curved


def sides_at(queries: list[int], side: int, least: int) -> list[int]:
    x = torch.zeros(len(queries), 3, side, side)
    return square_sides(torch.tensor(queries), x, least=least).tolist()


def test_sides_halve_their_area_at_the_queries_of_the_paper() -> None:
    expected = [round(math.sqrt(0.8 / 2**k * 32 * 32)) for k in range(len(HALVED_AFTER) + 1)]
    assert expected[:8] == [29, 20, 14, 10, 7, 5, 4, 3]
    last = [10, 50, 200, 500, 1000, 2000, 4000]  # queries that still have the size before
    assert sides_at([0, *last], 32, 1) == [29, *expected[:7]]
    assert sides_at([query + 1 for query in last], 32, 1) == expected[1:8]
    assert sides_at([4999, 9999], 4, 1) == [1, 1]


def test_windows_of_l2_are_odd_and_of_3_at_least() -> None:
    queries = [0, 11, 51, 201, 501, 1001, 2001, 4001]
    assert sides_at(queries, 32, 3) == [29, 21, 15, 11, 7, 5, 5, 3]
    assert sides_at([0], 8, 3) == [7]
    assert sides_at([0, 4001], 2, 3) == [2, 2]  # no more than there is


def test_windows_are_placed_at_their_drawn_positions() -> None:
    x, sides = torch.zeros(3, 1, 8, 10), torch.tensor([3, 3, 8])
    inside, down, across = _window(
        x, sides, torch.tensor([0.0, 0.999, 0.5]), torch.tensor([0.0, 0.5, 0.999])
    )
    assert inside.flatten(1).sum(dim=1).tolist() == [9, 9, 64]
    assert inside[0, 0, :3, :3].min() == 1
    assert inside[1, 0, 4:7, 3:6].min() == 1  # never the last place, as the reference has it
    assert inside[2, 0, :, 1:9].min() == 1
    assert (down[1, 4], across[1, 3]) == (0, 0)


class Stubborn:
    """Never fooled, prefers what it saw at random, and remembers it all."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        pixels = x.double().flatten(1)
        weights = torch.arange(pixels.shape[1], dtype=torch.float64).sin()
        lead = 1 + torch.frac(1000 * (pixels @ weights)).abs().float()
        return torch.stack([lead, torch.zeros_like(lead)], dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_query_lies_in_the_ball_and_is_counted(norm: Norm) -> None:
    x = torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model, eps = Stubborn(), 0.2 if norm == "linf" else 1.5
    y = torch.zeros(6, dtype=torch.int64)
    result = square(model, x, y, threat_model=ThreatModel(norm=norm, eps=eps), queries=300)
    assert len(model.seen) == 301
    assert result.forwards.tolist() == [301] * 6
    assert result.backwards.tolist() == [0] * 6
    for seen in model.seen:
        assert seen.min() >= 0
        assert seen.max() <= 1
        assert bool((distance(seen, x, norm) <= eps + 1e-6).all())
        if norm == "linf":  # every pixel at the end of its range
            low, high = (x - eps).clamp_min(0), (x + eps).clamp_max(1)
            assert torch.minimum((seen - low).abs(), (seen - high).abs()).max() < 1e-6
    # Each query changes something, and not the same for each image.
    changed = (model.seen[1] != model.seen[0]).any(dim=1)
    assert bool(changed.flatten(1).any(dim=1).all())
    assert len({str(places.tolist()) for places in changed}) > 1


def test_l2_uses_all_of_eps() -> None:
    """Far from the ends of the range every query has length eps."""
    x, model = torch.full((4, 3, 12, 12), 0.5), Stubborn()
    y = torch.zeros(4, dtype=torch.int64)
    square(model, x, y, threat_model=ThreatModel(norm="l2", eps=0.5), queries=100)
    lengths = torch.stack([distance(seen, x, "l2") for seen in model.seen])
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.5))


def test_each_query_changes_the_best_image_so_far() -> None:
    x, model = torch.full((1, 3, 16, 16), 0.5), Stubborn()
    y = torch.zeros(1, dtype=torch.int64)
    square(model, x, y, threat_model=ThreatModel(eps=0.1), queries=1300)
    leads = Stubborn()(torch.cat(model.seen))[:, 0].tolist()
    best = 0
    for query in range(1, 1301):
        seen = model.seen[query]
        rows = ((seen - model.seen[best]).abs() > 1e-6).any(dim=1)[0]
        if query > 1001:  # by then squares have a side of 3
            assert int(rows.any(dim=0).sum()) <= 3
            assert int(rows.any(dim=1).sum()) <= 3
        if leads[query] < leads[best]:
            best = query
    assert best > 0


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.15)])
def test_speculation_fills_a_batch_and_changes_no_result(
    make_curved: Callable[..., Curved],
    images: Tensor,
    norm: Norm,
    eps: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("robust.attacks.search.MAX_SPECULATIVE_PASS", 60)  # as on a GPU
    y = make_curved()(images).argmax(dim=1)

    def run(batch_size: int) -> tuple[AttackResult, Curved]:
        model = make_curved()
        ball = ThreatModel(norm=norm, eps=eps)
        result = square(model, images, y, threat_model=ball, queries=80, batch_size=batch_size)
        return result, model

    (plain, one_by_one), (filled, speculating) = run(12), run(60)
    assert 0 < int(plain.success.sum()) < 12
    for name in ("x_adv", "success", "distance", "logits"):
        assert torch.equal(getattr(plain, name), getattr(filled, name))
    assert len(speculating.calls) < 0.7 * len(one_by_one.calls)
    assert int(filled.forwards.sum()) == sum(speculating.calls)  # the wrong ones are paid for

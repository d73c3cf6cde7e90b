from collections.abc import Sequence

import pytest
import torch

from robust.attacks.apgd import APGD, APGDState, checks, random_surface
from robust.attacks.rows import Rows
from robust.choices import Norm
from robust.geometry import distance
from tests.robust.attacks.conftest import make_rows


def test_checks_of_the_paper() -> None:
    assert list(checks(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(checks(100).values()) == [22, 19, 16, 13, 10, 7, 6, 6]
    assert list(checks(1)) == [1]


def begun(algorithm: APGD) -> Rows[APGDState]:
    """A row at a gray image, with no noise: so the start is where the image is."""
    x = torch.full((1, 1, 2, 2), 0.5)
    rows: Rows[APGDState] = make_rows(x)
    rows.state = algorithm.begin(rows)
    rows.x_adv = rows.state.x_old = rows.state.x_top = x
    return rows


def go(
    algorithm: APGD, rows: Rows[APGDState], losses: Sequence[float], gradient: float = 1.0
) -> None:
    logits = torch.zeros(len(rows.x), 2)
    for loss in losses:
        values = torch.full((len(rows.x),), loss)
        algorithm.advance(rows, logits, values, torch.full_like(rows.x, gradient))


def size(rows: Rows[APGDState]) -> float:
    return float(rows.state.step_size.flatten()[0])


def climbing(rises: int, *, of: int) -> list[float]:
    """Losses of the start and of `of` steps, of which `rises` are above the one before."""
    losses = [0.0, 0.0]  # the first step is held against 0
    for step in range(of - 1):
        losses.append(losses[-1] + (1.0 if step < rises else -0.01))
    return losses


@pytest.mark.parametrize(("rises", "halved"), [(16, True), (17, False)])
def test_step_is_halved_if_at_most_three_quarters_of_the_steps_improve(
    rises: int, halved: bool
) -> None:
    algorithm = APGD(norm="linf", steps=100)
    rows = begun(algorithm)
    losses = climbing(rises, of=22)
    go(algorithm, rows, losses[:22])
    assert size(rows) == pytest.approx(0.2)  # not before the check
    go(algorithm, rows, losses[22:])
    assert size(rows) == pytest.approx(0.1 if halved else 0.2)


def test_step_is_halved_if_the_best_loss_stalls() -> None:
    algorithm = APGD(norm="linf", steps=100)
    rows = begun(algorithm)
    go(algorithm, rows, [0.0, *range(1, 21), 1000.0, 0.0])  # no check halves at 22 (21 of 22)
    assert size(rows) == pytest.approx(0.2)
    go(algorithm, rows, [0.1 * step for step in range(1, 20)])  # all 19 rise, far below the best
    assert size(rows) == pytest.approx(0.1)
    go(algorithm, rows, [2 + 0.1 * step for step in range(1, 17)])  # but not twice in a row
    assert size(rows) == pytest.approx(0.1)
    go(algorithm, rows, [5 + 0.1 * step for step in range(1, 14)])
    assert size(rows) == pytest.approx(0.05)


def test_halving_returns_to_the_best_point() -> None:
    algorithm = APGD(norm="linf", steps=100)
    rows = begun(algorithm)
    best = torch.full_like(rows.x, 0.45)
    go(algorithm, rows, [0.0])
    rows.x_adv = best
    go(algorithm, rows, [9.0], gradient=-1.0)
    go(algorithm, rows, [1.0] * 20)
    rows.state.x_old = rows.x_adv = torch.full_like(best, 0.55)
    go(algorithm, rows, [1.0])
    # From 0.45 against the gradient found there, by 0.05 to the edge; momentum from 0.55.
    assert size(rows) == pytest.approx(0.1)
    torch.testing.assert_close(rows.x_adv, (best - 0.75 * 0.05 - 0.25 * 0.1).clamp_min(0.4))
    assert torch.equal(rows.state.x_old, best)


def test_momentum_is_1_then_0_75() -> None:
    algorithm = APGD(norm="linf", steps=100)
    rows = begun(algorithm)
    rows.state.step_size = torch.full_like(rows.state.step_size, 0.04)
    go(algorithm, rows, [0.0])
    torch.testing.assert_close(rows.x_adv, torch.full_like(rows.x, 0.54))
    go(algorithm, rows, [0.0])
    torch.testing.assert_close(rows.x_adv, torch.full_like(rows.x, 0.54 + 0.03 + 0.01))
    go(algorithm, rows, [0.0], gradient=-1.0)
    torch.testing.assert_close(rows.x_adv, torch.full_like(rows.x, 0.58 - 0.03 + 0.01))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_on_the_surface_of_the_ball(norm: Norm) -> None:
    x, eps = torch.full((50, 1, 2, 2), 0.5), torch.full((50, 1, 1, 1), 0.1)
    starts = [
        random_surface(x, torch.arange(50), torch.full((50,), run), norm=norm, eps=eps)
        for run in range(2)
    ]
    torch.testing.assert_close(distance(starts[0], x, norm), torch.full((50,), 0.1))
    assert bool((starts[0] != starts[1]).flatten(1).any(dim=1).all())


def test_rows_at_different_steps_are_independent() -> None:
    """Two images, one begun three steps later, each as if it were alone."""
    algorithm, generator = APGD(norm="l2", steps=30), torch.Generator().manual_seed(0)
    losses = torch.randn(40, generator=generator)
    gradients = torch.randn(40, 1, 1, 2, 2, generator=generator)

    def advance(rows: Rows[APGDState], at: list[int]) -> None:
        algorithm.advance(
            rows, torch.zeros(len(at), 2), losses[at], torch.cat([gradients[step] for step in at])
        )

    alone = begun(algorithm)
    for step in range(27):
        advance(alone, [step])
    early, late = begun(algorithm), begun(algorithm)
    for step in range(3):
        advance(early, [step])
    both = early.join(late)
    for step in range(24):
        advance(both, [step + 3, step])
    assert torch.equal(both.x_adv[:1], alone.x_adv)
    assert torch.equal(both.state.step_size[:1], alone.state.step_size)
    for step in range(24, 27):
        advance(both, [step + 3, step])
    assert torch.equal(both.x_adv[1:], alone.x_adv)

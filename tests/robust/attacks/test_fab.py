from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from robust.attacks import fab_t
from robust.attacks.fab import FAB, hyperplane
from robust.attacks.run import run_algorithm
from robust.choices import Norm
from robust.geometry import lengths
from robust.threat_model import ThreatModel

SIZE = 6
finite = st.floats(-3, 3, width=32).filter(lambda v: v == 0 or abs(v) > 1e-2)
problems = st.tuples(
    st.lists(st.floats(0, 1, width=32), min_size=SIZE, max_size=SIZE),
    st.lists(finite, min_size=SIZE, max_size=SIZE),
    st.floats(-0.99, 0.99),
)


def solve(x: list[float], w: list[float], gap: float, norm: Norm) -> Tensor:
    images = torch.tensor(x).view(1, 1, 1, SIZE)
    return hyperplane(torch.tensor(w).view_as(images), norm)(images, torch.tensor([gap]))


def most(x: list[float], w: list[float], sign: float) -> float:
    """The largest <w, d> * sign that the box allows."""
    ends = [max(sign * wi * (1 - xi), -sign * wi * xi) for xi, wi in zip(x, w, strict=True)]
    return sum(ends)


@settings(max_examples=150, deadline=None)
@given(problem=problems, norm=st.sampled_from(["linf", "l2"]))
def test_reaches_the_hyperplane_inside_the_box(
    problem: tuple[list[float], list[float], float], norm: Norm
) -> None:
    x, w, share = problem
    gap = share * most(x, w, 1.0 if share > 0 else -1.0)
    step = solve(x, w, gap, norm).flatten()
    moved = torch.tensor(x) + step
    assert moved.min() >= -1e-6
    assert moved.max() <= 1 + 1e-6
    assert float(step @ torch.tensor(w)) == pytest.approx(gap, rel=1e-4, abs=1e-5)
    assert not bool(step[torch.tensor(w) == 0].any())


@settings(max_examples=60, deadline=None)
@given(problem=problems)
def test_no_step_is_shorter_in_linf(problem: tuple[list[float], list[float], float]) -> None:
    """Against linear programming: least t with -t <= d <= t, d in the box, <w, d> = gap."""
    x, w, share = problem
    gap = share * most(x, w, 1.0 if share > 0 else -1.0)
    above = [[float(i == j) for j in range(SIZE)] + [-1.0] for i in range(SIZE)]
    below = [[-float(i == j) for j in range(SIZE)] + [-1.0] for i in range(SIZE)]
    found = linprog(
        [0.0] * SIZE + [1.0],
        A_ub=above + below,
        b_ub=[0.0] * (2 * SIZE),
        A_eq=[[*w, 0.0]],
        b_eq=[gap],
        bounds=[(-xi, 1 - xi) for xi in x] + [(0, None)],
    )
    assert found.status == 0
    length = float(lengths(solve(x, w, gap, "linf"), "linf"))
    assert length == pytest.approx(found.fun, rel=1e-4, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(problem=problems)
def test_no_step_is_shorter_in_l2(problem: tuple[list[float], list[float], float]) -> None:
    x, w, share = problem
    sign = 1.0 if share > 0 else -1.0
    gap = share * most(x, w, sign)
    ends = [(1 - xi if sign * wi > 0 else -xi) * abs(share) for xi, wi in zip(x, w, strict=True)]
    found = minimize(
        lambda d: float(d @ d),
        ends,  # feasible, but not the shortest
        jac=lambda d: 2 * d,
        bounds=[(-xi, 1 - xi) for xi in x],
        constraints={"type": "eq", "fun": lambda d: float(d @ w) - gap, "jac": lambda d: w},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 200},
    )
    length = float(lengths(solve(x, w, gap, "l2"), "l2"))
    # SLSQP may stop early, above the optimum; a shorter step than ours would be a defect.
    assert length <= found.fun**0.5 + 1e-4


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("gap", [100.0, -100.0])
def test_stops_at_the_box_if_the_hyperplane_is_beyond(norm: Norm, gap: float) -> None:
    x, w = [0.2, 0.4, 0.6, 0.8, 1.0, 0.0], [1.0, -1.0, 0.0, 2.0, 0.1, -0.1]
    moved = torch.tensor(x) + solve(x, w, gap, norm).flatten()
    end = [1.0, 0.0, 0.6, 1.0, 1.0, 0.0] if gap > 0 else [0.0, 1.0, 0.6, 0.0, 0.0, 1.0]
    torch.testing.assert_close(moved, torch.tensor(end))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scale", [1e-25, 1e-8, 1e20])
def test_only_the_direction_of_the_gradient_counts(norm: Norm, scale: float) -> None:
    x, w = [0.2, 0.4, 0.6, 0.8, 1.0, 0.0], [1.0, -1.0, 0.5, 2.0, 0.1, -0.1]
    scaled = solve(x, [scale * wi for wi in w], scale * 0.7, norm)
    torch.testing.assert_close(scaled, solve(x, w, 0.7, norm))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_stays_without_a_margin_or_gradient(norm: Norm) -> None:
    x, w = [0.2, 0.4, 0.6, 0.8, 1.0, 0.0], [1.0, -1.0, 0.5, 2.0, 0.1, -0.1]
    assert not bool(solve(x, w, 0.0, norm).any())
    assert not bool(solve(x, [0.0] * SIZE, 0.7, norm).any())


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_most_passes_are_spent_if_every_second_step_crosses_the_boundary(steps: int) -> None:
    queries = count()

    def model(x: Tensor) -> Tensor:
        beyond = next(queries) % 4 == 2  # after the clean logits and the start
        other = x.flatten(1).sum(dim=1) + (100 if beyond else -100)
        return torch.stack([torch.zeros_like(other), other], dim=1)

    attack = FAB(norm="linf", steps=steps, early_stop=False)
    x, y = torch.full((1, 3, 4, 4), 0.5), torch.tensor([0])
    result = run_algorithm(model, attack, x, y, threat_model=ThreatModel())
    assert (result.forwards + result.backwards).item() == attack.cost


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_of_nan_does_not_end_the_attack(
    curved: nn.Module, images: Tensor, norm: Norm
) -> None:
    def model(x: Tensor) -> Tensor:
        """The logits of `curved`, with NaN in the gradient: the root's slope at 0 is infinite."""
        assert x.isfinite().all()
        logits: Tensor = curved(x)
        return logits + (0 * x).flatten(1).sum(dim=1, keepdim=True).sqrt()

    y = curved(images).argmax(dim=1)
    found = fab_t(model, images, y, threat_model=ThreatModel(norm=norm, eps=0.1), steps=2)
    assert not found.success.any()

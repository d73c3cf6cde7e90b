import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robust.choices import NORMS, Norm
from robust.geometry import distance, lengths, project, projection, steepest
from robust.threat_model import _shorten

SHAPE = (3, 1, 2, 3)
eps_values = st.floats(0, 2, width=32)


def images(low: float, high: float) -> st.SearchStrategy[Tensor]:
    numbers = st.lists(st.floats(low, high, width=32), min_size=18, max_size=18)
    return numbers.map(lambda values: torch.tensor(values).view(SHAPE))


@settings(max_examples=100, deadline=None)
@given(x=images(0, 1), x_adv=images(-3, 3), eps=eps_values, norm=st.sampled_from(NORMS))
def test_projection_lands_in_the_ball_and_range_and_is_idempotent(
    x: Tensor, x_adv: Tensor, eps: float, norm: Norm
) -> None:
    once = project(x_adv, x, norm=norm, eps=eps)
    assert once.min() >= 0
    assert once.max() <= 1
    assert bool((distance(once, x, norm) <= eps * (1 + 1e-5) + 1e-6).all())
    torch.testing.assert_close(project(once, x, norm=norm, eps=eps), once, rtol=1e-5, atol=1e-6)
    assert torch.equal(projection(x, norm=norm, eps=eps)(x_adv), once)
    each = torch.full((3,), eps)
    torch.testing.assert_close(project(x_adv, x, norm=norm, eps=each), once)


@settings(max_examples=50, deadline=None)
@given(x=images(0, 1), inside=images(0, 1), norm=st.sampled_from(NORMS))
def test_projection_keeps_points_inside(x: Tensor, inside: Tensor, norm: Norm) -> None:
    found = project(inside, x, norm=norm, eps=5.0 if norm == "l2" else 1.0)
    torch.testing.assert_close(found, inside, rtol=0, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(gradient=images(-3, 3), scale=st.sampled_from([1e-20, 1e-8, 1.0, 1e8]))
def test_steepest_step_has_unit_length_and_best_alignment(gradient: Tensor, scale: float) -> None:
    gradient = gradient * scale
    some = gradient.abs().amax(dim=(1, 2, 3)) > 1e-25
    for norm in NORMS:
        step = steepest(gradient, norm)
        length = lengths(step, norm).flatten()
        torch.testing.assert_close(length[some], torch.ones(int(some.sum())))
        gain = (step * gradient).flatten(1).double().sum(dim=1)
        flat = gradient.flatten(1).double()
        best = flat.abs().sum(dim=1) if norm == "linf" else flat.norm(dim=1)
        torch.testing.assert_close(gain[some], best[some], rtol=1e-4, atol=0)
        assert not bool(step[(gradient == 0).flatten(1).all(dim=1)].any())


@settings(max_examples=100, deadline=None)
@given(a=images(-3, 3), b=images(-3, 3))
def test_distances(a: Tensor, b: Tensor) -> None:
    delta = (a - b).flatten(1)
    torch.testing.assert_close(distance(a, b, "linf"), delta.abs().amax(dim=1))
    torch.testing.assert_close(distance(a, b, "l2"), delta.square().sum(dim=1).sqrt())


class OnMps(Tensor):
    """Stands for a tensor on Apple's MPS: refuses float64 as that does."""

    device = property(lambda self: torch.device("mps"))  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = super().__torch_function__(func, types, args, kwargs)
        if func is Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return found.as_subclass(Tensor)
        if isinstance(found, Tensor) and found.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return found


def test_lengths_are_summed_in_float64_without_it_on_the_device() -> None:
    x, x_adv = torch.rand(2, 3, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    there, moved = x.as_subclass(OnMps), x_adv.as_subclass(OnMps)
    found = distance(moved, there, "l2")
    assert isinstance(found, OnMps)
    assert found.tolist() == distance(x_adv, x, "l2").tolist()
    levels, exact = (255 * there).round(), 255 * moved
    shorter = _shorten(levels, exact, 300.0)
    assert isinstance(shorter, OnMps)
    assert shorter.tolist() == _shorten((255 * x).round(), 255 * x_adv, 300.0).tolist()

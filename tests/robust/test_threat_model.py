import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robust.images import encode_png, to_float, to_uint8
from robust.threat_model import ThreatModel, distance, format_eps, parse_eps
from tests.support.images import decode_png

SHAPE = (2, 3, 4, 4)
balls = st.one_of(
    st.builds(ThreatModel, norm=st.just("linf"), eps=st.floats(0, 1)),
    st.builds(ThreatModel, norm=st.just("l2"), eps=st.floats(0, 8)),
)
seeds = st.integers(0, 2**31)


def within(threat_model: ThreatModel, x_adv: Tensor, x: Tensor) -> bool:
    inside = bool((threat_model.distance(x_adv, x) <= threat_model.eps + 1e-6).all())
    return inside and bool((x_adv >= 0).all()) and bool((x_adv <= 1).all())


def eight_bit(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, SHAPE, generator=generator).float() / 255


@given(threat_model=balls, seed=seeds, reach=st.floats(0, 100))
def test_projection_stays_inside_and_is_idempotent(
    threat_model: ThreatModel, seed: int, reach: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(SHAPE, generator=generator)
    once = threat_model.project(x + reach * torch.randn(SHAPE, generator=generator), x)
    assert within(threat_model, once, x)
    torch.testing.assert_close(threat_model.project(once, x), once, rtol=0, atol=2e-7)


@given(threat_model=balls, seed=seeds)
def test_projection_keeps_points_of_the_ball(threat_model: ThreatModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(SHAPE, generator=generator)
    nearer = ThreatModel(norm=threat_model.norm, eps=threat_model.eps * 0.99)
    inside = nearer.random_start(x, generator)
    torch.testing.assert_close(threat_model.project(inside, x), inside, rtol=0, atol=1e-7)


@given(threat_model=balls, seed=seeds)
def test_random_start_lies_in_the_ball(threat_model: ThreatModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(SHAPE, generator=generator)
    assert within(threat_model, threat_model.random_start(x, generator), x)


def test_linf_noise_fills_the_interval_evenly() -> None:
    noise = ThreatModel(eps=0.1).noise(torch.zeros(200, 3, 8, 8), torch.Generator().manual_seed(0))
    assert noise.mean().abs() < 1e-3
    # A uniform variable on [-a, a] has variance a^2 / 3.
    assert noise.var().item() == pytest.approx(0.01 / 3, rel=0.02)


def test_l2_noise_is_uniform_in_volume() -> None:
    ball = ThreatModel(norm="l2", eps=2.0)
    x = torch.zeros(20_000, 1, 1, 2)
    lengths = ball.noise(x, torch.Generator().manual_seed(0)).flatten(1).norm(dim=1)
    # In the plane half of the area lies beyond eps / sqrt(2).
    assert (lengths > 2 / math.sqrt(2)).float().mean().item() == pytest.approx(0.5, abs=0.02)


@given(threat_model=balls, seed=seeds)
def test_rounding_stays_inside_and_survives_png(threat_model: ThreatModel, seed: int) -> None:
    x = eight_bit(seed)
    generator = torch.Generator().manual_seed(seed)
    x_adv = threat_model.random_start(x, generator)
    rounded = threat_model.round_inside(x_adv, x)
    assert within(threat_model, rounded, x)
    for image in rounded:
        assert torch.equal(to_float(decode_png(encode_png(to_uint8(image)))), image)


def test_rounding_linf_reaches_the_rim() -> None:
    x = torch.full(SHAPE, 100 / 255)
    rounded = ThreatModel(eps=8 / 255).round_inside(x + 8 / 255, x)
    assert torch.equal(rounded * 255, torch.full(SHAPE, 108.0))
    # Seven levels and a half can't be written in 8 bits; eight would leave the ball.
    rounded = ThreatModel(eps=7.5 / 255).round_inside(x + 7.5 / 255, x)
    assert torch.equal(rounded * 255, torch.full(SHAPE, 107.0))


def test_rounding_l2_keeps_most_of_the_length() -> None:
    x = torch.full((1, 3, 32, 32), 100 / 255)
    ball = ThreatModel(norm="l2", eps=0.5)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    rounded = ball.round_inside(ball.project(x + direction, x), x)
    assert 0.495 < ball.distance(rounded, x).item() <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_eps_zero_is_the_identity(norm: str) -> None:
    x = eight_bit(0)
    ball = ThreatModel(norm=norm, eps=0.0)  # type: ignore[arg-type]
    assert torch.equal(ball.project(x + 0.3, x), x)
    assert torch.equal(ball.random_start(x, torch.Generator().manual_seed(0)), x)
    assert torch.equal(ball.round_inside(x, x), x)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e12])
def test_steepest_has_length_one_at_any_scale(scale: float) -> None:
    gradient = scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    step = ThreatModel(norm="l2", eps=1.0).steepest(gradient)
    torch.testing.assert_close(step.flatten(1).norm(dim=1), torch.ones(2))
    step = ThreatModel(norm="linf").steepest(gradient)
    assert torch.equal(step.abs(), torch.ones(SHAPE))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_steepest_is_finite_for_a_useless_gradient(norm: str, value: float) -> None:
    gradient = torch.zeros(SHAPE)
    gradient[0, 0, 0, 0] = value
    step = ThreatModel(norm=norm).steepest(gradient)  # type: ignore[arg-type]
    assert bool(step.isfinite().all())
    assert torch.equal(step[1], torch.zeros(SHAPE[1:]))


def test_distance() -> None:
    x = torch.zeros(1, 1, 1, 2)
    x_adv = torch.tensor([[[[0.3, -0.4]]]])
    assert distance(x_adv, x, "linf").item() == pytest.approx(0.4)
    assert distance(x_adv, x, "l2").item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8/255", 8 / 255), ("0.5", 0.5), (0.25, 0.25), ("0", 0), (" 1 / 2 ", 0.5), ("1e-3", 1e-3)],
)
def test_parse_eps(text: str | float, size: float) -> None:
    assert parse_eps(text) == size


@pytest.mark.parametrize(
    "text",
    "banana||1/0|1/2/3|/|-1|nan|inf|-8/255|1e999|0x8/255|8/|8/255\n|1_0/255|0_1|٨/255|٠.٥".split(
        "|"
    ),
)
def test_parse_eps_rejects_invalid_text(text: str) -> None:
    with pytest.raises(ValueError, match="expected a"):
        parse_eps(text)


@pytest.mark.parametrize("levels", range(0, 256, 15))
def test_format_eps_is_read_back(levels: int) -> None:
    assert format_eps(levels / 255) == f"{levels}/255"
    assert parse_eps(format_eps(levels / 255)) == levels / 255


def test_format_eps_of_a_number() -> None:
    assert format_eps(0.03) == "0.03"
    assert format_eps(2.0) == "2"
    assert [format_eps(eps) for eps in (0.05, 0.25, 0.5)] == ["0.05", "0.25", "0.5"]


@pytest.mark.parametrize("text", ["0.25/255", "0.5/255", "0.75/255", "2.5/255", "12.25/255"])
def test_format_eps_of_parts_of_a_gray_level(text: str) -> None:
    assert format_eps(parse_eps(text)) == text
    assert format_eps(4 * parse_eps(text) / 4 + 1e-9) == text


def test_a_norm_is_read_in_any_case() -> None:
    assert ThreatModel(norm="Linf") == ThreatModel(norm="linf")  # type: ignore[arg-type]
    assert ThreatModel(norm="L2", eps=2.0).norm == "l2"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("norm", "eps", "message"),
    [
        ("l7", 0.1, "expected norm to be one of linf, l2"),
        ("linf", 8.0, "expected an linf eps in"),
        ("linf", -1.0, "at least 0"),
        ("linf", "8/255", "eps as a number, such as 8 / 255, got '8/255'"),
        ("l2", math.nan, "at least 0"),
        ("l2", math.inf, "at least 0"),
    ],
)
def test_threat_model_rejects_invalid_values(norm: str, eps: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThreatModel(norm=norm, eps=eps)  # type: ignore[arg-type]

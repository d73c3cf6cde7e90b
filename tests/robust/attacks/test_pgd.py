from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robust.attacks import AttackResult, fgsm, pgd
from robust.threat_model import ThreatModel

EPS = 8 / 255
LINF, L2 = ThreatModel(eps=EPS), ThreatModel(norm="l2", eps=0.25)


def ones(x: Tensor) -> Tensor:
    return torch.ones(len(x), dtype=torch.int64)


def run_pgd(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, **changes: object
) -> AttackResult:
    settings: dict[str, object] = {"threat_model": LINF, "alpha": EPS / 4, "steps": 10}
    return pgd(model, x, y, **(settings | changes))  # type: ignore[arg-type]


# The margin of a linear model falls by exactly eps times the dual norm of its weights.


@pytest.mark.parametrize(
    "attack",
    [
        lambda *args: fgsm(*args, threat_model=LINF),
        lambda *args: pgd(*args, threat_model=LINF, alpha=EPS / 4, steps=10),
        lambda *args: pgd(*args, threat_model=LINF, alpha=EPS / 4, steps=4, random_start=False),
    ],
    ids=["fgsm", "pgd", "pgd without a start"],
)
def test_linf_margin_falls_by_eps_times_the_l1_norm(
    linear: nn.Module, x: Tensor, attack: Callable[..., AttackResult]
) -> None:
    result = attack(linear, x, ones(x))
    fall = linear.margin(x) - linear.margin(result.x_adv)
    torch.testing.assert_close(fall, EPS * linear.w.abs().sum().expand(8), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "attack",
    [
        lambda *args: fgsm(*args, threat_model=L2),
        lambda *args: pgd(*args, threat_model=L2, alpha=0.1, steps=60),
        lambda *args: pgd(*args, threat_model=L2, alpha=0.1, steps=3, random_start=False),
    ],
    ids=["fgsm", "pgd", "pgd without a start"],
)
def test_l2_margin_falls_by_eps_times_the_l2_norm(
    linear: nn.Module, x: Tensor, attack: Callable[..., AttackResult]
) -> None:
    result = attack(linear, x, ones(x))
    fall = linear.margin(x) - linear.margin(result.x_adv)
    torch.testing.assert_close(fall, 0.25 * linear.w.norm().expand(8), rtol=1e-3, atol=0)


def test_returned_images_are_exactly_those_scored(linear: nn.Module, x: Tensor) -> None:
    y = torch.arange(8) % 2
    result = run_pgd(linear, x, y)
    torch.testing.assert_close(result.logits, linear(result.x_adv))
    assert torch.equal(result.success, linear(result.x_adv).argmax(dim=1) != y)
    assert torch.equal(result.distance, LINF.distance(result.x_adv, x))
    assert bool((result.distance <= EPS + 1e-6).all())
    assert not result.x_adv.requires_grad
    assert not result.logits.requires_grad


def test_result_stays_in_the_pixel_range(linear: nn.Module) -> None:
    x = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)).round()
    for threat_model in (ThreatModel(eps=0.3), ThreatModel(norm="l2", eps=3.0)):
        result = run_pgd(linear, x, ones(x), threat_model=threat_model, alpha=0.1)
        assert result.x_adv.min() >= 0
        assert result.x_adv.max() <= 1
        assert bool((result.distance > 0.9 * 0.3).all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_eps_zero_is_the_identity(linear: nn.Module, x: Tensor, norm: str) -> None:
    threat_model = ThreatModel(norm=norm, eps=0.0)  # type: ignore[arg-type]
    for result in (
        fgsm(linear, x, ones(x), threat_model=threat_model),
        run_pgd(linear, x, ones(x), threat_model=threat_model, alpha=0.1),
    ):
        assert torch.equal(result.x_adv, x)
        assert torch.equal(result.success, linear(x).argmax(dim=1) != 1)


def test_target_is_reached_if_possible(x: Tensor) -> None:
    w = torch.randn(3, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    target = torch.full((8,), 2)

    def model(images: Tensor) -> Tensor:
        # Logits pull class 2 up from behind; from 0.02 on the L1 norms decide.
        return torch.stack([(images * row).flatten(1).sum(1) for row in w], dim=1)

    y = model(x).argmax(dim=1)
    chosen = y != 2
    x, y, target = x[chosen], y[chosen], target[chosen]
    result = run_pgd(
        model, x, y, target=target, threat_model=ThreatModel(eps=0.25), alpha=0.05, steps=20
    )
    assert bool(result.success.all())
    assert torch.equal(model(result.x_adv).argmax(dim=1), target)
    short = run_pgd(model, x, y, target=target, threat_model=ThreatModel(eps=1e-4), alpha=1e-4)
    assert not bool(short.success.any())
    # Where it fails, the target has still come nearer.
    before = model(x).log_softmax(1)[:, 2]
    assert bool((short.logits.log_softmax(1)[:, 2] > before).all())


def test_untargeted_and_targeted_agree_on_two_classes(linear: nn.Module, x: Tensor) -> None:
    y = ones(x)
    untargeted = run_pgd(linear, x, y)
    targeted = run_pgd(linear, x, y, target=1 - y)
    torch.testing.assert_close(untargeted.x_adv, targeted.x_adv)


def test_early_stop_finds_the_same_successes_for_less(
    make_linear: Callable[..., nn.Module], x: Tensor
) -> None:
    w = make_linear().w
    middle = (x * w).flatten(1).sum(1).median().item()
    model = make_linear(bias=-middle + 0.3)  # some images fall at once, some later, some never
    y = ones(x)
    whole = run_pgd(model, x, y, restarts=2)
    early = run_pgd(model, x, y, restarts=2, early_stop=True)
    assert 0 < int(whole.success.sum()) < 8
    assert torch.equal(whole.success, early.success)
    assert int(early.forwards.sum()) < int(whole.forwards.sum())
    torch.testing.assert_close(early.logits, model(early.x_adv))


def test_restarts_attack_only_unfooled_images(
    make_linear: Callable[..., nn.Module], x: Tensor
) -> None:
    model = make_linear()
    margins = model.margin(x)
    model.bias = -(margins.min().item() + EPS * model.w.abs().sum().item()) - 0.01
    y = (model.margin(x) > 0).long()  # all right when clean; some within reach, some not
    model.images = 0
    result = run_pgd(model, x, y, steps=5, restarts=3)
    survivors = ~result.success
    assert 0 < int(survivors.sum()) < 8
    assert set(result.forwards[result.success].tolist()) == {6}
    assert set(result.forwards[survivors].tolist()) == {18}
    assert torch.equal(result.backwards * 6, result.forwards * 5)
    assert model.images == int(result.forwards.sum())


def test_works_under_no_grad(linear: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        result = fgsm(linear, x, ones(x), threat_model=LINF)
    assert torch.equal(result.x_adv, fgsm(linear, x, ones(x), threat_model=LINF).x_adv)
    assert result.distance.min().item() == pytest.approx(EPS, rel=1e-4)


def test_masked_gradient_changes_nothing(linear: nn.Module, x: Tensor) -> None:
    result = fgsm(lambda images: linear(images.round()), x, ones(x), threat_model=LINF)
    assert torch.equal(result.distance, torch.zeros(8))


def test_nan_gradient_never_leaves_the_ball(x: Tensor) -> None:
    def model(images: Tensor) -> Tensor:
        value = images.flatten(1).sum(dim=1)
        broken = (value - value.detach()).abs().sqrt()  # an infinite slope times zero
        return torch.stack([-value - broken, value], dim=1)

    for threat_model in (LINF, L2):
        result = run_pgd(model, x, ones(x), threat_model=threat_model)
        assert bool(result.x_adv.isfinite().all())
        assert not bool(result.success.any())


def test_same_seed_same_result(x: Tensor, linear: nn.Module) -> None:
    def attacked(seed: int = 0) -> Tensor:
        return run_pgd(linear, x, ones(x), alpha=0.001, steps=1, seed=seed).x_adv

    assert torch.equal(attacked(3), attacked(3))
    assert torch.equal(attacked(), attacked(0))
    assert not torch.equal(attacked(3), attacked(4))
    torch.rand(5)
    assert torch.equal(attacked(3), attacked(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.full((2, 3, 4, 4), torch.nan)}, r"images in \[0, 1\], got values from nan"),
        ({"x": torch.full((2, 3, 4, 4), 1.01)}, r"images in \[0, 1\]"),
        ({"x": torch.full((2, 3, 4, 4), -0.01)}, r"images in \[0, 1\]"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, "expected float images"),
        ({"x": torch.zeros(3, 4, 4)}, "expected float images"),
        (
            {"x": torch.zeros(0, 3, 4, 4), "y": torch.zeros(0, dtype=torch.int64)},
            "at least 1 image",
        ),
        ({"y": torch.ones(2)}, "labels int64"),
        ({"y": torch.ones(2, dtype=torch.int32)}, "labels int64"),
        ({"y": torch.ones(3, dtype=torch.int64)}, "labels int64"),
        ({"target": torch.zeros(2)}, "targets int64"),
        ({"target": torch.tensor([0, 1])}, "target other than the label"),
        ({"steps": 0}, "steps as a whole number of at least 1, got 0"),
        ({"restarts": 0}, "restarts as a whole number of at least 1, got 0"),
        ({"loss": "cw"}, "loss to be one of ce, margin, dlr, pm, got 'cw'"),
        ({"alpha": -0.1}, "alpha of at least 0"),
        ({"alpha": float("nan")}, "alpha of at least 0"),
    ],
)
def test_pgd_rejects_invalid_arguments(
    linear: nn.Module, change: dict[str, object], message: str
) -> None:
    x, y = torch.full((2, 3, 4, 4), 0.5), torch.ones(2, dtype=torch.int64)
    settings = {"x": x, "y": y, "threat_model": LINF, "alpha": 0.01, "steps": 1} | change
    with pytest.raises(ValueError, match=message):
        pgd(linear, settings.pop("x"), settings.pop("y"), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_fgsm_takes_the_eps_of_each_image(linear: nn.Module, eps: float) -> None:
    x, y = torch.full((2, 3, 4, 4), 0.5), torch.tensor([0, 1])
    sizes = torch.tensor([0.3, 0.2])
    result = fgsm(linear, x, y, threat_model=ThreatModel(eps=eps), eps=sizes)
    torch.testing.assert_close(result.distance, sizes)


def test_pgd_rejects_per_image_eps_with_alpha_at_eps_zero(linear: nn.Module) -> None:
    x, y = torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="eps above 0, as alpha scales with it, got 0"):
        pgd(
            linear,
            x,
            y,
            threat_model=ThreatModel(eps=0),
            alpha=0.1,
            steps=1,
            eps=torch.tensor([0.3]),
        )


def test_restarts_start_randomly_even_if_the_first_run_does_not(linear: nn.Module) -> None:
    seen: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return linear(x)

    x = torch.full((1, 3, 4, 4), 0.5)
    y = linear(x).argmin(dim=1).bitwise_xor(1)  # never fooled: every restart is made
    pgd(model, x, y, threat_model=LINF, alpha=0.0, steps=1, restarts=3, random_start=False)
    starts = seen[::2]
    assert torch.equal(starts[0], x)
    assert len({tuple(start.flatten().tolist()) for start in starts}) == 3

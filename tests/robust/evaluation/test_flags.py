"""Each flag on a model built to deserve it; none on a real one, defended or not."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robust.attacks import AttackSettings, resolve_attack
from robust.evaluation import Evaluation, evaluate, evaluate_batches, find_flags
from robust.evaluation.flags import notes
from robust.evaluation.result import Accuracy
from robust.threat_model import Norm, ThreatModel

CPU = torch.device("cpu")
Data = tuple[Tensor, Tensor]
Short = Callable[[ThreatModel], AttackSettings]


def attacks(
    *names: str, eps: float = 24 / 255, norm: Norm = "linf", square: int = 50
) -> list[AttackSettings]:
    ball = ThreatModel(norm=norm, eps=eps)
    return [
        resolve_attack(name, ball, steps=square if name == "square" else None) for name in names
    ]


def run(
    model: Callable[[Tensor], Tensor],
    data: Data,
    used: list[AttackSettings],
    *,
    num_classes: int = 10,
    curve: int = 0,
    allow_probabilities: bool = False,
) -> Evaluation:
    return evaluate(
        model,
        *data,
        num_classes=num_classes,
        attacks=used,
        device=CPU,
        curve=curve,
        allow_probabilities=allow_probabilities,
    )


def names(evaluation: Evaluation) -> set[str]:
    return {flag.name for flag in evaluation.flags}


@pytest.fixture(scope="session")
def test_digits(digits: tuple[Data, Data]) -> Data:
    return digits[1][0][:100], digits[1][1][:100]


# A sound model.


@pytest.mark.parametrize("eps", [2 / 255, 8 / 255, 24 / 255])
@pytest.mark.parametrize("kind", ["undefended", "defended"])
def test_sound_model_raises_no_flags(
    kind: str, eps: float, test_digits: Data, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    used = attacks("fgsm", "pgd", "apgd-ce-10", "square", eps=eps)
    result = run(model, test_digits, used, curve=40)
    assert result.flags == ()
    assert result.curve[-1].correct == 0
    assert run(model, test_digits, attacks("fgsm", "pgd", eps=eps, norm="l2")).flags == ()


def test_sound_model_raises_no_flags_on_few_images(undefended: nn.Module, digits: object) -> None:
    """Where a sound attack may well fool none."""
    images, labels = digits[1]  # type: ignore[index]
    used = attacks("fgsm", "pgd", "square", eps=2 / 255, square=10)
    results = [
        run(undefended, (images[k : k + 24], labels[k : k + 24]), used, curve=24)
        for k in (0, 24, 48)
    ]
    assert any(r.clean.correct == r.worst_correct >= 20 for r in results)
    assert [r.flags for r in results] == [()] * 3


def test_autoattack_on_a_sound_model_raises_no_flags(
    defended: nn.Module, test_digits: Data, short: Short
) -> None:
    result = run(defended, test_digits, [short(ThreatModel(eps=24 / 255))])
    assert result.flags == ()


# The model itself.


def test_random_answers(undefended: nn.Module, test_digits: Data) -> None:
    result = run(lambda x: undefended(x + 0.02 * torch.randn_like(x)), test_digits, attacks("pgd"))
    assert "randomized" in names(result)


def test_answers_that_depend_on_the_batch(undefended: nn.Module, test_digits: Data) -> None:
    result = run(lambda x: undefended(x - x.mean() + 0.3), test_digits, attacks("pgd"))
    assert "randomized" in names(result)


def test_probabilities(undefended: nn.Module, test_digits: Data) -> None:
    model = nn.Sequential(undefended, nn.Softmax(dim=1))
    result = run(model, test_digits, attacks("fgsm"), allow_probabilities=True)
    assert "probabilities" in names(result)


class Rounded(torch.autograd.Function):
    """To the nearest integer; no slope."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


def test_outputs_of_a_sigmoid(undefended: nn.Module, test_digits: Data) -> None:
    images, labels = test_digits

    def model(x: Tensor) -> Tensor:
        return undefended(x).sigmoid()

    assert "sigmoid" in names(run(model, test_digits, []))
    assert "sigmoid" not in names(run(model, (images[:49], labels[:49]), []))
    assert "sigmoid" not in names(run(undefended, test_digits, []))
    softmax = run(lambda x: undefended(x).softmax(1), test_digits, [], allow_probabilities=True)
    assert {"sigmoid", "probabilities"} & names(softmax) == {"probabilities"}


def test_gradients_that_are_zero(undefended: nn.Module, test_digits: Data) -> None:
    """Rounding in front of the model, as of a JPEG."""
    used = attacks("fgsm", "pgd", eps=12 / 255)
    used[1] = replace(used[1], random_start=False)
    result = run(lambda x: undefended(Rounded.apply(x * 8) / 8), test_digits, used)
    assert {"gradients", "no effect"} <= names(result)
    assert result.probes is not None
    assert result.probes.zero_gradients == result.probes.differentiated == 8


def test_gradients_that_are_nan(undefended: nn.Module, test_digits: Data) -> None:
    def model(x: Tensor) -> Tensor:
        return undefended(x + 0 * (x - x.detach()).abs().sqrt())

    result = run(model, test_digits, attacks("fgsm"))
    assert "gradients" in names(result)
    assert result.probes is not None
    assert result.probes.nan_gradients == result.probes.differentiated == 8


def test_missing_normalization(undefended: nn.Module, test_digits: Data) -> None:
    """A model that was trained on normalised images."""
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])

    def model(x: Tensor) -> Tensor:
        return undefended(x * std.view(3, 1, 1) + mean.view(3, 1, 1))

    result = run(model, test_digits, attacks("fgsm"))
    (flag,) = [flag for flag in result.flags if flag.name == "normalization"]
    found = re.match(
        r"(\d+) of 50 images are classified correctly when normalized as for", flag.text
    )
    assert found is not None, flag.text
    assert int(found[1]) >= 45


def test_model_without_gradients_raises_no_gradient_flag(
    defended: nn.Module, test_digits: Data
) -> None:
    result = run(lambda x: defended(x).detach(), test_digits, attacks("square"))
    assert result.flags == ()


def test_advice_for_a_model_without_gradients_is_possible(
    defended: nn.Module, test_digits: Data
) -> None:
    (square,) = attacks("square", square=1)
    result = run(lambda x: defended(x).detach(), test_digits, [square])
    (item,) = result.attacks
    result = replace(result, attacks=(replace(item, correct=result.clean.correct),))
    (flag,) = find_flags(result)
    assert flag.name == "no effect"
    assert flag.advice.endswith("run square with more queries and restarts")
    assert "autoattack" not in flag.advice


def test_chance(undefended: nn.Module, test_digits: Data) -> None:
    images, labels = test_digits
    result = run(undefended, (images, (labels + 1) % 10), attacks("fgsm"))
    assert names(result) == {"chance"}


def test_adversarial_images_are_not_mistaken_for_unnormalized_ones(
    undefended: nn.Module, test_digits: Data
) -> None:
    """None is right as it comes, and any change, a normalization too, brings many back."""
    images, labels = test_digits
    result = run(undefended, (images, (labels + 1) % 10), attacks("fgsm"))
    assert result.probes is not None
    probes = replace(result.probes, right=0, right_normalized=30, normalization="CIFAR")
    none_right = replace(result, clean=replace(result.clean, correct=0), probes=probes)
    (flag,) = find_flags(none_right)
    assert flag.name == "chance"
    assert str(flag).startswith(
        "0 of 100 clean images are classified correctly, fewer than by chance"
    )
    assert "adversarial already" in str(flag)
    some = replace(none_right, probes=replace(probes, right=10))
    assert {flag.name for flag in find_flags(some)} == {"chance", "normalization"}


# The attacks.


def test_an_attack_without_effect(defended: nn.Module, test_digits: Data) -> None:
    (pgd,) = attacks("pgd-5")
    nothing = replace(pgd, alpha=0.0, random_start=False)
    result = run(defended, test_digits, [nothing], curve=50)
    assert result.worst_correct == result.clean.correct
    assert names(result) == {"no effect"}
    assert names(run(defended, test_digits, [nothing])) == {"no effect"}


def test_a_masked_model(undefended: nn.Module, test_digits: Data) -> None:
    """The same decisions, yet no attack finds the way: the softmax is flat in float32."""
    plain = run(undefended, test_digits, attacks("fgsm"))
    result = run(lambda x: 1e6 * undefended(x), test_digits, attacks("fgsm"))
    assert result.clean.correct == plain.clean.correct
    assert result.worst_correct > plain.worst_correct + 10
    assert {"gradients", "no effect"} <= names(result)


def test_iterative_attack_weaker_than_one_step(undefended: nn.Module, test_digits: Data) -> None:
    used = attacks("fgsm", "pgd-5")
    used[1] = replace(used[1], alpha=0.1 / 255, random_start=False)
    found = names(run(undefended, test_digits, used))
    assert found == {"single step stronger", "no effect"}


class Bent(torch.autograd.Function):
    """The gradient turned around where it is first asked for, at the clean image."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        levels = (x.detach() * 255).flatten(1)
        ctx.clean = (levels - levels.round()).abs().amax(dim=1) < 1e-3  # type: ignore[attr-defined]
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        sign = 1 - 2 * ctx.clean.float()  # type: ignore[attr-defined]
        return gradient * sign.view(-1, 1, 1, 1)


def test_model_robust_to_exactly_one_step(undefended: nn.Module, test_digits: Data) -> None:
    result = run(
        lambda x: undefended(Bent.apply(x)), test_digits, attacks("fgsm", "pgd", eps=48 / 255)
    )
    assert "single step only" in names(result)
    assert run(undefended, test_digits, attacks("fgsm", "pgd", eps=48 / 255)).flags == ()


def masked(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """No gradient leads anywhere, though the model is fragile."""
    return lambda x: (
        model(x.detach()) + 1e-6 * x.flatten(1).sum(dim=1, keepdim=True) * (torch.arange(10) - 4.5)
    )


@pytest.mark.parametrize("together", [False, True])
def test_square_beats_misleading_gradients(
    undefended: nn.Module, test_digits: Data, short: Short, together: bool
) -> None:
    ball = ThreatModel(eps=32 / 255)
    used = [short(ball)] if together else attacks("pgd", "square", eps=32 / 255, square=100)
    assert "square stronger" in names(run(masked(undefended), test_digits, used))


@pytest.mark.parametrize(
    ("robust", "flags"),
    [
        ({"pgd-20": 50, "square": 20, "square-check": 20}, 2),
        ({"pgd-20": 50, "square-check": 20}, 1),
        ({"pgd-20": 50, "square-check": 49}, 0),
        ({"square": 20, "square-check": 50}, 0),  # neither is measured against the other
    ],
)
def test_square_check_is_a_random_search(robust: dict[str, int], flags: int) -> None:
    def accuracy(attack: AttackSettings | None, correct: int) -> Accuracy:
        per_class = ((correct // 10, 10),) * 10
        return Accuracy(attack=attack, correct=correct, n=100, per_class=per_class)

    result = Evaluation(
        n=100,
        total=100,
        clean=accuracy(None, 80),
        attacks=tuple(accuracy(*attacks(name), robust[name]) for name in robust),
        worst_correct=min(robust.values()),
    )
    found = [flag for flag in find_flags(result) if flag.name == "square stronger"]
    assert len(found) == flags
    assert [flag.text for flag in found][-1:] == [
        "square-check, a random search, fooled 30 more images than the gradient attacks"
    ] * (flags > 0)


@pytest.mark.parametrize(
    ("num_classes", "expected"),
    [
        (2, ["tries 1 target class, not 3", "maximizes the margin, as its loss needs 4 classes"]),
        (3, ["tries 2 target classes, not 3", "maximizes the margin, as its loss needs 4 classes"]),
        (4, []),
    ],
)
def test_what_few_classes_change_is_noted(num_classes: int, expected: list[str]) -> None:
    assert notes(attacks("malt", "pgd"), num_classes) == tuple(f"malt: {n}" for n in expected)


# The curve.


def test_a_curve_that_rises(undefended: nn.Module, test_digits: Data) -> None:
    """Fooled only by images that are changed a little: with more room attacks run past them."""
    truth = test_digits[0].float() / 255
    keys = truth.flatten(1)

    def model(x: Tensor) -> Tensor:
        away, nearest = torch.cdist(x.flatten(1), keys, p=float("inf")).min(dim=1)
        logits = undefended(x)
        safe = undefended(truth[nearest]) + 0 * logits
        return torch.where((away > 40 / 255)[:, None], safe, logits)

    result = run(model, test_digits, attacks("pgd"), curve=100)
    assert "not monotone" in names(result)


def test_accuracy_at_an_eps_no_classifier_can_resist() -> None:
    """Bright or dark on average, which noise does not change, and without a gradient."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    noise = torch.randint(-20, 21, (60, 3, 8, 8), generator=generator)
    images = (noise + 70 + 110 * labels.view(-1, 1, 1, 1)).to(torch.uint8)

    def model(x: Tensor) -> Tensor:
        bright = Rounded.apply(x.mean(dim=(1, 2, 3)))
        return torch.stack([1 - 2 * bright, 3 * bright - 1], dim=1)

    result = run(model, (images, labels), attacks("pgd"), num_classes=2, curve=60)
    assert result.clean.correct == 60
    assert {"large eps", "gradients"} <= names(result)


# What the model said when it was asked again.


def test_unconfirmed_successes(undefended: nn.Module, test_digits: Data) -> None:
    *_, result = evaluate_batches(
        lambda x: undefended(x),
        *test_digits,
        num_classes=10,
        attacks=attacks("pgd-5", eps=1 / 255),
        device=CPU,
        fast=lambda x: undefended(x).roll(1, dims=1),
    )
    assert names(result) >= {"unconfirmed"}
    assert result.attacks[0].unconfirmed > 50
    assert result.attacks[0].correct == result.clean.correct  # an unconfirmed success is none


def test_few_images_raise_no_flags(undefended: nn.Module, test_digits: Data) -> None:
    images, labels = test_digits
    (pgd,) = attacks("pgd-5")
    nothing = replace(pgd, alpha=0.0, random_start=False)
    assert run(undefended, (images[:10], labels[:10]), [nothing]).flags == ()
    tiny = attacks("fgsm", eps=0.1 / 255)
    assert run(undefended, test_digits, tiny).flags == ()


def test_every_flag_is_documented() -> None:
    root = Path(__file__).parents[3]
    source = (root / "robust/evaluation/flags.py").read_text()
    page = (root / "docs/evaluation.md").read_text()
    names = set(re.findall(r'name="([^"]+)"', source))
    assert {"randomized", "square stronger"} < names
    assert names == set(re.findall(r"`([^`]+)`", page.split("| flag | seen |")[1].split("\n\n")[0]))

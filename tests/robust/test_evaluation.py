import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from robust.attacks import AttackResult, AttackSettings, resolve_attack
from robust.doubts import doubts
from robust.evaluation import Accuracy, Evaluation, evaluate, evaluate_batches, wilson_interval
from robust.threat_model import ThreatModel

CPU = torch.device("cpu")
BALL = ThreatModel(eps=8 / 255)
FGSM, PGD = resolve_attack("fgsm", BALL), resolve_attack("pgd-5", BALL)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        # Newcombe 1998, Stat. Med. 17, 857-872, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(correct: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)


def data(n: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(60, 196, (n, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 2, (n,), generator=generator)


@pytest.fixture
def model(make_linear: Callable[..., nn.Module]) -> nn.Module:
    """A linear model whose boundary runs through the middle of the images."""
    model = make_linear()
    model.bias = 0.05 - model.margin(data()[0].float() / 255).median().item()
    return model


def by_hand(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which images are right, and which stay so at the worst point of the linf ball."""
    margin = model.margin(images.float() / 255) * (2 * labels - 1)
    return margin > 0, margin - 8 / 255 * model.w.abs().sum() > 0


def test_counts_are_those_of_the_known_model(model: nn.Module) -> None:
    images, labels = data()
    right, robust = by_hand(model, images, labels)
    assert 0 < int(robust.sum()) < int(right.sum()) < 40
    result = evaluate(
        model, images, labels, num_classes=2, attacks=[FGSM, PGD], device=CPU, batch_size=7
    )
    assert (result.n, result.total) == (40, 40)
    assert result.clean.correct == int(right.sum())
    assert [item.correct for item in result.attacks] == [int(robust.sum())] * 2
    assert result.worst_correct == int(robust.sum())
    assert result.clean.per_class == tuple(
        (int(right[labels == k].sum()), int((labels == k).sum())) for k in (0, 1)
    )
    assert result.accuracy("clean") == result.clean.correct / 40
    assert result.accuracy("pgd-5") == int(robust.sum()) / 40
    with pytest.raises(KeyError):
        result.accuracy("square")


def test_partial_results_only_grow(model: nn.Module) -> None:
    images, labels = data()
    parts = list(
        evaluate_batches(
            model, images, labels, num_classes=2, attacks=[PGD], device=CPU, batch_size=9
        )
    )
    assert [part.n for part in parts] == [9, 18, 27, 36, 40]
    for before, after in pairwise(parts):
        assert before.clean.correct <= after.clean.correct <= before.clean.correct + 9
        assert before.worst_correct <= after.worst_correct
        assert before.clean.seconds < after.clean.seconds
    for part in parts:
        assert part.worst_correct == part.attacks[0].correct <= part.clean.correct


class Flipping(AttackSettings):
    """Succeeds on the images whose first pixel has the remainder `alpha` by 5."""

    def run(self, model: object, x: Tensor, y: Tensor, **_: object) -> AttackResult:  # type: ignore[override]
        success = (x[:, 0, 0, 0] * 255).round() % 5 == self.alpha
        counts = torch.zeros(len(x), dtype=torch.int64)
        return AttackResult(
            x_adv=x,
            logits=torch.zeros(len(x), 2),
            success=success,
            distance=torch.zeros(len(x)),
            forwards=counts,
            backwards=counts,
        )


def test_worst_case_is_the_intersection(model: nn.Module) -> None:
    images, labels = data()
    right, _ = by_hand(model, images, labels)
    first = images[:, 0, 0, 0] % 5
    attacks = [Flipping(**{**vars(PGD), "alpha": remainder}) for remainder in (1, 2)]
    result = evaluate(model, images, labels, num_classes=2, attacks=attacks, device=CPU)
    survivors = [int((right & (first != remainder)).sum()) for remainder in (1, 2)]
    assert [item.correct for item in result.attacks] == survivors
    assert result.worst_correct == int((right & (first != 1) & (first != 2)).sum())
    assert result.worst_correct < min(survivors)


def test_the_seed_decides_whatever_ran_before(model: nn.Module) -> None:
    images, labels = data()

    def correct(seed: int) -> list[int]:
        # Nothing but its random start: what it fools is up to the seed.
        noise = resolve_attack("pgd-1", ThreatModel(eps=0.3), alpha=0.0, seed=seed)
        torch.rand(3)
        parts = evaluate_batches(
            model, images, labels, num_classes=2, attacks=[noise], device=CPU, batch_size=7
        )
        return [part.worst_correct for part in parts]

    assert correct(1) == correct(1)
    assert len({tuple(correct(seed)) for seed in range(5)}) > 1


def test_wrong_images_are_not_attacked(model: nn.Module) -> None:
    images, labels = data()
    right, _ = by_hand(model, images, labels)
    model.images = 0
    evaluate(model, images, labels, num_classes=2, attacks=[FGSM], device=CPU)
    # One clean pass each, then at most two of the single step.
    assert 40 < model.images <= 40 + 2 * int(right.sum())


def test_without_attacks_only_clean(model: nn.Module) -> None:
    images, labels = data()
    result = evaluate(model, images, labels, num_classes=2, attacks=[], device=CPU)
    assert result.attacks == ()
    assert result.worst_correct == result.clean.correct


def test_to_dict_is_json(model: nn.Module) -> None:
    images, labels = data()
    result = evaluate(model, images, labels, num_classes=3, attacks=[PGD], device=CPU)
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    clean, pgd = values["results"]
    assert clean["attack"] == "clean"
    assert clean["per_class"][2] is None
    assert (pgd["attack"], pgd["norm"], pgd["eps_text"]) == ("pgd-5", "linf", "8/255")
    assert pgd["interval"][0] < pgd["accuracy"] < pgd["interval"][1]
    assert values["worst_case"]["correct"] == pgd["correct"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": torch.zeros(0, 3, 4, 4, dtype=torch.uint8), "labels": torch.zeros(0)},
            "at least 1",
        ),
        ({"images": torch.zeros(40, 3, 4, 4)}, "uint8 images"),
        ({"labels": torch.zeros(39, dtype=torch.int64)}, "N labels"),
        ({"labels": torch.full((40,), 2)}, "labels from 0 to 1, got 2 to 2"),
        ({"labels": torch.full((40,), -1)}, "labels from 0 to 1, got -1"),
    ],
)
def test_refuses(model: nn.Module, change: dict[str, Tensor], message: str) -> None:
    images, labels = data()
    values = {"images": images, "labels": labels} | change
    with pytest.raises(ValueError, match=message):
        evaluate(model, values["images"], values["labels"], num_classes=2, attacks=[], device=CPU)


# When the numbers are not to be trusted.


def confident(model: nn.Module) -> Evaluation:
    images, _ = data()
    labels = (model.margin(images.float() / 255) > 0).long()
    return evaluate(model, images, labels, num_classes=2, attacks=[FGSM, PGD], device=CPU)


def test_a_sound_evaluation_raises_no_doubt(model: nn.Module) -> None:
    assert doubts(confident(model)) == ()


def test_a_masked_gradient_is_noticed(
    model: nn.Module, make_linear: Callable[..., nn.Module]
) -> None:
    sound = confident(model)
    masked = make_linear()
    masked.bias = model.bias
    plain = masked.forward
    masked.forward = lambda x: 1e6 * plain(x)  # type: ignore[method-assign]
    result = confident(masked)
    # The same decisions, yet no attack finds the way: the softmax is flat at float precision.
    assert result.clean.correct == sound.clean.correct == 40
    assert result.attacks[0].correct > sound.attacks[0].correct + 10
    found = doubts(result)
    assert found
    assert "fgsm fooled none of 40 images" in found[0]


def test_an_attack_that_does_nothing_is_noticed(model: nn.Module) -> None:
    images, _ = data()
    labels = (model.margin(images.float() / 255) > 0).long()
    nothing = replace(PGD, alpha=0.0, random_start=False)
    result = evaluate(model, images, labels, num_classes=2, attacks=[nothing], device=CPU)
    assert result.attacks[0].correct == result.clean.correct
    assert "pgd-5 fooled none" in doubts(result)[0]


def evaluation(clean: int, *attacked: tuple[AttackSettings, int]) -> Evaluation:
    def accuracy(attack: AttackSettings | None, correct: int) -> Accuracy:
        return Accuracy(attack=attack, correct=correct, n=100, per_class=((correct, 100),))

    return Evaluation(
        n=100,
        total=100,
        clean=accuracy(None, clean),
        attacks=tuple(accuracy(attack, correct) for attack, correct in attacked),
        worst_correct=min(correct for _, correct in attacked),
    )


def test_many_steps_weaker_than_one_are_noticed() -> None:
    (found,) = doubts(evaluation(80, (FGSM, 30), (PGD, 40)))
    assert found.startswith("pgd-5 leaves 10 more images right than the single step of fgsm")
    assert doubts(evaluation(80, (FGSM, 40), (PGD, 30))) == ()
    assert doubts(evaluation(80, (FGSM, 30), (PGD, 32))) == ()
    other_ball = resolve_attack("pgd-5", ThreatModel(eps=2 / 255))
    assert doubts(evaluation(80, (FGSM, 30), (other_ball, 60))) == ()


def test_nothing_is_concluded_from_little() -> None:
    assert doubts(evaluation(10, (FGSM, 10))) == ()
    tiny = resolve_attack("fgsm", ThreatModel(eps=0.1 / 255))
    assert doubts(evaluation(80, (tiny, 80))) == ()
    assert math.isnan(Accuracy(attack=None, correct=0, n=0, per_class=()).value)

"""`audit` is no weaker than AutoAttack where gradients are masked, and the flags say so."""

import pytest
import torch
from torch import Tensor, nn

from robust.attacks import resolve_attack
from robust.evaluation import Evaluation, evaluate
from robust.threat_model import ThreatModel

CPU = torch.device("cpu")
BALL = ThreatModel(eps=24 / 255)
Data = tuple[Tensor, Tensor]
SHORT = ("pma-5", "malt-5", "square-check-150")


class Wrapped(nn.Module):
    """What stands in the way of gradients, around a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits


class RandomInput(Wrapped):
    """Noise in the first layer, new in each pass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.05 * torch.randn_like(x))


class Saturated(Wrapped):
    """Logits so far apart that the softmax has no slope."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * super().forward(x)


class Rounded(Wrapped):
    """A step that can't be differentiated."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((20 * x).round() / 20)


@pytest.mark.parametrize(
    ("mask", "flags"),
    [
        (RandomInput, {"randomized"}),
        (Saturated, {"gradients"}),
        (Rounded, {"gradients", "square stronger"}),
    ],
)
def test_audit_is_no_weaker_than_autoattack_on_a_masked_model(
    mask: type[Wrapped],
    flags: set[str],
    undefended: nn.Module,
    digits: tuple[Data, Data],
) -> None:
    images, labels = digits[1][0][:60], digits[1][1][:60]
    ball = ThreatModel(eps=48 / 255)
    stages = ("apgd-ce-5", "apgd-t-5", "fab-t-5", "square-150")
    autoattack = resolve_attack("autoattack", ball, stages=stages)
    audit = resolve_attack("audit", ball, stages=SHORT)
    result = evaluate(
        mask(undefended), images, labels, num_classes=10, attacks=[autoattack, audit], device=CPU
    )
    theirs, ours = result.attacks
    assert flags <= {flag.name for flag in result.flags}
    if "randomized" not in flags:  # else what a query finds is chance
        assert ours.correct <= theirs.correct < result.clean.correct - 5


def test_images_fooled_by_only_one_ensemble_are_listed(
    defended: nn.Module, digits: tuple[Data, Data]
) -> None:
    images, labels = digits[1][0][:50], digits[1][1][:50]
    stages = {"autoattack": ["pgd-1", "square-1"], "audit": ["pgd-5", "square-1"]}
    attacks = [resolve_attack(name, BALL, stages=used) for name, used in stages.items()]

    def run(order: Tensor) -> Evaluation:
        return evaluate(
            defended,
            images[order],
            labels[order],
            num_classes=10,
            attacks=[*attacks, resolve_attack("fgsm", BALL)],
            device=CPU,
        )

    result = run(torch.arange(50))
    weak, strong, single = result.attacks
    for item in (weak, strong):
        assert len(item.fooled) == result.clean.correct - item.correct
    assert single.fooled == ()
    only_weak, only_strong = result.differences
    assert (only_weak.attack, only_weak.other) == ("autoattack", "audit")
    assert (only_strong.attack, only_strong.other) == ("audit", "autoattack")
    assert set(only_strong.images) == set(strong.fooled) - set(weak.fooled)
    assert only_strong.images
    # An image that the fooled set names is right as it is, and wrong after the attack alone.
    x = images.float() / 255
    for place in strong.fooled[:5]:
        one, label = x[place : place + 1], labels[place : place + 1]
        assert int(defended(one).argmax()) == int(label)
        assert bool(attacks[1].run(defended, one, label).success)
    # Places are those of the call, in whatever order it is.
    backwards = run(torch.arange(49, -1, -1))
    assert set(backwards.attacks[1].fooled) == {49 - place for place in strong.fooled}
    values = result.to_dict()
    assert values["differences"][1] == {
        "attack": "audit",
        "other": "autoattack",
        "count": len(only_strong.images),
        "indices": list(only_strong.images),
    }
    assert Evaluation.from_dict(values) == result
    assert str(only_strong) in str(result)


def test_times_report_the_seconds_of_passes(
    undefended: nn.Module, digits: tuple[Data, Data]
) -> None:
    attack = resolve_attack("audit", BALL, stages=SHORT)
    images, labels = digits[1][0][:20], digits[1][1][:20]
    result = evaluate(undefended, images, labels, num_classes=10, attacks=[attack], device=CPU)
    assert result.times is not None
    assert result.times.passes is not None
    assert result.times.limit is not None
    assert 0 < result.times.limit <= 1.001 * result.times.passes
    assert result.times.passes < result.times.evaluation
    assert result.to_dict()["times"] == vars(result.times)

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.threat_model import ThreatModel
from training.adversary import default_alpha, make_adversarial
from training.distributed import Shard
from training.objective import (
    adversarial_batches,
    attacked_sizes,
    distilled_targets,
    objective,
)
from training.recipe import AdversarialPart, Phase

EPS = 8 / 255
LINF = ThreatModel(norm="linf", eps=EPS)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))


@pytest.fixture
def x() -> Tensor:
    return 0.3 + 0.4 * torch.rand(10, 3, 4, 4, generator=seeded())


@pytest.fixture
def targets() -> Tensor:
    return F.one_hot(torch.arange(10) % 3, 3).float()


def attack(
    model: nn.Module, x: Tensor, targets: Tensor, part: AdversarialPart, **kwargs: bool
) -> Tensor:
    return make_adversarial(
        model, x, targets, part=part, threat_model=LINF, generator=seeded(), **kwargs
    )


def test_fgsm_moves_every_pixel_by_eps(model: nn.Module, x: Tensor, targets: Tensor) -> None:
    x_adv = attack(model, x, targets, AdversarialPart(kind="fgsm"))
    assert torch.allclose((x_adv - x).abs(), torch.full_like(x, EPS), atol=1e-6)
    assert F.cross_entropy(model(x_adv), targets) > F.cross_entropy(model(x), targets)


@pytest.mark.parametrize("kind", ["fgsm-rs", "pgd"])
def test_randomly_started_attacks_stay_in_the_ball(
    kind: str, model: nn.Module, x: Tensor, targets: Tensor
) -> None:
    part = AdversarialPart(kind=kind, steps=3)  # type: ignore[arg-type]
    delta = (attack(model, x, targets, part) - x).abs()
    assert delta.max() <= EPS + 1e-6
    assert delta.mean() > 0.5 * EPS


def test_n_fgsm_may_leave_the_ball_by_its_noise(
    model: nn.Module, x: Tensor, targets: Tensor
) -> None:
    delta = (attack(model, x, targets, AdversarialPart(kind="n-fgsm")) - x).abs()
    assert EPS * 2 < delta.max() <= 3 * EPS + 1e-6


def test_clean_and_eps_zero_return_the_images(model: nn.Module, x: Tensor, targets: Tensor) -> None:
    assert attack(model, x, targets, AdversarialPart(kind="clean")) is x
    none = ThreatModel(norm="linf", eps=0)
    part = AdversarialPart(kind="pgd", steps=3)
    assert (
        make_adversarial(model, x, targets, part=part, threat_model=none, generator=seeded()) is x
    )


def test_trades_starts_off_the_minimum_of_the_divergence(model: nn.Module, x: Tensor) -> None:
    clean = model(x).softmax(dim=1).detach()
    part = AdversarialPart(kind="pgd", steps=2)
    x_adv = attack(model, x, clean, part, divergence=True)
    assert (x_adv - x).abs().max() == pytest.approx(EPS, abs=1e-6)


def test_attack_does_not_update_batch_norm_statistics(x: Tensor, targets: Tensor) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 3)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attack(model, x, targets, AdversarialPart(kind="pgd", steps=2))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_default_steps_cross_the_ball() -> None:
    def alpha(kind: str, steps: int = 1) -> float:
        return default_alpha(AdversarialPart(kind=kind, steps=steps), EPS)  # type: ignore[arg-type]

    assert alpha("fgsm") == alpha("n-fgsm") == EPS
    assert alpha("fgsm-rs") == 1.25 * EPS
    assert alpha("pgd", 1) == alpha("pgd", 2) == EPS
    assert alpha("pgd", 10) == pytest.approx(2 / 255)
    assert alpha("pgd", 100) == pytest.approx(2 / 255)


def loss_of(phase: Phase, model: nn.Module, x: Tensor, targets: Tensor, eps: float = EPS) -> Tensor:
    batches = adversarial_batches(
        model,
        x,
        targets,
        phase=phase,
        threat_model=ThreatModel(norm="linf", eps=eps),
        generator=seeded(),
    )
    return objective(model, batches, targets, phase=phase, label_smoothing=0.1)


def phase_of(*parts: AdversarialPart, **fields: object) -> Phase:
    return Phase(name="phase", epochs=1, parts=parts, **fields)  # type: ignore[arg-type]


def test_clean_phase_uses_smoothed_cross_entropy(
    model: nn.Module, x: Tensor, targets: Tensor
) -> None:
    loss = loss_of(phase_of(AdversarialPart(kind="clean")), model, x, targets)
    smooth = 0.9 * targets + 0.1 / 3
    expected = -(smooth * model(x).log_softmax(dim=1)).sum(dim=1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_loss_weights_are_applied(
    split: bool, model: nn.Module, x: Tensor, targets: Tensor
) -> None:
    parts = AdversarialPart(kind="clean", share=0.3), AdversarialPart(kind="fgsm", share=0.7)
    loss = loss_of(phase_of(*parts, split=split), model, x, targets)
    x_adv = attack(model, x, targets, parts[1])
    clean = F.cross_entropy(model(x), targets, label_smoothing=0.1, reduction="none")
    attacked = F.cross_entropy(model(x_adv), targets, label_smoothing=0.1, reduction="none")
    expected = 0.3 * clean.mean() + 0.7 * attacked.mean()
    if split:
        expected = torch.cat([clean[:3], attacked[3:]]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_trades_adds_the_kl_divergence(model: nn.Module, x: Tensor, targets: Tensor) -> None:
    part = AdversarialPart(kind="pgd", steps=3)
    natural = F.cross_entropy(model(x), targets, label_smoothing=0.1).item()
    weak = loss_of(phase_of(part, loss="trades", trades_beta=1.0), model, x, targets).item()
    strong = loss_of(phase_of(part, loss="trades", trades_beta=3.0), model, x, targets).item()
    assert strong - natural == pytest.approx(3 * (weak - natural), rel=1e-4)
    assert weak > natural
    assert loss_of(phase_of(part, loss="trades"), model, x, targets, eps=0).item() == pytest.approx(
        natural, rel=1e-5
    )


@pytest.mark.parametrize("loss", ["cross-entropy", "trades"])
def test_class_weights_apply_per_image(
    loss: str, model: nn.Module, x: Tensor, targets: Tensor
) -> None:
    """The weighted loss is the weighted mean of the losses of single images."""
    phase = Phase(name="a", epochs=1, parts=(AdversarialPart(kind="pgd"),), loss=loss)  # type: ignore[arg-type]
    weights = torch.tensor([2.0, 0.5, 0.0])
    batches = [x, x + 0.05] if loss == "trades" else [x]
    whole = objective(
        model, batches, targets, phase=phase, label_smoothing=0.1, class_weights=weights
    )
    each = torch.stack(
        [
            objective(
                model,
                [batch[i : i + 1] for batch in batches],
                targets[i : i + 1],
                phase=phase,
                label_smoothing=0.1,
            )
            for i in range(len(x))
        ]
    )
    torch.testing.assert_close(whole, (each * weights[torch.arange(10) % 3]).mean())
    even = objective(
        model, batches, targets, phase=phase, label_smoothing=0.1, class_weights=torch.ones(3)
    )
    torch.testing.assert_close(even, each.mean())


def test_teacher_targets_are_mixed_by_weight(model: nn.Module, x: Tensor, targets: Tensor) -> None:
    mixed = distilled_targets(targets, model, x, weight=0.25)
    assert torch.allclose(mixed, 0.75 * targets + 0.25 * model(x).softmax(dim=1))
    assert not mixed.requires_grad
    assert distilled_targets(targets, model, x, weight=0.0) is targets


@pytest.mark.parametrize("fields", [{"split": True}, {}, {"loss": "trades"}])
@pytest.mark.parametrize("ranks", [1, 3])
def test_attacked_sizes_are_the_batch_sizes_of_attacks(
    fields: dict[str, object], ranks: int, model: nn.Module, x: Tensor, targets: Tensor
) -> None:
    parts = [AdversarialPart(kind="pgd")]
    if "loss" not in fields:
        shares = {"clean": 0.5, "fgsm": 0.1, "pgd": 0.4}
        parts = [AdversarialPart(kind=kind, share=share) for kind, share in shares.items()]  # type: ignore[arg-type]
    phase = phase_of(*parts, **fields)
    for rank in range(ranks):
        shard, seen = Shard(n=len(x), first=rank, step=ranks), set[int]()

        def counted(images: Tensor, seen: set[int] = seen) -> Tensor:
            seen.add(len(images))
            return model(images)  # type: ignore[no-any-return]

        adversarial_batches(
            counted,  # type: ignore[arg-type]
            shard.of(x),
            shard.of(targets),
            phase=phase,
            threat_model=LINF,
            generator=seeded(),
            shard=shard,
        )
        assert attacked_sizes(phase, shard) == seen - {0}
    assert attacked_sizes(Phase(name="clean", epochs=1), Shard(n=10)) == set()

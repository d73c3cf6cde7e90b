"""What is refused, and what the last pass of the model itself finds out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.attacks import ModelError, resolve_attack
from robust.attacks.passes import Passes
from robust.classifier import Classifier
from robust.evaluation import Evaluation, checks, evaluate, evaluate_batches
from robust.evaluation.flags import class_notes
from robust.evaluation.verify import verify
from robust.threat_model import ThreatModel

CPU = torch.device("cpu")
BALL = ThreatModel(eps=8 / 255)
FGSM, PGD = resolve_attack("fgsm", BALL), resolve_attack("pgd-5", BALL)
Data = tuple[Tensor, Tensor]


def run(model: Callable[[Tensor], Tensor], data: Data, **changes: object) -> Evaluation:
    values = {"num_classes": 2, "attacks": [PGD], "device": CPU} | changes
    return evaluate(model, *data, **values)  # type: ignore[arg-type]


# Refused.


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda z: z.softmax(dim=1), "expected logits, got probabilities"),
        (lambda z: z[:, 0], r"expected logits \(16, K\)"),
        (lambda z: z[:-1], r"expected logits \(16, K\)"),
        (lambda z: torch.cat([z, z], dim=1), "logits for 2 classes, got 4"),
        (lambda z: z / 0, "NaN or infinities for 16 of 16 images"),
        (lambda z: (z, z), "expected logits as a tensor, got tuple"),
        (lambda z: z.long(), "expected float logits, got torch.int64"),
        (lambda z: z.detach(), "with a gradient at the images, got none"),
    ],
)
def test_rejects_outputs_that_are_not_logits(
    model: nn.Module, linear_data: Data, answer: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        run(lambda x: answer(model(x)), linear_data)


@pytest.mark.parametrize(("n", "passes"), [(19, 19 + 8 + 16), (20, 20 + 8 + 16 + 3 * 8)])
def test_normalization_check_needs_enough_images(
    model: nn.Module, linear_data: Data, n: int, passes: int
) -> None:
    result = run(model, (linear_data[0][:n], linear_data[1][:n]), attacks=[])
    assert result.probes is not None
    assert result.probes.right_normalized is None  # on the first 8 none does better
    assert result.probes.differentiated == 8
    # Logits, the gradient of 8, 16 once more; and 8 with each of three normalizations.
    assert model.images == passes


def test_normalizations_are_not_tried_where_none_can_help(
    model: nn.Module, linear_data: Data
) -> None:
    images = linear_data[0][:20]
    predicted = model(images / 255).argmax(dim=1)
    model.images = 0
    result = run(model, (images, predicted), attacks=[])
    assert result.probes is not None
    assert (result.probes.right, result.probes.right_normalized) == (20, None)
    assert model.images == 20 + 8 + 16


def test_normalization_that_can_no_longer_help_enough_is_tried_on_few() -> None:
    """One more of the first 8 and all other 42 would not be significantly more than 33 of 50."""
    sizes = []

    def logits(x: Tensor) -> Tensor:
        sizes.append(len(x))
        found = torch.tensor([0.0, 1.0]).repeat(len(x), 1)
        found[0] = torch.tensor([1.0, 0.0])
        return found

    labels = torch.tensor([0] * 8 + [0, 1] * 21)
    predicted = torch.where(torch.arange(50) < 8, 1, labels)
    predicted[41:] = 1 - labels[41:]
    found = checks._best_normalization(Passes(logits), torch.rand(50, 3, 4, 4), labels, predicted)
    assert (found, sizes) == ((None, ""), [8, 8, 8])


@pytest.mark.parametrize(("second", "found"), [(0, None), (25, 48)])
def test_normalization_needs_images_of_several_classes(second: int, found: int | None) -> None:
    """Normalizing twice may make a model answer one class for everything."""
    labels = torch.tensor([0] * (50 - second) + [1] * second)
    x = torch.rand(50, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    answers = labels.clone()
    answers[-2:] = 2

    def normalized(images: Tensor) -> Tensor:
        start = 0 if len(images) == 8 else 8
        return nn.functional.one_hot(answers[start:][: len(images)], 3).float()

    predicted = torch.full_like(labels, 2)
    assert checks._best_normalization(Passes(normalized), x, labels, predicted)[0] == found


def test_images_of_few_classes_are_noted(model: nn.Module, linear_data: Data) -> None:
    images, labels = linear_data[0][:20], torch.zeros(20).long()
    note = "the images are of 1 of the model's 2 classes"
    assert run(model, (images, labels), attacks=[]).notes == (note,)
    assert run(model, (images[:19], labels[:19]), attacks=[]).notes == ()
    labels[0] = 1
    assert run(model, (images, labels), attacks=[]).notes == ()


@pytest.mark.parametrize(("n", "noted"), [(99, False), (100, True)])
def test_missing_classes_are_noted_if_not_by_chance(n: int, noted: bool) -> None:
    assert bool(class_notes(n, 9, 10)) == noted
    assert class_notes(n, 10, 10) == ()


def test_model_without_gradients_can_be_attacked_by_square(
    model: nn.Module, linear_data: Data
) -> None:
    attacks = [resolve_attack("square", BALL, steps=20)]
    result = run(lambda x: model(x).detach(), linear_data, attacks=attacks)
    assert result.worst_correct < result.clean.correct
    assert "gradients" not in {flag.name for flag in result.flags}  # nothing looked for one


@pytest.mark.parametrize("wrap", [Tensor.detach, lambda z: torch.from_numpy(z.numpy())])
def test_curve_is_left_out_if_only_it_needs_gradients(
    model: nn.Module, linear_data: Data, wrap: Callable[[Tensor], Tensor]
) -> None:
    attacks = [resolve_attack("square", BALL, steps=20)]
    without = run(model, linear_data, attacks=attacks)
    result = run(lambda x: wrap(model(x)), linear_data, attacks=attacks, curve=10)
    assert result.notes == ("no curve: pgd-20 needs gradients, and the model gives none",)
    assert (result.curve, result.probes.differentiated) == ((), 0)
    assert (result.clean, result.attacks) == (without.clean, without.attacks)
    curve = run(model, linear_data, attacks=attacks, curve=10)
    assert len(curve.curve) > 2
    assert curve.notes == ()


class Moving(nn.Module):
    """Batch norm that takes its statistics from the batch and moves its own, in any mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))
        self.register_buffer("unused", torch.tensor([float("nan")]))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.mean, self.var, training=True)
        return x[:, :2, 0, 0]


def test_rejects_and_restores_changing_batch_norm_statistics(linear_data: Data) -> None:
    model = Moving()
    with pytest.raises(ModelError, match="got one that changes mean and 1 more: its batch norm"):
        run(model, linear_data)
    assert torch.equal(model.mean, torch.zeros(3))
    assert torch.equal(model.var, torch.ones(3))


@pytest.mark.parametrize(("attacks", "broken"), [([PGD], "nan"), ([FGSM], "nan"), ([PGD], "inf")])
def test_rejects_nan_after_the_probed_images(
    model: nn.Module, linear_data: Data, attacks: list[object], broken: str
) -> None:
    images, labels = linear_data[0].repeat(4, 1, 1, 1), linear_data[1].repeat(4)
    seen = 0

    def answer(x: Tensor) -> Tensor:
        nonlocal seen
        seen += len(x)
        return model(x) if seen <= 150 else model(x) + float(broken)

    with pytest.raises(ModelError, match="expected finite logits"):
        run(answer, (images, labels), attacks=attacks)


def test_model_may_reject_images_out_of_range(model: nn.Module, linear_data: Data) -> None:
    def answer(x: Tensor) -> Tensor:
        if bool((x < 0).any() or (x > 1).any()):
            raise ValueError("expected images in [0, 1]")
        return model(x)

    assert run(answer, linear_data).to_dict()["results"] is not None


# The last pass.


def test_images_that_are_not_adversarial_are_caught(model: nn.Module, linear_data: Data) -> None:
    x = linear_data[0][:4].float() / 255
    x[3] = 0.99
    y = (model.margin(x) > 0).long()
    y[0] = 1 - y[0]  # the model errs there; all others it has right
    x_adv = x.clone()
    exact = Passes(model)
    assert verify(exact, x_adv, x, y=y, ball=BALL).confirmed.tolist() == [True, False, False, False]
    y = 1 - y
    y[0] = 1 - y[0]  # it errs everywhere
    assert verify(exact, x_adv, x, y=y, ball=BALL).confirmed.all()
    x_adv[1, 0, 0, 0] += 8.1 / 255  # out of the ball
    x_adv[2, 0, 0, 0] += 7.9 / 255
    x_adv[3, 0, 0, 0] = 1.001  # out of the pixel range
    verdict = verify(exact, x_adv, x, y=y, ball=BALL)
    assert verdict.confirmed.tolist() == [True, False, True, False]
    assert verdict.distance[1] == pytest.approx(8.1 / 255, abs=1e-6)
    with pytest.raises(ModelError, match="NaN or infinities for 4 of 4"):
        verify(Passes(lambda x: model(x) / 0), x, x, y=y, ball=BALL)


@pytest.mark.parametrize(("side", "eps"), [(32, 4.0), (32, 30.0), (224, 0.5), (224, 3.0)])
def test_rounding_in_a_large_ball_stays_confirmed(side: int, eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    n = 20 if side == 32 else 4
    x = torch.rand(n, 3, side, side, generator=generator)
    if side > 32:  # far enough from 0 and 1 that no pixel is clipped, which would move it inside
        x = 0.4 + 0.2 * x
    ball = ThreatModel(norm="l2", eps=eps)
    x_adv = ball.project(x + torch.randn(x.shape, generator=generator), x)
    model = Passes(lambda x: torch.tensor([[0.0, 1.0]]).repeat(len(x), 1))
    verdict = verify(model, x_adv, x, y=torch.zeros(n, dtype=torch.int64), ball=ball)
    assert verdict.confirmed.all()


def test_wrong_successes_of_a_search_are_detected(model: nn.Module, linear_data: Data) -> None:
    """Half of what the copy takes for fooled is not; clean accuracy is the model's own."""
    calls = 0

    def erring(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        logits = model(x)
        lies = (x[:, 0, 0, 0] * 255).round().long() % 2 == 0
        return torch.where(lies[:, None], logits.flip(dims=(1,)), logits)

    honest = run(model, linear_data, attacks=[FGSM])
    *_, result = evaluate_batches(
        lambda x: model(x), *linear_data, num_classes=2, attacks=[FGSM], device=CPU, fast=erring
    )
    assert calls
    assert result.clean.correct == honest.clean.correct
    assert result.attacks[0].unconfirmed > 3
    assert (
        result.attacks[0].correct >= honest.attacks[0].correct + result.attacks[0].unconfirmed - 3
    )
    assert "unconfirmed" in {flag.name for flag in result.flags}
    assert result.probes is not None
    assert result.probes.search_difference > 0.1


@pytest.mark.parametrize(("off", "most"), [(2e-6, 20), (2e-4, 85)])
def test_faster_copy_decides_only_clear_cases(off: float, most: int) -> None:
    """The first pixel's distance from 0.5 decides, and the copy is off: little, or too much."""
    asked = 0

    def logits(x: Tensor) -> Tensor:
        lead = x[:, 0, 0, 0] - 0.5
        return torch.stack([1 - lead, 1 + lead], dim=1)

    def exact(x: Tensor) -> Tensor:
        nonlocal asked
        asked += len(x)
        return logits(x)

    def copy(x: Tensor) -> Tensor:
        return logits(x) + torch.tensor([off, 0])

    lead = torch.linspace(-4e-3, 4e-3, 81)
    lead[40] = 2e-7  # of the second class; the copy takes it for the first
    images = (0.5 + lead).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
    *_, result = evaluate_batches(
        exact, images, (lead > 0).long(), num_classes=2, attacks=[], device=CPU, fast=copy
    )
    assert result.clean.correct == 81
    assert most - 10 < asked <= most


def test_classifier_is_attacked_through_its_faster_copy(
    make_classifier: Callable[..., Classifier],
) -> None:
    classifier = make_classifier(input_size=32)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(8) % 4
    result = run(classifier, (images, labels), num_classes=4, attacks=[FGSM], curve=0)
    assert result.probes is not None
    assert 0 < result.probes.search_difference < 1e-4
    assert result.clean.forwards == 8
    assert result.attacks[0].backwards == result.clean.correct


def test_bfloat16_searches_and_float32_decides(defended_float32: nn.Module, digits: object) -> None:
    images, labels = (values[:60] for values in digits[1])  # type: ignore[index]
    ball = ThreatModel(eps=24 / 255)
    attacks = [resolve_attack(name, ball) for name in ("fgsm", "pgd-10", "minimal")]
    seen: set[torch.dtype] = set()

    def forward(x: Tensor) -> Tensor:
        logits = defended_float32(x)
        seen.add(logits.dtype)
        return logits

    exact = run(forward, (images, labels), num_classes=10, attacks=attacks, precision="fp32")
    assert seen == {torch.float32}
    result = run(forward, (images, labels), num_classes=10, attacks=attacks, precision="bf16")
    assert seen == {torch.float32, torch.bfloat16}
    assert (exact.precision, result.precision) == ("fp32", "bf16 search, fp32 verified")
    assert result.to_dict()["precision"] == "bf16 search, fp32 verified"
    assert result.clean.correct == exact.clean.correct
    for one, other in zip(result.attacks, exact.attacks, strict=True):
        assert abs(one.correct - other.correct) <= 2
        assert one.unconfirmed == 0
    assert run(forward, (images, labels), num_classes=10).precision == "fp32"  # auto, on a CPU


def test_bfloat16_only_success_does_not_end_a_search(model: nn.Module, linear_data: Data) -> None:
    def forward(x: Tensor) -> Tensor:
        logits = model(x)
        return logits.flip(dims=(1,)) if torch.is_autocast_enabled("cpu") else logits

    exact = run(forward, linear_data, attacks=[PGD], precision="fp32")
    result = run(forward, linear_data, attacks=[PGD], precision="bf16")
    assert result.attacks[0].unconfirmed == 0
    assert result.attacks[0].correct >= exact.attacks[0].correct
    assert result.attacks[0].backwards > exact.attacks[0].backwards


@pytest.mark.parametrize("fits", [1, 13])
def test_out_of_memory_changes_nothing(
    model: nn.Module, linear_data: Data, fits: int, tmp_path: Path
) -> None:
    most = 0

    def small(x: Tensor) -> Tensor:
        nonlocal most
        if len(x) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        most = max(most, len(x))
        return model(x)

    attacks = [FGSM, PGD]
    whole = run(model, linear_data, attacks=attacks, curve=20)
    assert (
        run(small, linear_data, attacks=attacks, curve=20).to_dict()["curve"]
        == (whole.to_dict()["curve"])
    )
    assert run(small, linear_data, attacks=attacks) == run(model, linear_data, attacks=attacks)
    assert most > fits // 2

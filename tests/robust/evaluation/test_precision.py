"""What an evaluation searches in, and what bfloat16 may miss."""

import os
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robust.attack_registry import REGISTRY
from robust.attacks import AttackSettings as Attack
from robust.attacks import resolve_attack
from robust.checkpoint import load_checkpoint
from robust.classifier import Classifier
from robust.datasets import load_dataset
from robust.evaluation import evaluate_batches, precision
from robust.evaluation.precision import choose_precision
from robust.inference import InferenceClassifier, for_inference
from robust.packed import Packed
from robust.threat_model import ThreatModel
from tests.support.onnx_file import write_onnx

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
Data = tuple[Tensor, Tensor]
PASSES = 10**6


@pytest.fixture
def fast(make_classifier: Callable[..., Classifier]) -> InferenceClassifier:
    """One whose likeliest class leads by far more than bfloat16 is off, as a trained one's does."""
    classifier = make_classifier(input_size=32)
    with torch.no_grad():
        classifier.net.fc.bias[0] += 2
    return for_inference(classifier)


@pytest.fixture
def nothing_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are never packed."""
    monkeypatch.setattr(precision, "packed_if_faster", lambda model, other, dtype=None: other)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, nothing_packed: None) -> Callable[[float, float], None]:
    """Makes a pass of float32 and one of bfloat16 take so many seconds, whatever they take."""

    def set_seconds(fp32: float, bf16: float) -> None:
        def times() -> Iterator[float]:
            for seconds in (9.0, 9.0, bf16, fp32):  # the first pass of each prepares kernels
                yield from (0.0, seconds)

        ticks = times()
        monkeypatch.setattr("robust.agreement.time.process_time", lambda: next(ticks))

    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    return set_seconds


def images(n: int = 8) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(n) % 4


def test_auto_uses_bfloat16_if_faster(
    fast: InferenceClassifier, clock: Callable[[float, float], None]
) -> None:
    clock(0.3, 0.1)
    chosen, model = choose_precision("auto", fast, *images(), passes=PASSES)
    assert str(chosen) == "bf16 search, fp32 verified"
    assert chosen.reason.startswith("bfloat16 is 3.0 times as fast as float32 on 4 images, and 9")
    assert isinstance(model, InferenceClassifier)
    assert model.classifier.net.layer1[0].conv1.weight.dtype == torch.bfloat16

    clock(0.11, 0.1)
    chosen, model = choose_precision("auto", fast, *images(), passes=PASSES)
    assert (str(chosen), model) == ("fp32", fast)
    expected = "bfloat16 is 1.1 times as fast as float32 on 4 images, below the limit of 1.2"
    assert chosen.reason == expected


def test_auto_uses_float32_if_bfloat16_disagrees(
    fast: InferenceClassifier,
    clock: Callable[[float, float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock(0.3, 0.1)
    monkeypatch.setattr(precision, "in_bf16", lambda model, device: lambda x: 1.1 * model(x))
    chosen, model = choose_precision("auto", fast, *images(), passes=PASSES)
    assert (str(chosen), model) == ("fp32", fast)
    assert "of the likeliest class's median lead, above the limit of 2%" in chosen.reason

    def slanted(model: Callable[[Tensor], Tensor], device: torch.device) -> Callable[..., Tensor]:
        """The same logits, with a gradient of the opposite sign."""
        return lambda x: 2 * model(x).detach() - model(x)

    clock(0.3, 0.1)
    monkeypatch.setattr(precision, "in_bf16", slanted)
    chosen, model = choose_precision("auto", fast, *images(), passes=PASSES)
    assert (str(chosen), model) == ("fp32", fast)
    assert chosen.reason == "0.0% of the gradient's signs agree, below the limit of 90%"


def test_error_is_measured_relative_to_the_margin(
    fast: InferenceClassifier,
    clock: Callable[[float, float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error of 0.2, small beside logits of 1,000, hides a lead of 2."""
    with torch.no_grad():
        fast.classifier.net.fc.bias += 1000
    clock(0.3, 0.1)
    error = torch.tensor([0, 0.2, 0, 0])
    monkeypatch.setattr(precision, "in_bf16", lambda model, device: lambda x: model(x) + error)
    chosen, model = choose_precision("auto", fast, *images(), passes=PASSES)
    assert (str(chosen), model) == ("fp32", fast)
    assert "of the likeliest class's median lead, above the limit of 2%" in chosen.reason


def test_onnx_file_stays_in_float32(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    write_onnx(tmp_path / "theirs.onnx")
    fast = for_inference(load_checkpoint(tmp_path / "theirs.onnx").classifier)
    for asked in ("bf16", "auto"):
        chosen, model = choose_precision(asked, fast, *images(), passes=PASSES)  # type: ignore[arg-type]
        assert (str(chosen), model) == ("fp32", fast)
        assert chosen.reason == "only torch modules can run in bfloat16"


class Brightness(nn.Module):
    """The first of two classes leads by the mean of an image's pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(precision.MIN_PARAMETERS))

    def forward(self, x: Tensor) -> Tensor:
        lead = x.mean(dim=(1, 2, 3))
        return torch.stack([lead, torch.zeros_like(lead)], dim=1)


@pytest.mark.parametrize(("n", "text"), [(32, "bf16 search, fp32 verified"), (6, "fp32")])
def test_bfloat16_is_not_refused_because_of_the_first_images(
    n: int,
    text: str,
    clock: Callable[[float, float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error of 0.005 is large on four dark images, where no class leads, and on two more."""
    clock(0.3, 0.1)
    error = torch.tensor([0.005, 0])
    monkeypatch.setattr(precision, "in_bf16", lambda model, device: lambda x: model(x) + error)
    x = torch.ones(n, 3, 8, 8)
    x[:4] = 0.01
    chosen, _ = choose_precision("auto", Brightness(), x, torch.zeros(n).long(), passes=PASSES)
    assert str(chosen) == text


@pytest.mark.parametrize(
    ("why", "passes", "native"),
    [
        ("this processor has no instructions for bfloat16", PASSES, False),
        ("too few passes to try bfloat16: 100, below the limit of 250", 100, True),
    ],
)
@pytest.mark.usefixtures("nothing_packed")
def test_auto_says_why_it_does_not_try(
    fast: InferenceClassifier, why: str, passes: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: native)
    chosen, model = choose_precision("auto", fast, *images(), passes=passes)
    assert (str(chosen), chosen.reason, model) == ("fp32", why, fast)


def test_weights_are_packed_in_float32_where_there_are_passes_enough(
    fast: InferenceClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    monkeypatch.setattr("robust.agreement.time.process_time", cycle([0.0, 1.0]).__next__)
    x, y = images()
    chosen, model = choose_precision("auto", fast, x, y, passes=250)
    assert str(chosen) == "fp32"
    assert isinstance(model, Packed)
    torch.testing.assert_close(model(x), fast(x), rtol=0, atol=1e-5 * float(fast(x).abs().max()))
    assert choose_precision("fp32", fast, x, y, passes=249)[1] is fast


class Scattered(nn.Module):
    """A product, which autocast computes in bfloat16, written to a tensor that is float32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        product = x[:, 0, 0, :4] @ self.weight
        return torch.zeros(len(x), 4).scatter(1, torch.arange(4).expand(len(x), 4), product)


class NoGradient(nn.Linear):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, 0, 0, :4])


@pytest.mark.parametrize(
    ("model", "why"),
    [(Scattered(), "scatter(): Expected self.dtype"), (NoGradient(4, 4), "element 0 of")],
)
def test_auto_stays_in_float32_where_the_comparison_fails(
    model: nn.Module, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    monkeypatch.setattr(precision, "MIN_PARAMETERS", 1)
    chosen, found = choose_precision("auto", model, *images(), passes=PASSES)
    assert (str(chosen), found) == ("fp32", model)
    assert chosen.reason.startswith(f"the test of bfloat16 failed: {why}")


def test_running_out_of_memory_is_no_reason_for_float32(
    fast: InferenceClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(model: nn.Module, device: torch.device) -> Callable[..., Tensor]:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    monkeypatch.setattr(precision, "MIN_PARAMETERS", 1)
    monkeypatch.setattr(precision, "in_bf16", starved)
    with pytest.raises(torch.OutOfMemoryError):
        choose_precision("auto", fast, *images(), passes=PASSES)


def test_journal_is_resumed_in_its_own_precision(
    fast: InferenceClassifier, clock: Callable[[float, float], None], tmp_path: Path
) -> None:
    pixels, labels = images(4)

    def run(asked: precision.Precision) -> tuple[str, str]:
        *_, last = evaluate_batches(
            fast,
            (pixels * 255).to(torch.uint8),
            labels,
            num_classes=4,
            attacks=[resolve_attack("fgsm", ThreatModel())],
            device=CPU,
            precision=asked,
            journal=tmp_path / "journal",
        )
        return last.precision, last.precision_reason

    assert run("bf16") == ("bf16 search, fp32 verified", "as requested")
    # On its own it would be fp32: few passes.
    assert run("auto") == ("bf16 search, fp32 verified", "as the journal was begun")


def fooled_in(asked: precision.Precision, model: nn.Module, data: Data, attack: Attack) -> set[int]:
    """The images that `attack`, of several stages, fools in that precision."""
    *_, last = evaluate_batches(
        model, *data, num_classes=10, attacks=[attack], device=CPU, precision=asked
    )
    (item,) = last.attacks
    assert item.unconfirmed <= 1
    assert len(item.fooled) < last.clean.correct
    return set(item.fooled)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_autoattack_in_bfloat16_is_within_two_tenths_of_a_point(
    defended_float32: nn.Module, digits: tuple[Data, Data]
) -> None:
    data = tuple(torch.cat(parts)[:500] for parts in zip(*digits[::-1], strict=True))
    attack = resolve_attack("autoattack", ThreatModel(eps=24 / 255))
    exact, rough = (fooled_in(asked, defended_float32, data, attack) for asked in ("fp32", "bf16"))
    assert abs(len(exact) - len(rough)) <= 0.002 * 500
    assert len(exact) > 50


@pytest.mark.slow
@pytest.mark.timeout(10**5)
@pytest.mark.parametrize(
    "stages", [("pgd-20",), REGISTRY["audit"].stages, REGISTRY["autoattack"].stages]
)
def test_both_precisions_fool_the_same_images_except_one(
    stages: tuple[str, ...],
) -> None:
    if "ROBUST_TEST_SET" not in os.environ:
        pytest.skip("ROBUST_TEST_SET names no file of CIFAR-10's test images")
    loaded = load_checkpoint(ROOT / "models" / "robust_model.pt")
    dataset = load_dataset(os.environ["ROBUST_TEST_SET"], size=32)
    data = dataset.images[:100], dataset.labels[:100]
    attack = resolve_attack("autoattack", ThreatModel(eps=8 / 255), stages=stages)
    exact, rough = (fooled_in(p, loaded.classifier, data, attack) for p in ("fp32", "bf16"))
    assert len(exact ^ rough) <= 1
    assert len(exact) > 10


def test_bfloat16_misses_at_most_two_images_of_two_hundred(
    defended_float32: nn.Module,
    digits: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    short: Callable[[ThreatModel], Attack],
) -> None:
    found = {}
    for asked in ("fp32", "bf16"):
        *_, found[asked] = evaluate_batches(
            defended_float32,
            *digits[1],
            num_classes=10,
            attacks=[short(ThreatModel(eps=24 / 255))],
            device=CPU,
            precision=asked,  # type: ignore[arg-type]
        )
    one, other = found["fp32"], found["bf16"]
    assert other.clean.correct == one.clean.correct
    assert abs(other.attacks[0].correct - one.attacks[0].correct) <= 2
    assert 20 < one.attacks[0].correct < one.clean.correct - 20
    assert other.attacks[0].unconfirmed == 0

"""What is counted, on models whose answers are known."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from robust.attacks import AttackSettings, resolve_attack
from robust.classifier import Architecture, Classifier
from robust.evaluation import Accuracy, Evaluation, evaluate, evaluate_batches
from robust.evaluation.precision import full_float32
from robust.evaluation.run import shuffled
from robust.threat_model import ThreatModel

CPU = torch.device("cpu")
BALL = ThreatModel(eps=8 / 255)
FGSM, PGD = resolve_attack("fgsm", BALL), resolve_attack("pgd-5", BALL)
Data = tuple[Tensor, Tensor]
Short = Callable[[ThreatModel], AttackSettings]


def by_hand(model: nn.Module, data: Data) -> tuple[Tensor, Tensor]:
    """Which images are right, and which stay so at the worst point of the linf ball."""
    images, labels = data
    margin = model.margin(images.float() / 255) * (2 * labels - 1)
    return margin > 0, margin - 8 / 255 * model.w.abs().sum() > 0


def counts(result: Evaluation) -> list[object]:
    return [
        (item.correct, item.n, item.per_class, item.confusion) for item in result.accuracies
    ] + [result.worst_correct, result.curve]


def test_counts_are_those_of_the_known_model(model: nn.Module, linear_data: Data) -> None:
    labels = linear_data[1]
    right, robust = by_hand(model, linear_data)
    assert 0 < int(robust.sum()) < int(right.sum()) < 40
    result = evaluate(
        model, *linear_data, num_classes=2, attacks=[FGSM, PGD], device=CPU, batch_size=7
    )
    assert (result.n, result.total, result.done, result.stage) == (40, 40, 1.0, "")
    assert result.clean.correct == int(right.sum())
    assert [item.correct for item in result.attacks] == [int(robust.sum())] * 2
    assert result.worst_correct == int(robust.sum())
    for item, survives in ((result.clean, right), (result.attacks[0], robust)):
        assert item.per_class == tuple(
            (int(survives[labels == k].sum()), int((labels == k).sum())) for k in (0, 1)
        )
        # Two classes: what is not right is seen as the other.
        assert [row[k] for k, row in enumerate(item.confusion)] == [c for c, _ in item.per_class]
        assert [sum(row) for row in item.confusion] == [n for _, n in item.per_class]
    assert result.accuracy("clean") == result.clean.correct / 40
    assert result.accuracy("pgd-5") == int(robust.sum()) / 40
    with pytest.raises(KeyError):
        result.accuracy("square")


def test_accuracy_by_a_label_of_two_attacks_is_refused(model: nn.Module, linear_data: Data) -> None:
    smaller = resolve_attack("fgsm", ThreatModel(eps=4 / 255))
    result = evaluate(model, *linear_data, num_classes=2, attacks=[FGSM, smaller], device=CPU)
    assert result.attacks[0].value != result.attacks[1].value
    with pytest.raises(ValueError, match=r"got fgsm of 2 \(linf 8/255, linf 4/255\); take one of"):
        result.accuracy("fgsm")
    assert result.accuracy("clean") == result.clean.value


def test_passes_are_counted(model: nn.Module, linear_data: Data) -> None:
    right, robust = by_hand(model, linear_data)
    probing, n = 40 + 8 + 16 + 3 * 8, 40  # logits, gradients, twice, and normalized
    model.images = 0
    result = evaluate(model, *linear_data, num_classes=2, attacks=[FGSM], device=CPU)
    # The gradient at every image that is right, the step that follows, and each success once more.
    fooled = int((right & ~robust).sum())
    assert model.images == probing + 2 * int(right.sum()) + fooled
    (single,) = result.attacks
    assert (single.forwards, single.backwards) == (2 * int(right.sum()), int(right.sum()))
    assert result.clean.forwards == n
    assert single.distances is not None
    assert 0 < single.distances.least <= single.distances.most <= 8 / 255 + 1e-6


def test_wrong_images_are_not_attacked(model: nn.Module, linear_data: Data) -> None:
    images = linear_data[0]
    wrong = (model.margin(images.float() / 255) < 0).long()
    result = evaluate(model, images, wrong, num_classes=2, attacks=[PGD], device=CPU)
    assert result.clean.correct == result.attacks[0].correct == 0
    assert result.attacks[0].forwards == result.attacks[0].backwards == 0
    assert result.attacks[0].distances is None


@pytest.mark.parametrize("names", [("fgsm", "pgd-5"), ("pgd-5",), ("autoattack", "pgd-5"), ()])
def test_partial_results_cover_the_first_images(
    model: nn.Module, linear_data: Data, short: Short, names: tuple[str, ...]
) -> None:
    attacks = [short(BALL) if n == "autoattack" else resolve_attack(n, BALL) for n in names]
    order = shuffled(*linear_data)
    right, robust = (values[order] for values in by_hand(model, linear_data))
    parts = list(
        evaluate_batches(
            model, *linear_data, num_classes=2, attacks=attacks, device=CPU, batch_size=9, curve=12
        )
    )
    for before, after in pairwise(parts):
        assert before.done <= after.done
        for old, new in zip(before.accuracies, after.accuracies, strict=True):
            assert old.n <= new.n
    for part in parts:
        assert part.clean.correct == int(right[: part.clean.n].sum())
        for item in part.attacks[-1:]:  # of one stage, so that what is through stays as it is
            assert item.correct == int(robust[: item.n].sum())
            assert item.n in (0, 9, 18, 27, 36, 40)
        json.dumps(part.to_dict(), allow_nan=False)
    assert len({part.clean.n for part in parts}) >= 3
    last = parts[-1]
    assert {item.n for item in last.accuracies} == {last.n} == {40}
    assert (last.done, last.stage) == (1.0, "")
    assert all(part.flags == () for part in parts[:-1])


def test_worst_case_is_the_intersection(model: nn.Module, linear_data: Data) -> None:
    right, _ = by_hand(model, linear_data)
    # Nothing but a random start: what it fools is up to the seed and the image.
    ball = ThreatModel(eps=0.3)
    attacks = [resolve_attack("pgd-1", ball, alpha=0.0, seed=seed) for seed in (1, 2)]
    x, y = linear_data[0].float() / 255, linear_data[1]
    first, second = (right & ~attack.run(model, x, y).success for attack in attacks)
    result = evaluate(model, *linear_data, num_classes=2, attacks=attacks, device=CPU)
    assert [item.correct for item in result.attacks] == [int(first.sum()), int(second.sum())]
    assert result.worst_correct == int((first & second).sum())
    assert result.worst_correct < min(int(first.sum()), int(second.sum()))


def test_each_autoattack_stage_gets_the_remaining_images(
    defended: nn.Module, digits: tuple[Data, Data], short: Short
) -> None:
    images, labels = digits[1][0][:40], digits[1][1][:40]

    def run(eps: float) -> Accuracy:
        attack = short(ThreatModel(eps=eps))
        result = evaluate(defended, images, labels, num_classes=10, attacks=[attack], device=CPU)
        return result.attacks[0]

    strong = run(24 / 255)
    left = sum(right for right, _ in run(0.0).per_class)
    names = ["apgd-ce-5", "apgd-t-5", "fab-t-5", "square-30"]
    assert [stage.attack for stage in strong.stages] == names
    for stage in strong.stages:
        assert stage.attacked == left
        assert stage.correct <= left
        left = stage.correct
    assert strong.correct == left
    # An image that falls to the first stage is spared the others.
    weak = run(128 / 255)
    assert weak.correct == 0
    assert weak.stages[-1].attacked == 0
    assert weak.forwards + weak.backwards < (strong.forwards + strong.backwards) / 4


def test_minimal_reports_the_range_of_distances(model: nn.Module, linear_data: Data) -> None:
    right, robust = by_hand(model, linear_data)
    attack = resolve_attack("minimal", BALL)
    result = evaluate(model, *linear_data, num_classes=2, attacks=[attack], device=CPU)
    (item,) = result.attacks
    margin = model.margin(linear_data[0].float() / 255).abs()[right & ~robust].detach()
    exact = margin / model.w.detach().abs().sum()  # the smallest linf eps of a linear model
    assert item.correct == int(robust.sum())
    assert item.distances is not None
    assert item.distances.least == pytest.approx(float(exact.min()), rel=0.02, abs=8 / 255 / 1000)
    assert item.distances.most == pytest.approx(float(exact.max()), rel=0.02)


def test_neither_batch_size_nor_order_matters(
    defended: nn.Module, digits: tuple[Data, Data]
) -> None:
    images, labels = digits[1][0][:60], digits[1][1][:60]
    ball = ThreatModel(eps=24 / 255)
    attacks = [resolve_attack(name, ball) for name in ("fgsm", "pgd-5")]
    attacks.append(resolve_attack("square", ball, steps=20))

    def run(order: Tensor, batch_size: int) -> Evaluation:
        return evaluate(
            defended,
            images[order],
            labels[order],
            num_classes=10,
            attacks=attacks,
            device=CPU,
            batch_size=batch_size,
            curve=30,
        )

    whole = run(torch.arange(60), 60)
    assert 0 < whole.worst_correct < whole.clean.correct < 60
    for seed, batch_size in ((1, 7), (2, 60), (3, 25)):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        other = run(order, batch_size)
        assert counts(other) == counts(whole)
        # Square's passes do differ: it guesses ahead where a batch has room.
        for one, same in zip(other.attacks[:2], whole.attacks[:2], strict=True):
            assert one.forwards == same.forwards


def test_duplicate_images_are_allowed(model: nn.Module, linear_data: Data) -> None:
    once = evaluate(model, *linear_data, num_classes=2, attacks=[PGD], device=CPU)
    images, labels = linear_data[0].repeat(2, 1, 1, 1), linear_data[1].repeat(2)
    twice = evaluate(model, images, labels, num_classes=2, attacks=[PGD], device=CPU)
    assert twice.worst_correct == 2 * once.worst_correct


def test_without_attacks_only_clean_accuracy(model: nn.Module, linear_data: Data) -> None:
    result = evaluate(model, *linear_data, num_classes=2, attacks=[], device=CPU, curve=9)
    assert result.attacks == result.curve == ()
    assert result.worst_correct == result.clean.correct


def test_to_dict_is_json(model: nn.Module, linear_data: Data) -> None:
    model.forward = lambda x: torch.cat([type(model).forward(model, x), x[:, :1, 0, 0] - 9], dim=1)  # type: ignore[method-assign]
    result = evaluate(model, *linear_data, num_classes=3, attacks=[PGD], device=CPU, curve=20)
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    clean, pgd = values["results"]
    assert clean["attack"] == "clean"
    assert clean["per_class"][2] is None
    assert (pgd["attack"], pgd["norm"], pgd["eps_text"]) == ("pgd-5", "linf", "8/255")
    assert pgd["interval"][0] < pgd["accuracy"] < pgd["interval"][1]
    assert values["worst_case"]["correct"] == pgd["correct"]
    assert [point["eps_text"] for point in values["curve"]] == [
        *("0/255", "2/255", "4/255", "8/255", "16/255", "32/255", "64/255", "128/255")
    ]
    assert values["probes"]["n"] == 40
    summary = result.attacks[0].summary()
    assert summary["accuracy"] == pgd["accuracy"]
    assert "confusion" not in summary


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_unchanged_after_an_evaluation(
    model: nn.Module, linear_data: Data, fails: bool
) -> None:
    model.train()
    model.inner = nn.Dropout()
    model.inner.eval()
    calls, plain = 0, model.forward

    def forward(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        assert not model.training
        torch.rand(3)
        if fails and calls == 12:
            raise RuntimeError("broken")
        return plain(x)

    model.forward = forward  # type: ignore[method-assign]
    torch.backends.cuda.matmul.allow_tf32 = True
    parts = evaluate_batches(
        model, *linear_data, num_classes=2, attacks=[PGD], device=CPU, batch_size=9
    )
    before = torch.random.get_rng_state()

    def check() -> None:
        assert model.training
        assert not model.inner.training
        assert model.w.requires_grad
        assert model.w.grad is None
        assert torch.equal(torch.random.get_rng_state(), before)
        assert torch.backends.cuda.matmul.allow_tf32

    try:
        if fails:
            with pytest.raises(RuntimeError, match="broken"):
                list(parts)
        else:
            for _ in range(7):
                next(parts)
                check()
            parts.close()
        check()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_float32_is_exact_even_if_the_caller_allows_tf32() -> None:
    torch.set_float32_matmul_precision("medium")  # bfloat16 products, also on a CPU
    try:
        with full_float32():
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(0, 3, 4, 4, dtype=torch.uint8)}, "at least 1 image"),
        ({"images": torch.zeros(40, 3, 4, 4).double()}, "uint8 or float32 images .*float64"),
        ({"images": torch.full((40, 3, 4, 4), 1.25)}, r"in \[0, 1\], got values from 1.25 to 1.25"),
        ({"images": torch.zeros(3, 4, 4, dtype=torch.uint8)}, "expected uint8 or float32 images"),
        ({"labels": torch.zeros(39, dtype=torch.int64)}, r"labels int64 \(40,\)"),
        ({"labels": torch.zeros(40)}, r"labels int64 \(40,\), got torch.float32"),
        ({"labels": torch.full((40,), 2)}, "labels from 0 to 1, got 2 to 2"),
        ({"labels": torch.full((40,), -1)}, "labels from 0 to 1, got -1"),
        ({"batch_size": 0}, "batch size of at least 1, got 0"),
        ({"precision": "fp16"}, "precision out of auto, fp32, bf16, got 'fp16'"),
    ],
)
def test_rejects_invalid_arguments(
    model: nn.Module, linear_data: Data, change: dict[str, object], message: str
) -> None:
    values = {"images": linear_data[0], "labels": linear_data[1], "num_classes": 2} | change
    model.images = 0
    with pytest.raises(ValueError, match=message):
        evaluate(model, attacks=[], device=CPU, **values)  # type: ignore[arg-type]
    assert model.images == 0


def test_accuracy_of_no_images_is_nan() -> None:
    assert math.isnan(Accuracy(attack=None, correct=0, n=0, per_class=()).value)


def test_counts_by_class_are_read_back() -> None:
    counts = ((1, 2), (0, 1), (0, 0))
    bare = Accuracy(attack=None, correct=1, n=3, per_class=counts)  # as above 100 classes
    assert Accuracy.from_dict(bare.to_dict()) == bare
    whole = replace(bare, confusion=((1, 0, 1), (1, 0, 0), (0, 0, 0)))
    older = whole.to_dict()
    del older["per_class_counts"]
    assert Accuracy.from_dict(older) == whole


def test_batch_size_changes_results_only_by_rounding() -> None:
    """Passes of another size round otherwise, so an attack may end elsewhere near the boundary.

    What may differ: distances in the last digits, and an image that falls at the very edge. Every
    success is checked on the exact model either way.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = Classifier(Architecture(arch="resnet18", input_size=8, num_classes=3)).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (17, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = classifier(images.float() / 255).argmax(dim=1)

    def found(batch_size: int) -> Accuracy:
        *_, last = evaluate_batches(
            classifier,
            images,
            labels,
            num_classes=3,
            attacks=[resolve_attack("fab-t-3", ThreatModel(norm="l2", eps=2.0))],
            device=CPU,
            batch_size=batch_size,
        )
        assert last.clean.correct == 17
        return last.attacks[0]

    whole, parts = found(17), found(6)
    assert abs(parts.correct - whole.correct) <= 1
    assert whole.unconfirmed == parts.unconfirmed == 0
    assert whole.distances is not None
    assert parts.distances is not None
    assert parts.distances.median == pytest.approx(whole.distances.median, rel=0.01)


def test_float_images_are_scored_as_given(model: nn.Module, linear_data: Data) -> None:
    """Images moved across the boundary by less than half a gray level stay across it."""
    x = linear_data[0].float() / 255
    margin = model.margin(x).detach()
    change = 1.001 * margin.abs() / model.w.detach().abs().sum()
    moved = x - (margin.sign() * change)[:, None, None, None] * model.w.detach().sign()
    subtle = change < 0.4 / 255
    assert 3 <= int(subtle.sum()) < 40
    data = (moved[subtle], (margin[subtle] > 0).long())
    as_given = evaluate(model, *data, num_classes=2, attacks=[], device=CPU)
    assert (as_given.clean.correct, as_given.image_dtype) == (0, "float32")
    rounded = ((data[0] * 255).round().to(torch.uint8), data[1])
    as_bytes = evaluate(model, *rounded, num_classes=2, attacks=[], device=CPU)
    assert as_bytes.clean.correct > 0
    assert as_bytes.image_dtype == "uint8"


@pytest.mark.parametrize("size", [(16, 16), (16, 20)])
def test_works_in_inference_mode_and_for_any_image_shape(size: tuple[int, int]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(Architecture(arch="resnet18", num_classes=3, input_size=16)).eval()
    generator = torch.Generator().manual_seed(0)
    data = (
        torch.randint(0, 256, (6, 3, *size), dtype=torch.uint8, generator=generator),
        torch.tensor([0, 1, 2, 0, 1, 2]),
    )
    ask = {"num_classes": 3, "attacks": [PGD], "device": CPU}
    outside = evaluate(model, *data, **ask)  # type: ignore[arg-type]
    with torch.inference_mode():
        inside = evaluate(model, *(part.clone() for part in data), **ask)  # type: ignore[arg-type]
    assert counts(inside) == counts(outside)

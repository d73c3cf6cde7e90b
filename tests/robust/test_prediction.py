from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robust.attacks import resolve_attack
from robust.classifier import Classifier
from robust.images import encode_png, to_float
from robust.prediction import (
    AttackOutcome,
    amplify,
    attack_image,
    attack_images,
    find_class,
    predict,
    top_classes,
)
from robust.threat_model import ThreatModel
from tests.support.images import decode_png

CLASSES = ("cat", "dog", "frog", "ship")


@pytest.fixture(scope="module")
def model(make_classifier: Callable[..., Classifier]) -> Classifier:
    return make_classifier()


@pytest.fixture(scope="module")
def photo() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator)


def test_predict_is_the_softmax_of_eval_mode(model: Classifier, photo: Tensor) -> None:
    x = to_float(torch.stack([photo, photo.flip(2)]))
    with torch.inference_mode():
        expected = model(x).softmax(dim=1)
    model.train()
    try:
        probabilities = predict(model, x)
        assert model.training
    finally:
        model.eval()
    torch.testing.assert_close(probabilities, expected)
    assert not probabilities.is_inference()


def test_predict_rejects_invalid_logits() -> None:
    with pytest.raises(ValueError, match="expected finite logits"):
        predict(lambda x: torch.full((len(x), 2), torch.nan), torch.zeros(1, 3, 4, 4))


def test_top_classes() -> None:
    probabilities = torch.tensor([0.1, 0.6, 0.05, 0.25])
    first, second = top_classes(probabilities, CLASSES, 2)
    assert (first.label, first.index, second.label) == ("dog", 1, "ship")
    assert first.probability == pytest.approx(0.6)
    assert len(top_classes(probabilities, CLASSES, 100)) == 4


@pytest.mark.parametrize(
    ("name", "classes", "index"),
    [
        ("dog", CLASSES, 1),
        (" dog ", CLASSES, 1),
        ("3", CLASSES, 3),
        (0, CLASSES, 0),
        ("1", ("2", "1", "0"), 1),
        ("0", ("2", "1", "0"), 2),  # a name wins over an index
    ],
)
def test_find_class(name: str | int, classes: tuple[str, ...], index: int) -> None:
    assert find_class(name, classes) == index


@pytest.mark.parametrize("name", ["bird", "4", "-1", "1.0", "", "9" * 30, "²"])
def test_find_class_refuses(name: str) -> None:
    with pytest.raises(ValueError, match="expected class to be one of cat, dog, frog, ship"):
        find_class(name, CLASSES)


@pytest.mark.parametrize("attack", ["fgsm", "pgd-5"])
@pytest.mark.parametrize(
    "ball",
    [ThreatModel(eps=8 / 255), ThreatModel(eps=0.03), ThreatModel(norm="l2", eps=0.5)],
    ids=str,
)
def test_returned_image_is_the_one_that_was_scored(
    model: Classifier, photo: Tensor, attack: str, ball: ThreatModel
) -> None:
    outcome = attack_image(model, photo, settings=resolve_attack(attack, ball))
    decoded = decode_png(encode_png(outcome.image))
    torch.testing.assert_close(outcome.after, predict(model, to_float(decoded)[None])[0])
    torch.testing.assert_close(outcome.before, predict(model, to_float(photo)[None])[0])
    assert outcome.label == int(outcome.before.argmax())
    assert outcome.success == (int(outcome.after.argmax()) != outcome.label)
    assert not outcome.already_wrong
    levels = decoded.double() - photo.double()
    assert outcome.linf == levels.abs().max().item() / 255
    assert outcome.l2 == pytest.approx(levels.norm().item() / 255)
    assert (outcome.linf if ball.norm == "linf" else outcome.l2) <= ball.eps * (1 + 1e-6)
    assert outcome.linf > 0
    assert torch.equal(outcome.perturbation, amplify(decoded, photo))


def test_attack_lowers_the_margin(linear: nn.Module) -> None:
    photo = torch.full((3, 4, 4), 128, dtype=torch.uint8)
    settings = resolve_attack("fgsm", ThreatModel(eps=4 / 255))
    label = int(linear.margin(to_float(photo)[None]).item() > 0)
    outcome = attack_image(linear, photo, settings=settings)
    sign = 1 if label else -1
    before, after = (sign * linear.margin(to_float(i)[None]).item() for i in (photo, outcome.image))
    assert before - after == pytest.approx(4 / 255 * linear.w.abs().sum().item(), rel=1e-4)


def test_label_and_target(model: Classifier, photo: Tensor) -> None:
    before = predict(model, to_float(photo)[None])[0]
    first, second, *_, last = before.argsort(descending=True).tolist()
    settings = resolve_attack("pgd", ThreatModel(eps=32 / 255))
    outcome = attack_image(model, photo, settings=settings, target=second)
    assert outcome.success
    assert int(outcome.after.argmax()) == second
    outcome = attack_image(model, photo, last, settings=settings)
    assert outcome.already_wrong
    assert outcome.label == last
    with pytest.raises(ValueError, match="target other than the label"):
        attack_image(model, photo, settings=settings, target=first)


@pytest.mark.parametrize("index", [-1, 4])
def test_classes_out_of_range_are_refused(model: Classifier, photo: Tensor, index: int) -> None:
    settings = resolve_attack("fgsm", ThreatModel())
    with pytest.raises(ValueError, match="expected a label from 0 to 3"):
        attack_image(model, photo, index, settings=settings)
    with pytest.raises(ValueError, match="expected a target from 0 to 3"):
        attack_image(model, photo, settings=settings, target=index)


def test_image_must_be_8_bit(model: Classifier, photo: Tensor) -> None:
    with pytest.raises(ValueError, match="expected a uint8 image"):
        attack_image(model, to_float(photo), settings=resolve_attack("fgsm", ThreatModel()))


def test_seed_determines_the_result(model: Classifier, photo: Tensor) -> None:
    def image(seed: int) -> Tensor:
        settings = resolve_attack("pgd-2", ThreatModel(), alpha=0.001, seed=seed)
        return attack_image(model, photo, settings=settings).image

    assert torch.equal(image(1), image(1))
    assert not torch.equal(image(1), image(2))


def test_passes_are_counted(linear: nn.Module) -> None:
    photo = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    outcome = attack_image(linear, photo, settings=resolve_attack("pgd-7", ThreatModel()))
    assert (outcome.forwards, outcome.backwards) == (10, 7)
    assert linear.images == outcome.forwards


def test_amplify() -> None:
    x = torch.full((3, 1, 3), 100, dtype=torch.uint8)
    x_adv = x + torch.tensor([0, 4, 2], dtype=torch.uint8)
    assert amplify(x_adv, x)[0, 0].tolist() == [128, 255, 192]
    assert amplify(x, x_adv)[0, 0].tolist() == [128, 1, 64]
    assert amplify(x, x).unique().tolist() == [128]
    assert amplify(torch.full_like(x, 255), torch.zeros_like(x)).unique().tolist() == [255]


class Counted:
    """A model that counts the images it was asked about."""

    def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
        self.inner, self.images = inner, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.inner(x)


def test_a_search_in_bfloat16_is_scored_on_the_model_itself(
    model: Classifier, photo: Tensor
) -> None:
    settings = resolve_attack("pgd-3", ThreatModel())
    before = predict(model, to_float(photo)[None])
    exact, rough = Counted(model), Counted(lambda x: model(x) * 1.001)
    (found,) = attack_images(
        exact, photo[None], [int(before.argmax())], settings=settings, before=before, bf16=rough
    )
    assert (rough.images, exact.images) == (4, 1)  # the search, and what came of it
    expected = predict(model, to_float(found.image)[None])[0]
    torch.testing.assert_close(found.after, expected, rtol=0, atol=1e-5)
    assert found.success == (int(expected.argmax()) != found.label)


def sure(x: Tensor) -> Tensor:
    """Logits that say class 0 of every image, with a gradient."""
    mean = x.flatten(1).mean(dim=1)
    return torch.stack([10 + mean, mean.square()], dim=1)


def test_success_not_confirmed_in_float32_is_searched_again(photo: Tensor) -> None:
    settings = resolve_attack("pgd-3", ThreatModel())
    x = torch.stack([photo, photo.flip(2)])
    before = predict(sure, to_float(x))

    def run(bf16: Callable[[Tensor], Tensor] | None) -> list[AttackOutcome]:
        return attack_images(sure, x, [0, 0], settings=settings, before=before, bf16=bf16)

    rough = Counted(lambda x: -sure(x))  # fooled by every image, it says
    for found, exact in zip(run(rough), run(None), strict=True):
        assert not found.success
        assert torch.equal(found.image, exact.image)
        torch.testing.assert_close(found.after, exact.after)
        assert (found.backwards, found.forwards) == (6, 2 * exact.forwards - 1)
    assert rough.images == 8


def test_attack_ending_at_the_boundary_is_searched_in_float32(
    model: Classifier, photo: Tensor
) -> None:
    rough = Counted(model)
    before = predict(model, to_float(photo)[None])
    settings = resolve_attack("minimal", ThreatModel(), steps=1)
    attack_images(model, photo[None], [0], settings=settings, before=before, bf16=rough)
    assert rough.images == 0

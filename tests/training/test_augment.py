import math
from itertools import product

import pytest
import torch
from torch import Tensor

from training import augment as augment_module
from training.augment import augment, crop_and_flip, cutout, jitter, mixup, rotate
from training.recipe import Augmentation


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(32, 3, 16, 16, generator=seeded(1))


def fixed(value: float) -> object:
    return lambda x, reach, generator: torch.full((len(x), 1, 1, 1), value)


def test_all_off_changes_nothing(x: Tensor) -> None:
    off = Augmentation(crop_padding=0, flip=0)
    assert torch.equal(augment(x, off, seeded()), x)


def test_all_on_keeps_shape_and_range_and_follows_the_seed(x: Tensor) -> None:
    on = Augmentation(crop_padding=2, flip=0.5, rotation=10, jitter=0.3, cutout=4)
    first, again, other = (augment(x, on, seeded(seed)) for seed in (3, 3, 4))
    assert first.shape == x.shape
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_crop_and_flip_give_a_window_of_the_padded_image(x: Tensor) -> None:
    padded = torch.nn.functional.pad(x, (3,) * 4, mode="reflect")
    shifts = set()
    for image, border in zip(crop_and_flip(x, 3, 0.5, seeded()), padded, strict=True):
        found = []
        for top, left in product(range(7), range(7)):
            window = border[:, top : top + 16, left : left + 16]
            found += [(top, left, False)] * torch.equal(image, window)
            found += [(top, left, True)] * torch.equal(image, window.flip(2))
        assert len(found) == 1
        shifts.add(found[0])
    assert len(shifts) > 10  # drawn for each image


def test_flip_mirrors_all_or_none(x: Tensor) -> None:
    assert torch.equal(crop_and_flip(x, 0, 1.0, seeded()), x.flip(3))
    assert torch.equal(crop_and_flip(x, 0, 0.0, seeded()), x)


def test_rotation_by_90_degrees_is_exact(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment_module, "_uniform", fixed(math.pi / 2))
    turned = rotate(x, 90, seeded())
    assert min(
        (turned - x.rot90(k, dims=(2, 3))).abs().max().item() for k in (1, 3)
    ) == pytest.approx(0, abs=1e-5)


def test_jitter_scales_brightness_then_contrast_then_saturation(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment_module, "_uniform", fixed(0.0))
    assert torch.allclose(jitter(x, 0.5, seeded()), x, atol=1e-6)
    monkeypatch.setattr(augment_module, "_uniform", fixed(-1.0))
    assert jitter(x, 1.0, seeded()).abs().max() < 1e-6  # no brightness: black
    changes = iter((-0.4, -0.3, 0.2))
    monkeypatch.setattr(
        augment_module,
        "_uniform",
        lambda x, strength, generator: torch.full((len(x), 1, 1, 1), next(changes)),
    )
    luminance = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    expected = 0.6 * x
    mean = (expected * luminance).sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)
    expected = mean + 0.7 * (expected - mean)
    gray = (expected * luminance).sum(dim=1, keepdim=True)
    expected = gray + 1.2 * (expected - gray)
    assert torch.allclose(jitter(x, 0.5, seeded()), expected.clamp(0, 1), atol=1e-6)


def test_jitter_keeps_a_uniform_gray_image_uniform() -> None:
    gray = torch.full((8, 3, 4, 4), 0.5)
    changed = jitter(gray, 0.2, seeded())
    assert changed.flatten(1).std(dim=1).max() < 1e-6
    assert changed[:, 0, 0, 0].std() > 0.01


def test_cutout_sets_one_square_of_each_image_to_gray() -> None:
    x = torch.zeros(64, 3, 16, 16)
    masked = (cutout(x, 6, seeded()) == 0.5).all(dim=1)
    counts = masked.flatten(1).sum(dim=1)
    assert counts.max() == 36
    assert counts.min() >= 9  # a corner still has half of each side
    for mask in masked:
        rows, columns = mask.any(dim=1).sum(), mask.any(dim=0).sum()
        assert rows * columns == mask.sum()


def test_mixup_blends_images_and_targets_alike() -> None:
    x = torch.eye(8).view(8, 1, 1, 8).expand(8, 3, 4, 8).contiguous()
    targets = torch.eye(8)
    mixed, blended = mixup(x, targets, 1.0, seeded())
    assert torch.allclose(mixed[:, 0, 0], blended)
    assert torch.allclose(blended.sum(dim=1), torch.ones(8))
    assert len(blended.max(dim=1).values.unique()) > 3  # a share for each image


def test_mixup_weights_follow_beta() -> None:
    _, blended = mixup(torch.zeros(4000, 1, 1, 1), torch.eye(4000), 0.2, seeded())
    share = blended.diagonal()
    assert share.mean() == pytest.approx(0.5, abs=0.03)
    # Var Beta(a, a) = 1 / (4 (2a + 1))
    assert share.var() == pytest.approx(1 / (4 * 1.4), abs=0.01)

import pytest
import torch
from torch import Tensor

from robust.attacks.noise import image_keys, normal, uniform

N, COUNT = 40, 5000


@pytest.fixture
def x() -> Tensor:
    return torch.rand(N, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_numbers_are_uniform(x: Tensor) -> None:
    numbers = uniform(image_keys(x, 0), 0, COUNT)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, bins=100, min=0, max=1).double()
    expected = N * COUNT / 100
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert 50 < chi_squared < 160  # of 99 degrees of freedom


def test_numbers_are_uncorrelated(x: Tensor) -> None:
    """Between neighbours, streams, seeds and images: a correlation is below 4 / sqrt(count)."""
    keys = image_keys(x, 0)
    first = uniform(keys, 0, COUNT) - 0.5
    others = (
        uniform(keys, 1, COUNT),
        uniform(image_keys(x, 1), 0, COUNT),
        uniform(keys.roll(1), 0, COUNT),
        uniform(keys, 0, COUNT + 1)[:, 1:],
        uniform(keys, 2**32, COUNT),
    )
    for other in others:
        correlation = (first * (other - 0.5)).mean() * 12
        assert abs(float(correlation)) < 4 / (N * COUNT) ** 0.5


def test_normal_numbers_are_normal(x: Tensor) -> None:
    numbers = normal(image_keys(x, 0), 0, COUNT)
    assert bool(numbers.isfinite().all())
    assert abs(float(numbers.mean())) < 0.01
    assert float(numbers.std()) == pytest.approx(1, abs=0.01)
    within = (numbers.abs() < 1).float().mean()
    assert float(within) == pytest.approx(0.6827, abs=0.005)


def test_numbers_depend_on_the_image(x: Tensor) -> None:
    keys, order = image_keys(x, 3), torch.randperm(N, generator=torch.Generator().manual_seed(1))
    assert torch.equal(image_keys(x[order], 3), keys[order])
    assert torch.equal(torch.cat([image_keys(part, 3) for part in x.split(7)]), keys)
    stream = torch.arange(N)
    whole = uniform(keys, stream, 100)
    assert torch.equal(uniform(keys[order], stream[order], 100), whole[order])
    assert torch.equal(uniform(keys[5:6], 5, 40), whole[5:6, :40])


def test_the_smallest_change_changes_the_key(x: Tensor) -> None:
    keys = image_keys(x, 0)
    nudged = x.clone()
    nudged[:, 2, 3, 3] = torch.nextafter(nudged[:, 2, 3, 3], torch.tensor(2.0))
    swapped = x.clone()
    swapped[:, 0, 0, 0], swapped[:, 0, 0, 1] = x[:, 0, 0, 1], x[:, 0, 0, 0]
    every = torch.cat([keys, image_keys(x, 1), image_keys(nudged, 0), image_keys(swapped, 0)])
    assert len(set(every.tolist())) == 4 * N


def test_layout_does_not_matter(x: Tensor) -> None:
    assert torch.equal(image_keys(x.to(memory_format=torch.channels_last), 0), image_keys(x, 0))


@pytest.mark.gpu
def test_device_does_not_matter(x: Tensor) -> None:
    keys = image_keys(x, 0)
    assert torch.equal(image_keys(x.cuda(), 0).cpu(), keys)
    assert torch.equal(uniform(keys.cuda(), 4, COUNT).cpu(), uniform(keys, 4, COUNT))

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from robust.attacks import minimal
from robust.choices import Norm
from robust.geometry import distance
from robust.threat_model import ThreatModel


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_found_images_are_adversarial_at_the_reported_distance(
    curved: nn.Module, images: Tensor, norm: Norm
) -> None:
    y = curved(images).argmax(dim=1)
    eps = 0.006 if norm == "linf" else 0.06
    result = minimal(curved, images, y, threat_model=ThreatModel(norm=norm, eps=eps))
    assert 0 < int(result.success.sum())
    assert torch.equal(curved(result.x_adv).argmax(dim=1) != y, result.success)
    torch.testing.assert_close(result.logits, curved(result.x_adv))
    assert torch.equal(result.distance, distance(result.x_adv, images, norm))
    assert result.distance.max() <= eps + 1e-6


def test_larger_eps_loses_no_success_and_barely_raises_distances(
    curved: nn.Module, images: Tensor
) -> None:
    y = curved(images).argmax(dim=1)
    found = [
        minimal(curved, images, y, threat_model=ThreatModel(eps=eps))
        for eps in (0.003, 0.006, 0.012, 0.05)
    ]
    for smaller, larger in pairwise(found):
        assert bool((larger.success | ~smaller.success).all())
        both = smaller.success & larger.success
        assert bool((larger.distance[both] <= smaller.distance[both] * 1.02 + 2e-4).all())
    assert int(found[0].success.sum()) < int(found[-1].success.sum())


def test_an_image_wrong_from_the_start_is_at_distance_0(curved: nn.Module, images: Tensor) -> None:
    y = (curved(images).argmax(dim=1) + 1) % 10
    result = minimal(curved, images, y, threat_model=ThreatModel())
    assert bool(result.success.all())
    assert torch.equal(result.x_adv, images)
    assert result.forwards.tolist() == [1] * 12


def test_a_target_is_reached(curved: nn.Module, images: Tensor) -> None:
    y = curved(images).argmax(dim=1)
    target = (y + 1) % 10
    result = minimal(curved, images, y, threat_model=ThreatModel(eps=0.3), target=target)
    untargeted = minimal(curved, images, y, threat_model=ThreatModel(eps=0.3))
    assert bool(result.success.any())
    predicted = curved(result.x_adv).argmax(dim=1)
    assert torch.equal(predicted == target, result.success)
    assert float(result.distance[result.success].mean()) >= float(untargeted.distance.mean())


def test_more_restarts_lose_no_success(curved: nn.Module, images: Tensor) -> None:
    y = curved(images).argmax(dim=1)
    once, more = (
        minimal(curved, images, y, threat_model=ThreatModel(eps=0.01), steps=3, restarts=restarts)
        for restarts in (1, 4)
    )
    assert bool((more.success | ~once.success).all())
    assert not torch.equal(more.x_adv, once.x_adv)
    both = once.success
    assert bool((more.distance[both] <= once.distance[both]).all())

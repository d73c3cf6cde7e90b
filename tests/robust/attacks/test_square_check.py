"""Square check: cut short where gradients do better, and Square itself where they mislead."""

import pytest
import torch
from torch import Tensor, nn

from robust.attacks import resolve_attack, square
from robust.attacks.square_check import ASCENT, QUERIES
from robust.choices import Norm
from robust.threat_model import ThreatModel

EPS: dict[Norm, float] = {"linf": 0.02, "l2": 0.15}
norms = pytest.mark.parametrize("norm", list(EPS))


class Rounded(nn.Module):
    """The same model, but its gradient is 0: it sees pixels in steps of a hundredth."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model((100 * x).round() / 100)
        return logits


@norms
def test_check_stops_if_gradients_do_better(curved: nn.Module, images: Tensor, norm: Norm) -> None:
    y = curved(images).argmax(dim=1)
    attack = resolve_attack("square-check", ThreatModel(norm=norm, eps=EPS[norm] / 8))
    found = attack.run(curved, images, y)
    left = ~found.success
    assert int(left.sum()) >= 6
    assert found.backwards[left].unique().tolist() == [ASCENT]
    assert found.forwards[left].unique().tolist() == [ASCENT + QUERIES + 1]  # and the start


@norms
def test_masked_gradients_get_the_full_square_attack(
    curved: nn.Module, images: Tensor, norm: Norm
) -> None:
    model, y = Rounded(curved), curved(images).argmax(dim=1)
    ball = ThreatModel(norm=norm, eps=EPS[norm])
    attack = resolve_attack("square-check", ball, steps=150)
    found = attack.run(model, images, y, early_stop=True)
    alone = square(model, images, y, threat_model=ball, queries=150)
    assert 0 < int(alone.success.sum()) < 12
    wrong = model(images).argmax(dim=1) != y  # found by the first query, of the image as it is
    assert torch.equal(found.success, alone.success | wrong)
    assert torch.equal(found.x_adv[~wrong], alone.x_adv[~wrong])
    left = ~found.success
    # More only by speculation, once half of the images are done.
    assert ASCENT + 151 <= int(found.forwards[left].min())
    assert int(found.forwards[left].max()) < ASCENT + 170
    assert attack.cost == 2 * ASCENT + 151


@norms
def test_gradients_that_lead_nowhere_get_all_of_square(norm: Norm) -> None:
    """Any change lowers the margin, so that Square never comes up to the image itself."""
    images = torch.full((12, 3, 6, 6), 0.5)

    def model(x: Tensor) -> Tensor:
        changed = (x != 0.5).float().flatten(1).mean(dim=1) + 0 * x.flatten(1).sum(dim=1)
        return torch.stack([1 + changed, 0 * changed], dim=1)

    ball = ThreatModel(norm=norm, eps=EPS[norm])
    attack = resolve_attack("square-check", ball, steps=150)
    found = attack.run(model, images, torch.zeros(12, dtype=torch.int64))
    assert not found.success.any()
    assert found.forwards.unique().tolist() == [ASCENT + 151]

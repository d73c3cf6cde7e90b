"""How long an evaluation takes is told before it begins, and as it goes on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from robust.attacks import resolve_attack
from robust.commands.output import Progress
from robust.distributed import SINGLE, World
from robust.evaluation import evaluate_batches
from robust.evaluation.forecast import Forecast
from robust.threat_model import ThreatModel

BALL = ThreatModel(norm="linf", eps=8 / 255)


T = TypeVar("T")


def foretold(
    model: nn.Module, data: tuple[Tensor, Tensor], attack: str, world: World = SINGLE
) -> list[Forecast]:
    told: list[Forecast] = []
    results = evaluate_batches(
        model,
        *data,
        num_classes=2,
        attacks=[resolve_attack(attack, BALL)],
        device=torch.device("cpu"),
        batch_size=4,
        on_forecast=told.append,
        world=world,
    )
    next(results)
    results.close()
    return told


@pytest.mark.parametrize("attack", ["pgd-10", "square-30"])
def test_forecast_comes_before_the_first_attack(
    attack: str, model: nn.Module, linear_data: tuple[Tensor, Tensor]
) -> None:
    (told,) = foretold(model, linear_data, attack)
    n, cost = len(linear_data[0]), resolve_attack(attack, BALL).cost
    assert cost in (21, 31)
    assert (told.images, told.passes, told.worst) == (n, n * (cost + 2), n * (cost + 2))
    assert 0 < told.seconds == told.passes * told.seconds_per_pass


def test_forecast_is_updated_after_each_stage_for_the_remaining_images(
    model: nn.Module, linear_data: tuple[Tensor, Tensor]
) -> None:
    audit = resolve_attack("audit", BALL)
    told: list[Forecast] = []
    *_, result = evaluate_batches(
        model,
        *linear_data,
        num_classes=2,
        attacks=[audit],
        device=torch.device("cpu"),
        on_forecast=told.append,
    )
    first, *rest = told
    (item,) = result.attacks
    assert [forecast.stage for forecast in rest] == ["pma-10", "malt"]
    assert [forecast.images for forecast in rest] == [stage.correct for stage in item.stages[:2]]
    assert 0 < rest[0].images < item.stages[0].attacked
    # A sound model takes no more than was told, of which the full Square is no part.
    assert item.forwards + item.backwards <= first.passes
    spent_on_square = rest[1].images * (20 + 100 + 1 + 1)
    assert rest[1].passes == spent_on_square
    assert first.worst - first.passes == first.images * (5000 - 100)


@dataclass(frozen=True, kw_only=True)
class SecondOfTwo(World):
    """A process whose partner has the same precision."""

    rank: int = 1
    size: int = 2

    def gather(self, value: T) -> list[T]:
        return [value, value]


def test_each_process_speaks_of_its_own_images(
    model: nn.Module, linear_data: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = linear_data
    (told,) = foretold(model, (images[:31], labels[:31]), "pgd-10", world=SecondOfTwo())
    assert (told.images, told.processes) == (15, 2)
    Progress(100, title="evaluate", unit="%").show_forecast(replace(told, seconds_per_pass=1.0))
    expected = "note: 15 images (of one of 2 processes): at most 5 min 45 s (345 passes of 1 s); "
    assert capsys.readouterr().err.startswith(expected)


def test_forecast_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(100, title="evaluate", unit="%")
    progress.show_forecast(Forecast(images=100, passes=4200, worst=4200, seconds_per_pass=0.05))
    assert capsys.readouterr().err == (
        "note: 100 images: at most 3 min 30 s (4200 passes of 0.05 s); images fooled early "
        "take fewer\n"
    )
    progress.show_forecast(
        Forecast(images=40, passes=420, worst=4200, seconds_per_pass=0.05, stage="pma-10")
    )
    assert capsys.readouterr().err == (
        "note: 40 images remain after pma-10: at most 21.0 s more, or 3 min 30 s if gradients turn "
        "out to be masked (420 passes of 0.05 s); images fooled early take fewer\n"
    )
    short = Forecast(images=100, passes=300, worst=300, seconds_per_pass=0.001)
    progress.show_forecast(short)
    quiet = Progress(100, title="evaluate", unit="%", quiet=True)
    quiet.show_forecast(Forecast(images=100, passes=4200, worst=4200, seconds_per_pass=0.05))
    assert capsys.readouterr().err == ""

"""How far an evaluation is: shown at least every second, and written down as rarely as before."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from robust.attacks import AttackSettings, resolve_attack
from robust.evaluation import Evaluation, evaluate_batches
from robust.evaluation import stages as stages_module
from robust.evaluation.journal import Journal
from robust.threat_model import ThreatModel

Data = tuple[Tensor, Tensor]
PASS = 0.3  # seconds, by the test's own clock


class Clock:
    """Goes on by PASS before each pass of the model."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now += PASS


@pytest.fixture(autouse=True)
def unhurried() -> None:
    """The time that passes is that of the clock below."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stages_module, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


def followed(
    model: nn.Module,
    data: Data,
    clock: Clock,
    path: Path | None,
    batch: int = 8,
    names: tuple[str, ...] = ("fgsm", "pgd-100"),
) -> list[tuple[float, Evaluation]]:
    """Each result with the time that it came at, of an attack that no image gives way to."""
    images, labels = data
    ball = ThreatModel(norm="linf", eps=0.0)
    results = evaluate_batches(
        model,
        images,
        labels,
        num_classes=2,
        attacks=[resolve_attack(name, ball) for name in names],
        device=torch.device("cpu"),
        batch_size=batch,
        precision="fp32",
        journal=path,
        watch=clock.tick,
    )
    return [(clock.now, result) for result in results]


def test_progress_is_shown_at_least_every_second(
    model: nn.Module, linear_data: Data, clock: Clock
) -> None:
    shown = followed(model, linear_data, clock, None)
    times = [now for now, _ in shown]
    assert max(b - a for a, b in pairwise(times)) <= 1.0
    assert times[-1] - times[0] > 50
    done = [result.done for _, result in shown]
    assert done == sorted(done)
    # It moves each time, also while no image has finished, and no faster than the work.
    within = [
        result for _, result in shown if result.stage == "pgd-100" and not result.attacks[1].n
    ]
    assert len(within) > 20
    assert len({result.done for result in within}) == len(within)
    assert within[-1].done < 0.7


@pytest.mark.parametrize("name", ["apgd-t-1", "fab-t-1", "malt-1"])
def test_progress_is_shown_while_targets_are_chosen(
    model: nn.Module, linear_data: Data, clock: Clock, name: str
) -> None:
    """They need the clean logits of all images before the first query."""
    shown = followed(model, linear_data, clock, None, batch=2, names=(name,))
    assert max(b - a for a, b in pairwise(now for now, _ in shown)) <= 1.0
    done = [result.done for _, result in shown]
    assert done == sorted(done)


def test_progress_is_the_fraction_of_passes_done(
    model: nn.Module, linear_data: Data, clock: Clock
) -> None:
    shown = followed(model, linear_data, clock, None, batch=40)  # every pass is of all images
    begin, end = shown[0][0], shown[-1][0]
    for now, result in shown:
        assert result.done == pytest.approx((now - begin) / (end - begin), abs=0.05)


def test_a_result_so_far_can_be_printed(
    model: nn.Module, linear_data: Data, short: Callable[[ThreatModel], AttackSettings]
) -> None:
    """Each row is over the images of its own attack: later attacks have finished fewer."""
    ball = ThreatModel(eps=1 / 255)
    finished: set[tuple[int, int]] = set()
    for result in evaluate_batches(
        model,
        *linear_data,
        num_classes=2,
        attacks=[resolve_attack("fgsm", ball), short(ball)],
        device=torch.device("cpu"),
        batch_size=8,
    ):
        text = str(result)
        for item in result.accuracies:
            assert f" {item.correct}/{item.n} " in text
            assert all(f" {stage.correct}/40 " in text for stage in item.stages)
        finished.add((result.attacks[0].n, result.attacks[1].n))
    assert any(0 < later < first for first, later in finished)


def test_journal_is_written_only_when_images_finish(
    model: nn.Module,
    linear_data: Data,
    clock: Clock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[tuple[float, str, int]] = []
    write = Journal.write

    def noted(self: Journal, stage: str, rows: list[tuple[object, ...]], seconds: float) -> None:
        written.append((clock.now, stage, len(rows)))
        write(self, stage, rows, seconds)  # type: ignore[arg-type]

    monkeypatch.setattr(Journal, "write", noted)
    shown = followed(model, linear_data, clock, tmp_path / "journal")
    assert len(shown) > 3 * len(written)
    assert all(count > 0 for *_, count in written)
    late = [now for now, stage, count in written if "pgd-100" in stage and count < 8]
    assert all(b - a > 5 for a, b in pairwise(late))

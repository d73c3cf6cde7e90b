"""`--minutes`: epochs fitted into a time, with a fake clock."""

import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from robust.checkpoint import load_checkpoint
from robust.datasets import Dataset
from robust.distributed import SINGLE
from training import context, scoring
from training.budget import (
    USUAL_SCORE,
    Budget,
    Costs,
    Deadline,
    fit_epochs,
    process_age,
    with_epochs,
)
from training.monitor import Progress
from training.recipe import Phase, Recipe
from training.recipe_sources import load_recipe
from training.run import Stopped, train
from training.state import RunFolder, TrainingError
from training.step import Trainer

CPU = torch.device("cpu")


@dataclass
class Clock:
    """Seconds that pass only when something is done."""

    now: float = 0.0
    slowdown: float = 1.0
    step_seconds: tuple[float, ...] = (1.0, 3.0)  # of the phases clean and adversarial

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds * self.slowdown


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Steps, scores and the last score take the clock's time and do nothing else."""
    clock = Clock()

    def step(self: Trainer, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
        clock.spend(clock.step_seconds[options["phase"].is_adversarial])
        return torch.tensor(1.0)

    def score(*args: object, **options: object) -> dict[str, float]:
        clock.spend(4.0)
        return {"clean": 0.5, "fgsm": 0.4, "pgd": 0.3}

    def evaluate(model: object, images: Tensor, *args: object, **options: object) -> list[object]:
        clock.spend(0.5 * len(images))
        return [SimpleNamespace(accuracies=[], flags=())]

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(context, "score", score)
    monkeypatch.setattr(scoring, "evaluate_batches", evaluate)
    return clock


def epochs_of(out: Path) -> dict[str, int]:
    phases = load_checkpoint(out).sidecar.recipe["phases"]
    return {phase["name"]: phase["epochs"] for phase in phases}


def rates_of(recipe: Recipe, dataset: Dataset, **options: Any) -> list[Progress]:
    seen: list[Progress] = []
    train(recipe, dataset, device=CPU, observe=seen.append, **options)
    return [progress for progress in seen if progress.row is None]


def test_epochs_fill_the_time_in_the_proportions_of_the_recipe(
    tiny: Recipe, colors: Dataset, out: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """An epoch has 4 steps: 4 s and a score of about 3 s, or 12 s and one of about 3 s."""
    clock.now = 1000.0
    with caplog.at_level(logging.INFO):
        steps = rates_of(
            tiny, colors, out=out, deadline=Deadline(minutes=5, started=990.0, clock=clock)
        )
    clean, adversarial = epochs_of(out).values()
    assert abs(adversarial - 2 * clean) <= 2
    end = clock.now - 990.0
    assert 300 - 3 - 4 - 3 < end < 300  # not another step and a score, and a margin
    # The schedule is whole: as many steps as fitted, the last at almost no rate.
    fitted = sum(progress.phase.is_adversarial for progress in steps)
    assert len(steps) == 4 * clean + fitted
    assert adversarial == -(-fitted // 4)
    assert 0 < steps[-1].learning_rate < 0.01 * tiny.phases[1].learning_rate
    message = next(text for text in caplog.messages if text.startswith("--minutes 5: "))
    for part in (f"{clean} clean, ", "s have passed", "4 steps of 1.000 s (clean), 3.000 s"):
        assert part in message
    manifest = json.loads(RunFolder.of(out).manifest.read_text())
    assert manifest["minutes"] == {
        "given": 5,
        "epochs": {"clean": 1, "adversarial": 2},
        "fitted_steps": {},
    }
    assert {p["name"]: p["epochs"] for p in manifest["recipe"]["phases"]} == epochs_of(out)
    assert load_checkpoint(out).sidecar.recipe["minutes"] == manifest["minutes"]
    repeated = load_recipe(str(out.with_suffix(".json")))
    assert [phase.epochs for phase in repeated.phases] == [clean, adversarial]


@pytest.mark.parametrize("slowdown", [0.5, 2.0])
def test_later_phases_are_fitted_again_to_the_measured_time(
    slowdown: float,
    tiny: Recipe,
    colors: Dataset,
    out: Path,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The clean phase is faster or slower than timed; the adversarial one makes up for it."""

    def observe(progress: Progress) -> None:
        clock.slowdown = 1.0 if progress.phase.is_adversarial else slowdown

    with caplog.at_level(logging.INFO):
        deadline = Deadline(minutes=5, started=0.0, clock=clock)
        train(tiny, colors, out=out, device=CPU, deadline=deadline, observe=observe)
    planned = re.search(r"clean, (\d+) adversarial epochs", caplog.text)
    assert planned is not None
    assert (epochs_of(out)["adversarial"] > int(planned[1])) is (slowdown < 1)
    assert 300 - 10 < clock.now < 300


def test_slow_phase_is_shortened_and_finishes_its_schedule(
    tiny: Recipe, colors: Dataset, out: Path, clock: Clock
) -> None:
    def observe(progress: Progress) -> None:
        if progress.phase.is_adversarial:
            clock.slowdown = 3.0

    seen: list[Progress] = []
    deadline = Deadline(minutes=5, started=0.0, clock=clock)
    train(
        tiny,
        colors,
        out=out,
        device=CPU,
        deadline=deadline,
        observe=lambda p: (seen.append(p), observe(p))[1],  # type: ignore[func-returns-value]
    )
    assert clock.now < 300
    rows = [json.loads(line) for line in RunFolder.of(out).metrics.read_text().splitlines()]
    assert rows[-1]["learning_rate"] < 0.05 * tiny.phases[1].learning_rate
    assert rows[-1]["n"]  # scored, also where the epoch was cut short
    minutes = load_checkpoint(out).sidecar.recipe["minutes"]
    steps = [p for p in seen if p.phase.is_adversarial and p.row is None]
    assert minutes["fitted_steps"] == {"adversarial": len(steps)}
    assert epochs_of(out)["adversarial"] == -(-len(steps) // 4)


def test_too_few_minutes_are_rejected_with_the_minimum(
    tiny: Recipe, colors: Dataset, out: Path, clock: Clock
) -> None:
    with pytest.raises(TrainingError, match=r"for an epoch of each phase, got 0\.5") as refused:
        train(
            tiny,
            colors,
            out=out,
            device=CPU,
            deadline=Deadline(minutes=0.5, started=0.0, clock=clock),
        )
    assert not out.exists()
    assert not RunFolder.of(out).state.exists()
    found = re.search(r"expected at least ([\d.]+),", str(refused.value))
    assert found is not None
    clock.now = 0.0
    least = Deadline(minutes=float(found[1]), started=0.0, clock=clock)
    train(tiny, colors, out=out, device=CPU, deadline=least)
    assert epochs_of(out)["clean"] == 1
    assert 0.8 * 60 * least.minutes < clock.now < 60 * least.minutes


def test_resumed_run_keeps_its_fitted_epochs(
    tiny: Recipe, colors: Dataset, out: Path, clock: Clock
) -> None:
    calls = iter(range(100))
    deadline = Deadline(minutes=5, started=0.0, clock=clock)
    with pytest.raises(Stopped):
        train(
            tiny,
            colors,
            out=out,
            device=CPU,
            deadline=deadline,
            should_stop=lambda: next(calls) == 5,
        )
    before = json.loads(RunFolder.of(out).manifest.read_text())
    other = Deadline(minutes=6, started=0.0, clock=clock)
    with pytest.raises(TrainingError, match=r"--minutes it was started with, 5, got 6"):
        train(tiny, colors, out=out, device=CPU, resume=True, deadline=other)
    with pytest.raises(TrainingError, match="found another recipe"):
        train(replace(tiny, batch_size=8), colors, out=out, device=CPU, resume=True)
    train(tiny, colors, out=out, device=CPU, resume=True)
    assert epochs_of(out) == {p["name"]: p["epochs"] for p in before["recipe"]["phases"]}
    assert load_checkpoint(out).sidecar.recipe["minutes"] == before["minutes"]


def test_run_killed_before_its_first_save_is_fitted_again(
    tiny: Recipe, colors: Dataset, out: Path, clock: Clock
) -> None:
    def die(progress: Progress) -> None:
        raise RuntimeError("killed")

    deadline = Deadline(minutes=5, started=0.0, clock=clock)
    with pytest.raises(RuntimeError, match="killed"):
        train(tiny, colors, out=out, device=CPU, deadline=deadline, observe=die)
    assert "minutes" in json.loads(RunFolder.of(out).manifest.read_text())
    clock.now, clock.step_seconds = 0.0, (2.0, 9.0)  # as on a busier machine
    train(tiny, colors, out=out, device=CPU, resume=True, deadline=deadline)
    assert 270 < clock.now < 300


def test_extended_phase_shows_its_own_epochs(
    tiny: Recipe, colors: Dataset, out: Path, clock: Clock
) -> None:
    def observe(progress: Progress) -> None:
        seen.append(progress)
        clock.slowdown = 0.5

    seen: list[Progress] = []
    deadline = Deadline(minutes=5, started=0.0, clock=clock)
    train(tiny, colors, out=out, device=CPU, deadline=deadline, observe=observe)
    assert seen[-1].epoch == seen[-1].epochs > seen[0].epochs
    assert all(progress.epoch <= progress.epochs for progress in seen)


def test_timing_does_not_change_the_run(
    tiny: Recipe, colors: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With real steps: as long a run without `--minutes` ends with the same bits."""
    clock, step = Clock(), Trainer.step

    def timed_step(self: Trainer, *args: Any, **options: Any) -> Tensor:
        clock.spend(clock.step_seconds[options["phase"].is_adversarial])
        return step(self, *args, **options)

    monkeypatch.setattr(Trainer, "step", timed_step)
    monkeypatch.setattr(Budget, "fit_steps", lambda *args, total, **options: total)
    timed, plain = tmp_path / "timed.pt", tmp_path / "plain.pt"
    deadline = Deadline(minutes=0.7, started=0.0, clock=clock)
    train(tiny, colors, out=timed, device=CPU, deadline=deadline)
    assert epochs_of(timed) == {"clean": 1, "adversarial": 1}
    train(with_epochs(tiny, [1, 1]), colors, out=plain, device=CPU)
    assert timed.read_bytes() == plain.read_bytes()


def test_epochs_are_fitted_in_proportion_with_one_at_least() -> None:
    def within(total: float) -> Any:
        return lambda epochs: epochs[0] + 5 * epochs[1] + 10 * epochs[2] <= total

    assert fit_epochs([3, 26, 3], within(3 + 130 + 30)) == [3, 26, 3]
    assert fit_epochs([3, 26, 3], within(2 * 163)) == [6, 52, 6]
    assert fit_epochs([3, 26, 3], within(0)) == [1, 1, 1]
    assert fit_epochs([3, 0, 3], within(66)) == [6, 0, 6]
    few = fit_epochs([3, 26, 3], within(60))
    assert within(60)(few)
    assert few[1] >= 8


def test_slow_steps_shorten_the_phase() -> None:
    now = [0.0]
    recipe = Recipe(name="r", phases=(Phase(name="a", epochs=10), Phase(name="b", epochs=1)))
    costs = Costs(steps=10, step=(1.0, 1.0), score=2.0, finish=5.0)
    deadline = Deadline(minutes=2.5, started=0.0, clock=lambda: now[0])
    budget = Budget(recipe, deadline, costs, SINGLE)

    def after(seconds: float, done: int, total: int = 100) -> int:
        now[0] += seconds
        return budget.fit_steps(recipe, 0, done=done, total=total)

    assert [after(1.0, done) for done in range(1, 11)] == [100] * 10  # 100 s, and 19 s of scores
    now[0] += 30.0
    assert after(1.0, 11) < 100
    assert after(300.0, 12) == 13  # one more, to end the schedule


def test_fast_steps_restore_the_phase_and_extend_the_last() -> None:
    """Steps of 3 s, then of 0.5 s where 1 s was timed; 2 s for a score after 10 of them."""
    now = [0.0]
    recipe = Recipe(name="r", phases=(Phase(name="a", epochs=5), Phase(name="b", epochs=5)))
    costs = Costs(steps=10, step=(1.0, 1.0), score=2.0, finish=5.0)
    deadline = Deadline(minutes=2.2, started=0.0, clock=lambda: now[0])
    budget = Budget(recipe, deadline, costs, SINGLE)

    def after(seconds: float, done: int, phase: int) -> int:
        now[0] += seconds
        return budget.fit_steps(recipe, phase, done=done, total=50)

    assert [after(3.0, done, 0) for done in range(1, 11)][-1] < 50
    assert [after(0.5, done, 0) for done in range(11, 49)][-1] == 50  # never more than its own
    assert [after(0.5, done, 1) for done in range(1, 11)][-1] > 100


def test_new_phase_expects_scores_of_the_usual_length() -> None:
    """After a clean phase most images are fooled at the first step; then fewer are."""
    recipe = Recipe(name="r", phases=(Phase(name="a", epochs=1), Phase(name="b", epochs=5)))
    costs = Costs(steps=10, step=(1.0, 1.0), score=20.0, finish=5.0)
    deadline = Deadline(minutes=2, started=0.0, clock=lambda: 0.0)
    budget = Budget(recipe, deadline, costs, SINGLE)
    budget.fit_steps(recipe, 0, done=10, total=10)
    budget.scored(1.0)
    assert budget.score_seconds < 2
    budget.fit_steps(recipe, 1, done=1, total=50)
    assert budget.score_seconds == USUAL_SCORE * costs.score
    budget.scored(10.0)
    budget.fit_steps(recipe, 1, done=11, total=50)
    assert 10 < budget.score_seconds < USUAL_SCORE * costs.score


def test_steps_with_awp_are_expected_to_take_longer() -> None:
    """The first half of the steps takes 1 s each, the second 2 s, as timed."""
    now = [0.0]
    phase = Phase(name="a", epochs=10, awp=0.005, awp_from=0.5)
    recipe = Recipe(name="r", phases=(phase,))
    costs = Costs(steps=10, step=(1.5,), awp=(2.0,), score=0.0, finish=0.0)
    deadline = Deadline(minutes=153.5 / 60, started=0.0, clock=lambda: now[0])
    budget = Budget(recipe, deadline, costs, SINGLE)
    for done in range(1, 101):
        now[0] += 1.0 if done <= 50 else 2.0
        if done < 100:
            assert budget.fit_steps(recipe, 0, done=done, total=100) == 100


def test_slow_phase_leaves_later_phases_their_share() -> None:
    now = [0.0]
    recipe = Recipe(name="r", phases=(Phase(name="a", epochs=10), Phase(name="b", epochs=10)))
    costs = Costs(steps=10, step=(1.0, 1.0), score=0.0, finish=0.0)
    deadline = Deadline(minutes=203.5 / 60, started=0.0, clock=lambda: now[0])
    budget = Budget(recipe, deadline, costs, SINGLE)
    for done in range(1, 11):
        now[0] += 2.0
        fitted = budget.fit_steps(recipe, 0, done=done, total=100)
    assert 50 <= fitted <= 60  # half as many as planned, and an epoch of slack


def test_process_age_is_known() -> None:
    assert 0 < process_age() < 24 * 3600
    assert Deadline.of_this_process(1).elapsed == pytest.approx(process_age(), abs=0.5)

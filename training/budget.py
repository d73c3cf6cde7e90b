"""``--minutes``: fits the number of epochs to the available time.

Before the first epoch, a few steps of each phase and part of a scoring are timed. The epochs of all
phases are then fitted to the remaining time, in the recipe's proportions, and fitted again at the
start of each phase. A phase whose steps get slower is shortened, and the last phase is extended if
time is left. So the run ends in time, and its learning-rate schedule is complete.
"""

from __future__ import annotations

import logging
import math
import os
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robust.distributed import World
from training.recipe import Recipe
from training.state import TrainingError

logger = logging.getLogger(__name__)

MIN_MARGIN, MARGIN = 3.0, 0.01  # seconds, and share of the time, reserved for what is not timed
USUAL_SCORE = 0.7  # typical time of a scoring relative to one in which no image is fooled
SCORE_GROWTH = 1.15  # time of the next scoring relative to the last, as fewer images are fooled
WINDOW = 50  # clock readings over which the speed of a phase is measured
_imported = time.monotonic()


def process_age() -> float:
    """Seconds since this process started, or since this import if the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])  # from boot to the start of the process
        boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        return boot - ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError, IndexError):
        return time.monotonic() - _imported


@dataclass(frozen=True, kw_only=True)
class Deadline:
    """The time by which a run must have written its checkpoint."""

    minutes: float  # from the start of the process
    started: float  # that start, on `clock`
    clock: Callable[[], float] = time.monotonic  # seconds

    @classmethod
    def of_this_process(cls, minutes: float) -> Deadline:
        """`minutes` minutes from the start of this process."""
        return cls(minutes=minutes, started=time.monotonic() - process_age())

    @property
    def elapsed(self) -> float:
        """Seconds since the process started."""
        return self.clock() - self.started

    @property
    def margin(self) -> float:
        """Seconds reserved for everything that is not timed."""
        return max(MIN_MARGIN, MARGIN * 60 * self.minutes)

    @property
    def left(self) -> float:
        """Seconds until the deadline, minus the margin."""
        return 60 * self.minutes - self.elapsed - self.margin


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Measured times of the parts of a run on this machine, in seconds."""

    steps: int  # per epoch
    step: tuple[float, ...]  # seconds of a step, by phase; the mean if AWP begins late
    score: float  # seconds of a scoring in which no image is fooled, the slowest case
    finish: float  # seconds of the final scoring, on all held-out images, in the same case
    awp: tuple[float, ...] = ()  # time of a step with AWP relative to one without, by phase

    def work(self, recipe: Recipe, phase: int, done: int, total: int) -> float:
        """Seconds of the first `done` of `total` steps of a phase, as timed before the run."""
        item, ratio = recipe.phases[phase], self.awp[phase] if self.awp else 1.0
        perturbed = max(0, done - math.ceil(item.awp_from * total))
        mean = 1 + (ratio - 1) * (1 - item.awp_from)
        return self.step[phase] / mean * (done + (ratio - 1) * perturbed)

    def epochs(self, phase: int, count: int, score_every: int) -> float:
        """Seconds of `count` epochs of a phase, including their scores."""
        scores = math.ceil(count / score_every)
        return count * self.steps * self.step[phase] + scores * USUAL_SCORE * self.score


class Budget:
    """Decides how many epochs and steps still fit; rank 0's clock counts for all ranks."""

    def __init__(self, recipe: Recipe, deadline: Deadline, costs: Costs, world: World) -> None:
        self.recipe, self.deadline, self.costs, self.world = recipe, deadline, costs, world
        self.score_seconds = USUAL_SCORE * costs.score
        self._phase = -1  # the phase of the next fields
        self._done = self._steps = 0  # steps that are done, and that were fitted last
        self._work = 0.0  # seconds of the done steps, as timed before the run
        self._readings: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # `_work`, and the time
        self._scoring = 0.0  # seconds of all scores, which `_readings` exclude

    def to_dict(self) -> dict[str, Any]:
        """Its entry in the run's manifest, as JSON values."""
        epochs = {phase.name: phase.epochs for phase in self.recipe.phases}
        return {"given": self.deadline.minutes, "epochs": epochs, "fitted_steps": {}}

    def fit(self, recipe: Recipe, first: int = 0) -> Recipe:
        """`recipe` with as many epochs of the phases from `first` on as fit in the remaining time.

        For the first phase, raises TrainingError that names the minimum if not even one epoch of
        each phase fits.
        """
        return with_epochs(recipe, self.world.on_rank0(lambda: self._fit(recipe, first)))

    def _fit(self, recipe: Recipe, first: int) -> list[int]:
        wanted = [phase.epochs for phase in self.recipe.phases]
        wanted[:first] = [0] * first

        def seconds(epochs: Sequence[int]) -> float:
            every = recipe.score_every
            parts = (self.costs.epochs(k, n, every) for k, n in enumerate(epochs))
            return sum(parts) + self.costs.finish

        left, epochs = self.deadline.left, [min(1, n) for n in wanted]
        if first == 0 and seconds(epochs) > left:
            total = self.deadline.elapsed + seconds(epochs)
            minimum = max(total + MIN_MARGIN, total / (1 - MARGIN)) / 60
            raise TrainingError(
                f"--minutes: expected at least {math.ceil(10 * minimum + 0.5) / 10:.1f}, for an "
                f"epoch of each phase, got {self.deadline.minutes:g}; "
                f"{self._explain(recipe, first)}"
            )
        epochs = fit_epochs(wanted, lambda n: seconds(n) <= left)
        before = [phase.epochs for phase in recipe.phases]
        epochs[:first] = before[:first]
        if first == 0 or epochs != before:
            chosen = _listed(recipe, epochs, first)
            logger.info(
                "--minutes %g: %s; %s", self.deadline.minutes, chosen, self._explain(recipe, first)
            )
        return epochs

    def _explain(self, recipe: Recipe, first: int) -> str:
        costs, deadline = self.costs, self.deadline
        steps = ", ".join(
            f"{costs.step[k]:.3f} s ({phase.name})"
            for k, phase in enumerate(recipe.phases)
            if k >= first and phase.epochs
        )
        return (
            f"{deadline.elapsed:.0f} s have passed, {deadline.margin + costs.finish:.0f} s are "
            "reserved for the last score and the file; an epoch is "
            f"{costs.steps} steps of {steps}, and a score takes about "
            f"{USUAL_SCORE * costs.score:.1f} s"
        )

    def scored(self, seconds: float) -> None:
        """Record how long a scoring took."""
        self.score_seconds = SCORE_GROWTH * seconds
        self._scoring += seconds

    def fit_steps(self, recipe: Recipe, phase: int, *, done: int, total: int) -> int:
        """The number of steps for a phase of `total` steps, `done` of which are done.

        Fewer than `total` if time is short; more for the last phase if time is left.
        """
        return self.world.on_rank0(lambda: self._fit_steps(recipe, phase, done, total))

    def _fit_steps(self, recipe: Recipe, phase: int, done: int, total: int) -> int:
        costs, later = self.costs, recipe.phases[phase + 1 :]
        if self._phase != phase:
            self._phase, self._done, self._steps, self._work = phase, 0, total, 0.0
            self._readings.clear()
            # A score of the phase before may have been cheap: most of its images were fooled.
            self.score_seconds = max(self.score_seconds, USUAL_SCORE * costs.score)

        def work(first: int, last: int, steps: int) -> float:
            before, after = (costs.work(recipe, phase, n, steps) for n in (first, last))
            return after - before

        self._work += work(self._done, done, self._steps)
        self._done = done
        self._readings.append((self._work, self.deadline.clock() - self._scoring))
        (first, began), (last, now) = self._readings[0], self._readings[-1]
        self._steps = total
        if len(self._readings) < 3 or now <= began:
            return total
        pace = (now - began) / (last - first)
        slowdown = max(1.0, pace)
        # Later phases shrink in proportion, by one epoch more so that a small delay costs no steps.
        other = sum(
            costs.epochs(k, max(1, math.ceil(item.epochs / slowdown) - 1), recipe.score_every)
            for k, item in enumerate(later, phase + 1)
            if item.epochs
        )
        left = self.deadline.left - slowdown * (other + costs.finish)
        every = costs.steps * recipe.score_every

        def seconds(steps: int) -> float:
            """Of that many more steps, with a score after each `every` and at the end."""
            return pace * work(done, done + steps, done + steps) + self._scores(done, steps, every)

        most = math.floor(max(0.0, left) / (pace * work(0, 1, total)))
        if any(item.epochs for item in later):
            most = min(most, total - done)
        self._steps = done + max(1, bisect_right(range(1, most + 1), left, key=seconds))
        return self._steps

    def _scores(self, done: int, steps: int, every: int) -> float:
        """Seconds of all further scorings, including one due now."""
        return self.score_seconds * (math.ceil((done + steps) / every) - (done - 1) // every)


def fit_epochs(wanted: Sequence[int], fits: Callable[[Sequence[int]], bool]) -> list[int]:
    """Maximum epochs per phase that fit, in proportion to `wanted` and at least one each.

    A phase with 0 in `wanted` gets 0.
    """
    epochs = [min(1, n) for n in wanted]
    phases = [k for k, n in enumerate(wanted) if n]

    def with_one_more(k: int) -> list[int]:
        return [n + (i == k) for i, n in enumerate(epochs)]

    def behind() -> int:
        return min(phases, key=lambda k: epochs[k] / wanted[k])

    while fits(with_one_more(behind())):
        epochs = with_one_more(behind())
    for k in phases:  # the remaining time may be enough for an epoch of another phase
        if fits(with_one_more(k)):
            epochs = with_one_more(k)
    return epochs


def with_epochs(recipe: Recipe, epochs: Sequence[int]) -> Recipe:
    """`recipe` with other numbers of epochs, by phase."""
    pairs = zip(recipe.phases, epochs, strict=True)
    return replace(recipe, phases=tuple(replace(phase, epochs=n) for phase, n in pairs))


def _listed(recipe: Recipe, epochs: Sequence[int], first: int) -> str:
    named = zip(recipe.phases, epochs, strict=True)
    chosen = [f"{n} {phase.name}" for k, (phase, n) in enumerate(named) if k >= first]
    return ", ".join(chosen) + " epochs"

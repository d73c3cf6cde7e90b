"""A run of ``python -m training`` with the recipe `tiny` on one of several world.

The second rank ends itself in its first life at the step STOP_AT (``EPOCH STEP``) by the signal
STOP_BY. With STEP_SECONDS, the clock of ``--minutes`` advances by that many seconds a step and
nothing else, three times as fast on the second rank.
"""

import os
import signal
from typing import Any

import torch

from robust.commands.running import main
from tests.support import small
from training.budget import Deadline
from training.commands import train
from training.display import Display
from training.distributed import was_restarted
from training.monitor import Progress
from training.recipes import RECIPES
from training.step import Trainer

torch.set_num_threads(1)  # as the tests themselves
RECIPES["tiny"] = small.shared
show = Display.__call__


def show_or_end(display: Display, progress: Progress) -> None:
    show(display, progress)
    here = f"{progress.epoch} {progress.step}" == os.environ.get("STOP_AT")
    if here and os.environ["RANK"] == "1" and not was_restarted():
        os.kill(os.getpid(), signal.Signals[os.environ["STOP_BY"]])


if "STEP_SECONDS" in os.environ:
    step, now = Trainer.step, [0.0]

    def timed_step(trainer: Trainer, *batch: torch.Tensor, **settings: Any) -> torch.Tensor:
        now[0] += float(os.environ["STEP_SECONDS"]) * (1 + 2 * int(os.environ["RANK"]))
        return step(trainer, *batch, **settings)

    def of_this_process(minutes: float) -> Deadline:
        return Deadline(minutes=minutes, started=0.0, clock=lambda: now[0])

    Trainer.step = timed_step  # type: ignore[method-assign]
    Deadline.of_this_process = staticmethod(of_this_process)  # type: ignore[assignment]
Display.__call__ = show_or_end  # type: ignore[method-assign]
main(train, name="training")

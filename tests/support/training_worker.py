"""A run of ``python -m training`` with the recipe `tiny` on one of several world.

The second rank ends itself in its first life at the step STOP_AT (``EPOCH STEP``) by the signal
STOP_BY.
"""

import os
import signal

import torch

from robust.commands.running import main
from tests.support import small
from training.commands import train
from training.display import Display
from training.distributed import was_restarted
from training.monitor import Progress
from training.recipes import RECIPES

torch.set_num_threads(1)  # as the tests themselves
RECIPES["tiny"] = small.shared
show = Display.__call__


def show_or_end(display: Display, progress: Progress) -> None:
    show(display, progress)
    here = f"{progress.epoch} {progress.step}" == os.environ.get("STOP_AT")
    if here and os.environ["RANK"] == "1" and not was_restarted():
        os.kill(os.getpid(), signal.Signals[os.environ["STOP_BY"]])


Display.__call__ = show_or_end  # type: ignore[method-assign]
main(train, name="training")

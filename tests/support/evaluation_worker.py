"""``robust evaluate`` on one of several world, killed when it has shown so many results."""

import os
import signal
from typing import Any

import torch

import robust_cli
from robust.commands.output import Progress

torch.set_num_threads(1)  # as the tests themselves
shown = 0


def count(*_: Any) -> None:
    global shown
    shown += 1
    if shown == int(os.environ.get("KILL_AT", "0")):
        os.kill(os.getpid(), signal.SIGKILL)


Progress.update = count  # type: ignore[method-assign]
robust_cli.main()

"""Copies of the repository's folders for commands that tests run."""

import os
import shutil
from pathlib import Path


def copy_for_commands(folder: Path, to: Path) -> None:
    """Copy a folder without training runs; weights are hard links, which writers replace."""
    ignore = shutil.ignore_patterns("runs")
    shutil.copytree(folder, to, ignore=ignore, copy_function=_link_weights)


def _link_weights(source: str, to: str) -> None:
    if source.endswith(".pt"):
        try:
            os.link(source, to)
            return
        except OSError:  # another file system
            pass
    shutil.copy2(source, to)

"""Temporary folders. If their process is killed, the next one removes them."""

from __future__ import annotations

import fcntl
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

# Nothing else may be named like this: a folder of ROBUST_JOBS also has a file `lock`.
PREFIX = "robust-scratch-"
LOCK = "lock"  # locked by the folder's process; the kernel unlocks it when that dies


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty temporary folder, removed after the block."""
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        folder = Path(name)
        # Locked before it is renamed to the name that `remove_abandoned` looks for.
        with (folder / "lock.new").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "lock.new").rename(folder / LOCK)
            yield folder


def remove_abandoned(parent: Path | None = None) -> None:
    """Remove the scratch folders of dead processes from `parent`, by default the temp folder."""
    for path in Path(parent or tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        try:
            with path.open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.parent)
        except BlockingIOError:  # in use
            continue
        except OSError as error:  # another user's, or removed by another process just now
            logger.debug("%s was not removed: %s", path.parent, error)
        else:
            logger.info("removed %s, left by a killed process", path.parent)

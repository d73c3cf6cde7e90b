"""Temporary folders that are removed even when their process is killed: at the next start."""

from __future__ import annotations

import fcntl
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

PREFIX = "robust-"
LOCK = "lock"  # held by the process that uses the folder, and released by the kernel when it dies


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        folder = Path(name)
        # Locked before it has the name by which others look for it.
        with (folder / "lock.new").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "lock.new").rename(folder / LOCK)
            yield folder


def remove_abandoned(parent: Path | None = None) -> None:
    """Remove the scratch folders of processes that no longer live, from the temporary folder."""
    for path in Path(parent or tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        try:
            with path.open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.parent)
        except BlockingIOError:  # in use
            continue
        except OSError as error:  # another user's, or removed by another process just now
            logger.debug("%s is left: %s", path.parent, error)
        else:
            logger.info("removed %s, left by a killed process", path.parent)

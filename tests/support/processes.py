"""Several Python processes that work together, as torchrun starts them, for tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from random import Random

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port that nothing listens on, of those that the system gives to nobody by itself."""
    for port in Random().sample(range(15_000, 32_000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def run_together(
    *arguments: str | Path, size: int = 2, folder: Path = ROOT, status: int = 0, **extra: str
) -> list[str]:
    """Run ``python ARGUMENTS`` on all ranks until each ends with `status`; what each printed.

    `extra` goes into their environment.
    """
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**environment(rank, size, port), **extra},
        )
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [status] * size, said
    return [out for out, _ in said]

"""What several benchmarks need: a running service, and the name of the processor."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def service(*options: str, **environment: str) -> Iterator[str]:
    """The address of a new `robust serve`, once it is ready; SystemExit if it ends before."""
    process = subprocess.Popen(
        [sys.executable, "-m", "robust_cli", "serve", "--port", "0", *options],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        found = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
        while found and process.poll() is None:
            if httpx.get(f"{found[0]}/readyz", timeout=60).is_success:
                yield found[0]
                return
            time.sleep(0.1)
        raise SystemExit("robust serve ended before it was ready")
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def processor_name() -> str:
    """The name of the processor, such as AMD EPYC 9654."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", path.read_text()) if path.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()

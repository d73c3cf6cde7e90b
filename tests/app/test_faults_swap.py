"""kill -9 while a checkpoint is replaced: the old or the new one is served, never a mixture."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from app.settings import Settings
from robust.checkpoint import load_checkpoint
from robust.images import to_float
from robust.prediction import predict
from tests.app.conftest import write_checkpoint
from tests.support.faults import prediction
from tests.support.images import decode_png
from tests.support.serving import png, serving, until

ROOT = Path(__file__).parents[2]
SEEDS = (1, 2)
# Replaces one by the other without end; each line asks for one more process that does.
WRITER = """
import os, sys
from pathlib import Path
from app.settings import Settings
from robust.checkpoint import load_checkpoint, save_checkpoint

path, *others = map(Path, sys.argv[1:])
loaded = [load_checkpoint(other) for other in others]
print(0, flush=True)
for _ in sys.stdin:
    pid = os.fork()
    while pid == 0:
        for checkpoint in loaded:
            save_checkpoint(path, checkpoint.classifier, checkpoint.sidecar)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print(0, flush=True)
"""


@contextmanager
def writer(path: Path, others: list[Path]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), *map(str, others)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "0\n"
        yield process
    finally:
        process.stdin.close()
        process.wait(280)
        process.stdout.close()


def killed_after(process: subprocess.Popen[str], seconds: float) -> None:
    """Let a process write for so long, and kill it."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    pid = int(process.stdout.readline())
    try:
        time.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGKILL)
    assert process.stdout.readline() == "0\n"


def expected(path: Path) -> float:
    loaded = load_checkpoint(path)
    row = predict(loaded.classifier, to_float(decode_png(png(seed=1))).unsqueeze(0))[0]
    return float(row.max())


def assert_whole(answer: dict[str, Any], known: dict[str, float]) -> None:
    """What is answered is the answer of the weights that are named."""
    probability = answer["results"][0]["probability"]
    assert probability == pytest.approx(known[answer["model_sha256"]], abs=1e-3)


@pytest.mark.parametrize(
    "rounds", [3, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_writer_killed_at_any_moment_leaves_a_complete_checkpoint(
    tmp_path: Path, rounds: int
) -> None:
    random, path = Random(0), tmp_path / "served" / "robust_model.pt"
    others = [tmp_path / f"{seed}.pt" for seed in SEEDS]
    known = {write_checkpoint(o, seed=s): expected(o) for o, s in zip(others, SEEDS, strict=True)}
    assert abs(min(known.values()) - max(known.values())) > 0.01  # a mixture would be told
    path.parent.mkdir()
    write_checkpoint(path, seed=SEEDS[0])
    settings = Settings(checkpoint=path, threads=1, device="cpu", reload_seconds=0.02)
    with writer(path, others) as process, serving(settings) as watching:
        for _ in range(rounds):
            killed_after(process, random.uniform(0.0, 0.4))
            # What it left is whole, for the service that saw it come and for one that starts.
            on_disk = load_checkpoint(path).sha256
            assert on_disk in known
            assert_whole(prediction(watching), known)
            with serving(settings) as started:
                answer = prediction(started)
                assert answer["model_sha256"] == on_disk
                assert_whole(answer, known)
        # The last one is taken over, and so is the next.
        until(lambda: prediction(watching)["model_sha256"] == on_disk)
        for seed in SEEDS:
            sha256 = write_checkpoint(path, seed=seed)
            until(lambda new=sha256: prediction(watching)["model_sha256"] == new)

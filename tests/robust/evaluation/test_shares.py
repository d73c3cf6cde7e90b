"""Several processes that share the images out find what one finds."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from robust.attacks import resolve_attack
from robust.distributed import World
from robust.evaluation import Evaluation, evaluate_batches
from robust.evaluation.outcomes import Outcomes
from robust.threat_model import ThreatModel
from robust_cli import run
from tests.support.processes import run_together

SCRIPT = Path(__file__).parents[2] / "support" / "evaluation_worker.py"
ATTACKS = ("--attack", "fgsm", "--attack", "pgd-3", "--eps", "1/255", "--curve", "4")
ATTACKS += ("--precision", "fp32")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An odd number of images, so that shares differ in size."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (45, 3, 32, 32), dtype=np.uint8)
    path = tmp_path / "data.npz"
    np.savez(path, images=images, labels=generator.integers(0, 4, 45))
    return path


def found(path: Path) -> Any:
    """A report but for what time, place and the rounding of smaller passes make of it."""
    varies = ("seconds", "times", "device", "probes", "distances", "forwards", "backwards")

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k not in varies}
        return [without(item) for item in value] if isinstance(value, list) else value

    return without(json.loads(path.read_text()))


@pytest.mark.timeout(900)
def test_two_processes_match_one_even_after_a_kill(
    tmp_path: Path, data: Path, checkpoint_path: Path
) -> None:
    common = ["evaluate", "--checkpoint", str(checkpoint_path), "--data", str(data), *ATTACKS]
    one, two, journal = (tmp_path / name for name in ("one.json", "two.json", "journal"))
    assert run([*common, "--json", str(one)]) == 0
    arguments = [SCRIPT, *common, "--json", two, "--journal", journal]
    run_together(*arguments, status=-signal.SIGKILL, KILL_AT="1")
    assert not two.exists()
    for rank in (1, 2):
        connection = sqlite3.connect(f"{journal}.{rank}-of-2")
        ((done,),) = connection.execute("SELECT count(DISTINCT image) FROM finished")
        connection.close()
        assert done == (23 if rank == 1 else 22)  # clean and FGSM are through
    first, second = run_together(*arguments)
    assert found(two) == found(one)
    assert found(two)["n"] == 45
    assert [point["n"] for point in found(two)["curve"]] == [4] * 8
    assert "2 times cpu" in first
    assert second == ""


class Alone(Exception):
    """A rank waits for a value that the other one has not sent."""


@dataclass(frozen=True, kw_only=True)
class Rank(World):
    """One of two ranks, which gets the values in `received` (None: its own) from the other one."""

    size: int = 2
    received: list[Any]
    sent: list[Any] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        self.sent.append(value)
        if len(self.sent) > len(self.received):
            raise Alone
        return [self.received[len(self.sent) - 1] or value, value]


def test_process_may_get_no_images(make_linear: Callable[..., nn.Module]) -> None:
    def evaluated(world: World) -> Evaluation:
        *_, last = evaluate_batches(
            make_linear(),
            torch.full((1, 3, 4, 4), 0.5),
            torch.tensor([0]),
            num_classes=2,
            attacks=[resolve_attack("fgsm", ThreatModel())],
            device=torch.device("cpu"),
            curve=4,
            world=world,
        )
        return last

    expected = evaluated(World())
    first = Rank(rank=0, received=[None])
    with pytest.raises(Alone):
        evaluated(first)
    found = evaluated(Rank(rank=1, received=first.sent))
    assert found.n == 1
    assert found.attacks == expected.attacks
    assert found.curve == expected.curve


def test_shards_are_gathered_in_order() -> None:
    labels = torch.arange(5)
    whole = Outcomes(None, labels, num_classes=5, batch_size=5)
    shares = [Outcomes(None, labels[r::2], num_classes=5, batch_size=5) for r in (0, 1)]
    shares[0].add_rows([(0, 1, 3, 0.5, 0, 1, 2), (2, 0, 4, 0.0, 0, 1, 2)])
    shares[1].add_rows([(1, 1, 0, 0.25, 1, 3, 4)])
    whole.merge(shares)
    assert whole.fooled.tolist() == [True, False, False, True, False]
    assert whole.predicted.tolist() == [3, 1, 2, 0, 4]
    assert whole.distance.tolist() == [0.5, 0, 0, 0.25, 0]
    assert whole.unconfirmed.tolist() == [False, False, False, True, False]
    assert whole.forwards.tolist() == [1, 0, 0, 3, 1]
    assert whole.finished.tolist() == [True, False, False, True, True]

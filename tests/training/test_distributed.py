"""Two processes that split every batch train the same model as one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robust.checkpoint import load_checkpoint
from robust.datasets import Dataset
from robust.distributed import World
from tests.support import small
from tests.support.processes import ROOT, environment, run_together
from training.distributed import Collectives, Shard
from training.run import Stopped, train
from training.state import RunFolder, TrainingError, load_state

CPU = torch.device("cpu")
SCRIPT = Path(__file__).parents[1] / "support" / "training_worker.py"
# Of the network that gradients.py takes.
PARAMETERS, CHANNELS, NORMS, CLASSES = 432 + 4_608 + 132 + 2 * 48, 48, 2, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, colors: Dataset) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.pt"
    torch.save({"images": colors.images, "labels": colors.labels}, path)
    return path


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The checkpoint of two processes that nothing happened to."""
    out = tmp_path_factory.mktemp("together") / "model.pt"
    first, second = run_together(SCRIPT, *arguments(data, out))
    assert first.splitlines()[-1].startswith("wrote ")
    assert second == ""  # one speaks for all
    return out


def arguments(data: Path, out: Path) -> list[str]:
    named = {"data": data, "out": out, "recipe": "tiny", "device": "cpu"}
    return [f"--{name}={value}" for name, value in named.items()]


def test_shards_cover_every_image_once() -> None:
    rows, whole = torch.arange(11), torch.arange(11)[3:8]
    shares = [Shard(n=11, first=rank, step=3) for rank in range(3)]
    assert sorted(torch.cat([share.of(rows) for share in shares]).tolist()) == list(range(11))
    assert sum(share.weight for share in shares) == pytest.approx(1)
    for share in shares:
        where, part = share.within(3, 8)
        assert share.of(rows)[where].tolist() == part.of(whole).tolist()


def test_shard_draws_match_the_whole_batch() -> None:
    def noise(x: Tensor, generator: torch.Generator) -> Tensor:
        return torch.rand(x.shape, generator=generator)

    x = torch.zeros(7, 2)
    whole = Shard(n=7).draw(noise, x, torch.Generator().manual_seed(0))
    for rank in range(3):
        share = Shard(n=7, first=rank, step=3)
        drawn = share.draw(noise, share.of(x), torch.Generator().manual_seed(0))
        assert torch.equal(drawn, whole[rank::3])


def test_sharded_batch_has_the_gradient_of_the_whole() -> None:
    first, second = map(
        json.loads, run_together(Path(__file__).parents[1] / "support" / "gradient_worker.py")
    )
    failures = first.pop("failure"), second.pop("failure")
    assert failures == ("Local: the disk is full", "RuntimeError: Local: the disk is full")
    assert first == second
    assert first.pop("stop") == {"asked": True, "not asked": False}
    assert first.pop("threads") == {"left": 0}
    local = first.pop("local")
    assert local["statistics"] < 1e-6
    assert local["bytes"] == 4 * (PARAMETERS + 1 + 2 * CHANNELS)  # the loss is the one more
    assert len(first) == 5
    for name, far in first.items():
        # Of the third step in float64, so that the steps before are seen to be the same.
        rounding = 1e-9 if name.endswith("64") else 1e-4
        assert far["gradient"] < rounding, name
        assert far["statistics"] < rounding, name
        assert far["loss"] < rounding, name
    # Statistics go forward, their gradients backward, in float64: two a channel, and the count.
    statistics = 2 * 8 * (2 * CHANNELS + NORMS)
    # Attacks say nothing: only the passes of the loss do, of which TRADES has two.
    once = 4 * (PARAMETERS + 1) + statistics
    assert first["split 32"]["bytes"] == once
    assert first["trades 32"]["bytes"] == once + statistics
    # AWP takes a gradient of the weights first, without those of norms and biases.
    weights = PARAMETERS - 2 * CHANNELS - CLASSES
    assert first["awp 32"]["bytes"] == once + 4 * weights + statistics


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The output of two processes of which one got SIGTERM in the second epoch."""
    out = tmp_path_factory.mktemp("stopped") / "model.pt"
    run_together(SCRIPT, *arguments(data, out), status=143, STOP_AT="2 1", STOP_BY="SIGTERM")
    assert not out.exists()
    return out


def test_two_processes_stopped_at_a_step_match_one(
    stopped: Path, colors: Dataset, out: Path
) -> None:
    steps = iter(range(1, 6))
    with pytest.raises(Stopped):
        train(small.shared(), colors, out=out, device=CPU, should_stop=lambda: next(steps) == 5)
    one, two = (load_state(RunFolder.of(path).state) for path in (out, stopped))
    assert (one.epoch, one.step, one.phase) == (two.epoch, two.step, two.phase) == (0, 1, 1)
    for ours, theirs in zip(two.history, one.history, strict=True):
        # Of 4 steps; gradients themselves are compared above, before roundings have grown.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_minutes_follow_the_clock_of_rank_0(tmp_path: Path, data: Path) -> None:
    """The clock of the second runs three times as fast; by it, no run would fit."""
    out = tmp_path / "model.pt"
    run_together(SCRIPT, *arguments(data, out), "--minutes=1", STEP_SECONDS="2")
    # Steps of 2 s, 4 an epoch. 10 were timed, and 3 s are the margin: 18 fit into the other 37 s.
    minutes = load_checkpoint(out).sidecar.recipe["minutes"]
    assert minutes["fitted_steps"] == {"adversarial": 10}
    rows = RunFolder.of(out).metrics.read_text().splitlines()
    assert [json.loads(row)["phase"] for row in rows] == ["clean"] * 2 + ["adversarial"] * 3


@pytest.mark.slow  # half a minute
def test_restarted_worker_gives_the_same_result(stopped: Path, together: Path, data: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    workers = ["--nproc-per-node=2", "--max-restarts=1", str(SCRIPT)]
    finished = subprocess.run(
        [*torchrun, *workers, *arguments(data, stopped), "--resume"],
        cwd=ROOT,
        env={**environment(0, 1, 0), "STOP_AT": "3 2", "STOP_BY": "SIGKILL"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    assert "exitcode: -9" in finished.stderr
    assert stopped.read_bytes() == together.read_bytes()
    rows = RunFolder.of(stopped).metrics.read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == [1, 2, 3]
    assert load_checkpoint(stopped).sidecar.device.startswith("2 times cpu")


def test_incompatible_options_are_rejected(
    colors: Dataset, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small.tiny()
    monkeypatch.setattr(World, "on_rank0", lambda self, make: make())
    monkeypatch.setattr(World, "gather", lambda self, value: [value] * self.size)
    with pytest.raises(TrainingError, match="at least 2 images of a batch for each process"):
        train(recipe, colors, out=out, device=CPU, world=World(size=9))
    monkeypatch.setattr(World, "gather", lambda self, value: [value, {**value, "seed": 1}])
    with pytest.raises(TrainingError, match="another seed for process 2 of 2"):
        train(recipe, colors, out=out, device=CPU, world=World(size=2))


def test_single_process_communicates_nothing() -> None:
    collectives = Collectives()
    collectives.all_reduce_sum([torch.ones(2)])
    assert collectives.any(True)
    assert collectives.bytes == 0


def test_module_is_the_command() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "training", "--data", "digits", "--recipe", "none"],
        cwd=ROOT,
        env={**environment(0, 1, 0)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("training: expected recipe to be one of quick")

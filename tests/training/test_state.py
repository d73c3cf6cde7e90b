"""State written in the background during training."""

import threading
from pathlib import Path

import pytest
import torch

from robust import files
from training.state import RunState, StateWriter, TrainingError, load_state


def state_of(value: float) -> RunState:
    weights = {"weight": torch.full((3,), value)}
    return RunState(step=int(value), model=weights, optimizer={"state": {0: {"m": [weights]}}})


def test_state_is_saved_as_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, real = threading.Event(), files.write_atomic

    def slow(path: Path, write: object) -> None:
        may_write.wait(280)
        real(path, write)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "write_atomic", slow)
    path, state = tmp_path / "state.pt", state_of(1)
    with StateWriter(path) as writer:
        writer.save(state)  # does not wait for the disk
        state.model["weight"].fill_(2)
        state.history.append({"epoch": 1})
        assert not path.exists()
        may_write.set()
        writer.wait()
        found = load_state(path)
    assert found.model["weight"].tolist() == [1, 1, 1]
    assert found.optimizer["state"][0]["m"][0]["weight"].tolist() == [1, 1, 1]
    assert found.history == []


def test_exit_waits_for_the_last_write(tmp_path: Path) -> None:
    with StateWriter(tmp_path / "state.pt") as writer:
        for value in (1, 2, 3):
            writer.save(state_of(value))
    assert load_state(tmp_path / "state.pt").step == 3


def test_failed_write_is_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def full(path: Path, write: object) -> None:
        failed.set()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_atomic", full)
    with StateWriter(tmp_path / "state.pt") as writer:
        writer.save(state_of(1))
        failed.wait(280)
        with pytest.raises(TrainingError, match=r"state\.pt: could not save .*No space left"):
            writer.wait()
        writer.check()  # raised once
    with pytest.raises(TrainingError, match="No space left"), StateWriter(tmp_path / "s") as writer:
        writer.save(state_of(1))

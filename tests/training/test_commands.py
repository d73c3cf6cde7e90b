import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from robust.checkpoint import load_checkpoint
from robust.datasets import Dataset
from robust_cli import run
from tests.training import small
from training.commands import Display, time_left
from training.recipes import RECIPES
from training.state import RunFolder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and a recipe `tiny`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "tiny", small.tiny)
    return tmp_path


@pytest.fixture
def data(here: Path, colours: Dataset) -> None:
    torch.save({"images": colours.images, "labels": colours.labels}, here / "train.pt")


def test_without_data_the_forms_are_listed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train"]) == 2
    message = capsys.readouterr().err
    for form in ("train.pt", ".npz", "FOLDER", "cifar10", "--data digits"):
        assert form in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "none.npz"], "none.npz: expected"),
        (["--data", "digits", "--recipe", "slow"], "expected a recipe out of classic, classic-cpu"),
        (["--data", "digits", "--recipe", "tiny", "--out", "m.txt"], "expected --out to end in"),
        (["--data", "digits", "--recipe", "tiny", "--device", "toaster"], "expected a device"),
        (["--data", "digits", "--seed", "-1"], "seed"),
        (["--data", "digits", "--recipe", "tiny", "--init", "none.pt"], "none.pt: expected"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    arguments: list[str], expected: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", *arguments]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1
    assert not list(here.glob("**/*.pt"))


@pytest.mark.usefixtures("data")
def test_train_pt_in_this_folder_is_taken(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--recipe", "tiny", "--out", "model.pt", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train.pt: 80 images, 4 classes; recipe tiny, 3 epochs on cpu")
    assert [line.split(":")[0] for line in lines[1:4]] == [
        "epoch 1/3 clean",
        "epoch 2/3 adversarial",
        "epoch 3/3 adversarial",
    ]
    assert lines[-1].startswith("wrote model.pt (epoch ")
    assert load_checkpoint(here / "model.pt").sidecar.recipe["name"] == "tiny"


@pytest.mark.usefixtures("data")
def test_sigterm_saves_and_resume_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    arguments = ["train", "--recipe", "tiny", "--out", "model.pt", "--device", "cpu"]
    with monkeypatch.context() as patched:
        patched.setattr(Display, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            run(arguments)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "--resume goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    folder = RunFolder.of(here / "model.pt")
    assert folder.state.exists()
    assert not (here / "model.pt").exists()
    assert run(arguments) == 2
    assert "unfinished run; pass --resume" in capsys.readouterr().err
    assert run([*arguments, "--resume"]) == 0
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert load_checkpoint(here / "model.pt").classifier.architecture.num_classes == 4


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89, "89 s"), (600, "10 min"), (11100, "3 h 05 min"), (math.inf, "unknown time")],
)
def test_time_left(seconds: float, words: str) -> None:
    assert time_left(seconds) == words

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from robust.checkpoint import load_checkpoint
from robust.datasets import Dataset
from robust_cli import run
from tests.support import small
from training.display import Display, time_left
from training.recipe_sources import load_recipe
from training.recipes import RECIPES
from training.state import RunFolder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and a recipe `tiny`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "tiny", small.tiny)
    return tmp_path


@pytest.fixture
def data(here: Path, colors: Dataset) -> None:
    torch.save({"images": colors.images, "labels": colors.labels}, here / "train.pt")
    validation = {"images": colors.images[:20] ^ 1, "labels": colors.labels[:20]}
    torch.save(validation, here / "val.pt")


def test_norm_is_case_insensitive(data: None) -> None:
    assert run(["train", "--recipe", "tiny", "--norm", "L2", "--out", "m.pt"]) == 0
    assert json.loads(Path("m.json").read_text())["threat_model"]["norm"] == "l2"


def test_missing_data_error_lists_the_formats(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train"]) == 2
    message = capsys.readouterr().err
    for form in ("train.pt", ".npz", "a folder", "cifar10", "--data digits"):
        assert form in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "none.npz"], "none.npz: expected"),
        (["--data", "digits", "--recipe", "slow"], "expected recipe to be one of quick, cpu, "),
        (["--data", "digits", "--recipe", "none.toml"], "none.toml: no such file"),
        (
            ["--data", "digits", "--recipe", "tiny", "--set", "adversarial.epochs=ten"],
            "adversarial.epochs: expected a whole number of at least 0, got 'ten'",
        ),
        (["--data", "digits", "--recipe", "tiny", "--out", "m.txt"], "expected --out to end in"),
        (
            ["--data", "digits", "--eps", "4/255", "--set", "eps=2/255"],
            "expected --eps or --set eps=2/255, got both",
        ),
        (
            ["--data", "digits", "--norm", "l2", "--set", "norm=l2"],
            "expected --norm or --set norm=l2, got both",
        ),
        (
            ["--data", "digits", "--input-size", "32", "--set", "input_size=64"],
            "expected --input-size or --set input_size=64, got both",
        ),
        (["--data", "digits", "--recipe", "tiny", "--device", "toaster"], "expected a device"),
        (["--data", "digits", "--seed", "-1"], "seed"),
        (["--data", "digits", "--minutes", "nan"], "expected a finite number, got nan"),
        (["--data", "digits", "--minutes", "inf"], "expected a finite number, got inf"),
        (["--data", "digits", "--key", "ema"], "expected --key with --init, got no --init"),
        (["--data", "digits", "--recipe", "tiny", "--val", "none.npz"], "none.npz: expected"),
        (["--data", "digits", "--recipe", "tiny", "--init", "none.pt"], "none.pt: expected"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], expected: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", *arguments]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1
    assert not list(here.glob("**/*.pt"))


@pytest.mark.usefixtures("data")
def test_train_pt_in_the_current_folder_is_used(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "--recipe", "tiny", "--out", "model.pt", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train.pt: 80 images, 4 classes; recipe tiny, 3 epochs on cpu")
    assert lines[1].startswith("12 steps of 16 images, about ")
    assert [line.split(":")[0] for line in lines[2:5]] == [
        "epoch 1/3 clean",
        "epoch 2/3 adversarial",
        "epoch 3/3 adversarial",
    ]
    assert lines[-1].startswith("wrote model.pt (epoch ")
    assert load_checkpoint(here / "model.pt").sidecar.recipe["name"] == "tiny"


@pytest.mark.usefixtures("data")
def test_sigterm_saves_and_resume_continues(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    arguments = ["train", "--recipe", "tiny", "--out", "model.pt", "--device", "cpu"]
    with monkeypatch.context() as patched:
        patched.setattr(Display, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            run(arguments)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "continue it with --resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    folder = RunFolder.of(here / "model.pt")
    assert folder.state.exists()
    assert not (here / "model.pt").exists()
    assert run(arguments) == 2
    assert "unfinished run; continue it with --resume" in capsys.readouterr().err
    assert run([*arguments, "--resume"]) == 0
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert load_checkpoint(here / "model.pt").classifier.architecture.num_classes == 4


def test_fields_can_be_set_and_a_run_repeated_from_its_record(
    here: Path, data: None, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["train", "--device", "cpu", "--seed", "7", "--classes", "red,green,blue,yellow"]
    common += ["--val", "val.pt"]
    changes = ["--set", "adversarial.epochs=0", "--set", "batch_size=8", "--eps", "4/255"]
    assert run([*common, "--recipe", "tiny", *changes, "--out", "a.pt"]) == 0
    first = load_checkpoint(here / "a.pt").sidecar
    assert (first.recipe["batch_size"], first.recipe["eps"]) == (8, 4 / 255)
    assert [row["n"] for row in first.evaluation] == [20, 20, 20]
    assert first.recipe["validation"]["name"] == "val.pt"
    assert first.classes == ("red", "green", "blue", "yellow")
    assert [phase["epochs"] for phase in first.recipe["phases"]] == [1, 0]
    record = RunFolder.of(here / "a.pt").manifest
    assert run([*common, "--recipe", str(record), "--out", "b.pt"]) == 0
    assert (here / "b.pt").read_bytes() == (here / "a.pt").read_bytes()
    assert "; recipe tiny, 1 epoch on cpu" in capsys.readouterr().out
    again = ["train", "--recipe", str(record), "--device", "cpu", "--out", "a.pt", "--resume"]
    assert run(again) == 2  # another seed
    told = capsys.readouterr().err
    assert "run.json used --seed 7, this run uses 0" in told
    assert "run.json used --val val.pt, this run uses none" in told
    assert "run.json used --classes red,green,blue,yellow, this run uses 0,1,2,3" in told


def test_recipes_are_listed_and_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{listed}" for name in RECIPES)
    assert "Full run: 535 s on one NVIDIA H200" in listed
    for options in ([], ["--json"]):
        assert run(["recipes", "gpu", "--set", "batch_size=512", *options]) == 0
        path = here / ("mine.json" if options else "mine.toml")
        path.write_text(capsys.readouterr().out)
        assert load_recipe(str(path)) == replace(RECIPES["gpu"](), batch_size=512)
    assert run(["recipes", "--json"]) == 2
    assert run(["recipes", "gpu", "--set", "strong.awps=0"]) == 2
    assert "strong.awps: expected field to be one of awp, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89, "89 s"), (600, "10 min"), (11100, "3 h 05 min"), (math.inf, "unknown time")],
)
def test_time_left(seconds: float, words: str) -> None:
    assert time_left(seconds) == words

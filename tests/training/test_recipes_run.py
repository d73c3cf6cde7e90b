"""Small recipes, from the command line to a checkpoint that torchvision loads."""

import json
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet50

from robust.checkpoint import load_checkpoint
from robust.datasets import Dataset
from robust_cli import run
from training.state import RunFolder

SMALL = ["--device", "cpu", "--set", "batch_size=16", "--set", "held_out=0.2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colors: Dataset) -> Path:
    """An empty current folder with 24 images of 16 pixels in train.pt: one step an epoch."""
    monkeypatch.chdir(tmp_path)
    few = colors.limit(24)
    torch.save({"images": few.images, "labels": few.labels}, tmp_path / "train.pt")
    return tmp_path


def test_cpu_makes_a_plain_torchvision_resnet50(here: Path) -> None:
    phases = ["--set", "clean.epochs=1", "--set", "adversarial.epochs=1"]
    assert run(["train", "--recipe", "cpu", "--out", "model.pt", *SMALL, *phases]) == 0
    arguments = ["--checkpoint", "model.pt", "--format", "torchvision", "--out", "exported.pt"]
    assert run(["export", *arguments]) == 0
    classifier = load_checkpoint(here / "model.pt").classifier
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name in ("model.pt", "exported.pt"):
        net = resnet50(num_classes=4)
        net.load_state_dict(torch.load(here / name, weights_only=True), strict=True)
        with torch.inference_mode():
            logits = net.eval()(x)
            assert logits.shape == (1, 4)
            torch.testing.assert_close(logits, classifier(x), rtol=1e-4, atol=1e-4)


def test_plain_keeps_the_best_clean_model(here: Path) -> None:
    small = ["--input-size", "16", "--set", "clean.epochs=2"]
    assert run(["train", "--recipe", "plain", "--out", "plain.pt", *SMALL, *small]) == 0
    sidecar = load_checkpoint(here / "plain.pt").sidecar
    assert (sidecar.architecture.arch, sidecar.architecture.stem) == ("resnet18", "cifar")
    lines = RunFolder.of(here / "plain.pt").metrics.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["phase"] for row in rows] == ["clean", "clean"]
    best = max(rows, key=lambda row: (row["clean"], row["epoch"]))
    assert sidecar.recipe["kept_epoch"] == best["epoch"]

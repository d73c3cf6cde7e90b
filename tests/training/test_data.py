import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from robust import files
from robust.checkpoint import load_checkpoint
from robust.datasets import Dataset, DatasetError
from training import step as step_module
from training.data import TrainingData
from training.objective import objective
from training.recipe import Recipe
from training.run import train
from training.state import RunFolder, TrainingError

CPU = torch.device("cpu")


def split(dataset: Dataset, recipe: Recipe, validation: Dataset | None = None) -> TrainingData:
    return TrainingData.split(dataset, recipe, seed=0, device=CPU, validation=validation)


def test_stratified_fraction_is_held_out(tiny: Recipe, colors: Dataset) -> None:
    data = split(colors, tiny)
    assert (len(data.images), len(data.held_images)) == (64, 16)
    assert data.held_source == {"data": "held out from training"}
    assert data.class_weights is None
    assert data.count_record() == {
        name: {"train": 16, "held_out": 4} for name in ("red", "green", "blue", "yellow")
    }


def test_validation_images_replace_the_held_out_fraction(
    tiny: Recipe, colors: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    validation = replace(
        colors.subset(range(12)), labels=torch.arange(12) % 4, images=colors.images[:12] ^ 1
    )
    validation = replace(
        validation, classes=("yellow", "blue", "green", "red"), labels=3 - validation.labels
    )
    data = split(colors, tiny, validation)
    assert len(data.images) == len(colors)
    assert data.held_labels.tolist() == [0, 1, 2, 3] * 3  # in the order of the training classes
    assert data.held_source["data"] == "colors"
    assert "also training images" not in caplog.text
    split(colors, tiny, colors.subset([0, 1, 2, 3, 40]))
    assert "5 of the held-out images are also training images" in caplog.text


def test_incompatible_validation_images_are_rejected(tiny: Recipe, colors: Dataset) -> None:
    with pytest.raises(TrainingError, match="colors: expected images of 16 x 16 pixels"):
        split(colors, tiny, replace(colors, images=colors.images[:, :, :8, :8]))
    with pytest.raises(DatasetError, match="does not have pink"):
        split(colors, tiny, replace(colors, classes=("red", "green", "blue", "pink")))
    with pytest.raises(TrainingError, match="expected held-out images, found none"):
        split(colors, tiny, colors.subset([]))


def test_class_problems_are_logged(
    tiny: Recipe, colors: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    labels = torch.where(colors.labels == 3, 1, colors.labels)
    labels[0] = 3  # one image of the class yellow
    data = split(replace(colors, labels=labels), replace(tiny, class_weights="balanced"))
    assert "images per class, training + held out: red 15 + 4, green 32 + 8" in caplog.text
    assert "class yellow (1 image) without held-out images" in caplog.text
    assert "green has 32 images to train on, 32 times as many as yellow (1)" in caplog.text
    assert "only 16 images held out: a measured accuracy of 50% may be" in caplog.text
    weights = data.class_weights
    assert weights is not None
    assert (weights[3] / weights[1]).item() == pytest.approx(32)
    assert weights[data.labels].mean().item() == pytest.approx(1)


def test_run_uses_class_weights_and_records_classes_and_validation_images(
    tiny: Recipe, colors: Dataset, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[torch.Tensor] = []

    def spy(*args: Any, class_weights: torch.Tensor, **settings: Any) -> torch.Tensor:
        used.append(class_weights)
        return objective(*args, class_weights=class_weights, **settings)

    monkeypatch.setattr(step_module, "objective", spy)
    recipe = replace(tiny, phases=(replace(tiny.phases[1], epochs=1),), class_weights="balanced")
    validation = replace(colors.subset(range(20)), images=colors.images[:20] ^ 1, name="val.npz")
    sidecar = train(recipe, colors, out=out, device=CPU, validation=validation)
    assert all(row["data"] == "val.npz" and row["n"] == 20 for row in sidecar.evaluation)
    assert sidecar.evaluation[0]["data_sha256"] == validation.sha256
    record = files.read_json(RunFolder.of(out).manifest)
    assert record["class_counts"]["red"] == {"train": 20, "held_out": 5}
    assert record["validation"] == {"name": "val.npz", "count": 20, "sha256": validation.sha256}
    assert record["finished"]
    assert len(used) == 5  # steps
    assert all(torch.equal(weights, torch.ones(4)) for weights in used)
    with pytest.raises(TrainingError, match="found another validation"):
        train(recipe, colors, out=out, device=CPU, resume=True)
    assert load_checkpoint(out).sidecar.recipe["class_weights"] == "balanced"


@pytest.mark.parametrize("existing", [False, True])
def test_rejected_run_leaves_no_files(
    tiny: Recipe, colors: Dataset, tmp_path: Path, existing: bool
) -> None:
    out = tmp_path / "new" / "models" / "model.pt"
    if existing:
        out.parent.mkdir(parents=True)
    with pytest.raises(TrainingError, match="at least one batch of 16 images"):
        train(tiny, colors.limit(16), out=out, device=CPU)
    left = [path.name for path in tmp_path.rglob("*")]
    assert sorted(left) == (["models", "new"] if existing else [])

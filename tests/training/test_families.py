"""Networks of other families than ResNet go through a whole run."""

from dataclasses import replace
from pathlib import Path

import torch

from robust.checkpoint import load_checkpoint
from robust.datasets import Dataset
from training.recipe import Recipe
from training.run import train


def test_a_wide_resnet_is_trained_and_continued(
    tiny: Recipe, colors: Dataset, tmp_path: Path
) -> None:
    clean, adversarial = tiny.phases
    recipe = replace(
        tiny,
        arch="wide_resnet10_1",
        stem="cifar",
        zero_init_residual=True,
        phases=(clean, replace(adversarial, epochs=1)),
    )
    path = tmp_path / "model.pt"
    train(recipe, colors, out=path, device=torch.device("cpu"), seed=0)
    loaded = load_checkpoint(path)
    assert loaded.sidecar.architecture.arch == "wide_resnet10_1"
    assert loaded.sidecar.recipe["arch"] == "wide_resnet10_1"
    further = replace(recipe, phases=(replace(adversarial, epochs=1),))
    other = replace(colors, classes=("a", "b", "c", "d"))  # so that the head is drawn anew
    out = tmp_path / "further.pt"
    train(further, other, out=out, device=torch.device("cpu"), seed=0, init=loaded)
    assert load_checkpoint(out).sidecar.classes == other.classes

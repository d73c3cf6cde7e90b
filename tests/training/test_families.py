"""Networks of other families than the wide ResNets of the other tests go through a whole run."""

from dataclasses import replace
from pathlib import Path

import torch

from robust.checkpoint import load_checkpoint
from robust.datasets import Dataset
from training.recipe import Recipe
from training.run import train


def test_resnet_is_trained_and_continued(tiny: Recipe, colors: Dataset, tmp_path: Path) -> None:
    recipe = replace(
        tiny,
        arch="resnet18",
        stem="imagenet",
        zero_init_residual=True,
        phases=(replace(tiny.phases[1], epochs=1),),
    )
    colors = colors.limit(40)  # 2 steps
    path = tmp_path / "model.pt"
    train(recipe, colors, out=path, device=torch.device("cpu"), seed=0)
    loaded = load_checkpoint(path)
    assert loaded.sidecar.architecture.arch == "resnet18"
    assert loaded.sidecar.recipe["arch"] == "resnet18"
    other = replace(colors, classes=("a", "b", "c", "d"))  # so that the head is drawn anew
    out = tmp_path / "further.pt"
    train(recipe, other, out=out, device=torch.device("cpu"), seed=0, init=loaded)
    assert load_checkpoint(out).sidecar.classes == other.classes

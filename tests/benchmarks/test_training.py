from dataclasses import replace

import pytest
import torch

from benchmarks.training import Steps, measure, operations, tables
from training.recipe import Recipe
from training.recipes import gpu


def small(recipe: Recipe) -> Recipe:
    return replace(
        recipe, arch="resnet18", stem="imagenet", input_size=32, batch_size=4, compile="off"
    )


def test_the_operations_counted_are_those_of_the_passes() -> None:
    """A backward pass is two forward ones, less the first layer's gradient to the image."""
    recipe = small(gpu())
    counted = operations(recipe, recipe.phases[1], n=2)
    forward = counted["forward"]
    first = 2 * 64 * 3 * 49 * 16 * 16  # of the first convolution
    assert counted["clean_step"] == 3 * forward - first
    assert counted["attack_step"] == 2 * forward
    assert counted["loss"] == 2 * (3 * forward - first)
    assert counted["attack_passes"] == 5 * forward  # clean, and two steps of two
    assert counted["adversarial_step"] == counted["attack_passes"] + counted["loss"]
    strong = operations(recipe, recipe.phases[2], n=2)
    assert strong["loss"] == 2 * counted["loss"]  # AWP takes it twice


def test_a_step_moves_weights_and_average() -> None:
    steps = Steps(small(gpu()), gpu().phases[1], torch.device("cpu"))
    steps.optimizer.param_groups[0]["lr"] = 0.1
    before = [steps.model.net.fc.weight.clone(), steps.averaged.module.net.fc.weight.clone()]  # type: ignore[union-attr]
    steps.adversarial_step()
    after = [steps.model.net.fc.weight, steps.averaged.module.net.fc.weight]  # type: ignore[union-attr]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.slow
def test_the_parts_add_up_to_the_step() -> None:
    recipe = small(gpu())
    found = measure(recipe, recipe.phases[1], torch.device("cpu"), repeats=1, count=2)
    lines = tables(found).splitlines()
    start = next(k for k, line in enumerate(lines) if "part of an" in line) + 2
    parts = [[cell.strip() for cell in line.split("|")[2:4]] for line in lines[start:]]
    step = 1000 * found["rows"]["adversarial_step"]["seconds"]
    assert sum(float(ms) for ms, _ in parts) == pytest.approx(step, abs=0.5)
    assert sum(float(share.rstrip("%")) for _, share in parts) == pytest.approx(100, abs=0.5)
    row = found["rows"]["clean_step"]
    assert row["share"] == pytest.approx(
        row["flop_per_image"] * row["images_per_second"] / found["matrix_flop_per_second"]
    )

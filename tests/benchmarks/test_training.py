from dataclasses import replace

import pytest
import torch

from benchmarks.training import Steps, compare_folding, measure, operations, profile, tables
from training.recipe import Recipe
from training.recipes import gpu


def small(recipe: Recipe) -> Recipe:
    return replace(
        recipe, arch="resnet18", stem="imagenet", input_size=32, batch_size=4, compile="off"
    )


def test_counted_operations_match_the_passes() -> None:
    """A backward pass is two forward ones, less the first layer's gradient to the image."""
    recipe = small(gpu())
    pgd = recipe.phases[1]  # PGD-2
    counted = operations(recipe, pgd, n=2)
    forward = counted["forward"]
    loss = 3 * forward - 2 * 64 * 3 * 49 * 16 * 16  # without the first convolution's
    assert counted["clean_step"] == loss
    assert counted["attack_step"] == 2 * forward
    assert counted["attack_passes"] == 2 * 2 * forward
    assert counted["loss"] == loss
    assert counted["adversarial_step"] == counted["attack_passes"] + loss
    costly = replace(pgd, loss="trades", awp=0.01)  # a clean prediction more, two losses twice
    counted = operations(recipe, costly, n=2)
    assert counted["attack_passes"] == 5 * forward
    assert counted["loss"] == 2 * 2 * loss


def test_a_step_moves_weights_and_average() -> None:
    steps = Steps(small(gpu()), gpu().phases[1], torch.device("cpu"))
    trainer = steps.trainer
    weights = trainer.model.net.fc.weight, trainer.averaged.module.net.fc.weight  # type: ignore[union-attr]
    before = [weight.clone() for weight in weights]
    steps.loss()
    trainer.update(0.1)
    assert not any(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a profiler that looks for GPUs
def test_the_profile_names_the_kernels_of_each_part() -> None:
    recipe = small(gpu())
    text = profile(Steps(recipe, recipe.phases[1], torch.device("cpu")), repeats=1)
    assert [line.split(":")[0] for line in text.splitlines() if " ms in kernels" in line] == [
        "attack",
        "loss",
        "whole step",
    ]
    attack, loss, _ = text.split(" ms in kernels")[1:]
    assert "convolution" in attack
    assert "batch_norm" not in attack  # folded
    assert "batch_norm" in loss


@pytest.mark.slow
def test_folding_is_compared_in_alternation() -> None:
    recipe = small(gpu())
    lines = compare_folding(recipe, recipe.phases[1], torch.device("cpu"), repeats=2).splitlines()
    assert [line.split(":")[0] for line in lines] == ["attack", "step"]

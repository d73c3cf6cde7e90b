"""Recipe fields that change a single step or the selected model."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from robust.classifier import Classifier
from robust.datasets import Dataset
from robust.images import to_float
from robust.networks import family_of
from training.recipe import Recipe
from training.result import keep_if_best
from training.setup import build_model
from training.state import RunState
from training.step import Trainer


@pytest.fixture
def make_trainer(tiny: Recipe, colors: Dataset) -> Any:
    def make(**changes: object) -> Trainer:
        recipe = replace(tiny, **changes)  # type: ignore[arg-type]
        model = build_model(recipe, colors, seed=0, init=None)
        return Trainer(model, recipe, device=torch.device("cpu"))

    return make


def set_gradients(model: Classifier) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def gradient_norm(model: Classifier) -> float:
    return float(
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    )


def test_gradients_are_clipped(make_trainer: Any) -> None:
    for clip in (0.5, 0.0):
        trainer = make_trainer(gradient_clip=clip)
        set_gradients(trainer.model)
        before = gradient_norm(trainer.model)
        trainer.update(0.0)
        assert gradient_norm(trainer.model) == pytest.approx(clip or before, rel=1e-4)
        assert before > 1


def test_average_follows_ema_decay(make_trainer: Any) -> None:
    for decay in (0.0, 0.9):
        trainer = make_trainer(ema_decay=decay)
        set_gradients(trainer.model)
        trainer.update(0.1)
        weights = zip(trainer.model.parameters(), trainer.averaged.module.parameters(), strict=True)
        assert all(torch.equal(new, average) for new, average in weights) == (decay == 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_has_the_recipes_label_smoothing(
    make_trainer: Any, tiny: Recipe, colors: Dataset, smoothing: float
) -> None:
    trainer = make_trainer(label_smoothing=smoothing)
    x, targets = to_float(colors.images[:8]), F.one_hot(colors.labels[:8], 4).float()
    loss = trainer.backward([x], targets, tiny.phases[0])
    expected = F.cross_entropy(trainer.model(x), targets, label_smoothing=smoothing)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_uses_the_recipes_precision(
    make_trainer: Any, tiny: Recipe, colors: Dataset, precision: str
) -> None:
    trainer = make_trainer(precision=precision, input_size=32)
    dtypes: list[torch.dtype] = []
    trainer.model.net.conv1.register_forward_hook(
        lambda module, inputs, output: dtypes.append(output.dtype)
    )
    x = to_float(F.interpolate(colors.images[:4].float(), size=32).to(torch.uint8))
    trainer.backward([x], F.one_hot(colors.labels[:4], 4).float(), tiny.phases[0])
    assert dtypes == [torch.bfloat16 if precision == "bf16" else torch.float32]


def test_zero_init_residual_zeroes_the_residual_ends(tiny: Recipe, colors: Dataset) -> None:
    ends = family_of(tiny.arch).residual_ends
    assert ends is not None
    for zero in (True, False):
        recipe = replace(tiny, zero_init_residual=zero)
        model = build_model(recipe, colors, seed=0, init=None)
        assert all(not weight.any() for weight in ends(model.net)) == zero


@pytest.mark.parametrize(("select", "kept"), [("clean", 1), ("mean", 2), ("pgd", 3), ("last", 4)])
def test_selected_epoch(make_trainer: Any, select: str, kept: int) -> None:
    model, state = make_trainer().model, RunState()
    for epoch, clean, pgd in ((1, 0.9, 0.1), (2, 0.8, 0.4), (3, 0.6, 0.5), (4, 0.5, 0.3)):
        keep_if_best(state, {"epoch": epoch, "clean": clean, "pgd": pgd}, model, select=select)
    assert state.best is not None
    assert state.best.epoch == kept

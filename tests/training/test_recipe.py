import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from robust.classifier import Architecture, Classifier
from training.recipe import (
    AdversarialPart,
    Augmentation,
    Phase,
    Recipe,
)
from training.recipes import RECIPES, classic, classic_cpu, cpu, fast, gpu, named_recipe, quick

HALF = (AdversarialPart(kind="pgd", share=0.5),)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_has_two_phases_and_is_json(name: str) -> None:
    recipe = named_recipe(name)
    assert recipe.name == name
    clean_first = [] if name == "cpu-further" else [False]  # that begins with trained weights
    stronger = [True] if name in ("gpu", "fast") else []  # a third phase with more attack steps
    assert [phase.is_adversarial for phase in recipe.phases] == [*clean_first, True, *stronger]
    assert json.loads(json.dumps(recipe.to_dict()))["name"] == name


def test_classic_is_the_baselines_schedule() -> None:
    recipe = classic()
    clean, adversarial = recipe.phases
    assert (clean.epochs, adversarial.epochs) == (100, 50)
    assert (recipe.optimizer, recipe.momentum, recipe.weight_decay) == ("sgd", 0.9, 1e-4)
    assert (recipe.batch_size, recipe.label_smoothing, recipe.gradient_clip) == (256, 0.1, 1.0)
    assert clean.learning_rate == 0.1
    assert clean.augmentation.mixup > 0
    for phase in recipe.phases:
        used = phase.augmentation
        assert (used.crop_padding, used.flip, used.rotation) == (4, 0.5, 10)
        assert (used.jitter, used.cutout) == (0.1, 8)
    shares = {part.kind: part.share for part in adversarial.parts}
    assert shares == {"clean": 0.5, "fgsm": 0.25, "pgd": 0.25}
    assert adversarial.parts[2].steps == 20


def test_classic_cpu_is_classic_in_as_many_passes_as_cpu() -> None:
    full, short = classic(), classic_cpu()
    clean, adversarial = short.phases
    assert clean.epochs == 2 * adversarial.epochs
    phases = tuple(
        replace(there, epochs=here.epochs)
        for there, here in zip(full.phases, short.phases, strict=True)
    )
    assert short == replace(full, name=short.name, ema_decay=short.ema_decay, phases=phases)
    passes = [sum(p.epochs * p.passes for p in recipe.phases) for recipe in (short, cpu())]
    assert passes[0] == pytest.approx(passes[1], rel=0.05)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"phases": ()}, "some epochs"),
        ({"phases": (Phase(name="a", epochs=0),)}, "some epochs"),
        ({"phases": (Phase(name="a", epochs=1), Phase(name="a", epochs=1))}, "different names"),
        ({"phases": (Phase(name="a", epochs=1, learning_rate=0),)}, "learning_rate"),
        (
            {
                "phases": (
                    Phase(name="a", epochs=1, parts=(AdversarialPart(kind="pgd", share=0.5),)),
                )
            },
            "add up to 1",
        ),
        ({"phases": (Phase(name="a", epochs=1, loss="trades"),)}, "one attacked part"),
        (
            {
                "phases": (
                    Phase(
                        name="a",
                        epochs=1,
                        parts=(AdversarialPart(kind="fgsm"),),
                        augmentation=Augmentation(mixup=0.2),
                    ),
                )
            },
            "mixup in a clean phase",
        ),
        ({"phases": (Phase(name="a", epochs=1, awp=-0.1),)}, "a: expected awp in"),
        ({"phases": (Phase(name="a", epochs=1, awp_from=1.0),)}, "a: expected awp_from in"),
        ({"phases": (Phase(name="a", epochs=1, teacher=1.5),)}, "a: expected teacher in"),
        ({"phases": (Phase(name="a", epochs=1, final_rate=-1),)}, "a: expected final_rate in"),
        ({"phases": (Phase(name="a", epochs=1, loss="TRADES"),)}, "a: expected loss out of cross-"),
        (
            {"phases": (Phase(name="a", epochs=1, parts=(AdversarialPart(kind="PGD"),)),)},
            "a: expected kind out of clean, fgsm, .*, got 'PGD'",
        ),
        (
            {"phases": (Phase(name="a", epochs=1, parts=(AdversarialPart(kind="pgd", steps=0),)),)},
            "a: expected steps of at least 1, got 0",
        ),
        (
            {
                "phases": (
                    Phase(
                        name="a",
                        epochs=1,
                        parts=(
                            AdversarialPart(kind="clean", share=1.5),
                            AdversarialPart(kind="pgd", share=-0.5),
                        ),
                    ),
                )
            },
            "a: expected share from 0 to 1, got 1.5",
        ),
        (
            {"phases": (Phase(name="a", epochs=1, augmentation=Augmentation(crop_padding=32)),)},
            "a: expected crop_padding from 0 to 31, got 32",
        ),
        ({"optimizer": "adam"}, "expected optimizer out of sgd, adamw, got 'adam'"),
        ({"arch": "resnet101"}, "expected arch out of"),
        ({"gradient_clip": -1.0}, "expected gradient_clip of at least 0"),
        ({"weight_decay": float("nan")}, "expected weight_decay of at least 0, got nan"),
        ({"monitor_limit": -5}, "expected monitor_limit of at least 0"),
        ({"batch_size": 1}, "batch_size"),
        ({"held_out": 0.0}, "held_out"),
        ({"ema_decay": 1.0}, "ema_decay"),
    ],
)
def test_a_wrong_recipe_says_which_field(change: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        replace(quick(), **change)  # type: ignore[arg-type]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"out of classic, .*cpu-further, .*fast, got 'slow'"):
        named_recipe("slow")


def test_the_shipped_recipe_leaves_normalisation_to_the_first_batch_norm() -> None:
    recipe: Recipe = cpu()
    assert (recipe.mean, recipe.std) == ((0.0,) * 3, (1.0,) * 3)
    assert (recipe.arch, recipe.stem, recipe.activation) == ("resnet50", "imagenet", "relu")


@pytest.mark.parametrize(("recipe", "petaflop"), [(gpu(), 134), (fast(), 17)])
def test_the_gpu_recipes_cost_what_their_docstrings_reckon(recipe: Recipe, petaflop: float) -> None:
    with torch.device("meta"):
        model = Classifier(Architecture(arch=recipe.arch, stem=recipe.stem))
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 32, 32))
    passes = sum(phase.epochs * phase.passes for phase in recipe.phases)
    assert counter.get_total_flops() * 49_000 * passes / 1e15 == pytest.approx(petaflop, rel=0.02)


@pytest.mark.parametrize("recipe", [gpu(), fast()])
def test_a_phase_of_the_gpu_recipes_begins_where_the_one_before_ended(recipe: Recipe) -> None:
    _, adversarial, strong = recipe.phases
    assert adversarial.learning_rate * adversarial.final_rate == pytest.approx(strong.learning_rate)
    assert strong.warmup == strong.final_rate == 0


def test_awp_and_a_teacher_cost_what_they_run() -> None:
    phase = Phase(
        name="a", epochs=1, parts=(AdversarialPart(kind="pgd", steps=2),), loss="trades", awp=0.005
    )
    assert phase.passes == 4 + 1 + 6 + 6
    assert replace(phase, awp_from=0.5).passes == 4 + 1 + 6 + 3
    assert replace(phase, awp=0.0, awp_from=0.5, teacher=0.3).passes == 4 + 1 + 6 + 1


@pytest.mark.parametrize(
    ("phase", "passes"),
    [
        (Phase(name="a", epochs=1), 3),
        (Phase(name="a", epochs=1, parts=(AdversarialPart(kind="n-fgsm"),)), 5),
        (Phase(name="a", epochs=1, parts=(AdversarialPart(kind="pgd", steps=10),)), 23),
        (
            Phase(
                name="a", epochs=1, parts=(AdversarialPart(kind="pgd", steps=10),), loss="trades"
            ),
            27,
        ),
        (
            Phase(
                name="a",
                epochs=1,
                parts=(
                    AdversarialPart(kind="clean", share=0.5),
                    AdversarialPart(kind="pgd", share=0.5, steps=10),
                ),
            ),
            26,
        ),
    ],
)
def test_what_a_phase_costs(phase: Phase, passes: float) -> None:
    assert phase.passes == passes
    parts = phase.parts
    if len(parts) == 2:
        assert replace(phase, split=True).passes == 13

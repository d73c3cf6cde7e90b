import json
import re
from dataclasses import replace
from pathlib import Path

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
from training.recipes import (
    NO_FULL_RUN,
    RAN,
    RECIPES,
    classic,
    classic_cpu,
    cpu,
    fast,
    gpu,
    gpu_further,
    named_recipe,
    plain,
    quick,
)

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
HALF = (AdversarialPart(kind="pgd", share=0.5),)


PHASES = {
    "plain": [False],
    "cpu-further": [True],  # continues trained weights
    "gpu": [False, True, True],
    "gpu-further": [True, True],
    "fast": [False, True, True],
}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_names_its_phases_and_is_json(name: str) -> None:
    recipe = named_recipe(name)
    assert recipe.name == name
    assert [phase.is_adversarial for phase in recipe.phases] == PHASES.get(name, [False, True])
    assert json.loads(json.dumps(recipe.to_dict()))["name"] == name
    assert RAN[name]
    assert RECIPES[name].__doc__


def test_docs_state_where_every_recipe_has_run() -> None:
    rows = re.findall(r"^\| `([a-z][a-z-]+)` \|.*\| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == list(RECIPES)
    for name, ran in rows:
        if RAN[name] == NO_FULL_RUN:
            assert ran == NO_FULL_RUN
        else:
            assert re.findall(r"[\d.]+", ran) == re.findall(r"[\d.]+", RAN[name].replace("-10", ""))


def test_classic_has_the_baseline_schedule() -> None:
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


def test_classic_cpu_has_classics_shape_and_cpus_cost() -> None:
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
        ({"phases": ()}, "some epochs, got no phases"),
        (
            {"phases": (Phase(name="a", epochs=0), Phase(name="b", epochs=0))},
            "some epochs, got a.epochs=0, b.epochs=0",
        ),
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
            r"a\.augmentation\.mixup: expected 0 in an adversarial phase, got 0.2",
        ),
        (
            {"phases": (Phase(name="a", epochs=1, awp=-0.1),)},
            r"a\.awp: expected a number in \[0, 1\), got -0.1",
        ),
        (
            {"phases": (Phase(name="a", epochs=1, awp_from=1.0),)},
            r"a\.awp_from: expected a number in",
        ),
        (
            {"phases": (Phase(name="a", epochs=1, teacher=1.5),)},
            r"a\.teacher: expected a number in",
        ),
        (
            {"phases": (Phase(name="a", epochs=1, final_rate=-1),)},
            r"a\.final_rate: expected a number in",
        ),
        (
            {"phases": (Phase(name="a", epochs=1, loss="TRADES"),)},
            r"a\.loss: expected one of cross-",
        ),
        (
            {"phases": (Phase(name="a", epochs=1, parts=(AdversarialPart(kind="PGD"),)),)},
            r"a\.parts\.0\.kind: expected one of clean, fgsm, .*, got 'PGD'",
        ),
        (
            {"phases": (Phase(name="a", epochs=1, parts=(AdversarialPart(kind="pgd", steps=0),)),)},
            r"a\.parts\.0\.steps: expected a whole number of at least 1, got 0",
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
            r"a\.parts\.0\.share: expected a number in \[0, 1\], got 1.5",
        ),
        (
            {"phases": (Phase(name="a", epochs=1, augmentation=Augmentation(crop_padding=32)),)},
            r"a\.augmentation\.crop_padding: expected less than the input_size of 32, got 32",
        ),
        ({"optimizer": "adam"}, "optimizer: expected one of sgd, adamw, got 'adam'"),
        ({"arch": "resnet101"}, "arch: expected arch to be one of"),
        ({"arch": "torchvision:vgg11"}, "arch: expected a ResNet, .* got 'torchvision:vgg11'"),
        ({"gradient_clip": -1.0}, "gradient_clip: expected a number of at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay: expected a number of at least 0, got nan"),
        ({"monitor_limit": -5}, "monitor_limit: expected a whole number of at least 0"),
        ({"batch_size": 1}, "batch_size"),
        ({"batch_size": "64"}, "batch_size: expected a whole number of at least 2, got '64'"),
        ({"phases": ("clean",)}, r"phases\.0: expected Phase, got 'clean'"),
        ({"norm": "l1"}, "norm: expected one of linf, l2"),
        ({"input_size": 4}, "input_size: expected a whole number in"),
        ({"held_out": 0.0}, "held_out"),
        ({"ema_decay": 1.0}, "ema_decay"),
    ],
)
def test_invalid_recipe_names_the_field(change: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        replace(quick(), **change)  # type: ignore[arg-type]


def test_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"one of quick, .*gpu-further, .*classic-cpu, got 'slow'"):
        named_recipe("slow")


def test_the_shipped_recipe_leaves_normalisation_to_the_first_batch_norm() -> None:
    recipe: Recipe = cpu()
    assert (recipe.mean, recipe.std) == ((0.0,) * 3, (1.0,) * 3)
    assert (recipe.arch, recipe.stem, recipe.activation) == ("resnet50", "imagenet", "relu")


@pytest.mark.parametrize(
    ("recipe", "passes", "petaflop"),
    [(gpu(), 230, 29), (gpu_further(), 231, 29), (fast(), 199, 11)],
)
def test_gpu_recipe_costs_match_their_docstrings(
    recipe: Recipe, passes: float, petaflop: float
) -> None:
    with torch.device("meta"):
        model = Classifier(Architecture(arch=recipe.arch, stem=recipe.stem))
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 32, 32))
    assert sum(phase.epochs * phase.passes for phase in recipe.phases) == passes
    assert counter.get_total_flops() * 49_000 * passes / 1e15 == pytest.approx(petaflop, rel=0.02)


@pytest.mark.parametrize("recipe", [gpu(), gpu_further(), fast()])
def test_gpu_recipe_phases_continue_the_learning_rate(recipe: Recipe) -> None:
    *_, adversarial, strong = recipe.phases
    assert adversarial.learning_rate * adversarial.final_rate == pytest.approx(strong.learning_rate)
    assert strong.warmup == strong.final_rate == 0


def test_gpu_further_has_the_architecture_it_continues_and_half_the_rate() -> None:
    first, further = gpu(), gpu_further()
    for name in ("arch", "stem", "activation", "input_size", "mean", "std", "held_out"):
        assert getattr(further, name) == getattr(first, name)
    adversarial, strong = further.phases
    assert adversarial.learning_rate == first.phases[1].learning_rate / 2
    assert (adversarial.parts[0].steps, adversarial.teacher) == (2, 0.4)
    assert (strong.parts[0].steps, strong.awp, strong.teacher) == (3, 0.005, 0.4)


def test_plain_has_no_attack_and_the_architecture_of_fast() -> None:
    recipe = plain()
    assert not any(phase.is_adversarial for phase in recipe.phases)
    assert (recipe.arch, recipe.stem) == (fast().arch, fast().stem)
    assert recipe.phases[0].augmentation.mixup == 0
    assert recipe.select == "clean"  # PGD accuracy near 0 could not pick one


def test_awp_and_a_teacher_add_their_passes() -> None:
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
def test_phase_cost(phase: Phase, passes: float) -> None:
    assert phase.passes == passes
    parts = phase.parts
    if len(parts) == 2:
        assert replace(phase, split=True).passes == 13

"""The recipes by name. A further one is one more function in `RECIPES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from training.recipe import AdversarialPart, Augmentation, Phase, Recipe


def classic() -> Recipe:
    """The baseline's own schedule: 100 clean epochs, then 50 of half clean, half FGSM or PGD-20.

    Its mistakes are left out: the model is picked on held-out images by PGD accuracy, attacks
    leave batch norm alone, and averaged weights are kept. Hours on a GPU.
    """
    augmentation = Augmentation(crop_padding=4, flip=0.5, rotation=10, jitter=0.1, cutout=8)
    return Recipe(
        name="classic",
        weight_decay=1e-4,
        batch_size=256,
        phases=(
            Phase(
                name="clean",
                epochs=100,
                warmup=0.05,
                augmentation=Augmentation(
                    crop_padding=4, flip=0.5, rotation=10, jitter=0.1, cutout=8, mixup=0.2
                ),
            ),
            Phase(
                name="adversarial",
                epochs=50,
                parts=(
                    AdversarialPart(kind="clean", share=0.5),
                    AdversarialPart(kind="fgsm", share=0.25),
                    AdversarialPart(kind="pgd", share=0.25, steps=20, alpha=2 / 255),
                ),
                split=True,
                augmentation=augmentation,
            ),
        ),
    )


def classic_cpu() -> Recipe:
    """`classic` in about as many passes as `cpu`, to compare the two on the same data and machine.

    Two thirds of the epochs are clean, as in `classic`; the averaged weights span 1.3 epochs, as
    in `cpu`.
    """
    recipe = classic()
    clean, adversarial = recipe.phases
    phases = replace(clean, epochs=6), replace(adversarial, epochs=3)
    return replace(recipe, name="classic-cpu", ema_decay=0.996, phases=phases)


def cpu() -> Recipe:
    """A robust ResNet-50 from 50,000 images on two CPU cores within 2.5 hours.

    AdamW, because SGD stays at chance for hundreds of steps on so short a schedule; mild
    augmentation and N-FGSM, because there is no time to overfit or for more attack steps.
    """
    return Recipe(
        name="cpu",
        optimizer="adamw",
        weight_decay=0.05,
        zero_init_residual=True,
        ema_decay=0.998,
        phases=(
            Phase(name="clean", epochs=3, learning_rate=2e-3, warmup=0.1),
            Phase(
                name="adversarial",
                epochs=10,
                learning_rate=1.4e-3,
                parts=(
                    AdversarialPart(kind="clean", share=0.15),
                    AdversarialPart(kind="n-fgsm", share=0.85),
                ),
                split=True,
            ),
        ),
    )


def cpu_further() -> Recipe:
    """A further hour and a half for what `cpu` made: begin with it by ``--init``.

    Every image attacked, a lower peak rate and a longer average of the weights.
    """
    return replace(
        cpu(),
        name="cpu-further",
        ema_decay=0.999,
        phases=(
            Phase(
                name="adversarial",
                epochs=9,
                learning_rate=1e-3,
                parts=(AdversarialPart(kind="n-fgsm"),),
            ),
        ),
    )


def quick() -> Recipe:
    """Minutes on a laptop: shows the whole pipeline on a small data set such as `digits`."""
    return Recipe(
        name="quick",
        arch="resnet18",
        optimizer="adamw",
        weight_decay=0.05,
        zero_init_residual=True,
        ema_decay=0.99,
        batch_size=64,
        held_out=0.1,
        phases=(
            Phase(
                name="clean",
                epochs=4,
                learning_rate=2e-3,
                augmentation=Augmentation(
                    crop_padding=2, flip=0, rotation=10, jitter=0.1, cutout=4, mixup=0.2
                ),
            ),
            Phase(
                name="adversarial",
                epochs=8,
                learning_rate=1e-3,
                parts=(
                    AdversarialPart(kind="clean", share=0.25),
                    AdversarialPart(kind="n-fgsm", share=0.25),
                    AdversarialPart(kind="pgd", share=0.5, steps=3),
                ),
                split=True,
                augmentation=Augmentation(crop_padding=2, flip=0, rotation=5),
            ),
        ),
    )


def gpu() -> Recipe:
    """A robust ResNet-50 with the CIFAR stem within half an hour of one H200; never run in full.

    Made for 50,000 images of 32 pixels; aims at 52.5% under AutoAttack (Linf 8/255) with 83% clean.
    So far it ran on a CPU only, a few steps of a smaller network. What fits into the time: a
    forward pass is 1.3 GMACs, 2.6 GFLOP an image, a backward pass twice that, and one to the image
    alone once. 49,000 images an epoch make 0.127 PFLOP a pass (`Phase.passes`):

        phase             epochs  passes  PFLOP
        clean                 10       3      4
        adversarial           68      11     95
        strong                12      23     35   with AWP all through
        all                   90            134

    At 100 TFLOP/s, an eighth of the best bf16 matrix rate of that GPU (about 790, measured) and
    what such networks of small convolutions and batch norm usually reach, this is 1,340 s; scoring
    1,000 images 90 times in float32 takes some 180 s, compiling and the end some 120 s: 27 minutes.
    `benchmarks/training.py` measures the rate; the epochs of `adversarial` are what to trade.

    Sources: TRADES (Zhang et al. 2019, arXiv:1901.08573); few well-chosen attack steps and more
    epochs (Addepalli et al. 2022, arXiv:2210.15318); weight decay 5e-4, label smoothing and smooth
    activations (Pang et al. 2021, arXiv:2010.00467); AWP (Wu et al. 2020, arXiv:2004.05884).
    """
    return Recipe(
        name="gpu",
        stem="cifar",
        activation="silu",
        weight_decay=5e-4,
        batch_size=256,
        ema_decay=0.999,  # a window of 1,000 steps, 5 epochs
        phases=(
            Phase(name="clean", epochs=10, learning_rate=0.2, warmup=0.2, final_rate=0.5),
            Phase(
                name="adversarial",
                epochs=68,
                learning_rate=0.2,
                warmup=0.02,
                final_rate=0.15,
                parts=(AdversarialPart(kind="pgd", steps=2),),
                loss="trades",
                trades_beta=5.0,
            ),
            Phase(
                name="strong",
                epochs=12,
                learning_rate=0.03,
                warmup=0.0,
                parts=(AdversarialPart(kind="pgd", steps=5),),
                loss="trades",
                trades_beta=5.0,
                awp=0.005,
            ),
        ),
    )


def fast() -> Recipe:
    """A robust ResNet-18 with the CIFAR stem within 5 minutes of one H200; never run in full.

    Made for 50,000 images of 32 pixels; aims at 45% under AutoAttack (Linf 8/255). A forward pass
    is 0.56 GMACs, 0.055 PFLOP an epoch of 49,000 images: 2 x 3 + 22 x 11 + 4 x 17 passes are 17
    PFLOP, 170 s at the 100 TFLOP/s that `gpu` reckons with; scoring takes some 30 s, compiling and
    the end some 60 s. The graphs are those of ReLU, which is cheaper than SiLU.
    """
    recipe = gpu()
    clean, adversarial, strong = recipe.phases
    return replace(
        recipe,
        name="fast",
        arch="resnet18",
        activation="relu",
        ema_decay=0.998,
        phases=(
            replace(clean, epochs=2),
            replace(adversarial, epochs=22, warmup=0.05),
            replace(strong, epochs=4, awp=0.0),
        ),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "classic": classic,
    "classic-cpu": classic_cpu,
    "cpu": cpu,
    "cpu-further": cpu_further,
    "quick": quick,
    "gpu": gpu,
    "fast": fast,
}


def named_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError that lists the names there are."""
    if name not in RECIPES:
        raise ValueError(f"expected a recipe out of {', '.join(RECIPES)}, got {name[:40]!r}")
    return RECIPES[name]()

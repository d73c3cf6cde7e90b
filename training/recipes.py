"""The built-in recipes. To add one, write a function here and register it with `@recipe`.

Recipes can also live elsewhere: `robust train --recipe` takes a TOML or JSON file and
``package.module:function``, see `training.recipe_sources`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from training.recipe import AdversarialPart, Augmentation, Phase, Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {}
"""Every built-in recipe by name."""
RAN: dict[str, str] = {}
"""Hardware and result of each recipe's full run; ``none yet`` for those without one."""

NO_FULL_RUN = "none yet"

# As in the run whose results `gpu` reports; `gpu-further` and `fast` build on it.
_EVERY_IMAGE_PGD_2 = (AdversarialPart(kind="pgd", steps=2, alpha=8 / 255),)
_EVERY_IMAGE_PGD_3 = (AdversarialPart(kind="pgd", steps=3),)


def recipe(name: str, *, ran: str) -> Callable[[Callable[[], Recipe]], Callable[[], Recipe]]:
    """Register a function that builds a recipe under `name`."""

    def register(build: Callable[[], Recipe]) -> Callable[[], Recipe]:
        RECIPES[name], RAN[name] = build, ran
        return build

    return register


@recipe("quick", ran="71 s on two cores of an AMD EPYC, on `digits`")
def quick() -> Recipe:
    """Train a ResNet-18 on a small dataset such as `digits` in minutes on a laptop."""
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


@recipe(
    "cpu",
    ran="113 minutes on two cores of a Xeon with AMX: CIFAR-10 clean 63.4%, PGD-20 35.0%",
)
def cpu() -> Recipe:
    """Train a plain torchvision ResNet-50 on 50,000 images on two CPU cores in two hours.

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


@recipe(
    "cpu-further",
    ran="90 minutes, mostly on one core of a Xeon with AMX: CIFAR-10 clean 64.2%, PGD-20 37.0%",
)
def cpu_further() -> Recipe:
    """Continue the training of `cpu` for another hour and a half, with `--init`.

    Every image is attacked, at a lower peak rate and with a longer average of the weights.
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


@recipe(
    "plain",
    ran="131 minutes on two cores, later one, of an EPYC beside other work: CIFAR-10 clean 88.9%, "
    "PGD-20 0.5%",
)
def plain() -> Recipe:
    """Train a standard ResNet-18 (CIFAR stem) without attacks, as a baseline for robust models.

    A single clean phase with a short schedule and a high peak rate. The goal is 91% clean accuracy
    on CIFAR-10 in about an hour on a CPU; robust accuracy ends near 0. A training step of 128
    images needs 0.43 TFLOP, so 8 epochs in an hour take 0.4 TFLOP/s: some two cores with AMX, or
    eight without. `--minutes` fits the epochs to a slower machine. No mixup and no cutout, because
    8 epochs are too few to overfit.
    """
    return Recipe(
        name="plain",
        arch="resnet18",
        stem="cifar",
        ema_decay=0.998,  # a window of 500 steps, 1.3 epochs
        select="clean",
        phases=(
            Phase(
                name="clean",
                epochs=8,
                learning_rate=0.2,
                warmup=0.2,
                augmentation=Augmentation(jitter=0.1),
            ),
        ),
    )


@recipe(
    "gpu",
    ran="535 s on one NVIDIA H200: CIFAR-10 clean 82.7%, PGD-20 53.7%",
)
def gpu() -> Recipe:
    """Train a robust ResNet-50 (CIFAR stem, SiLU) on 50,000 images in nine minutes on one H200.

    Ran in full on one NVIDIA H200 (torch 2.11, bf16, torch.compile), seed 0, on CIFAR-10's 50,000
    training images, 1,000 of them held out: 535 s from process start to written file, of which
    146 s were torch.compile with a cold cache. On CIFAR-10's test images, Linf 8/255:

        clean                 82.7%  (4,137 of 5,000)
        FGSM                  58.5%  (2,927 of 5,000)
        PGD-20, float32       53.5%  (2,677 of 5,000)
        APGD-CE then APGD-T   50.4%  (1,259 of 2,500 picked at random)

    Held-out PGD-10 accuracy was still rising at the last epoch (55.2%), so more epochs are worth
    more than anything else: `gpu-further`.

    Sources: few well-chosen attack steps and more epochs (Addepalli et al. 2022,
    arXiv:2210.15318); weight decay 5e-4, label smoothing and smooth activations (Pang et al. 2021,
    arXiv:2010.00467); AWP (Wu et al. 2020, arXiv:2004.05884).
    """
    return Recipe(
        name="gpu",
        stem="cifar",
        activation="silu",
        weight_decay=5e-4,
        batch_size=256,
        ema_decay=0.999,  # a window of 1,000 steps, 5 epochs
        phases=(
            Phase(
                name="clean",
                epochs=3,
                learning_rate=0.2,
                warmup=0.3,
                final_rate=0.5,
                augmentation=Augmentation(rotation=10, jitter=0.1, cutout=8, mixup=0.2),
            ),
            Phase(
                name="adversarial",
                epochs=26,
                learning_rate=0.2,
                warmup=0.02,
                final_rate=0.15,
                parts=_EVERY_IMAGE_PGD_2,
            ),
            Phase(
                name="strong",
                epochs=3,
                learning_rate=0.03,
                warmup=0.0,
                parts=_EVERY_IMAGE_PGD_3,
                teacher=0.4,
                awp=0.005,
            ),
        ),
    )


@recipe("gpu-further", ran=NO_FULL_RUN)
def gpu_further() -> Recipe:
    """Continue the training of `gpu` for another nine minutes on one H200, with `--init`.

    No clean phase, half the peak rate, and the averaged model as a teacher from the first step.
    It makes as many passes as `gpu`: 24 x 8 + 3 x 13 = 231 per image, against 230. Use the seed of
    the first run and the same data in the same order, so that the same images are held out.
    """
    recipe = gpu()
    _, adversarial, strong = recipe.phases
    return replace(
        recipe,
        name="gpu-further",
        phases=(
            replace(
                adversarial,
                epochs=24,
                learning_rate=0.1,
                warmup=0.05,
                final_rate=0.3,
                teacher=0.4,
            ),
            strong,
        ),
    )


@recipe("fast", ran=NO_FULL_RUN)
def fast() -> Recipe:
    """Train a robust ResNet-18 (CIFAR stem) on 50,000 images in five minutes on one H200.

    The schedule of `gpu` with fewer epochs and ReLU, whose graphs are cheaper. A forward pass is
    0.56 GMACs where the ResNet-50's is 1.30, and 2 x 3 + 22 x 7 + 3 x 13 = 199 passes an image
    instead of 230: 11 PFLOP where `gpu` takes 29.
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
            replace(strong, epochs=3),
        ),
    )


@recipe("classic", ran=NO_FULL_RUN)
def classic() -> Recipe:
    """Train with the baseline's schedule: 100 clean epochs, then 50 half clean and half attacked.

    A quarter of each adversarial batch is FGSM and a quarter PGD-20. The baseline's mistakes are
    fixed: the model is selected on held-out images by PGD accuracy, attacks don't change batch
    norm, and averaged weights are kept. Takes hours on a GPU.
    """
    augmentation = Augmentation(rotation=10, jitter=0.1, cutout=8)
    return Recipe(
        name="classic",
        weight_decay=1e-4,
        batch_size=256,
        phases=(
            Phase(
                name="clean",
                epochs=100,
                augmentation=replace(augmentation, mixup=0.2),
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


@recipe(
    "classic-cpu",
    ran="113 minutes on two cores of a Xeon with AMX: CIFAR-10 clean 51.5%, PGD-20 23.4%",
)
def classic_cpu() -> Recipe:
    """Train `classic` in about as many passes as `cpu`, to compare the two on one machine.

    Two thirds of the epochs are clean, as in `classic`; the weights are averaged over 1.3 epochs,
    as in `cpu`.
    """
    recipe = classic()
    clean, adversarial = recipe.phases
    phases = replace(clean, epochs=6), replace(adversarial, epochs=3)
    return replace(recipe, name="classic-cpu", ema_decay=0.996, phases=phases)


def named_recipe(name: str, *, others: str = "") -> Recipe:
    """Build the recipe of that name. Raises ValueError that lists the names, and `others`."""
    if name not in RECIPES:
        known = ", ".join(RECIPES) + (f", or {others}" if others else "")
        raise ValueError(f"expected recipe to be one of {known}, got {name[:200]!r}")
    return RECIPES[name]()

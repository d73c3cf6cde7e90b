"""A run small enough for a unit test: 16-pixel images whose color is their class.

The network has 78,000 weights; with the 11 million of a ResNet-18 a run takes five times as long.
"""

from dataclasses import replace

import torch

from robust.datasets import Dataset
from training.recipe import AdversarialPart, Augmentation, Phase, Recipe


def colors() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 4
    base = torch.tensor([[220, 30, 30], [30, 220, 30], [30, 30, 220], [200, 200, 30]])
    noise = torch.randint(-30, 31, (80, 3, 16, 16), generator=generator)
    images = (base[labels].view(-1, 3, 1, 1) + noise).clamp(0, 255).to(torch.uint8)
    return Dataset(
        images=images, labels=labels, classes=("red", "green", "blue", "yellow"), name="colors"
    )


def tiny() -> Recipe:
    return Recipe(
        name="tiny",
        arch="wide_resnet10_1",
        stem="cifar",
        input_size=16,
        batch_size=16,
        held_out=0.2,
        ema_decay=0.9,
        optimizer="adamw",
        weight_decay=0.01,
        precision="fp32",
        phases=(
            Phase(
                name="clean",
                epochs=1,
                learning_rate=2e-3,
                augmentation=Augmentation(
                    crop_padding=2, flip=0.5, rotation=10, jitter=0.1, cutout=4, mixup=0.2
                ),
            ),
            Phase(
                name="adversarial",
                epochs=2,
                learning_rate=1e-3,
                parts=(
                    AdversarialPart(kind="clean", share=0.5),
                    AdversarialPart(kind="pgd", share=0.5, steps=2),
                ),
                split=True,
            ),
        ),
    )


def shared() -> Recipe:
    """Steps so small that roundings stay small: on so few pixels they grow fast."""
    phases = tiny().phases
    noisy = replace(phases[1], learning_rate=1e-3, parts=(AdversarialPart(kind="n-fgsm"),))
    return replace(tiny(), optimizer="sgd", phases=(replace(phases[0], learning_rate=1e-3), noisy))

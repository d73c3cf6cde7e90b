"""A small checkpoint with random weights, and one service shared by tests that don't change it."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.engine import model_reloader
from app.settings import Settings
from robust.checkpoint import save_checkpoint
from robust.classifier import Architecture, Classifier
from robust.images import to_float
from robust.sidecar import Sidecar
from tests.support.serving import CLASSES, Running, pixels, serving

# Answers must not depend on the processor: tests of bfloat16 ask for it.
os.environ["ROBUST_PRECISION"] = "fp32"


SMALL = "wide_resnet10_1"  # a service starts with it in a fifth of the time of a ResNet-18


def write_checkpoint(
    path: Path, seed: int = 0, classes: tuple[str, ...] = CLASSES, *, arch: str = SMALL
) -> str:
    """Save a network with the random weights of `seed`; its SHA-256."""
    stem = "cifar" if arch == SMALL else "imagenet"
    architecture = Architecture(arch=arch, stem=stem, num_classes=len(classes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = Classifier(architecture).eval()
    # Random weights answer nearly the same for all classes; wider, so that some class leads.
    head = classifier.net.fc.requires_grad_(False)
    head.weight.mul_(64 if arch == SMALL else 8)
    if arch == SMALL:  # and nearly the same for all images
        with torch.no_grad():
            head.bias -= classifier(to_float(pixels(seed=100, n=16))).mean(dim=0)
    sidecar = Sidecar(architecture=architecture, classes=classes)
    return save_checkpoint(path, classifier, sidecar).weights_sha256


@pytest.fixture(scope="session", autouse=True)
def frozen_imports() -> Iterator[None]:
    """Each service collects garbage as it starts; what was imported need not be scanned again."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patched:
        # Only the process of `robust serve` freezes its models too, see test_server.py.
        patched.setattr(model_reloader, "refreeze_objects", lambda: None)
        yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "robust_model.pt"
    write_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def running(checkpoint: Path) -> Iterator[Running]:
    settings = Settings(checkpoint=checkpoint, threads=1, device="cpu", deadline_seconds=120)
    with serving(settings) as running:
        yield running

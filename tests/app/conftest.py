"""A small checkpoint with random weights, and one service for the tests that leave it as it is."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.settings import Settings
from robust.checkpoint import save_checkpoint
from robust.classifier import Architecture, Classifier
from robust.sidecar import Sidecar
from tests.support.serving import CLASSES, Running, serving

# Answers must not depend on the processor: tests of bfloat16 ask for it.
os.environ.setdefault("ROBUST_PRECISION", "fp32")


def write_checkpoint(path: Path, seed: int = 0, classes: tuple[str, ...] = CLASSES) -> str:
    """Save a ResNet-18 with the random weights of `seed`; its SHA-256."""
    architecture = Architecture(arch="resnet18", num_classes=len(classes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = Classifier(architecture)
        # Random weights answer nearly the same for all classes; wider, so that some class leads.
        classifier.net.fc.weight.data.mul_(8)
    sidecar = Sidecar(architecture=architecture, classes=classes)
    return save_checkpoint(path, classifier, sidecar).weights_sha256


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "robust_model.pt"
    write_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def running(checkpoint: Path) -> Iterator[Running]:
    with serving(Settings(checkpoint=checkpoint, threads=1, device="cpu")) as running:
        yield running

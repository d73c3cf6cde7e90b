"""Fixtures for the tests of every package."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Tests run side by side: a thread each. Also in the processes they start, read as torch is loaded.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

from robust.checkpoint import save_checkpoint
from robust.classifier import Architecture, Classifier
from robust.sidecar import Sidecar

# No test depends on speed, on chance, or on what earlier runs have found.
settings.register_profile(
    "any machine",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("any machine")

CLASSES = ("cat", "dog", "frog", "ship")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The commands configure logging for their process, which here runs other tests, too."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    found = logging.Logger.manager.loggerDict.values()
    loggers = [root, *(item for item in found if isinstance(item, logging.Logger))]
    levels = [logger.level for logger in loggers]
    yield
    root.handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        if logger.level != level:
            logger.setLevel(level)


@pytest.fixture(scope="session")
def make_classifier() -> Callable[..., Classifier]:
    def make(**fields: object) -> Classifier:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            architecture = Architecture(arch="resnet18", num_classes=4, **fields)  # type: ignore[arg-type]
            return Classifier(architecture).eval()

    return make


@pytest.fixture(scope="session")
def checkpoint_path(
    tmp_path_factory: pytest.TempPathFactory, make_classifier: Callable[..., Classifier]
) -> Path:
    """A float16 ResNet-18 of four classes with its sidecar. Not to be written to."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    classifier = make_classifier()
    save_checkpoint(
        path, classifier, Sidecar(architecture=classifier.architecture, classes=CLASSES)
    )
    return path

"""A checkpoint with its run and an evaluation whose numbers are known."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robust.checkpoint import save_checkpoint
from robust.classifier import Architecture, Classifier
from robust.sidecar import DataRecord, Sidecar
from robust.threat_model import ThreatModel

CLASSES = ("cat", "dog & <b>", "frog", "ship")
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "phases": [
        {
            "name": "clean",
            "epochs": 1,
            "parts": [{"kind": "clean", "share": 1.0, "steps": 1}],
            "loss": "cross-entropy",
            "learning_rate": 0.002,
            "warmup": 0.1,
            "augmentation": {"crop_padding": 4, "flip": 0.5, "mixup": 0.0},
        },
        {
            "name": "adversarial",
            "epochs": 2,
            "parts": [{"kind": "clean", "share": 0.25}, {"kind": "pgd", "share": 0.75, "steps": 3}],
            "loss": "trades",
            "trades_beta": 6.0,
            "learning_rate": 0.001,
            "warmup": 0.0,
            "augmentation": {},
        },
    ],
    "optimizer": "adamw",
    "batch_size": 128,
    "held_out": 0.02,
    "select": "pgd",
}
DATA = {"name": "train.npz", "count": 50_000, "sha256": "d" * 64}
EPOCHS: list[dict[str, Any]] = [
    {
        "epoch": k,
        "phase": phase,
        "adversarial": phase != "clean",
        "loss": loss,
        "learning_rate": 0.00125,
        "clean": clean,
        "fgsm": 0.3,
        "pgd": pgd,
        "n": 1000,
        "images_per_second": 50.0 * k,
        "seconds": 60.0 * k,
        "scoring_seconds": 6.0,
    }
    for k, phase, loss, clean, pgd in (
        (1, "clean", 1.8525, 0.535, 0.019),
        (2, "adversarial", 2.0935, 0.501, 0.262),
        (3, "adversarial", float("nan"), 0.611, 0.348),
    )
]


def result(attack: str, matrix: list[list[int]], **fields: Any) -> dict[str, Any]:
    """As `robust evaluate` writes it; `matrix` is the confusion."""
    sizes = [sum(row) for row in matrix]
    right = [row[k] for k, row in enumerate(matrix)]
    values = {
        "attack": attack,
        "correct": sum(right),
        "n": sum(sizes),
        "per_class": [a / b if b else None for a, b in zip(right, sizes, strict=True)],
        "confusion": matrix,
        "distances": None,
        "stages": [],
        "forwards": 400,
        "backwards": 80,
        "unconfirmed": 0,
        "seconds": 4.0,
    }
    if attack != "clean":
        ball = {"norm": "linf", "eps": 8 / 255, "eps_text": "8/255"}
        values |= {**ball, "alpha": 2 / 255, "steps": 20, "restarts": 1, "seed": 0}
    return values | fields


CLEAN = [[30, 5, 4, 1], [10, 20, 8, 2], [3, 4, 33, 0], [0, 0, 0, 0]]
ROBUST = [[12, 20, 6, 2], [15, 9, 12, 4], [9, 10, 21, 0], [0, 0, 0, 0]]
EVALUATION: dict[str, Any] = {
    "checkpoint": "/home/somebody/model.pt",
    "data": {
        "name": "test.npz",
        "count": 500,
        "sha256": "e" * 64,
        "scored": 120,
        "scored_sha256": "f" * 64,
        "dtype": "float32",
        "changes": ["skipped 1 broken link: cat/gone.png"],
    },
    "n": 120,
    "total": 120,
    "results": [result("clean", CLEAN), result("pgd-20", ROBUST)],
    "worst_case": {"accuracy": 0.35, "correct": 42, "n": 120, "interval": [0.27, 0.44]},
    "curve": [
        {"eps": eps / 255, "eps_text": f"{eps}/255", "correct": correct, "n": 50}
        for eps, correct in ((0, 35), (4, 24), (8, 18), (32, 3), (128, 0))
    ],
    "probes": {
        "n": 100,
        "difference": 0.0,
        "probabilities": False,
        "zero_gradients": 7,
        "nan_gradients": 0,
        "right": 66,
        "right_normalized": 31,
    },
    "flags": [{"name": "gradients", "text": "7 have no gradient", "advice": "look for rounding"}],
    "notes": ["fab-t: tries 3 target classes, not 9"],
    "precision": "fp32",
    "classes": list(CLASSES),
    "seed": 0,
    "batch_size": 100,
    "versions": {"robust": "0.1.0", "torch": "2.15.0"},
    "device": "cpu (1 threads)",
    "seconds": 12.5,
}


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.pt, runs/model, pgd.json and set.npz. Not to be written to."""
    folder = tmp_path_factory.mktemp("house")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = Classifier(Architecture(arch="resnet18", num_classes=4)).eval()
    sidecar = save_checkpoint(
        folder / "model.pt",
        classifier,
        Sidecar(
            architecture=classifier.architecture,
            classes=CLASSES,
            threat_model=ThreatModel(eps=8 / 255),
            recipe={**RECIPE, "kept_epoch": 3},
            data=DataRecord(**DATA),
            seed=5,
            versions={"torch": "2.15.0"},
            device="cpu (2 threads)",
            duration_seconds=200.0,
            evaluation=[
                {"data": "held out from training", **result("clean", CLEAN)},
                {"data": "test.npz", "data_sha256": "f" * 64, **result("clean", ROBUST)},
            ],
        ),
    )
    run = folder / "runs" / "model"
    run.mkdir(parents=True)
    manifest = {"recipe": RECIPE, "data": DATA, "seed": 5, "finished": True}
    (run / "run.json").write_text(json.dumps(manifest))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EPOCHS))
    evaluation = copy.deepcopy(EVALUATION) | {"weights_sha256": sidecar.weights_sha256}
    (folder / "pgd.json").write_text(json.dumps(evaluation))
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        seen = classifier(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).argmax(dim=1).numpy()
    labels = np.where(np.arange(6) % 2, (seen + 1) % 4, seen)  # every second one is wrong
    np.savez(folder / "set.npz", images=images, labels=labels)
    return folder


@pytest.fixture
def evaluation() -> dict[str, Any]:
    """What `robust evaluate --json` writes, of the weights ``0000``."""
    return copy.deepcopy(EVALUATION) | {"weights_sha256": "0000"}


@pytest.fixture
def sidecar() -> Sidecar:
    """Of the same classes."""
    return Sidecar(architecture=Architecture(arch="resnet18", num_classes=4), classes=CLASSES)


@pytest.fixture
def make_result() -> Callable[..., dict[str, Any]]:
    """One of its results, from a name and a confusion matrix."""
    return result

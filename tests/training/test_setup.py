"""What is set up before the first step of a run."""

from typing import Any

import pytest

from robust.classifier import Architecture
from robust.datasets import Dataset
from robust.sidecar import DataRecord, Sidecar
from training.setup import warn_about_seen_images


@pytest.mark.parametrize(
    ("seed", "share", "before", "warning"),
    [
        (0, 0.2, {"held_out": 0.2}, ""),
        (0, 0.1, {"held_out": 0.2}, ""),  # a part of the images that were held out
        (0, 0.2, {}, ""),
        (1, 0.2, {"held_out": 0.2}, "with --seed 0 the same images are held out"),
        (0, 0.3, {"held_out": 0.2}, "with --set held_out=0.2 the same images"),
        (1, 0.3, {"held_out": 0.2}, "with --seed 0 --set held_out=0.2 the same images"),
        (0, 0.2, {"held_out": 0.2, "validation": {"name": "val.npz"}}, "use --val as before"),
    ],
)
def test_images_seen_by_the_initial_weights_are_warned_about(
    seed: int,
    share: float,
    before: dict[str, Any],
    warning: str,
    colors: Dataset,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for digest in ("other images", colors.sha256):
        assert not caplog.messages
        earlier = Sidecar(
            architecture=Architecture(num_classes=4),
            classes=colors.classes,
            recipe=before,
            data=DataRecord(name="colors", count=80, sha256=digest),
            seed=0,
        )
        warn_about_seen_images(earlier, colors, share, seed=seed)
    assert len(caplog.messages) == bool(warning)
    assert warning in caplog.text

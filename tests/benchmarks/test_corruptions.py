"""CIFAR-10-C is scored by severity, each against its own labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.corruptions import Row, published


@pytest.mark.parametrize("scale", [1, np.float32(1 / 256)])  # 8 bits, or floats that are not
def test_each_severity_is_a_fifth_of_a_file(tmp_path: Path, scale: float) -> None:
    labels = np.arange(10) % 2
    images = np.zeros((10, 8, 8, 3), np.uint8)
    images[labels == 1] = 255
    images[8:] = 255 - images[8:]  # the last severity fools
    np.save(tmp_path / "fog.npy", images * scale)
    np.save(tmp_path / "labels.npy", labels)

    def by_brightness(x: Tensor) -> Tensor:
        bright = x.mean((1, 2, 3))
        return torch.stack([1 - bright, bright], 1)

    rows = published(
        by_brightness,
        [tmp_path / "fog.npy"],
        torch.device("cpu"),
        size=8,
        classes=("dark", "light"),
        limit=None,
    )
    assert list(rows) == [Row("fog", f"severity {k}", 2 if k < 5 else 0, 2) for k in range(1, 6)]

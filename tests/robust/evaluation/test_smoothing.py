"""Certificates against a linear model, whose distance to the boundary is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from robust import networks
from robust.attacks import ModelError
from robust.evaluation.smoothing import (
    ABSTAINED,
    Certificate,
    certify,
    largest_radius,
    least_share,
)
from robust_cli import run

Model = Callable[[Tensor], Tensor]


def half_space(offset: float) -> tuple[Model, Tensor]:
    """A model of two classes, and an image `offset` from the plane between them, in class 1."""
    normal = torch.zeros(3, 4, 4)
    normal[0, 0, 0], normal[1, 2, 3] = 0.6, 0.8
    image = torch.full((3, 4, 4), 0.5)

    def model(x: Tensor) -> Tensor:
        margin = ((x - image) * normal).sum(dim=(1, 2, 3)) + offset
        return torch.stack([-margin, margin], dim=1)

    return model, image


def certified(offset: float, samples: int = 20_000) -> Certificate:
    model, image = half_space(offset)
    generator = torch.Generator().manual_seed(0)
    return certify(model, image, sigma=0.5, samples=samples, batch_size=10_000, generator=generator)


@pytest.mark.parametrize("offset", [0.25, 0.5, 1.0])
def test_radius_is_at_most_the_distance_to_the_boundary(offset: float) -> None:
    found = certified(offset)
    assert found.predicted == 1
    assert 0.85 * offset < found.radius < offset


def test_it_abstains_on_the_boundary() -> None:
    assert certified(0.0) == Certificate(predicted=ABSTAINED, radius=0.0)


def test_fewer_samples_certify_a_smaller_radius() -> None:
    assert 0 < certified(1.0, samples=100).radius < certified(1.0, samples=1000).radius


def test_largest_radius_is_reached_if_all_copies_agree() -> None:
    most = largest_radius(sigma=0.5, samples=100, alpha=0.001)
    assert certified(100.0, samples=100).radius == most > certified(0.5, samples=100).radius
    assert largest_radius(sigma=0.5, samples=100, alpha=1e-40) == 0  # it always abstains


def test_noisy_copies_are_classified_in_full_float32() -> None:
    model, image = half_space(1.0)
    seen = set()

    def watched(x: Tensor) -> Tensor:
        seen.add(torch.backends.cuda.matmul.fp32_precision)
        return model(x)

    generator = torch.Generator().manual_seed(0)
    certify(watched, image, sigma=0.5, samples=100, generator=generator)
    assert seen == {"ieee"}


def test_clopper_pearson_bounds() -> None:
    scipy = pytest.importorskip("scipy.stats")
    for seen, n in ((1, 10), (7, 10), (990, 1000), (9_999, 10_000)):
        expected = scipy.beta.ppf(0.001, seen, n - seen + 1)
        assert least_share(seen, n, alpha=0.001) == pytest.approx(expected, abs=1e-9)
    assert least_share(0, 10, alpha=0.001) == 0
    assert least_share(10, 10, alpha=0.001) == pytest.approx(0.001**0.1)


def test_rejects_invalid_arguments() -> None:
    model, image = half_space(1.0)
    with pytest.raises(ValueError, match="sigma above 0"):
        certify(model, image, sigma=0.0, generator=torch.Generator())
    with pytest.raises(ValueError, match="batch_size as a whole number of at least 1, got 0"):
        certify(model, image, sigma=0.1, batch_size=0, generator=torch.Generator())
    with pytest.raises(ModelError, match="finite logits, got NaN"):
        certify(lambda x: model(x) * torch.nan, image, sigma=0.1, generator=torch.Generator())


def test_smooth_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    net = networks.build("wide_resnet10_1", num_classes=3, stem="cifar", input_size=16)
    torch.save({"model": net.state_dict()}, tmp_path / "theirs.pt")
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", images=images, labels=[0, 1, 2])
    out = tmp_path / "certified.json"
    command = ["certify", "--model", str(tmp_path / "theirs.pt"), "--input-size", "16", "--data"]
    command += [str(tmp_path / "few.npz"), "--samples", "100", "--sigma", "1/255"]
    assert run([*command, "--json", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("theirs.pt on 3 of 3 images of few.npz")
    assert lines[1].split() == ["l2", "radius", "certified", "%", "95%", "interval", "correct"]
    told = json.loads(out.read_text())
    radii = [row["radius"] for row in told["images"] if row["right"]]
    assert told["results"][0]["correct"] == len(radii) > 0
    (told_radii,) = [line for line in lines if line.startswith("radius of the correct images: ")]
    most = largest_radius(sigma=1 / 255, samples=100, alpha=0.001)
    assert told_radii.endswith(
        f"median {np.median(radii):.3g}, largest {max(radii):.3g}; at most {most:.3g} with these "
        "settings"
    )
    assert "activation" in told["model"]["guessed"]
    assert run([*command, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["results"] == told["results"]

"""Measures the accuracy of a checkpoint on corrupted images.

    python benchmarks/corruptions.py --data test.npz [--checkpoint PATH] [--json FILE]
    python benchmarks/corruptions.py --data CIFAR-10-C

For a folder of CIFAR-10-C (Hendrycks & Dietterich 2019, arXiv:1903.12261), prints the accuracy for
each corruption at its five severities, and their mean, which can be compared with published
results. For other images, applies a few similar corruptions at three strengths each; those results
can be used to compare checkpoints, but not with published results.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where it is not installed

from robust.checkpoint import load_checkpoint
from robust.classifier import resolve_device
from robust.datasets import Dataset, load_dataset
from robust.evaluation import wilson_interval
from robust.images import to_float
from robust.inference import for_inference
from robust.matching import match_classes

Corruption = Callable[[Tensor, float], Tensor]  # images uint8 (N, 3, H, W) and a strength


def gaussian_noise(images: Tensor, deviation: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return as_bytes(images / 255 + deviation * noise)


def blur(images: Tensor, sigma: float) -> Tensor:
    return transforms.gaussian_blur(images, [7, 7], [sigma, sigma])


def brightness(images: Tensor, change: float) -> Tensor:
    return as_bytes(images / 255 + change)


def contrast(images: Tensor, factor: float) -> Tensor:
    means = (images / 255).mean((2, 3), keepdim=True)
    return as_bytes(means + factor * (images / 255 - means))


def pixelate(images: Tensor, factor: float) -> Tensor:
    side = images.shape[-1]
    small = transforms.resize(images, [round(side * factor)] * 2, antialias=True)
    nearest = transforms.InterpolationMode.NEAREST
    return transforms.resize(small, [side] * 2, interpolation=nearest)


def jpeg(images: Tensor, quality: float) -> Tensor:
    done = []
    for image in images:
        file = io.BytesIO()
        transforms.to_pil_image(image).save(file, "JPEG", quality=round(quality))
        done.append(transforms.pil_to_tensor(Image.open(file)))
    return torch.stack(done)


def rotation(images: Tensor, degrees: float) -> Tensor:
    return transforms.rotate(images, degrees, transforms.InterpolationMode.BILINEAR)


SEVERITIES = 5
CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, float, float], str]] = {
    "Gaussian noise": (gaussian_noise, (0.04, 0.08, 0.12), "deviation"),
    "Gaussian blur": (blur, (0.5, 1.0, 1.5), "sigma in pixels"),
    "brightness": (brightness, (0.1, 0.2, 0.3), "added"),
    "contrast": (contrast, (0.6, 0.4, 0.2), "factor"),
    "pixelate": (pixelate, (0.75, 0.5, 0.375), "share of the side kept"),
    "JPEG": (jpeg, (50, 20, 10), "quality"),
    "rotation": (rotation, (10, 20, 30), "degrees"),
}


def as_bytes(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def count_correct(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, device: torch.device
) -> int:
    correct = 0
    with torch.no_grad():
        for part, truth in zip(images.split(250), labels.split(250), strict=True):
            predicted = model(to_float(part.to(device))).argmax(1).cpu()
            correct += int((predicted == truth).sum())
    return correct


@dataclass(frozen=True)
class Row:
    corruption: str
    strength: str
    correct: int
    n: int


def self_corrupted(
    model: Callable[[Tensor], Tensor], data: Dataset, device: torch.device
) -> Iterator[Row]:
    """The accuracy without corruption, and with each of ours at each strength."""
    images, labels, n = data.images, data.labels, len(data)
    yield Row("none", "", count_correct(model, images, labels, device), n)
    for name, (corrupt, strengths, unit) in CORRUPTIONS.items():
        for strength in strengths:
            correct = count_correct(model, corrupt(images, strength), labels, device)
            yield Row(name, f"{unit} {strength:g}", correct, n)


def published(
    model: Callable[[Tensor], Tensor],
    files: Sequence[Path],
    device: torch.device,
    *,
    size: int,
    classes: Sequence[str],
    limit: int | None,
) -> Iterator[Row]:
    """The accuracy for each file, which has a fifth of its images per severity, mildest first."""
    for file in files:
        data = match_classes(load_dataset(file, size=size), classes).in_8_bits()
        for change in data.changes:
            click.echo(f"note: {file.name}: {change}", err=True)
        if len(data) % SEVERITIES:
            raise click.UsageError(
                f"{file}: expected {SEVERITIES} severities, got {len(data)} images"
            )
        for severity, part in enumerate(data.images.chunk(SEVERITIES)):
            labels = data.labels.chunk(SEVERITIES)[severity]
            order = random_order(len(part), limit)
            correct = count_correct(model, part[order], labels[order], device)
            yield Row(file.stem, f"severity {severity + 1}", correct, len(order))


def random_order(n: int, limit: int | None) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:limit]


@click.command(help=__doc__)
@click.option("--data", required=True, metavar="PATH")
@click.option("--checkpoint", type=click.Path(path_type=Path), default="models/robust_model.pt")
@click.option("--limit", type=click.IntRange(min=1), help="Number of random images. Default: all.")
@click.option("--device", "device_name", default="auto", show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    data: str, checkpoint: Path, limit: int | None, device_name: str, json_path: Path | None
) -> None:
    device = resolve_device(device_name)
    loaded = load_checkpoint(checkpoint, device=device)
    size, classes = loaded.sidecar.architecture.input_size, loaded.sidecar.classes
    model = for_inference(loaded.classifier, device)
    files = sorted(file for file in Path(data).glob("*.npy") if file.name != "labels.npy")
    if files:
        rows = published(model, files, device, size=size, classes=classes, limit=limit)
    else:
        dataset = match_classes(load_dataset(data, size=size, train=False), classes).in_8_bits()
        for change in dataset.changes:
            click.echo(f"note: {change}", err=True)
        rows = self_corrupted(model, dataset.subset(random_order(len(dataset), limit)), device)
    click.echo(f"{checkpoint} ({loaded.sha256[:12]}), {Path(data).name}; accuracy in percent\n")
    click.echo("| corruption | strength | n | accuracy % | 95% interval |\n|---|---|---|---|---|")
    done = []
    for row in rows:
        low, high = wilson_interval(row.correct, row.n)
        click.echo(
            f"| {row.corruption} | {row.strength} | {row.n} | {100 * row.correct / row.n:.2f} "
            f"| {100 * low:.1f} to {100 * high:.1f} |"
        )
        done.append(row)
    corrupted = [row.correct / row.n for row in done if row.corruption != "none"]
    mean = sum(corrupted) / len(corrupted)
    click.echo(f"\nmean over {len(corrupted)} corrupted sets: {100 * mean:.2f}")
    if json_path is not None:
        report = {"sha256": loaded.sha256, "mean": mean, "rows": [asdict(row) for row in done]}
        json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How does a checkpoint do on images nobody attacked but weather, lenses and files have changed?

    python benchmarks/corruptions.py --data test.npz [--checkpoint PATH] [--json FILE]

Prints accuracy for each corruption at three severities, in the manner of Hendrycks & Dietterich
2019 (arXiv:1903.12261) but not their files: these are a few of their kinds, made here, so the
figures compare checkpoints with one another and not with published ones.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import click
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where it is not installed

from robust.checkpoint import load_checkpoint
from robust.classifier import resolve_device
from robust.datasets import load_dataset
from robust.evaluation import wilson_interval
from robust.images import to_float
from robust.inference import for_inference

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


@click.command(help=__doc__)
@click.option("--data", required=True, metavar="PATH")
@click.option("--checkpoint", type=click.Path(path_type=Path), default="models/robust_model.pt")
@click.option("--limit", type=click.IntRange(min=1), help="Images, picked at random. Default: all.")
@click.option("--device", "device_name", default="auto", show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    data: str, checkpoint: Path, limit: int | None, device_name: str, json_path: Path | None
) -> None:
    device = resolve_device(device_name)
    loaded = load_checkpoint(checkpoint, device=device)
    dataset = load_dataset(data, size=loaded.sidecar.architecture.input_size)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:limit]
    images, labels = dataset.images[order], dataset.labels[order]
    model = for_inference(loaded.classifier, device)
    n = len(images)
    rows = [{"corruption": "none", "strength": None, "correct": None}]
    rows[0]["correct"] = count_correct(model, images, labels, device)
    for name, (corrupt, strengths, unit) in CORRUPTIONS.items():
        for strength in strengths:
            correct = count_correct(model, corrupt(images, strength), labels, device)
            rows.append(
                {"corruption": name, "strength": strength, "unit": unit, "correct": correct}
            )
    click.echo(f"{checkpoint} ({loaded.sha256[:12]}), {dataset.name}, n={n}; accuracy in percent\n")
    click.echo("| corruption | strength | accuracy % | 95% interval |\n|---|---|---|---|")
    for row in rows:
        low, high = wilson_interval(row["correct"], n)
        strength = "" if row["strength"] is None else f"{row['unit']} {row['strength']:g}"
        click.echo(
            f"| {row['corruption']} | {strength} | {100 * row['correct'] / n:.2f} "
            f"| {100 * low:.1f} to {100 * high:.1f} |"
        )
    if json_path is not None:
        json_path.write_text(
            json.dumps({"n": n, "sha256": loaded.sha256, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

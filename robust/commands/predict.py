"""``robust predict``: what a checkpoint sees in images."""

from __future__ import annotations

from pathlib import Path

import click

from robust.commands.options import checkpoint_option, device_option, read_image
from robust.commands.output import percent, plain, table

BATCH_SIZE = 64


@click.command()
@click.argument(
    "images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE..."
)
@checkpoint_option
@device_option
@click.option("--top-k", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def predict(
    images: tuple[Path, ...], checkpoint: Path, device_name: str, top_k: int, as_json: bool
) -> None:
    """Tell the likeliest classes of each image.

    JPEG, PNG and WebP; each image is cropped to its central square and resized to the model's
    input. Example:

    \b
        robust predict examples/cat.jpg --top-k 2
    """
    import torch

    from robust.checkpoint import load_checkpoint
    from robust.classifier import resolve_device
    from robust.files import to_json
    from robust.images import to_float
    from robust.prediction import predict as predict_batch
    from robust.prediction import top_classes

    device = resolve_device(device_name)
    loaded = load_checkpoint(checkpoint, device=device)
    model, classes = loaded.classifier, loaded.sidecar.classes
    batch = torch.stack([read_image(path, model) for path in images])
    probabilities = torch.cat(
        [predict_batch(model, to_float(part.to(device))) for part in torch.split(batch, BATCH_SIZE)]
    )
    tops = [top_classes(row, classes, top_k) for row in probabilities]
    if as_json:
        predictions = [
            {"image": str(path), "top": [vars(item) for item in top]}
            for path, top in zip(images, tops, strict=True)
        ]
        report = {
            "checkpoint": str(checkpoint),
            "weights_sha256": loaded.sha256,
            "predictions": predictions,
        }
        click.echo(to_json(report), nl=False)
        return
    rows = [
        [str(path), *(f"{plain(item.label)} {percent(item.probability)}" for item in top)]
        for path, top in zip(images, tops, strict=True)
    ]
    header = ["image", *(f"top {rank + 1}" for rank in range(len(tops[0])))]
    click.echo(table(header, rows))

"""``robust predict``: the likeliest classes of images."""

from __future__ import annotations

import click

from robust.commands.options import (
    ModelChoice,
    exit_status,
    expand_images,
    model_options,
    read_images,
)
from robust.commands.output import percent
from robust.tables import plain, table

BATCH_SIZE = 64


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@model_options
@click.option("--top-k", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def predict(images: tuple[str, ...], model: ModelChoice, top_k: int, as_json: bool) -> int:
    """Print the likeliest classes of each image.

    IMAGE may be a file (JPEG, PNG, WebP, GIF, BMP, TIFF or PPM), a folder or a pattern such as
    'photos/*.jpg'. Each image is cropped to its central square and resized to the model's input;
    a note says so. If a file is not an image, the command names it, classifies the others and
    exits with 1, or 2 if none is an image. Example:

    \b
        robust predict examples/cat.jpg --top-k 2
    """
    import torch

    from robust.files import to_json
    from robust.images import to_float
    from robust.prediction import predict as predict_batch
    from robust.prediction import top_classes

    paths = expand_images(images)
    loaded = model.load()
    classifier, classes = loaded.classifier, loaded.sidecar.classes
    read, broken = read_images(paths, classifier)
    tops = []
    if read:
        batch = torch.stack([image.pixels for image in read])
        for part in torch.split(batch, BATCH_SIZE):
            probabilities = predict_batch(classifier, to_float(part.to(classifier.mean.device)))
            tops += [top_classes(row, classes, top_k) for row in probabilities]
    if as_json:
        report = {
            "checkpoint": model.spec,
            "weights_sha256": loaded.sha256,
            "model": loaded.origin(),
            "predictions": [
                {
                    "image": str(image.path),
                    "changes": list(image.changes),
                    "top": [vars(item) for item in top],
                }
                for image, top in zip(read, tops, strict=True)
            ],
            "broken": broken,
        }
        click.echo(to_json(report), nl=False)
    elif read:
        rows = [
            [str(image.path), *(f"{plain(item.label)} {percent(item.probability)}" for item in top)]
            for image, top in zip(read, tops, strict=True)
        ]
        header = ["image", *(f"top {rank + 1}" for rank in range(len(tops[0])))]
        click.echo(table(header, rows))
    return exit_status(read, broken)

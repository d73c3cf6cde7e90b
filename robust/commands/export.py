"""``robust export``: the weights in a file that loads without this project."""

from __future__ import annotations

from pathlib import Path

import click

from robust.commands.options import checkpoint_option


@click.command()
@checkpoint_option
@click.option(
    "--format",
    "file_format",
    required=True,
    type=click.Choice(["torchvision", "safetensors", "onnx"]),
    help="A state dict, the same with metadata, or the whole model.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="File to write.",
)
def export(checkpoint: Path, file_format: str, out: Path) -> None:
    """Write the weights to a file that loads without this project.

    They are float32 there; the Python line that loads them is printed. Example:

    \b
        robust export --format onnx --out robust_model.onnx
    """
    from robust.checkpoint import load_checkpoint
    from robust.export import export_checkpoint

    usage = export_checkpoint(load_checkpoint(checkpoint), out, file_format)  # type: ignore[arg-type]
    click.echo(f"wrote {out}; load it with:\n{usage}")

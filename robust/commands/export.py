"""``robust export``: the model as a state dict, safetensors, ONNX or a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import click

from robust.commands.options import ModelChoice, model_options


@click.command()
@model_options
@click.option(
    "--format",
    "file_format",
    required=True,
    type=click.Choice(["torchvision", "safetensors", "onnx", "hub"]),
    help="torchvision: a state dict; safetensors: the same with metadata; onnx: the whole model; "
    "hub: a folder for the Hugging Face hub.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="File to write, with the suffix .pt, .safetensors or .onnx; for hub a new folder.",
)
def export(model: ModelChoice, file_format: str, out: Path) -> None:
    """Export the model as a state dict, safetensors, ONNX or a Hugging Face folder.

    The weights are float32. The command prints the Python line that loads them. Example:

    \b
        robust export --format onnx --out robust_model.onnx
    """
    from robust.export import export_checkpoint

    usage = export_checkpoint(model.load(), out, file_format)  # type: ignore[arg-type]
    click.echo(f"wrote {out}; load it with:\n{usage}")

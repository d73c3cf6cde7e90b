"""The commands ``robust train`` and ``robust recipes``."""

from __future__ import annotations

import logging
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import click

from robust.commands.options import Size, device_option
from robust.datasets.registry import data_help, forms_list
from training.display import Display
from training.stopping import StopRequest

DEFAULT_DATA = "train.pt"
NO_DATA = f"""expected --data, as this folder has no train.pt. Supported formats:
{forms_list()}
Try: robust train --data digits --recipe quick"""


set_option = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Set a field of the recipe (batch_size=512) or of a phase (adversarial.epochs=20). "
    "Repeat for more.",
)


def _finite(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    """Refuse nan and inf, which a range of numbers lets through."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"expected a finite number, got {value}")
    return value


@click.command()
@click.option("--data", metavar="PATH", help=f"{data_help()} Default: train.pt.")
@click.option(
    "--val",
    metavar="PATH",
    help="Held-out images that select the model, as for --data. Default: a share of --data.",
)
@click.option(
    "--recipe",
    "recipe_source",
    default="cpu",
    show_default=True,
    metavar="RECIPE",
    help="A name from `robust recipes`, FILE.toml, FILE.json (also a run.json), or "
    "package.module:function.",
)
@set_option
@click.option(
    "--norm",
    type=click.Choice(["linf", "l2"], case_sensitive=False),
    help="Norm of the threat model. Default: the recipe's.",
)
@click.option(
    "--eps",
    type=Size(),
    metavar="SIZE",
    help="Radius of the ball in pixel units, such as 8/255. Default: the recipe's; with another "
    "norm 8/255 (linf) or 0.5 (l2).",
)
@click.option(
    "--input-size",
    type=click.IntRange(8, 1024),
    metavar="PIXELS",
    help="Height and width to resize images to. Default: the recipe's.",
)
@click.option(
    "--classes",
    metavar="NAMES",
    help="Class names in the order of the labels: cat,dog,ship, or a file with one per line.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default="models/robust_model.pt",
    show_default=True,
    help="Checkpoint to write; the run's own files go to runs/NAME beside it.",
)
@device_option
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of initial weights, held-out images, batches, augmentation and attacks.",
)
@click.option(
    "--init",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="Weights to start from, with a new head if the classes differ. Default: random.",
)
@click.option("--key", metavar="NAME", help="Key of the weights in the --init file, such as ema.")
@click.option(
    "--compile",
    "compile_passes",
    type=click.Choice(["auto", "on", "off"]),
    help="Whether to use torch.compile. Default: the recipe's, usually auto (only on CUDA).",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    callback=_finite,
    metavar="M",
    help="Fit the number of epochs, in the recipe's proportions, so that the checkpoint is written "
    "within M minutes of the start.",
)
@click.option("--resume", is_flag=True, help="Continue a run that was stopped.")
def train(
    data: str | None,
    val: str | None,
    recipe_source: str,
    assignments: tuple[str, ...],
    norm: Literal["linf", "l2"] | None,
    eps: float | None,
    input_size: int | None,
    classes: str | None,
    out: Path,
    device_name: str,
    seed: int,
    init: Path | None,
    key: str | None,
    compile_passes: Literal["auto", "on", "off"] | None,
    minutes: float | None,
    resume: bool,
) -> None:
    """Train a robust classifier: first clean, then adversarial training.

    \b
        robust train --data digits --recipe quick --out models/digits.pt
        robust train --data cifar10 --recipe cpu --set adversarial.epochs=20 --set eps=4/255

    `robust recipes` lists the recipes; `robust recipes NAME` prints one with all fields.

    On several GPUs or processes, which share every batch:

        torchrun --standalone --nproc-per-node 2 -m training --data digits --recipe quick
    """
    if data is None:
        if not Path(DEFAULT_DATA).exists():
            raise click.UsageError(NO_DATA)
        data = DEFAULT_DATA
    from robust.loading.options import parse_classes
    from training.recipe_sources import load_recipe, recorded_run
    from training.recipe_values import override

    given = {"norm": norm, "eps": eps, "input_size": input_size, "compile": compile_passes}
    _check_given_once(given, assignments)
    recipe = load_recipe(recipe_source)  # a name that does not exist is refused without torch

    from training.inputs import differences_from, load_images, with_threat_model

    recipe = with_threat_model(recipe, norm, eps)
    recipe = replace(recipe, input_size=input_size or recipe.input_size)
    recipe = override(recipe, assignments)
    names = parse_classes(classes) if classes else ()
    if compile_passes is not None:
        recipe = replace(recipe, compile=compile_passes)

    from robust.checkpoint import load_checkpoint, model_options
    from robust.classifier import resolve_device
    from robust.distributed import init_distributed
    from training.budget import Deadline
    from training.cost import describe_cost
    from training.distributed import was_restarted
    from training.run import Stopped
    from training.run import train as run
    from training.setup import make_manifest

    device = resolve_device(device_name)
    if key is not None and init is None:
        raise click.UsageError("expected --key with --init, got no --init")
    if out.suffix != ".pt":
        raise click.UsageError(f"expected --out to end in .pt, got {out.name}")
    # Before signals are caught, so that SIGTERM ends a process that is waiting for the others.
    world, device = click.get_current_context().with_resource(init_distributed(device))
    configure_logging(quiet=not world.is_rank0)
    initial = None if init is None else load_checkpoint(init, options=model_options(key=key))
    dataset = load_images(data, size=recipe.input_size, classes=names)
    validation = None
    if val is not None:
        validation = load_images(val, size=recipe.input_size, classes=dataset.classes)
    if world.is_rank0:
        this = make_manifest(recipe, dataset, seed=seed, init=initial, validation=validation)
        for line in differences_from(recorded_run(recipe_source), this, dataset.classes):
            click.echo(f"note: {recipe_source} {line}", err=True)
        unit, number = ("epoch", recipe.epochs) if minutes is None else ("minute", minutes)
        length = f"{number:g} {unit}{'' if number == 1 else 's'}"
        click.echo(
            f"{dataset.name}: {len(dataset)} images, {len(dataset.classes)} classes; "
            f"recipe {recipe.name}, {length} on {world.in_words(str(device))}; "
            f"writes {out}"
        )
        cost = describe_cost(
            recipe,
            images=round(len(dataset) * (1 - (0.0 if validation else recipe.held_out))),
            num_classes=len(dataset.classes),
            device=device,
            ranks=world.size,
            timed=minutes is None,
        )
        click.echo(cost)
        for source in filter(None, (dataset, validation)):
            for line in source.changes:
                click.echo(f"note: {source.name}: {line}", err=True)
    display = Display(quiet=not world.is_rank0)
    with StopRequest() as stop:
        try:
            sidecar = run(
                recipe,
                dataset,
                out=out,
                device=device,
                seed=seed,
                init=initial,
                validation=validation,
                resume=resume or was_restarted(),
                deadline=None if minutes is None else Deadline.of_this_process(minutes),
                should_stop=stop.requested,
                observe=display,
                world=world,
            )
        except Stopped:
            display.close()
            if world.is_rank0:
                click.echo("stopped; the run is saved, continue it with --resume", err=True)
            raise SystemExit(128 + (stop.signal or signal.SIGTERM)) from None
        finally:
            display.close()
    if not world.is_rank0:
        return
    held_out = ", ".join(
        f"{row['attack']} {100 * row['accuracy']:.2f}%" for row in sidecar.evaluation
    )
    click.echo(f"wrote {out} (epoch {sidecar.recipe['kept_epoch']} kept; held out: {held_out})")


def _check_given_once(given: Mapping[str, object], assignments: Sequence[str]) -> None:
    """Refuse a field of the recipe that has both its own option and a --set."""
    for assignment in assignments:
        field = assignment.partition("=")[0].strip()
        if given.get(field) is not None:
            option = f"--{field.replace('_', '-')}"
            raise click.UsageError(f"expected {option} or --set {assignment}, got both")


@click.command()
@click.argument("source", metavar="[NAME]", required=False)
@set_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of TOML.")
def recipes(source: str | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """List the recipes, or print one for `robust train --recipe`.

    \b
        robust recipes gpu --set batch_size=512 > mine.toml
        robust train --recipe mine.toml
    """
    from robust.files import to_json
    from training.recipe_sources import load_recipe
    from training.recipe_values import override, to_toml
    from training.recipes import NO_FULL_RUN, RAN, RECIPES

    if source is None:
        if assignments or as_json:
            raise click.UsageError("expected the NAME of a recipe with --set and --json, got none")
        for name, build in RECIPES.items():
            summary = (build.__doc__ or "").partition("\n")[0]
            click.echo(f"{name:<12} {summary}\n{'':<12} Full run: {RAN.get(name, NO_FULL_RUN)}.")
        return
    recipe = override(load_recipe(source), assignments)
    click.echo(to_json(recipe.to_dict()).decode() if as_json else to_toml(recipe), nl=False)


commands: list[click.Command] = [train, recipes]


def configure_logging(*, quiet: bool = False) -> None:
    """Send the library's warnings and notes to standard error; only errors if `quiet`."""
    level = logging.ERROR if quiet else logging.INFO
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr)

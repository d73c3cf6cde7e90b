"""``robust attack``: change one image so that a checkpoint errs, and show by how little."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from robust.commands.options import (
    attack_options,
    checkpoint_option,
    device_option,
    read_image,
    resolve_attacks,
)
from robust.commands.output import percent, plain, table, write_report

if TYPE_CHECKING:
    from robust.prediction import AttackOutcome


@click.command()
@click.argument("image", type=click.Path(path_type=Path))
@checkpoint_option
@device_option
@attack_options
@click.option(
    "--label", metavar="CLASS", help="Name or index to lead away from. Default: the prediction."
)
@click.option("--target", metavar="CLASS", help="Name or index to lead to. Default: any other.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("."),
    show_default=True,
    metavar="DIR",
    help="Folder for the images.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Write the result as JSON too; - prints it instead of the table.",
)
def attack(
    image: Path,
    checkpoint: Path,
    device_name: str,
    attack_names: tuple[str, ...],
    norm: str,
    eps: float | None,
    alpha: float | None,
    steps: int | None,
    restarts: int | None,
    seed: int,
    label: str | None,
    target: str | None,
    out: Path,
    json_path: Path | None,
) -> None:
    """Attack one image and write what comes out.

    For each attack two PNG files: the adversarial image, rounded to 8 bits inside the ball, and
    what was added, amplified, grey where nothing was. Prediction, success and distances are those
    of the file. Example:

    \b
        robust attack examples/cat.jpg --eps 4/255 --target dog --out attacked
    """
    from robust.checkpoint import load_checkpoint
    from robust.classifier import resolve_device
    from robust.files import write_atomic
    from robust.images import encode_png
    from robust.prediction import attack_image, find_class

    attacks = resolve_attacks(
        attack_names,
        norm=norm,
        eps=eps,
        alpha=alpha,
        steps=steps,
        restarts=restarts,
        seed=seed,
    )
    device = resolve_device(device_name)
    loaded = load_checkpoint(checkpoint, device=device)
    model, classes = loaded.classifier, loaded.sidecar.classes
    x = read_image(image, model).to(device)
    y = None if label is None else find_class(label, classes)
    goal = None if target is None else find_class(target, classes)
    outcomes = [attack_image(model, x, y, settings=item, target=goal) for item in attacks]

    written = {f"{image.stem}-input.png": x.cpu()}
    for outcome in outcomes:
        written[_file_name(image, outcome)] = outcome.image
        written[_file_name(image, outcome, "-perturbation")] = outcome.perturbation
    for name, pixels in written.items():
        write_atomic((out / name).resolve(), partial(_write, encode_png(pixels)))

    report = {
        "image": str(image),
        "checkpoint": str(checkpoint),
        "weights_sha256": loaded.sha256,
        "attacks": [_to_dict(outcome, classes, image, out) for outcome in outcomes],
    }
    if json_path is not None:
        write_report(json_path, report)
    if str(json_path) != "-":
        click.echo(_describe(outcomes, classes))
        click.echo(f"wrote {len(written)} images to {out}: {', '.join(written)}")


def _write(data: bytes, file: IO[bytes]) -> None:
    file.write(data)


def _file_name(image: Path, outcome: AttackOutcome, ending: str = "") -> str:
    return f"{image.stem}-{outcome.settings.label}{ending}.png"


def _describe(outcomes: list[AttackOutcome], classes: tuple[str, ...]) -> str:
    from robust.threat_model import format_eps

    rows = []
    for outcome in outcomes:
        threat_model = outcome.settings.threat_model
        rows.append(
            [
                outcome.settings.label,
                threat_model.norm,
                format_eps(threat_model.eps),
                _leader(outcome.before, classes),
                _leader(outcome.after, classes),
                _success(outcome),
                format_eps(outcome.linf),
                f"{outcome.l2:.3f}",
                f"{outcome.seconds:.2f}",
            ]
        )
    header = ("attack", "norm", "eps", "before", "after", "success", "linf", "l2", "seconds")
    first = outcomes[0]
    aim = f" towards {classes[first.target]}" if first.target is not None else ""
    return f"away from {plain(classes[first.label])}{plain(aim)}\n{table(header, rows)}"


def _leader(probabilities: Any, classes: tuple[str, ...]) -> str:
    index = int(probabilities.argmax())
    return f"{classes[index]} {percent(float(probabilities[index]))}"


def _success(outcome: AttackOutcome) -> str:
    if outcome.target is None and outcome.already_wrong:
        return "already wrong"
    return "yes" if outcome.success else "no"


def _to_dict(
    outcome: AttackOutcome, classes: tuple[str, ...], image: Path, out: Path
) -> dict[str, Any]:
    from robust.prediction import top_classes
    from robust.threat_model import format_eps

    settings = outcome.settings
    return {
        "attack": settings.label,
        "norm": settings.threat_model.norm,
        "eps": settings.threat_model.eps,
        "eps_text": format_eps(settings.threat_model.eps),
        "alpha": settings.alpha,
        "steps": settings.steps,
        "restarts": settings.restarts,
        "seed": settings.seed,
        "label": classes[outcome.label],
        "target": None if outcome.target is None else classes[outcome.target],
        "before": vars(top_classes(outcome.before, classes, 1)[0]),
        "after": vars(top_classes(outcome.after, classes, 1)[0]),
        "success": outcome.success,
        "already_wrong": outcome.already_wrong,
        "linf": outcome.linf,
        "l2": outcome.l2,
        "adversarial_image": str(out / _file_name(image, outcome)),
        "perturbation_image": str(out / _file_name(image, outcome, "-perturbation")),
        "forwards": outcome.forwards,
        "backwards": outcome.backwards,
        "seconds": outcome.seconds,
    }

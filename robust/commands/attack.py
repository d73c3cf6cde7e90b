"""``robust attack``: adversarial images for given images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robust.commands.options import (
    AttackCommand,
    ModelChoice,
    attack_options,
    echo_broken,
    echo_other_threat_model,
    exit_status,
    expand_images,
    json_option,
    model_options,
    read_images,
    resolve_attacks,
)
from robust.commands.output import percent, write_report
from robust.tables import plain, table

if TYPE_CHECKING:
    from torch import Tensor

    from robust.prediction import AttackOutcome
    from robust.threat_model import ThreatModel


@click.command(cls=AttackCommand)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@model_options
@attack_options
@click.option(
    "--label", metavar="CLASS", help="True class, by name or index. Default: the prediction."
)
@click.option("--target", metavar="CLASS", help="Target class. Default: any but the true class.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("."),
    show_default=True,
    metavar="DIR",
    help="Folder for the images.",
)
@json_option
def attack(
    images: tuple[str, ...],
    model: ModelChoice,
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
) -> int:
    """Attack images and write the adversarial images.

    For each attack and image it writes two PNG files: the adversarial image, rounded to 8 bits
    inside the ball, and the amplified perturbation (gray: no change). Prediction, success and
    distances are those of the file. IMAGE may be a file, a folder or a pattern such as
    'photos/*.jpg'. An image that can't be read, or whose prediction is the target already, is named
    on standard error; the command attacks the others and exits with 1, or 2 if there are none.
    Example:

    \b
        robust attack examples/cat.jpg --eps 4/255 --target dog --out attacked
    """
    from robust.images import to_float
    from robust.prediction import attack_image, find_class, predict

    attacks = resolve_attacks(
        attack_names,
        norm=norm,
        eps=eps,
        alpha=alpha,
        steps=steps,
        restarts=restarts,
        seed=seed,
    )
    _check_eps(attacks[0].threat_model)
    paths = expand_images(images)
    _check_names(paths)
    loaded = model.load()
    loaded.check_attacks(attacks)
    echo_other_threat_model(loaded.sidecar, attacks[0].threat_model)
    classifier, classes = loaded.classifier, loaded.sidecar.classes
    y = None if label is None else find_class(label, classes)
    target_class = None if target is None else find_class(target, classes)
    read, broken = read_images(paths, classifier)
    reports = []
    for item in read:
        image, pixels = item.path, item.pixels
        x = pixels.to(classifier.mean.device)
        if y is None and target_class is not None:
            (before,) = predict(classifier, to_float(x).unsqueeze(0))
            if int(before.argmax()) == target_class:
                why = f"expected a target other than its prediction, got {classes[target_class]}"
                broken.append(echo_broken(image, f"{image}: {why}"))
                continue
        outcomes = [
            attack_image(classifier, x, y, settings=each, target=target_class) for each in attacks
        ]
        names = _write_images(image, pixels, outcomes, out)
        attacked = [_to_dict(outcome, classes, image, out) for outcome in outcomes]
        changes = list(item.changes)
        reports.append({"image": str(image), "changes": changes, "attacks": attacked})
        if str(json_path) != "-":
            prefix = f"{plain(str(image))} " if len(paths) > 1 else ""
            click.echo(prefix + _goal(outcomes[0], classes))
            click.echo(_describe(outcomes, classes))
            click.echo(plain(f"wrote {len(names)} images to {out}: {', '.join(names)}"))
    about = {"checkpoint": model.spec, "model": loaded.origin(), "weights_sha256": loaded.sha256}
    if json_path is not None:
        several = {"images": reports, "broken": broken}
        result = reports[0] if len(paths) == len(reports) == 1 else several
        write_report(json_path, about | result)
    return exit_status(reports, broken)


def _check_eps(threat_model: ThreatModel) -> None:
    """Raise ValueError if the eps ball around an 8-bit image contains no other one."""
    from robust.threat_model import EPS_OF_8_BIT

    if not threat_model.reaches_8_bit:
        raise ValueError(f"expected eps of {EPS_OF_8_BIT}, got {threat_model.eps:g}")


def _check_names(paths: list[Path]) -> None:
    """Raise ValueError if the results of two images would have the same name."""
    first: dict[str, Path] = {}
    for path in paths:
        other = first.setdefault(path.stem, path)
        if other is not path:
            raise ValueError(
                "expected images with different names, as results are named after them, got "
                f"{other} and {path}"
            )


def _write_images(
    image: Path, pixels: Tensor, outcomes: list[AttackOutcome], out: Path
) -> list[str]:
    """Write the image as the model saw it and the result of each attack; return the names."""
    from robust.files import write_bytes
    from robust.images import encode_png

    written = {f"{image.stem}-input.png": pixels}
    for outcome in outcomes:
        written[_file_name(image, outcome)] = outcome.image
        written[_file_name(image, outcome, "-perturbation")] = outcome.perturbation
    for name, value in written.items():
        write_bytes((out / name).resolve(), encode_png(value))
    return list(written)


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
                _top_class(outcome.before, classes),
                _top_class(outcome.after, classes),
                _success(outcome),
                format_eps(outcome.linf),
                f"{outcome.l2:.3f}",
                f"{outcome.seconds:.2f}",
            ]
        )
    header = ("attack", "norm", "eps", "before", "after", "success", "linf", "l2", "seconds")
    return table(header, rows)


def _goal(outcome: AttackOutcome, classes: tuple[str, ...]) -> str:
    label = classes[outcome.label]
    if outcome.target is None:
        return plain(f"untargeted, away from {label}")
    return plain(f"targeted, from {label} to {classes[outcome.target]}")


def _top_class(probabilities: Any, classes: tuple[str, ...]) -> str:
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

    settings = outcome.settings
    return {
        "attack": settings.label,
        **settings.to_dict(),
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

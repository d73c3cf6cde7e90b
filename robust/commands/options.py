"""Options shared by several commands, and the objects they build."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.core import ParameterSource

from robust.attack_registry import DEFAULT_ATTACKS, REGISTRY, names, takers
from robust.commands.running import USER_ERROR
from robust.datasets.registry import data_help
from robust.tables import plain

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from robust.attacks import AttackSettings
    from robust.checkpoint import Checkpoint
    from robust.classifier import Classifier
    from robust.sidecar import Sidecar
    from robust.threat_model import ThreatModel

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_CHECKPOINT = Path("models/robust_model.pt")
MAX_STEPS = 10_000  # far beyond convergence; more must be a typo
MAX_RESTARTS = 1_000
MAX_SEED = 2**32 - 1


if TYPE_CHECKING:
    _FloatType = click.ParamType[float]
else:  # older versions of click have no generic type
    _FloatType = click.ParamType


class Size(_FloatType):
    """A size in pixel units, ``8/255`` or a number."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        from robust.sizes import parse_eps

        try:
            return parse_eps(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


device_option = click.option(
    "--device",
    "device_name",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="auto, cpu, cuda, cuda:N, mps or xpu.",
)


_DESCRIPTION_OPTIONS = (
    click.option(
        "--arch",
        metavar="NAME",
        help="Network, timm:NAME or torchvision:NAME. Default: inferred from the keys.",
    ),
    click.option(
        "--stem",
        metavar="NAME",
        help="imagenet, cifar, 3x3-stride2, 3x3-maxpool or 3x3-stride2-maxpool. Default: inferred "
        "from the weights.",
    ),
    click.option(
        "--activation",
        metavar="NAME",
        help="relu or silu. Default: relu, or silu for DeepMind's networks.",
    ),
    click.option(
        "--input-size",
        type=click.IntRange(8, 1024),
        metavar="PIXELS",
        help="Width and height of the model's input. Default: from the file or library, else 32.",
    ),
    click.option(
        "--mean",
        metavar="R,G,B",
        help="Mean of pixels in [0, 1]: three numbers, or imagenet, cifar10, cifar100 or none. "
        "Default: from the file or library, else 0.",
    ),
    click.option(
        "--std",
        metavar="R,G,B",
        help="Standard deviation of pixels in [0, 1]: three numbers, or imagenet, cifar10, "
        "cifar100 or none. Default: from the file or library, else 1.",
    ),
    click.option(
        "--classes",
        metavar="NAMES",
        help="Comma-separated class names, or a file with one per line. Default: numbers.",
    ),
    click.option("--key", metavar="NAME", help="Key of the weights in the file, such as ema."),
)
DESCRIBED = ("arch", "stem", "activation", "input_size", "mean", "std", "classes", "key")


def describing_options(function: F) -> F:
    """Add the options that describe a bare state dict; passed on under the names in `DESCRIBED`."""
    for option in reversed(_DESCRIPTION_OPTIONS):
        function = option(function)
    return function


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """The model given to a command, with the options that describe it."""

    spec: str
    device_name: str
    description: dict[str, Any]

    def device(self) -> torch.device:
        """The requested device. Raises ValueError if there is none."""
        from robust.device import resolve_device

        return resolve_device(self.device_name)

    def load(self, device: torch.device | None = None) -> Checkpoint:
        """Load the model on `device`, by default the requested one.

        If `auto` chose an accelerator that disagrees with the CPU, prints a warning and uses the
        CPU. Raises ValueError.
        """
        from robust.checkpoint import load_checkpoint, model_options
        from robust.device import DeviceDisagrees

        if self.spec == str(DEFAULT_CHECKPOINT) and not Path(self.spec).exists():
            raise click.UsageError(f"expected --model, as this folder has no {self.spec}")
        options, device = model_options(**self.description), device or self.device()
        try:
            return load_checkpoint(self.spec, device=device, options=options)
        except DeviceDisagrees as error:
            if self.device_name != "auto":
                raise
            click.echo(f"warning: {error}: using the CPU", err=True)
            return load_checkpoint(self.spec, options=options)


def _not_a_sidecar(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    """Refuse to replace what says how to load a model by a result."""
    if path is not None and path.is_file():
        from robust.sidecar import is_sidecar

        if path.suffix == ".json" and is_sidecar(path.read_bytes()):
            raise click.BadParameter(
                f"expected a file of its own for the result, got {path}, a model's sidecar, which "
                "holds its classes and normalization"
            )
    return path


json_option = click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    callback=_not_a_sidecar,
    metavar="FILE",
    help="Also write the result as JSON; - prints it instead of the table.",
)
"""The option for the result as JSON; passed on as `json_path`."""


test_option = click.option(
    "--test/--train", default=True, help="Split of a dataset that has several. Default: test."
)
"""The option for the split of a dataset; passed on as `test`."""


def data_options(function: F) -> F:
    """Add the options for labeled images; passed on as `data`, `test` and `limit`."""
    options = (
        click.option("--data", required=True, metavar="PATH", help=data_help()),
        test_option,
        click.option(
            "--limit",
            type=click.IntRange(min=1),
            metavar="N",
            help="Use the first N images (evenly spaced if the data is sorted by class).",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def model_options(function: F) -> F:
    """Add the options for the model, its device and its description; passed on as `model`."""

    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        description = {name: kwargs.pop(name) for name in DESCRIBED}
        kwargs["model"] = ModelChoice(
            spec=kwargs.pop("model_spec"),
            device_name=kwargs.pop("device_name"),
            description=description,
        )
        return function(*args, **kwargs)

    options = (
        click.option(
            "--model",
            "--checkpoint",
            "model_spec",
            default=str(DEFAULT_CHECKPOINT),
            show_default=True,
            metavar="MODEL",
            help="Weights, a Hugging Face folder, an exported graph, file.py:function or "
            "oip+http://HOST/v2/models/NAME.",
        ),
        describing_options,
        device_option,
    )
    for option in reversed(options):
        command = option(command)
    return cast(F, command)


def attack_options(function: F) -> F:
    """Add the options for attacks, their threat model and their parameters."""
    options = (
        click.option(
            "--attack",
            "attack_names",
            multiple=True,
            metavar="NAME",
            help=f"Attack to run, from the list below; pgd-50 has 50 steps. Repeat for more. "
            f"Default: {' and '.join(DEFAULT_ATTACKS)}.",
        ),
        click.option(
            "--norm", default="linf", show_default=True, metavar="NAME", help="linf or l2."
        ),
        click.option(
            "--eps",
            type=Size(),
            metavar="SIZE",
            help="Radius of the ball in pixel units. Default: 8/255 (linf) or 0.5 (l2).",
        ),
        click.option(
            "--alpha",
            type=Size(),
            metavar="SIZE",
            help=f"Step size of {takers('alpha')}. Default: a quarter of eps, more below 10 steps.",
        ),
        click.option(
            "--steps",
            type=click.IntRange(1, MAX_STEPS),
            help=f"Steps, or queries of {names(lambda attack: attack.unit == 'queries')}. "
            "Default: see the list below.",
        ),
        click.option(
            "--restarts",
            type=click.IntRange(1, MAX_RESTARTS),
            help=f"Runs of {takers('restarts')} from different starts, until one fools the model. "
            "Default: 1.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(0, MAX_SEED),
            default=0,
            show_default=True,
            help="Seed of the random starts.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


class AttackCommand(click.Command):
    """A command with `attack_options`, whose help lists all attacks."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the attacks with their descriptions and default budgets."""
        with formatter.section("Attacks"):
            formatter.write_dl([(entry.name, entry.described) for entry in REGISTRY.values()])
        super().format_epilog(ctx, formatter)


def resolve_attacks(
    requested: Sequence[str | AttackSettings],
    *,
    norm: str,
    eps: float | None,
    alpha: float | None,
    steps: int | None,
    restarts: int | None,
    seed: int,
) -> list[AttackSettings]:
    """The requested attacks without duplicates, with every parameter set. Raises ValueError.

    An attack is a name, which the other arguments complete, or complete settings. By default the
    attacks are `DEFAULT_ATTACKS`.
    """
    from robust.attacks import DEFAULT_EPS, AttackSettings, resolve_attack
    from robust.attacks.settings import parse_name
    from robust.threat_model import ThreatModel

    if eps is None:
        eps = DEFAULT_EPS.get(str(norm).lower(), 0.0)  # type: ignore[call-overload]
    threat_model = ThreatModel(norm=norm, eps=eps)  # type: ignore[arg-type]
    attacks: list[AttackSettings] = []
    named: list[AttackSettings] = []
    for attack in requested or DEFAULT_ATTACKS:
        if isinstance(attack, AttackSettings):
            attacks.append(attack)
            continue
        settings = resolve_attack(
            attack, threat_model, alpha=alpha, steps=steps, restarts=restarts, seed=seed
        )
        _, steps_in_name = parse_name(attack)
        if steps is not None and steps_in_name not in (0, steps):
            raise ValueError(f"expected one number of steps for {attack}, got steps {steps} too")
        if settings.steps > MAX_STEPS:
            raise ValueError(f"expected at most {MAX_STEPS} steps, got {settings.steps}")
        named.append(settings)
        attacks.append(settings)
    for option, value in (("alpha", alpha), ("steps", steps), ("restarts", restarts)):
        if value is not None and named and not any(item.takes(option) for item in named):
            got = ", ".join(dict.fromkeys(item.name for item in named))
            raise ValueError(f"expected {option} with an attack that takes it, got {got} only")
    return list(dict.fromkeys(attacks))


def echo_other_threat_model(sidecar: Sidecar, attacked: ThreatModel) -> None:
    """Print a note if the default threat model is not the one that the model was trained for."""
    source = click.get_current_context().get_parameter_source
    if any(source(name) is not ParameterSource.DEFAULT for name in ("norm", "eps")):
        return
    trained = sidecar.threat_model
    if trained is not None and trained != attacked:
        click.echo(
            f"note: the model was trained for {trained}, and is attacked under {attacked}; "
            "--norm and --eps change that",
            err=True,
        )


@dataclass(frozen=True, kw_only=True)
class ReadImage:
    """An image file as the model sees it."""

    path: Path
    pixels: Tensor  # uint8 (3, S, S)
    changes: tuple[str, ...]  # resizing and cropping, in words


def read_image(path: Path, classifier: Classifier) -> ReadImage:
    """The image in a file of any format, at the model's size. Raises ImageError, OSError."""
    from robust import images
    from robust.datasets.arrays import conversion_notes, resize_note

    size = classifier.architecture.input_size
    try:
        opened = images.open_image(path.read_bytes(), size=size, any_format=True)
    except images.ImageError as error:
        raise images.ImageError(
            error.kind, expected=f"{error.expected} in {path}", found=error.found
        ) from None
    changes = []
    if opened.size != (size, size):
        changes.append(resize_note(1, *opened.size, size))
    if opened.frames > 1:
        changes.append(f"used the first of {opened.frames} frames")
    changes += conversion_notes(several_frames=0, deep=opened.deep, transparent=opened.transparent)
    return ReadImage(path=path, pixels=images.fit_image(opened.image, size), changes=tuple(changes))


def read_images(
    paths: Sequence[Path], classifier: Classifier
) -> tuple[list[ReadImage], list[dict[str, str]]]:
    """The readable images, as the model sees them, and the unreadable ones with the reason.

    Prints the unreadable ones, and what was resized or cropped, on standard error.
    """
    from robust.images import ImageError

    read, broken = [], []
    for path in paths:
        try:
            read.append(read_image(path, classifier))
            continue
        except ImageError as error:
            why = str(error)
        except OSError as error:
            why = f"{path}: {(error.strerror or str(error)).lower()}"
        broken.append(echo_broken(path, why))
    changed: dict[str, list[Path]] = {}
    for image in read:
        for change in image.changes:
            changed.setdefault(change, []).append(image.path)
    for change, files in changed.items():
        more = f" and {len(files) - 1} more, each" if len(files) > 1 else ""
        click.echo(f"note: {plain(str(files[0]))}{more}: {change}", err=True)
    return read, broken


def echo_broken(path: Path, why: str) -> dict[str, str]:
    """Print on standard error why an image is left out; return its entry in the JSON."""
    click.echo(f"robust: {plain(why)}", err=True)
    return {"image": str(path), "error": why}


def exit_status(read: Sequence[object], broken: Sequence[object]) -> int:
    """0, or 1 if some images are broken, or 2 if all are."""
    if not broken:
        return 0
    return 1 if read else USER_ERROR


def expand_images(names: Sequence[str]) -> list[Path]:
    """Files, the files in folders, and the matches of patterns.

    Raises ValueError for a folder or pattern without files.
    """
    paths: list[Path] = []
    for name in names:
        path, found = Path(name), [Path(name)]
        if path.is_dir():
            found = sorted(
                item for item in path.iterdir() if item.is_file() and not item.name.startswith(".")
            )
        elif not path.exists() and any(mark in name for mark in "*?["):
            matches = map(Path, glob(name, recursive=True))
            found = sorted(item for item in matches if item.is_file())
        if not found:
            raise ValueError(f"expected images in {name}, found none")
        paths += found
    return paths

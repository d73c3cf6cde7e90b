"""Options that several commands take, and what they turn into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from torch import Tensor

    from robust.attacks import AttackSettings
    from robust.classifier import Classifier

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_CHECKPOINT = Path("models/robust_model.pt")
MAX_STEPS = 10_000  # far beyond where attacks converge; more is a slip of the keyboard
MAX_RESTARTS = 1_000
MAX_SEED = 2**32 - 1


class Size(click.ParamType[float]):
    """A size in pixel units, ``8/255`` or a number."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        from robust.threat_model import parse_eps

        try:
            return parse_eps(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


checkpoint_option = click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    default=DEFAULT_CHECKPOINT,
    show_default=True,
    metavar="PATH",
    help="Weights to use, with their sidecar beside them.",
)
device_option = click.option(
    "--device",
    "device_name",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="auto, cpu, cuda or cuda:N.",
)


def attack_options(function: F) -> F:
    """Which attacks, in which ball, with which parameters."""
    options = (
        click.option(
            "--attack",
            "attack_names",
            multiple=True,
            metavar="NAME",
            help="fgsm, pgd, pgd-margin, apgd-ce, apgd-dlr, apgd-t, fab-t, square, autoattack or "
            "minimal; pgd-50 has 50 steps. Repeat for more. Default: fgsm and pgd.",
        ),
        click.option(
            "--norm", default="linf", show_default=True, metavar="NAME", help="linf or l2."
        ),
        click.option(
            "--eps",
            type=Size(),
            metavar="SIZE",
            help="Largest change in pixel units. Default: 8/255, for l2 0.5.",
        ),
        click.option(
            "--alpha",
            type=Size(),
            metavar="SIZE",
            help="Step of pgd. Default: a quarter of eps, more for fewer than 10 steps.",
        ),
        click.option(
            "--steps",
            type=click.IntRange(1, MAX_STEPS),
            help="Default: 20, apgd and fab-t 100, square 5000 queries.",
        ),
        click.option(
            "--restarts",
            type=click.IntRange(1, MAX_RESTARTS),
            help="Of attacks that start at random. Default: 1.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(0, MAX_SEED),
            default=0,
            show_default=True,
            help="Of the random starts.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def resolve_attacks(
    names: tuple[str, ...],
    *,
    norm: str,
    eps: float | None,
    alpha: float | None,
    steps: int | None,
    restarts: int | None,
    seed: int,
) -> list[AttackSettings]:
    """The attacks asked for, each once, with every parameter filled in. Raises ValueError."""
    from robust.attacks import DEFAULT_ATTACKS, DEFAULT_EPS, resolve_attack
    from robust.threat_model import ThreatModel

    if eps is None:
        eps = DEFAULT_EPS.get(norm, 0.0)  # type: ignore[call-overload]
    threat_model = ThreatModel(norm=norm, eps=eps)  # type: ignore[arg-type]
    attacks = []
    for name in names or DEFAULT_ATTACKS:
        settings = resolve_attack(
            name, threat_model, alpha=alpha, steps=steps, restarts=restarts, seed=seed
        )
        if settings.steps > MAX_STEPS:
            raise ValueError(f"expected at most {MAX_STEPS} steps, got {settings.steps}")
        if settings not in attacks:
            attacks.append(settings)
    for option, value in (("alpha", alpha), ("steps", steps), ("restarts", restarts)):
        if value is not None and not any(settings.takes(option) for settings in attacks):
            raise ValueError(
                f"expected --{option} with an attack that takes it, got {attacks[0].name} only"
            )
    return attacks


def read_image(path: Path, classifier: Classifier) -> Tensor:
    """The image in a file as the model sees it, uint8 (3, S, S). Raises ImageError, OSError."""
    from robust.images import ImageError, decode_image, fit_image

    try:
        image = decode_image(path.read_bytes())
    except ImageError as error:
        raise ImageError(
            error.kind, expected=f"{error.expected} in {path}", found=error.found
        ) from None
    return fit_image(image, classifier.architecture.input_size)

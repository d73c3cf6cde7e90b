"""Parses and validates the parameters of the routes; errors name the field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from app.engine.served_model import ServedModel
from app.errors import FieldError, InvalidParameters, invalid
from app.settings import Settings
from robust.attack_registry import default_budgets, did_you_mean, names, takers
from robust.attacks import (
    ATTACKS,
    DEFAULT_ATTACKS,
    DEFAULT_EPS,
    AttackSettings,
    resolve_attack,
)
from robust.attacks.settings import UnknownAttack, parse_name
from robust.prediction import find_class
from robust.threat_model import Norm, ThreatModel, format_eps, parse_eps

P = TypeVar("P", bound=BaseModel)

MAX_ATTACKS = 8  # named in one request


def _size(value: object) -> float:
    try:
        return parse_eps(str(value))
    except ValueError:
        raise PydanticCustomError(
            "size", "a size of at least 0, as a number or a fraction such as 8/255"
        ) from None


def _whole(value: object) -> object:
    """Refuse integers that are not plain ASCII digits: pydantic would accept underscores too."""
    if isinstance(value, str) and not re.fullmatch(r"[+-]?[0-9]{1,30}", value.strip(" ")):
        raise PydanticCustomError("whole", "a whole number in digits 0 to 9")
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Size = Annotated[
    float,
    BeforeValidator(_size),
    WithJsonSchema({"type": "string", "examples": ["8/255", "0.03"]}),
]


_any_case = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
Compare = Annotated[Literal["false", "true", "only"], _any_case]


class _Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PredictParameters(_Parameters):
    """The parameters of POST /predict besides images."""

    top_k: Whole = Field(
        default=5, ge=1, le=1000, description="How many classes to name, likeliest first."
    )


class AttackParameters(_Parameters):
    """The parameters of every route that attacks."""

    attack: list[str] = Field(
        default_factory=lambda: list(DEFAULT_ATTACKS),
        min_length=1,
        max_length=MAX_ATTACKS,
        description=f"Repeatable: {', '.join(ATTACKS)}; pgd-50 has 50 steps, square-1000 as many "
        f"queries. Default: {' and '.join(DEFAULT_ATTACKS)}.",
        examples=[["pgd"]],
    )
    norm: Annotated[Norm, _any_case] = Field(
        default="linf", description="How distance is measured."
    )
    eps: Size | None = Field(
        default=None,
        description="Radius of the ball in pixel units. Default: 8/255 under linf, 0.5 under l2.",
    )
    alpha: Size | None = Field(
        default=None,
        description=f"Step size of {takers('alpha')} in pixel units. Default: a quarter of eps, "
        "more for fewer than 10 steps.",
    )
    steps: Positive | None = Field(
        default=None,
        description=f"Steps, or queries of {names(lambda attack: attack.unit == 'queries')}. "
        f"Default: {default_budgets()}.",
    )
    restarts: Positive | None = Field(
        default=None,
        description=f"Runs of {takers('restarts')}, each from another start, until one fools the "
        "model. Default: 1.",
    )
    seed: Whole = Field(default=0, ge=0, lt=2**31, description="Seed of the random starts.")


class AttackImageParameters(AttackParameters):
    """The parameters of POST /attack besides an image."""

    label: str | None = Field(
        default=None,
        description="The class to lead away from, by name or index. Default: the prediction.",
    )
    target: str | None = Field(
        default=None, description="A class to lead to, by name or index. Default: any other."
    )
    compare: Compare = Field(
        default="false",
        description="true: attack the model of ROBUST_COMPARE too, and show each model's "
        "adversarial image to the other; only: attack that model alone.",
    )


class EvaluateParameters(AttackParameters):
    """The parameters of POST /evaluate besides a dataset."""

    dataset: str | None = Field(
        default=None, description="The name of a dataset that the operator registered."
    )
    limit: Positive | None = Field(
        default=None,
        description="Score at most this many images: the first, or evenly spaced ones if the set "
        "is sorted by class.",
    )
    curve: Whole = Field(
        default=0,
        ge=0,
        description="Attack this many images again at increasing eps, for an accuracy curve.",
    )


def parse(kind: type[P], values: Mapping[str, Sequence[str]]) -> P:
    """Validate parameters, each with one or more values, as `kind`. Raises InvalidParameters."""
    lists = {name for name, item in kind.model_fields.items() if item.annotation == list[str]}
    errors = [
        FieldError(field=safe_name(name), expected="one value", got=f"{len(texts)}")
        for name, texts in values.items()
        if len(texts) > 1 and name not in lists
    ]
    if errors:
        raise InvalidParameters(errors)
    plain = {
        name: list(texts) if name in lists else texts[0]
        for name, texts in values.items()
        if texts  # empty: null in JSON
    }
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        known = ", ".join(kind.model_fields)
        raise InvalidParameters(field_errors(error.errors(), known=known)) from None


def field_errors(errors: Sequence[Any], *, known: str = "") -> list[FieldError]:
    """Pydantic's errors as FieldErrors, which never repeat text from the input."""
    found = []
    for error in errors:
        parts = [str(part) for part in error["loc"] if part not in ("body", "query", "path")]
        expected = error["msg"].removeprefix("Input should be ")
        got = describe(error.get("input"))
        if error["type"] == "extra_forbidden":
            expected, got = f"one of the parameters {known}", "another one"
        found.append(
            FieldError(field=safe_name(parts[0] if parts else "body"), expected=expected, got=got)
        )
    return found


def describe(value: object) -> str:
    """A description of an invalid value that repeats numbers but never text."""
    if isinstance(value, str):
        number = re.fullmatch(r"[-+0-9./eE]{1,24}", value)
        return value if number else f"text of {len(value)} characters" if value else "nothing"
    if isinstance(value, int | float):
        return str(value)[:24]
    return f"{len(value)} values" if isinstance(value, list) else "another kind of value"


def resolve_attacks(parameters: AttackParameters, settings: Settings) -> list[AttackSettings]:
    """The requested attacks without duplicates, with the same defaults as on the command line.

    Raises InvalidParameters with every error.
    """
    threat_model = _threat_model(parameters, settings)
    given = parameters.model_dump(include={"alpha", "steps", "restarts"}, exclude_none=True)
    most_steps = max(settings.max_steps, settings.max_queries)
    errors = [
        _too_many(name, given[name], most)
        for name, most in (("steps", most_steps), ("restarts", settings.max_restarts))
        if given.get(name, 0) > most
    ]
    if errors:  # before computing with a number that may be huge
        raise InvalidParameters(errors)
    attacks: list[AttackSettings] = []
    for name in parameters.attack:
        try:
            attack = resolve_attack(name, threat_model, seed=parameters.seed, **given)
        except UnknownAttack:
            expected = f"an attack out of {', '.join(ATTACKS)}, or pgd-N{did_you_mean(name)}"
            errors.append(FieldError(field="attack", expected=expected, got=describe(name)))
            continue
        except ValueError:  # not its text, which may repeat the name
            expected = "an attack with at least 1 step"
            errors.append(FieldError(field="attack", expected=expected, got=describe(name)))
            continue
        attacks.append(attack)
        _, steps_in_name = parse_name(name)
        if steps_in_name not in (0, given.get("steps", steps_in_name)):
            expected = f"only one number of steps, as the attack has {steps_in_name} in its name"
            errors.append(FieldError(field="steps", expected=expected, got=str(given["steps"])))
            continue
        most = settings.max_queries if attack.entry.unit == "queries" else settings.max_steps
        if attack.steps > most:
            field = "steps" if "steps" in given else "attack"
            errors.append(_too_many(field, attack.steps, most))
    if not errors:
        got = f"only {', '.join(dict.fromkeys(attack.name for attack in attacks))}"
        errors = [
            FieldError(field=field, expected="an attack that takes it", got=got)
            for field in given
            if not any(attack.takes(field) for attack in attacks)
        ]
    if errors:
        raise InvalidParameters(list(dict.fromkeys(errors)))
    return list(dict.fromkeys(attacks))


def _too_many(field: str, value: int, most: int) -> FieldError:
    what = "restarts" if field == "restarts" else "steps"
    return FieldError(field=field, expected=f"at most {most} {what}", got=describe(str(value)))


def _threat_model(parameters: AttackParameters, settings: Settings) -> ThreatModel:
    norm, eps = parameters.norm, parameters.eps
    if eps is None:
        eps = min(DEFAULT_EPS[norm], settings.max_eps(norm))
    if eps > settings.max_eps(norm):
        expected = f"at most {format_eps(settings.max_eps(norm))} under {norm}"
        raise invalid("eps", expected, f"{eps:g}")
    return ThreatModel(norm=norm, eps=eps)


def check_model(
    attacks: Sequence[AttackSettings],
    model: ServedModel,
    *,
    targeted: bool = False,
    curve: int = 0,
) -> None:
    """Raise InvalidParameters for attacks, or a curve, that can't be run on `model`.

    It may have too few classes for the attack's loss, or no gradients.
    """
    kind, found = model.sidecar.architecture.arch, len(model.classes)
    errors = []
    refused = [item.name for item in attacks if item.uses_gradient and not model.differentiable]
    if refused:
        expected = f"attacks without gradients, such as square: {kind} models have none"
        got = ", ".join(dict.fromkeys(refused))
        errors.append(FieldError(field="attack", expected=expected, got=got))
    for attack in attacks:
        needed = attack.classes_needed(targeted=targeted)
        if found < needed:
            expected = f"an attack for the {found} classes of the model"
            got = f"{attack.name}, which needs {needed}{' with a target' if targeted else ''}"
            errors.append(FieldError(field="attack", expected=expected, got=got))
    if curve and not model.differentiable:
        expected = f"0: its attack needs gradients, which {kind} models do not have"
        errors.append(FieldError(field="curve", expected=expected, got=f"{curve}"))
    if errors:
        raise InvalidParameters(errors)


def resolve_class(text: str | None, field: str, classes: Sequence[str]) -> int | None:
    """The index of a class given by name or index. Raises InvalidParameters."""
    if text is None:
        return None
    try:
        return find_class(text, classes)
    except ValueError:
        expected = f"a class name or an index from 0 to {len(classes) - 1}"
        raise invalid(field, expected, describe(text)) from None


def safe_name(name: str) -> str:
    """The name of a parameter if it may be repeated in an error; `unknown` if not."""
    return name if re.fullmatch(r"[a-z_]{1,32}", name) else "unknown"

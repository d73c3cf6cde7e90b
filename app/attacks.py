"""Attacks on images of several requests, sharing their passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.engine import Engine, Session
from app.errors import FieldError, InvalidParameters
from app.model import ServedModel
from app.queue import Kind, Work
from robust.attacks import AttackSettings
from robust.images import to_float
from robust.inference import FEW, at_least
from robust.prediction import AttackOutcome, attack_images, predict


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """An image uint8 (3, H, W), the class to lead away from (None: the prediction) and to."""

    image: Tensor
    label: int | None = None
    target: int | None = None


async def attack_together(
    engine: Engine,
    model: ServedModel,
    item: Attacked,
    attacks: Sequence[AttackSettings],
    *,
    deadline: float | None = None,
) -> list[AttackOutcome]:
    """What each of `attacks` does to one image, together with what others ask alike.

    Raises InvalidParameters when target and label are the same, and what `Engine.run_shared` does.
    """
    works = [
        Work(
            kind=Kind.ATTACK,
            model=model,
            cost=cost([settings]),
            deadline=deadline,
            function=_function(settings),
            share=(settings, item.target is not None),
            item=item,
        )
        for settings in attacks
    ]
    return await engine.run_shared(works)


def cost(attacks: Sequence[AttackSettings]) -> int:
    """Most forward and backward passes for an image, those before and after included."""
    return sum(settings.cost + 2 for settings in attacks)


def _function(
    settings: AttackSettings,
) -> Callable[[Session, list[Attacked]], list[AttackOutcome | Exception]]:
    def run(session: Session, items: list[Attacked]) -> list[AttackOutcome | Exception]:
        start = session.seconds()
        # Alone and in company an image meets passes of this size, and so gets the same bits.
        model = at_least(FEW, session)
        x = torch.stack([item.image for item in items]).to(session.device)
        before = predict(model, to_float(x))
        labels = [
            int(row.argmax()) if item.label is None else item.label
            for item, row in zip(items, before, strict=True)
        ]
        good = torch.tensor(
            [label != item.target for label, item in zip(labels, items, strict=True)]
        )
        results: list[AttackOutcome | Exception] = [_same_class() for _ in items]
        at = good.nonzero().flatten().tolist()
        if at:
            targets = [items[place].target for place in at]
            outcomes = attack_images(
                model,
                x[good.to(x.device)],
                [labels[place] for place in at],
                settings=settings,
                targets=None if None in targets else targets,  # all have one, or none has
                before=before[good],
                given_up=lambda: session.given_up()[good],
                batch_size=FEW,
            )
            for place, outcome in zip(at, outcomes, strict=True):
                results[place] = replace(outcome, seconds=session.seconds() - start)
        return results

    return run


def _same_class() -> InvalidParameters:
    return InvalidParameters(
        [
            FieldError(
                field="target", expected="another class than the label", got="the label itself"
            )
        ]
    )

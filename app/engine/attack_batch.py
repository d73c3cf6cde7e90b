"""Attacks on single images, batched across requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.engine.engine import MAX_SHARED, Engine
from app.engine.queue import Kind, Work
from app.engine.served_model import ServedModel
from app.engine.session import Session
from app.errors import InvalidParameters, invalid
from robust.attacks import AttackSettings
from robust.images import to_float
from robust.prediction import AttackOutcome, amplify, attack_images, predict


@dataclass(frozen=True, kw_only=True)
class AttackItem:
    """A uint8 image (3, H, W), its label (None: the prediction) and its target class, if any."""

    image: Tensor
    label: int | None = None
    target: int | None = None


async def attack_in_batch(
    engine: Engine,
    model: ServedModel,
    item: AttackItem,
    attacks: Sequence[AttackSettings],
    *,
    deadline: float | None = None,
) -> list[AttackOutcome]:
    """Run each of `attacks` on one image, in a batch with other requests for the same attack.

    Raises InvalidParameters if the target is the label, or without one the prediction, and the
    errors of `Engine.run_shared`.
    """
    return await engine.run_shared(
        [_work(model, item, settings, deadline=deadline) for settings in attacks]
    )


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Another model's predictions for an adversarial image."""

    label: int  # the given class of the image, or that model's prediction
    target: int | None
    before: Tensor  # its probabilities float32 (K,) of the original image
    after: Tensor  # and of the adversarial one

    @property
    def already_wrong(self) -> bool:
        """Whether that model misclassified the original image."""
        return int(self.before.argmax()) != self.label


async def compare_in_batch(
    engine: Engine,
    pairs: Sequence[tuple[ServedModel, ServedModel]],
    item: AttackItem,
    attacks: Sequence[AttackSettings],
    *,
    deadline: float | None = None,
) -> list[list[tuple[AttackOutcome, Transfer]]]:
    """Attack the first model of each pair, and classify the adversarial image with the second.

    Returns a list per pair, with a result per attack. All are admitted together. Without a label, a
    model that predicts the target already is not attacked: its result is the image itself. Raises
    what `attack_in_batch` raises.
    """
    results = await engine.run_shared(
        [
            _work(model, item, settings, deadline=deadline, other=other)
            for model, other in pairs
            for settings in attacks
        ]
    )
    return [results[at : at + len(attacks)] for at in range(0, len(results), len(attacks))]


def _work(
    model: ServedModel,
    item: AttackItem,
    settings: AttackSettings,
    *,
    deadline: float | None,
    other: ServedModel | None = None,
) -> Work:
    """One attack on one image; `other` is the model that classifies the adversarial image."""
    return Work(
        kind=Kind.ATTACK,
        model=model,
        cost=cost([settings]) if other is None else compare_cost([settings]),
        deadline=deadline,
        function=_function(settings) if other is None else _with_transfer(settings, other),
        share=(settings, item.target is not None, other),
        item=item,
    )


def compare_cost(attacks: Sequence[AttackSettings]) -> int:
    """`cost`, plus two passes of the other model for each attack."""
    return cost(attacks) + 2 * len(attacks)


def cost(attacks: Sequence[AttackSettings]) -> int:
    """The most passes of the attacks for an image, with the predictions before and after.

    Restoring a success that rounding to 8 bits undid, or repeating an attack in float32, adds some.
    """
    return sum(settings.cost + 2 for settings in attacks)


def _function(
    settings: AttackSettings, *, may_predict_target: bool = False
) -> Callable[[Session, list[AttackItem]], list[AttackOutcome | Exception]]:
    def run(session: Session, items: list[AttackItem]) -> list[AttackOutcome | Exception]:
        start = session.seconds()
        x = torch.stack([item.image for item in items]).to(session.device)
        before = predict(session, to_float(x))
        labels = [
            int(row.argmax()) if item.label is None else item.label
            for item, row in zip(items, before, strict=True)
        ]
        valid = torch.tensor(
            [label != item.target for label, item in zip(labels, items, strict=True)]
        )
        results: list[AttackOutcome | Exception] = [
            _unattacked(settings, item, row)
            if may_predict_target and item.label is None
            else _same_class(item)
            for item, row in zip(items, before, strict=True)
        ]
        indices = valid.nonzero().flatten().tolist()
        if indices:
            targets = [items[index].target for index in indices]
            outcomes = attack_images(
                session,
                x[valid.to(x.device)],
                [labels[index] for index in indices],
                settings=settings,
                targets=None if None in targets else targets,  # all have one, or none has
                before=before[valid],
                cancelled=lambda: session.cancelled()[valid],
                batch_size=MAX_SHARED,
                bf16=session.bf16,
            )
            for index, outcome in zip(indices, outcomes, strict=True):
                results[index] = replace(outcome, seconds=session.seconds() - start)
        return results

    return run


def _same_class(item: AttackItem) -> InvalidParameters:
    """The error for a target that is the label, or without a label the prediction."""
    if item.label is not None:
        return invalid("target", "a class other than the label", "the label itself")
    expected = "a class other than the one the model predicts"
    return invalid("target", expected, "the class the model predicts")


def _unattacked(settings: AttackSettings, item: AttackItem, before: Tensor) -> AttackOutcome:
    """The outcome for an image that the model classifies as the target already."""
    return AttackOutcome(
        settings=settings,
        label=int(before.argmax()),
        target=item.target,
        before=before,
        after=before,
        success=True,
        linf=0.0,
        l2=0.0,
        image=item.image,
        perturbation=amplify(item.image, item.image),
        forwards=1,
        backwards=0,
        seconds=0.0,
    )


def _with_transfer(
    settings: AttackSettings, other: ServedModel
) -> Callable[[Session, list[AttackItem]], list[tuple[AttackOutcome, Transfer] | Exception]]:
    attack = _function(settings, may_predict_target=True)

    def run(
        session: Session, items: list[AttackItem]
    ) -> list[tuple[AttackOutcome, Transfer] | Exception]:
        outcomes = attack(session, items)
        images = [
            item.image if isinstance(outcome, Exception) else outcome.image
            for outcome, item in zip(outcomes, items, strict=True)
        ]
        session.pause()
        x = torch.stack([*(item.image for item in items), *images]).to(session.device)
        before, after = predict(other.logits, to_float(x)).chunk(2)
        return [
            outcome
            if isinstance(outcome, Exception)
            else (
                outcome,
                Transfer(
                    label=int(before[index].argmax()) if item.label is None else item.label,
                    target=item.target,
                    before=before[index],
                    after=after[index],
                ),
            )
            for index, (outcome, item) in enumerate(zip(outcomes, items, strict=True))
        ]

    return run

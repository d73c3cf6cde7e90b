"""Predictions for images, and attacks whose results are scored as 8-bit images."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robust.attacks import AttackResult, AttackSettings, Cancelled, Model, frozen
from robust.attacks.eight_bit import closest, outward
from robust.attacks.search import for_rows
from robust.evaluation.precision import full_float32
from robust.images import to_float, to_uint8


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One class and its probability in [0, 1]."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True, kw_only=True)
class AttackOutcome:
    """One attack on one image. Everything except `settings` is measured on the 8-bit `image`."""

    settings: AttackSettings
    label: int  # the class the attack moves away from
    target: int | None  # the class of a targeted attack
    before: Tensor  # probabilities float32 (K,) of the original image
    after: Tensor  # those of `image`
    success: bool  # `after` predicts another class than `label`, or predicts `target`
    linf: float  # distances to the original image, in pixel units
    l2: float
    image: Tensor  # the adversarial image, uint8 (3, H, W)
    perturbation: Tensor  # the change, amplified: uint8 (3, H, W), gray 128 where there is none
    forwards: int
    backwards: int
    seconds: float

    @property
    def already_wrong(self) -> bool:
        """Whether the model misclassified the original image."""
        return int(self.before.argmax()) != self.label


@full_float32()
def predict(model: Model, x: Tensor) -> Tensor:
    """Probabilities float32 (N, K), on the CPU, of images float32 (N, 3, H, W) in [0, 1].

    The model runs in eval mode and is left as it was. Raises ValueError for NaN or infinite
    logits.
    """
    with frozen(model, x.device), torch.inference_mode():
        logits = model(x).float()
    if not bool(logits.isfinite().all()):
        raise ValueError("expected finite logits, got NaN or infinities from the model")
    return logits.softmax(dim=1).cpu().clone()


def top_classes(
    probabilities: Tensor | Sequence[float], classes: Sequence[str], k: int
) -> tuple[Prediction, ...]:
    """The `k` likeliest classes, or all if there are fewer, of probabilities (K,).

    Ties are in order of the class index.
    """
    values = probabilities.tolist() if isinstance(probabilities, Tensor) else probabilities
    likeliest = heapq.nlargest(k, range(len(values)), key=values.__getitem__)
    return tuple(
        Prediction(label=classes[index], index=index, probability=values[index])
        for index in likeliest
    )


def find_class(name: str | int, classes: Sequence[str]) -> int:
    """The index of a class given by name or index; a name wins if both are possible.

    Raises ValueError that lists the classes.
    """
    text = str(name).strip()
    if text in classes:
        return list(classes).index(text)
    if text.isascii() and text.isdigit() and len(text) <= 9 and int(text) < len(classes):
        return int(text)
    shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    raise ValueError(
        f"expected class to be one of {shown} or an index from 0 to {len(classes) - 1}, "
        f"got {text[:40]!r}"
    )


def attack_image(
    model: Model,
    x: Tensor,
    y: int | None = None,
    *,
    settings: AttackSettings,
    target: int | None = None,
) -> AttackOutcome:
    """Attack the image `x`, uint8 (3, H, W), and score the resulting 8-bit image.

    `x` is on the device of the model. `y` is the true class, by default the prediction; `target` is
    the target class. The result is rounded to 8 bits inside the ball and then classified again, so
    that the decoded PNG is exactly what was scored. Raises ValueError for a label or target that
    is not a class of the model, or a target equal to the label.
    """
    if x.dtype != torch.uint8 or x.ndim != 3:
        raise ValueError(f"expected a uint8 image (3, H, W), got {x.dtype} {tuple(x.shape)}")
    start = time.perf_counter()
    before = predict(model, to_float(x).unsqueeze(0))
    label = int(before[0].argmax()) if y is None else y
    (outcome,) = attack_images(
        model,
        x.unsqueeze(0),
        [label],
        settings=settings,
        targets=None if target is None else [target],
        before=before,
    )
    return replace(outcome, seconds=time.perf_counter() - start)


@full_float32()
def attack_images(
    model: Model,
    x: Tensor,
    labels: Sequence[int],
    *,
    settings: AttackSettings,
    before: Tensor,
    targets: Sequence[int] | None = None,
    cancelled: Cancelled | None = None,
    batch_size: int | None = None,
    bf16: Model | None = None,
) -> list[AttackOutcome]:
    """Attack images uint8 (N, 3, H, W) in one batch, each away from its label.

    `before` are their probabilities, float32 (N, K). `cancelled` returns the mask bool (N,) of
    cancelled images and is called between passes; their attack ends with the best result so far.
    `seconds` of an outcome is the time of the whole batch. `bf16` is a bfloat16 copy of `model` for
    the search: results are scored on `model`, and an image whose success is not confirmed is
    attacked again on `model`. A success on `model` that rounding undoes is pushed outward, up to
    eps. An attack with a `fallback` also tries that on the images it fails on, and returns the
    closest 8-bit image toward the original that still fools the model.
    """
    start = time.perf_counter()
    for name, indices in (("label", labels), ("target", targets or ())):
        for index in indices:
            if not 0 <= index < before.shape[1]:
                raise ValueError(f"expected a {name} from 0 to {before.shape[1] - 1}, got {index}")
    y = torch.tensor(labels, device=x.device)
    goal = None if targets is None else torch.tensor(targets, device=x.device)

    def fooled(after: Tensor, rows: Tensor) -> Tensor:
        predicted = after.argmax(dim=1).to(x.device)
        return predicted != y[rows] if goal is None else predicted == goal[rows]

    def attack(searched: Model, rows: Tensor, by: AttackSettings = settings) -> _Attacked:
        clean = to_float(x[rows])
        result = by.run(
            searched,
            clean,
            y[rows],
            target=None if goal is None else goal[rows],
            cancelled=for_rows(cancelled, rows),
            batch_size=batch_size,
            eight_bit=True,
        )
        images = to_uint8(settings.threat_model.round_inside(result.x_adv, clean))
        return _Attacked(result=result, images=images, after=predict(model, to_float(images)))

    def undone(found: _Attacked, rows: Tensor) -> Tensor:
        """Indices of the successes whose 8-bit images don't fool the model."""
        return (found.result.success & ~fooled(found.after, rows)).nonzero().squeeze(1)

    searched = model if bf16 is None or settings.needs_float32 else bf16

    def fall_back(found: _Attacked, by: AttackSettings) -> _Attacked:
        failed = (~fooled(found.after, everything)).nonzero().squeeze(1)
        if not len(failed):
            return found
        other = attack(model, failed, by)
        found = found.with_cost_of(failed, other)
        taken = fooled(other.after, failed)
        if not bool(taken.any()):
            return found
        rows = failed[taken]
        closer, passes = closest(
            lambda tried: fooled(predict(model, tried), rows),
            to_float(other.images[taken]),
            to_float(x[rows]),
            norm=by.threat_model.norm,
        )
        return found.with_images(rows, to_uint8(closer), predict(model, closer), passes + 1)

    everything = torch.arange(len(x), device=x.device)
    found = attack(searched, everything)
    lost = undone(found, everything)
    near = found.result.x_adv[lost]
    if len(lost) and searched is not model:  # by bfloat16
        other = attack(model, lost)
        found = found.with_cost_of(lost, other).with_images(lost, other.images, other.after)
        again = undone(other, lost)
        near, lost = other.result.x_adv[again], lost[again]
    if len(lost):  # by rounding to 8 bits
        farther, passes = outward(
            lambda tried: fooled(predict(model, tried), lost),
            near,
            to_float(x[lost]),
            norm=settings.threat_model.norm,
            eps=settings.threat_model.eps,
        )
        found = found.with_images(lost, to_uint8(farther), predict(model, farther), passes + 1)
    if settings.fallback is not None:
        found = fall_back(found, settings.fallback)
    success = fooled(found.after, everything).tolist()
    # Whole gray levels, so distances are exact.
    levels = (found.images.cpu().double() - x.cpu().double()).flatten(1)
    seconds = time.perf_counter() - start
    outcomes = []
    for place, label in enumerate(labels):
        outcomes.append(
            AttackOutcome(
                settings=settings,
                label=label,
                target=targets[place] if targets else None,
                before=before[place],
                after=found.after[place],
                success=success[place],
                linf=float(levels[place].abs().amax()) / 255,
                l2=float(levels[place].square().sum().sqrt()) / 255,
                image=found.images[place].cpu(),
                perturbation=amplify(found.images[place], x[place]).cpu(),
                forwards=int(found.result.forwards[place]) + 2,
                backwards=int(found.result.backwards[place]),
                seconds=seconds,
            )
        )
    return outcomes


@dataclass(frozen=True, kw_only=True)
class _Attacked:
    """The results of an attack on N images, and their 8-bit predictions."""

    result: AttackResult
    images: Tensor  # uint8 (N, 3, H, W)
    after: Tensor  # probabilities float32 (N, K)

    def with_images(
        self, rows: Tensor, images: Tensor, after: Tensor, passes: int = 0
    ) -> _Attacked:
        """These results with other images for `rows`, found with so many more forward passes."""
        return replace(
            self,
            images=self.images.index_copy(0, rows, images),
            after=self.after.index_copy(0, rows.cpu(), after),
            result=self._with_passes(rows, torch.full_like(rows, passes), torch.zeros_like(rows)),
        )

    def with_cost_of(self, rows: Tensor, other: _Attacked) -> _Attacked:
        """These results with the passes of another attack on `rows` added to theirs."""
        more = other.result
        return replace(self, result=self._with_passes(rows, more.forwards + 1, more.backwards))

    def _with_passes(self, rows: Tensor, forwards: Tensor, backwards: Tensor) -> AttackResult:
        return replace(
            self.result,
            forwards=self.result.forwards.index_add(0, rows, forwards),
            backwards=self.result.backwards.index_add(0, rows, backwards),
        )


def amplify(x_adv: Tensor, x: Tensor) -> Tensor:
    """The difference of two uint8 images, stretched to the full range around gray 128.

    The largest change becomes 1 or 255; unchanged pixels are 128.
    """
    delta = x_adv.to(torch.float32) - x.to(torch.float32)
    largest = delta.abs().amax().clamp_min(1)
    return (128 + delta * (127 / largest)).round().to(torch.uint8)

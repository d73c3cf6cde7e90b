"""What a model says of an image, as it came and after an attack, told in 8-bit images."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robust.attacks import AttackSettings, GivenUp, Model, frozen
from robust.evaluation.precision import full_float32
from robust.images import to_float, to_uint8


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One class a model sees in an image, with its probability in [0, 1]."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True, kw_only=True)
class AttackOutcome:
    """One attack on one image. All but `settings` is measured on the 8-bit `image`."""

    settings: AttackSettings
    label: int  # the class the attack leads away from
    target: int | None  # the class it leads to, where one was asked for
    before: Tensor  # probabilities float32 (K,) of the image as it came
    after: Tensor  # the same of `image`
    success: bool  # `after` is led by another class than `label`, or by `target` where given
    linf: float  # distances to the image as it came, in pixel units
    l2: float
    image: Tensor  # the adversarial image, uint8 (3, H, W)
    perturbation: Tensor  # what was added, amplified: uint8 (3, H, W), grey 128 where nothing was
    forwards: int
    backwards: int
    seconds: float

    @property
    def already_wrong(self) -> bool:
        """Whether the model missed `label` before anything was done to the image."""
        return int(self.before.argmax()) != self.label


@full_float32()
def predict(model: Model, x: Tensor) -> Tensor:
    """Probabilities float32 (N, K), on the CPU, of images float32 (N, 3, H, W) in [0, 1].

    The model is held in eval mode meanwhile and left as it was. Raises ValueError for a model
    that answers NaN or infinities: no class can be read off those.
    """
    with frozen(model, x.device), torch.inference_mode():
        logits = model(x).float()
    if not bool(logits.isfinite().all()):
        raise ValueError("expected finite logits, got NaN or infinities from the model")
    return logits.softmax(dim=1).cpu().clone()


def top_classes(
    probabilities: Tensor | Sequence[float], classes: Sequence[str], k: int
) -> tuple[Prediction, ...]:
    """The `k` likeliest classes, or all where there are fewer, of probabilities (K,).

    Of classes equally likely the one of the lower index comes first.
    """
    values = probabilities.tolist() if isinstance(probabilities, Tensor) else probabilities
    likeliest = heapq.nlargest(k, range(len(values)), key=values.__getitem__)
    return tuple(
        Prediction(label=classes[index], index=index, probability=values[index])
        for index in likeliest
    )


def find_class(name: str | int, classes: Sequence[str]) -> int:
    """The index of a class given by name or index; a name wins where both would fit.

    Raises ValueError naming the classes there are.
    """
    text = str(name).strip()
    if text in classes:
        return list(classes).index(text)
    if text.isascii() and text.isdigit() and len(text) <= 9 and int(text) < len(classes):
        return int(text)
    shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    raise ValueError(
        f"expected a class out of {shown} or an index from 0 to {len(classes) - 1}, "
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
    """Attack the image `x`, uint8 (3, H, W), and score the 8-bit image that comes out.

    `x` lies on the device of the model. `y` is the class to lead away from, the prediction where
    it is None; `target` the class to lead to. The result is rounded to 8 bits inside the ball and
    then classified anew: what a PNG of it decodes to is what was scored. Raises ValueError for a
    label or target that is no class of the model, or a target that is the label.
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
    given_up: GivenUp | None = None,
    batch_size: int | None = None,
) -> list[AttackOutcome]:
    """The same for images uint8 (N, 3, H, W) together, each led away from its label.

    `before` are their probabilities float32 (N, K). `given_up` tells between two passes, bool
    (N,), whose result nobody wants any more: their attack ends there, and what is given for them
    is what was found so far. `seconds` are those of all.
    """
    start = time.perf_counter()
    for name, indices in (("label", labels), ("target", targets or ())):
        for index in indices:
            if not 0 <= index < before.shape[1]:
                raise ValueError(f"expected a {name} from 0 to {before.shape[1] - 1}, got {index}")
    clean = to_float(x)
    result = settings.run(
        model,
        clean,
        torch.tensor(labels, device=x.device),
        target=None if targets is None else torch.tensor(targets, device=x.device),
        given_up=given_up,
        batch_size=batch_size,
    )
    images = to_uint8(settings.threat_model.round_inside(result.x_adv, clean))
    after = predict(model, to_float(images))
    levels = (images.cpu().double() - x.cpu().double()).flatten(1)  # whole: distances are exact
    seconds = time.perf_counter() - start
    outcomes = []
    for place, label in enumerate(labels):
        predicted, target = int(after[place].argmax()), targets[place] if targets else None
        outcomes.append(
            AttackOutcome(
                settings=settings,
                label=label,
                target=target,
                before=before[place],
                after=after[place],
                success=predicted != label if target is None else predicted == target,
                linf=float(levels[place].abs().amax()) / 255,
                l2=float(levels[place].square().sum().sqrt()) / 255,
                image=images[place].cpu(),
                perturbation=amplify(images[place], x[place]).cpu(),
                forwards=int(result.forwards[place]) + 2,
                backwards=int(result.backwards[place]),
                seconds=seconds,
            )
        )
    return outcomes


def amplify(x_adv: Tensor, x: Tensor) -> Tensor:
    """The difference of two uint8 images, stretched to the full range around grey 128.

    Its largest change becomes 1 or 255; where nothing changed the pixel is 128.
    """
    delta = x_adv.to(torch.float32) - x.to(torch.float32)
    largest = delta.abs().amax().clamp_min(1)
    return (128 + delta * (127 / largest)).round().to(torch.uint8)

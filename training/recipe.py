"""Recipes: everything that decides what a training run does, as data.

Each technique is a field and has a value that switches it off. The recipes themselves are in
`training.recipes`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from robust.classifier import Activation, Arch, Stem
from robust.threat_model import Norm

EPS = 8 / 255  # pixel units


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes to each image, drawn per image on the device."""

    crop_padding: int = 4
    """Pixels of reflected border before a random crop back to size. 0: no crop."""
    flip: float = 0.5
    """Probability of a horizontal flip. 0: none."""
    rotation: float = 0.0
    """Largest angle in degrees, uniform on both sides. 0: none."""
    jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation. 0: none."""
    cutout: int = 0
    """Side in pixels of the square set to mid-grey. 0: none (DeVries & Taylor 2017)."""
    mixup: float = 0.0
    """Beta parameter of mixup (Zhang et al. 2018). 0: none; adversarial parts are never mixed."""


@dataclass(frozen=True, kw_only=True)
class AdversarialPart:
    """One share of the loss: images attacked in a given way."""

    kind: Literal["clean", "fgsm", "fgsm-rs", "n-fgsm", "pgd"]
    """`fgsm`: no start. `fgsm-rs`: uniform start in the ball (Wong et al. 2020). `n-fgsm`: noise
    of twice eps and no clipping to the ball, does not collapse (de Jorge et al. 2022)."""
    share: float = 1.0
    """Weight in the loss; the shares of a phase add up to 1."""
    steps: int = 1
    """Gradient steps of `pgd`; the others take one."""
    alpha: float = 0.0
    """Step in pixel units. 0: eps for `fgsm` and `n-fgsm`, 1.25 eps for `fgsm-rs`, for `pgd` a
    quarter of eps or what crosses the ball."""

    @property
    def attack_steps(self) -> int:
        """Gradient steps before the image is trained on."""
        return {"clean": 0, "pgd": self.steps}.get(self.kind, 1)


CLEAN = (AdversarialPart(kind="clean"),)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training with one kind of loss and one learning-rate schedule."""

    name: str
    epochs: int
    """Passes over the training images. 0: the phase is left out."""
    parts: tuple[AdversarialPart, ...] = CLEAN
    """What the loss is made of."""
    loss: Literal["cross-entropy", "trades"] = "cross-entropy"
    """`trades`: clean loss plus `trades_beta` times the divergence of the attacked prediction
    from the clean one (Zhang et al. 2019); takes exactly one attacked part."""
    trades_beta: float = 6.0
    split: bool = False
    """True: each image goes to one part only, in the proportion of the shares. False: every
    image goes through every part."""
    learning_rate: float = 0.1
    """Peak, reached after the warm-up, then a cosine down to 0."""
    warmup: float = 0.05
    """Share of the phase's steps in which the rate rises linearly. 0: none."""
    final_rate: float = 0.0
    """Where the cosine ends, as a share of the peak, so that a further phase can go on from
    there. 0: at nothing."""
    teacher: float = 0.0
    """Share of the target that is the averaged model's own prediction of the unattacked image
    (Tarvainen & Valpola 2017; against robust overfitting, Dong et al. 2022). 0: labels alone."""
    awp: float = 0.0
    """Adversarial weight perturbation: how far the weights are pushed up the loss, as a share of
    their norm (Wu et al. 2020, who take 0.005). 0: none."""
    awp_from: float = 0.0
    """Share of the phase's steps after which `awp` begins; late is cheaper."""
    augmentation: Augmentation = field(default_factory=Augmentation)

    @property
    def is_adversarial(self) -> bool:
        """Whether any part of the loss is attacked."""
        return any(part.kind != "clean" for part in self.parts)

    @property
    def passes(self) -> float:
        """Forward and backward passes an image takes, roughly: what one phase costs to another."""
        attacks = [2 * part.attack_steps for part in self.parts]
        if self.loss == "trades":  # clean and attacked, and the prediction it is to diverge from
            attack, loss = attacks[0] + 1.0, 6.0
        elif self.split:
            pairs = zip(self.parts, attacks, strict=True)
            attack, loss = sum(part.share * steps for part, steps in pairs), 3.0
        else:
            attack, loss = float(sum(attacks)), 3.0 * len(self.parts)
        perturbed = 1 - self.awp_from if self.awp else 0.0  # the loss once more, for its direction
        return attack + loss * (1 + perturbed) + (1 if self.teacher else 0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. Validated on construction: ValueError names the field."""

    name: str
    phases: tuple[Phase, ...]

    arch: Arch = "resnet50"
    stem: Stem = "imagenet"
    activation: Activation = "relu"
    input_size: int = 32
    """Pixels a side."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Normalisation inside the classifier; 0 and 1 leave it to the first batch norm, so that the
    bare weights take pixels in [0, 1]."""
    zero_init_residual: bool = False
    """Start every residual branch at zero (Goyal et al. 2017)."""

    norm: Norm = "linf"
    eps: float = EPS

    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    """Of SGD, Nesterov's. 0: plain SGD."""
    weight_decay: float = 5e-4
    """On weights of convolutions and the head; never on norms and biases. 0: none."""
    batch_size: int = 128
    label_smoothing: float = 0.1
    """Share of the target spread over all classes. 0: none."""
    gradient_clip: float = 1.0
    """Largest global L2 norm of the gradient. 0: no clipping."""
    ema_decay: float = 0.999
    """Averaged weights, per step, lower while the run is young. 0: no averaging."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 where the device multiplies it in hardware (CUDA, CPUs with AMX)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Passes through torch.compile, attack and training as graphs of their own. `auto`: on CUDA."""

    batch_norm: Literal["sync", "local"] = "sync"
    """Where several GPUs share out a batch. `sync`: statistics over the whole batch, so that all
    is as on one. `local`: each over its share, which spares two rounds of talk a layer; running
    statistics are the mean over the GPUs."""

    held_out: float = 0.02
    """Stratified share of the training data that is never trained on and picks the model."""
    monitor_limit: int = 1000
    """Held-out images scored after each epoch. 0: all."""
    select: Literal["pgd", "mean", "last"] = "pgd"
    """The model kept: the best PGD-10 accuracy on the held-out images, the best mean of that and
    the clean one, the later of equals; or the last."""

    def __post_init__(self) -> None:
        _check_choices("recipe", self)
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names) or not any(phase.epochs for phase in self.phases):
            raise ValueError(f"phases: expected different names and some epochs, got {names}")
        for phase in self.phases:
            _check_phase(phase, self.input_size)
        _check_range("recipe", self, 0, "weight_decay", "gradient_clip", "monitor_limit")
        if self.batch_size < 2:
            raise ValueError(f"batch_size: expected at least 2, got {self.batch_size}")
        for name in ("momentum", "label_smoothing", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected [0, 1), got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: expected a share between 0 and 1, got {self.held_out}")

    @property
    def epochs(self) -> int:
        """Epochs of all phases together."""
        return sum(phase.epochs for phase in self.phases)

    @property
    def is_adversarial(self) -> bool:
        """Whether any phase that runs is adversarial."""
        return any(phase.is_adversarial for phase in self.phases if phase.epochs)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def _check_choices(owner: str, value: object) -> None:
    """Raise ValueError for a field whose value is none of those its type names."""
    for name, hint in get_type_hints(type(value)).items():
        found = getattr(value, name)
        if get_origin(hint) is Literal and found not in get_args(hint):
            choices = ", ".join(map(str, get_args(hint)))
            raise ValueError(f"{owner}: expected {name} out of {choices}, got {found!r}")


def _check_range(
    owner: str, value: object, low: float, *names: str, high: float = math.inf
) -> None:
    for name in names:
        if not low <= getattr(value, name) <= high:
            limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{owner}: expected {name} {limits}, got {getattr(value, name)}")


def _check_phase(phase: Phase, input_size: int) -> None:
    for part in phase.parts:
        _check_choices(phase.name, part)
        _check_range(phase.name, part, 0, "share", high=1)
        _check_range(phase.name, part, 1, "steps")
        _check_range(phase.name, part, 0, "alpha")
    _check_choices(phase.name, phase)
    _check_range(phase.name, phase, 0, "trades_beta")
    total = sum(part.share for part in phase.parts)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"{phase.name}: expected shares that add up to 1, got {total:g}")
    if phase.epochs < 0 or phase.learning_rate <= 0 or not 0 <= phase.warmup < 1:
        raise ValueError(
            f"{phase.name}: expected epochs >= 0, learning_rate > 0 and a warmup in [0, 1), got "
            f"{phase.epochs}, {phase.learning_rate:g} and {phase.warmup:g}"
        )
    attacked = [part for part in phase.parts if part.kind != "clean"]
    if phase.loss == "trades" and (len(attacked) != 1 or len(phase.parts) != 1):
        raise ValueError(f"{phase.name}: expected trades with one attacked part, got {phase.parts}")
    for name in ("final_rate", "teacher", "awp", "awp_from"):
        if not 0 <= getattr(phase, name) < 1:
            raise ValueError(f"{phase.name}: expected {name} in [0, 1), got {getattr(phase, name)}")
    augmentation = phase.augmentation
    if augmentation.mixup and phase.is_adversarial:
        raise ValueError(f"{phase.name}: expected mixup in a clean phase only")
    _check_range(phase.name, augmentation, 0, "crop_padding", high=input_size - 1)  # of reflection
    _check_range(phase.name, augmentation, 0, "cutout", "mixup")
    _check_range(phase.name, augmentation, 0, "rotation", high=180)
    _check_range(phase.name, augmentation, 0, "flip", "jitter", high=1)

"""Recipes: complete descriptions of training runs, as data.

Each technique is a field with a value that turns it off. The built-in recipes are in
`training.recipes`; files and command-line overrides are read in `training.recipe_values`.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from robust.choices import Activation, Norm, Stem
from training.field_types import Limits, Size, check_fields

EPS = 8 / 255  # pixel units

Share = Annotated[float, Limits(0, 1)]
BelowOne = Annotated[float, Limits(0, 1, below=True)]
NotNegative = Annotated[float, Limits(0)]
Count = Annotated[int, Limits(0)]
AtLeastOne = Annotated[int, Limits(1)]
Rgb = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes to each image, drawn per image on the device."""

    crop_padding: Count = 4
    """Pixels of reflected border before a random crop back to size. 0: no crop."""
    flip: Share = 0.5
    """Probability of a horizontal flip. 0: none."""
    rotation: Annotated[float, Limits(0, 180)] = 0.0
    """Largest angle in degrees, uniform on both sides. 0: none."""
    jitter: Share = 0.0
    """Largest relative change of brightness, contrast and saturation. 0: none."""
    cutout: Count = 0
    """Side in pixels of a square set to mid-gray. 0: none (DeVries & Taylor 2017)."""
    mixup: NotNegative = 0.0
    """Beta parameter of mixup (Zhang et al. 2018); clean phases only. 0: none."""


@dataclass(frozen=True, kw_only=True)
class AdversarialPart:
    """One part of the loss: images attacked in a given way."""

    kind: Literal["clean", "fgsm", "fgsm-rs", "n-fgsm", "pgd"]
    """`fgsm`: starts at the image. `fgsm-rs`: uniform start in the ball (Wong et al. 2020).
    `n-fgsm`: noise of twice eps and no clipping to the ball, which prevents collapse (de Jorge et
    al. 2022)."""
    share: Share = 1.0
    """Weight in the loss; the shares of a phase add up to 1."""
    steps: AtLeastOne = 1
    """Gradient steps of `pgd`; the others take one."""
    alpha: Size = 0.0
    """Step size in pixel units. 0: eps for `fgsm` and `n-fgsm`, 1.25 eps for `fgsm-rs`; for `pgd`
    2.5 eps / steps, but at least eps / 4 and at most eps."""

    @property
    def attack_steps(self) -> int:
        """Gradient steps before the image is trained on."""
        return {"clean": 0, "pgd": self.steps}.get(self.kind, 1)


CLEAN = (AdversarialPart(kind="clean"),)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Some epochs with one kind of loss and one learning-rate schedule."""

    name: str
    """Letters, digits, ``-`` and ``_``, a letter first. Identifies the phase in ``--set``."""
    epochs: Count
    """Passes over the training images. 0: the phase is skipped."""
    parts: tuple[AdversarialPart, ...] = CLEAN
    """The parts of the loss."""
    loss: Literal["cross-entropy", "trades"] = "cross-entropy"
    """`trades`: clean loss plus `trades_beta` times the divergence of the attacked prediction
    from the clean one (Zhang et al. 2019); takes exactly one attacked part."""
    trades_beta: NotNegative = 6.0
    split: bool = False
    """True: each image goes to one part only, in the proportion of the shares. False: every
    image goes through every part."""
    learning_rate: Annotated[float, Limits(0, above=True)] = 0.1
    """Peak rate, reached after the warm-up and followed by a cosine decay."""
    warmup: BelowOne = 0.05
    """Share of the phase's steps in which the rate rises linearly. 0: none."""
    final_rate: BelowOne = 0.0
    """Rate at the end of the cosine, relative to the peak; the next phase can continue from it."""
    teacher: BelowOne = 0.0
    """Share of the target that is the averaged model's own prediction of the clean image
    (Tarvainen & Valpola 2017; against robust overfitting, Dong et al. 2022). 0: labels alone."""
    awp: BelowOne = 0.0
    """Adversarial weight perturbation: how far the weights are moved up the loss, relative to
    their norm (Wu et al. 2020, who use 0.005). 0: none."""
    awp_from: BelowOne = 0.0
    """Share of the phase's steps after which `awp` begins; a late start is cheaper."""
    augmentation: Augmentation = field(default_factory=Augmentation)

    @property
    def is_adversarial(self) -> bool:
        """Whether the loss has adversarial images."""
        return any(part.kind != "clean" for part in self.parts)

    @property
    def passes(self) -> float:
        """Approximate forward and backward passes per image; a backward pass counts twice.

        A gradient with respect to the image is two passes, one with respect to the weights three.
        """
        attacks = [2 * part.attack_steps for part in self.parts]
        if self.loss == "trades":  # one more pass for the clean prediction
            attack, loss = attacks[0] + 1.0, 6.0
        elif self.split:
            pairs = zip(self.parts, attacks, strict=True)
            attack, loss = sum(part.share * steps for part, steps in pairs), 3.0
        else:
            attack, loss = float(sum(attacks)), 3.0 * len(self.parts)
        perturbed = 1 - self.awp_from if self.awp else 0.0  # AWP computes the loss twice
        return attack + loss * (1 + perturbed) + (1 if self.teacher else 0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole training run.

    Raises ValueError for a wrong type or value, as ``adversarial.epochs: expected ..., got ...``.
    """

    name: str
    phases: tuple[Phase, ...]

    arch: str = "resnet50"
    """A network that `robust.networks` builds."""
    variant: str = ""
    """Distinguishes networks of the same name, see the family's file."""
    stem: Stem = "imagenet"
    activation: Activation = "relu"
    input_size: Annotated[int, Limits(8, 1024)] = 32
    """Height and width in pixels."""
    mean: Rgb = (0.0, 0.0, 0.0)
    """Subtracted from pixels in [0, 1] inside the classifier. Files and ``--set`` also take
    ``imagenet`` or ``cifar10``, for mean and std together."""
    std: Rgb = (1.0, 1.0, 1.0)
    """Divides them. Mean 0 and std 1 leave normalization to the first batch norm, so that the
    bare weights take pixels in [0, 1]."""
    zero_init_residual: bool = False
    """Initialize every residual branch to zero (Goyal et al. 2017)."""

    norm: Norm = "linf"
    """Norm of the ball that attacks stay in."""
    eps: Size = EPS
    """Its radius in pixel units."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: BelowOne = 0.9
    """Nesterov momentum of SGD. 0: plain SGD."""
    weight_decay: NotNegative = 5e-4
    """On weights of convolutions and the head; never on norms and biases. 0: none."""
    batch_size: Annotated[int, Limits(2)] = 128
    label_smoothing: BelowOne = 0.1
    """Share of the target spread over all classes. 0: none."""
    class_weights: Literal["none", "balanced"] = "none"
    """Class weights of the loss in every phase. `balanced`: an image counts n / (K n_k), for n
    images in K classes and n_k in its own, so that all classes count alike."""
    gradient_clip: NotNegative = 1.0
    """Largest global L2 norm of the gradient. 0: no clipping."""
    ema_decay: BelowOne = 0.999
    """Decay per step of the averaged weights, lower in the first steps. 0: no averaging."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 where the device has hardware for it (CUDA, CPUs with AVX-512 BF16 or AMX)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether torch.compile compiles the passes. `auto`: on CUDA."""

    batch_norm: Literal["sync", "local"] = "sync"
    """Batch norm when several GPUs share a batch. `sync`: statistics over the whole batch, as on
    one GPU. `local`: each GPU's own, which saves two all-reduces per layer; running statistics
    are the mean over the GPUs."""

    held_out: Annotated[float, Limits(0, 1, above=True, below=True)] = 0.02
    """Stratified share of the training images that is held out to select the model; unused when
    validation images are given (``--val``)."""
    monitor_limit: Count = 1000
    """Held-out images scored after an epoch. 0: all."""
    score_every: Annotated[int, Limits(1)] = 1
    """Epochs between scores on held-out images; the last epoch of a phase is always scored."""
    select: Literal["pgd", "mean", "clean", "last"] = "pgd"
    """The model that is kept: with the best accuracy on held-out images under PGD-10 (`pgd`),
    without an attack (`clean`), or the best mean of both (`mean`), the later one in a tie; or the
    `last`."""

    def __post_init__(self) -> None:
        # Not at the top: recipes are listed without torch.
        from robust import networks
        from robust.threat_model import ThreatModel

        check_fields(self)
        try:
            if networks.family_of(self.arch).stems == ("own",):
                raise ValueError(
                    "expected a ResNet, PreActResNet or WideResNet of robust.networks, as training "
                    f"builds the network, got {self.arch!r}"
                )
            networks.check_choices(
                self.arch, stem=self.stem, activation=self.activation, variant=self.variant
            )
        except ValueError as error:
            raise ValueError(f"arch: {error}") from None
        _check_phase_names(self.phases)
        try:
            ThreatModel(norm=self.norm, eps=self.eps)
        except ValueError as error:
            raise ValueError(f"eps: {error}") from None
        if min(self.std) <= 0:
            raise ValueError(f"std: expected 3 positive numbers, got {self.std}")
        for phase in self.phases:
            _check_phase(phase, self.input_size)

    @property
    def epochs(self) -> int:
        """Epochs of all phases together."""
        return sum(phase.epochs for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def _check_phase_names(phases: tuple[Phase, ...]) -> None:
    names = [phase.name for phase in phases]
    if len(set(names)) != len(names):
        raise ValueError(f"phases: expected different names, got {', '.join(names)}")
    if not any(phase.epochs for phase in phases):
        got = ", ".join(f"{name}.epochs=0" for name in names) or "no phases"
        raise ValueError(f"phases: expected some epochs, got {got}")
    for name in names:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise ValueError(f"phases: expected a name such as adversarial, got {name[:40]!r}")


def _check_phase(phase: Phase, input_size: int) -> None:
    """Checks that involve more than one field."""
    total = sum(part.share for part in phase.parts)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"{phase.name}.parts: expected shares that add up to 1, got {total:g}")
    attacked = [part for part in phase.parts if part.kind != "clean"]
    if phase.loss == "trades" and (len(attacked) != 1 or len(phase.parts) != 1):
        raise ValueError(
            f"{phase.name}.parts: expected one attacked part for trades, got "
            f"{[part.kind for part in phase.parts]}"
        )
    if phase.augmentation.mixup and phase.is_adversarial:
        raise ValueError(
            f"{phase.name}.augmentation.mixup: expected 0 in an adversarial phase, got "
            f"{phase.augmentation.mixup}"
        )
    if phase.augmentation.crop_padding >= input_size:  # reflection needs that many pixels
        raise ValueError(
            f"{phase.name}.augmentation.crop_padding: expected less than the input_size of "
            f"{input_size}, got {phase.augmentation.crop_padding}"
        )

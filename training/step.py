"""The training step: the model, its average, its optimizer, and how a batch updates them.

A `Trainer` can be used alone: `Trainer.step` is a whole step, and its parts (`prepare`, `attack`,
`backward`, `update`) are called one by one by the benchmarks and the tests.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.classifier import Classifier
from robust.images import to_float
from robust.networks import family_of
from robust.threat_model import ThreatModel
from training.augment import augment, mixup
from training.awp import perturbed
from training.compiled import compiled_attack, compiled_loss, compiles
from training.distributed import Collectives, Shard
from training.ema import AveragedModel
from training.folded import FoldedCopy
from training.objective import adversarial_batches, attacked_sizes, distilled_targets, objective
from training.optimizer import autocast, make_optimizer, uses_bf16
from training.recipe import Phase, Recipe
from training.state import RunState


class Trainer:
    """A classifier in training on one device.

    `model` has the trained weights, `averaged` their moving average, which is scored and saved.
    Each rank has a Trainer; `collectives` keep them equal.

    The loss uses `loss_model`, the model itself or its compiled graph. Attacks use `attack_model`,
    a copy with folded norms that each step refreshes; without `fold`, and for networks that can't
    be folded, it is the model itself under autocast.
    """

    def __init__(
        self,
        model: Classifier,
        recipe: Recipe,
        *,
        device: torch.device,
        collectives: Collectives | None = None,
        class_weights: Tensor | None = None,
        fold: bool = True,
    ) -> None:
        self.recipe, self.device = recipe, device
        self.class_weights = class_weights  # float32 (K,), for the loss
        self.collectives = collectives or Collectives()
        self.num_classes = model.architecture.num_classes
        self.threat_model = ThreatModel(norm=recipe.norm, eps=recipe.eps)
        self.bf16 = uses_bf16(recipe, device)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = AveragedModel(self.model, recipe.ema_decay)
        self.reset_optimizer()
        synced = self.collectives.world.size > 1 and recipe.batch_norm == "sync"
        if synced:  # not the averaged model, which never sees a batch
            self.collectives.with_global_norms(self.model)
        self.loss_model: nn.Module = self.model
        self.teacher: nn.Module = self.averaged.module
        self.attack_model: nn.Module = self.model
        self.attack_copy: FoldedCopy | None = None
        self.teacher_copy: FoldedCopy | None = None
        self.attack_bf16 = self.bf16  # whether attacks need autocast
        if fold and family_of(model.architecture.arch).norm_pairs is not None:
            self._fold()
        if compiles(recipe, device):
            self._compile(synced=synced)

    def _fold(self) -> None:
        """Use attack copies of the model whose weights already have autocast's precision."""
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        if any(phase.is_adversarial for phase in self.recipe.phases):
            self.attack_model = self.attack_copy = FoldedCopy(self.model, dtype)
            self.attack_bf16 = False
        if any(phase.teacher for phase in self.recipe.phases):
            assert isinstance(self.averaged.module, Classifier)
            self.teacher = self.teacher_copy = FoldedCopy(self.averaged.module, dtype)

    def _compile(self, *, synced: bool) -> None:
        x, phases = self._example(), self.recipe.phases
        if not synced:  # a compiled graph can't contain collectives
            self.loss_model = compiled_loss(self.model, x, bf16=self.bf16)
        shard = self.collectives.shard(self.recipe.batch_size)
        sizes = {size for phase in phases for size in attacked_sizes(phase, shard)}
        if sizes:
            self.attack_model = compiled_attack(
                self.attack_model,
                [x[:size] for size in sorted(sizes)],
                bf16=self.attack_bf16,
                predicts=any(phase.loss == "trades" for phase in phases),
            )

    def _example(self) -> Tensor:
        """Images of the same shape as in training."""
        size, n = self.recipe.input_size, self.recipe.batch_size
        x = torch.full((n, 3, size, size), 0.5, device=self.device)
        return self.collectives.shard(n).of(x).contiguous(memory_format=torch.channels_last)

    def reset_optimizer(self) -> None:
        """Create a fresh optimizer, at the start of each phase."""
        self.optimizer = make_optimizer(self.model, self.recipe)

    def load_state(self, state: RunState) -> None:
        """Load weights, average and optimizer from `state`."""
        self.model.load_state_dict(state.model)
        self.averaged.module.load_state_dict(state.averaged)
        self.averaged.steps = state.averaged_steps
        self.optimizer.load_state_dict(state.optimizer)

    def fill_state(self, state: RunState) -> None:
        """Put weights, average and optimizer into `state`, without copying the tensors."""
        state.model = self.model.state_dict()
        state.averaged = self.averaged.module.state_dict()
        state.averaged_steps = self.averaged.steps
        state.optimizer = self.optimizer.state_dict()

    def step(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        phase: Phase,
        learning_rate: float,
        awp: float,
        generator: torch.Generator,
    ) -> Tensor:
        """Update the weights with one batch; returns its mean loss, a scalar still on the device.

        Images uint8 (N, 3, H, W) and labels int64 (N,) are the whole batch, even if several ranks
        share it. `awp` is the relative size of the weight perturbation at this step.
        """
        self.model.train()
        x, targets, shard = self.prepare(images, labels, phase, generator)
        batches, targets = self.attack(x, targets, phase, generator, shard)
        loss = self.backward(batches, targets, phase, awp=awp, weight=shard.weight)
        loss = self.collectives.add_gradients(self.model, loss)
        self.update(learning_rate)
        return loss

    def prepare(
        self, images: Tensor, labels: Tensor, phase: Phase, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Shard]:
        """Augmented images float32 and target distributions (N, K) of this rank's shard."""
        x = augment(to_float(images), phase.augmentation, generator)
        targets = F.one_hot(labels, self.num_classes).float()
        if phase.augmentation.mixup:
            x, targets = mixup(x, targets, phase.augmentation.mixup, generator)
        shard = self.collectives.shard(len(x))
        x = shard.of(x).contiguous(memory_format=torch.channels_last)
        return x, shard.of(targets), shard

    def attack(
        self,
        x: Tensor,
        targets: Tensor,
        phase: Phase,
        generator: torch.Generator,
        shard: Shard | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """The images for the loss, see `adversarial_batches`, and their targets."""
        if phase.is_adversarial and self.attack_copy is not None:
            self.attack_copy.refresh()
        if phase.teacher and self.teacher_copy is not None:
            self.teacher_copy.refresh()
        with autocast(self.attack_bf16, self.device):
            targets = distilled_targets(targets, self.teacher, x, weight=phase.teacher)
            batches = adversarial_batches(
                self.attack_model,
                x,
                targets,
                phase=phase,
                threat_model=self.threat_model,
                generator=generator,
                shard=shard,
            )
        return batches, targets

    def backward(
        self,
        batches: list[Tensor],
        targets: Tensor,
        phase: Phase,
        *,
        awp: float = 0.0,
        weight: float = 1.0,
    ) -> Tensor:
        """Set the gradients of `weight` times the loss; returns it, a scalar on the device."""
        loss_of = partial(self._loss, batches, targets, phase, weight)
        self.optimizer.zero_grad(set_to_none=True)
        all_reduce_sum = self.collectives.all_reduce_sum
        with perturbed(self.model, loss_of, gamma=awp, all_reduce_sum=all_reduce_sum):
            loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _loss(self, batches: list[Tensor], targets: Tensor, phase: Phase, weight: float) -> Tensor:
        with autocast(self.bf16, self.device):
            loss = objective(
                self.loss_model,
                batches,
                targets,
                phase=phase,
                label_smoothing=self.recipe.label_smoothing,
                class_weights=self.class_weights,
            )
        return weight * loss

    def update(self, learning_rate: float) -> None:
        """Clip the gradients, take an optimizer step, and update the averaged weights."""
        if self.recipe.gradient_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.averaged.update()

"""One training run on several GPUs or machines, the same mathematics as on one.

Every rank holds all images and weights, and draws the same random numbers for the whole batch, as
they depend on seed and position alone. It then takes its share of the batch, attacks it and goes
forward and backward on it; no word passes between ranks in an attack. After that their gradients
are added up in one all-reduce, so that every rank takes the same step. torch's
DistributedDataParallel would do the same in pieces, and at every backward of its wrapper.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust.ranks import ALONE, Ranks


def was_restarted() -> bool:
    """Whether torchrun started this process in place of one that was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank has of `n` images: every `step`-th from `first` on.

    Not a stretch of them: all ranks get alike many of each part of a loss, which differ in cost.
    """

    n: int
    first: int = 0
    step: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """The rows of this share, of all (n, ...)."""
        return whole[self.first :: self.step]

    @property
    def weight(self) -> float:
        """Of the mean over this share in the mean over all."""
        return len(range(self.first, self.n, self.step)) / self.n

    def within(self, start: int, stop: int) -> tuple[slice, Share]:
        """Where the images `start` to `stop` of all lie in this share, and its share of them."""
        before, after = (len(range(self.first, edge, self.step)) for edge in (start, stop))
        first = (self.first - start) % self.step
        return slice(before, after), Share(n=stop - start, first=first, step=self.step)

    def draw(
        self,
        noise: Callable[[Tensor, torch.Generator], Tensor],
        x: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """`noise` for the images `x` of this share: drawn for all n, so that it is each image's."""
        return self.of(noise(x.new_empty((self.n, *x.shape[1:])), generator))


class Team:
    """What the ranks of a run do together in a step, and how much they say."""

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.bytes = 0  # handed to all-reduces so far

    def share(self, n: int) -> Share:
        """This rank's of a batch of n images."""
        return Share(n=n, first=self.ranks.rank, step=self.ranks.size)

    def add_up(self, tensors: list[Tensor]) -> None:
        """Put the sum over all ranks into each tensor, by one all-reduce of them all."""
        if self.ranks.size == 1:
            return
        import torch.distributed as dist

        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        self.bytes += flat.numel() * flat.element_size()
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))

    def add_gradients(self, model: nn.Module, loss: Tensor) -> float:
        """Add up gradients and loss of the ranks' shares; returns the loss of the whole batch.

        Where norms are `local` their running statistics become the mean over the ranks: each
        image counts, and all ranks go on with the same model, also the averaged one. The variance
        between shares is left out.
        """
        loss = loss.detach().clone()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if self.ranks.size > 1:
            statistics = _local_statistics(model)
            for values in statistics:
                values /= self.ranks.size
            self.add_up([*gradients, loss, *statistics])
        return loss.item()

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self.ranks.size == 1:
            return flag
        said = torch.tensor([float(flag)])
        self.add_up([said])
        return bool(said.item())

    def with_global_norms(self, model: nn.Module) -> nn.Module:
        """`model` with batch norms that take their statistics over the shares of all ranks.

        Parameters and buffers are the same tensors under the same names. On CUDA torch's
        SyncBatchNorm, which has no other.
        """
        if self.ranks.size == 1:
            return model
        if next(model.parameters()).device.type == "cuda":
            synced: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
            return synced
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) is nn.BatchNorm2d:
                    setattr(module, name, GlobalBatchNorm(child, self))
        return model


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all ranks, on any device; in eval mode a plain one."""

    def __init__(self, norm: nn.BatchNorm2d, team: Team) -> None:
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        self.team, self.training = team, norm.training
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.to(self.weight.dtype)
        var, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
        mean, var = mean.double(), var.double()  # so that the square of the mean costs no digits
        count = mean.new_tensor([x.numel() / x.shape[1]])
        sums = torch.cat([count * mean, count * (var + mean.square()), count])
        sums = _SumOverRanks.apply(sums, self.team)
        count = sums[-1].detach()
        mean, square = (sums[:-1] / count).chunk(2)
        var = square - mean.square()
        if self.track_running_stats:
            self._follow(mean.detach(), var.detach() * count / (count - 1))
        scale = self.weight * (var + self.eps).rsqrt().to(values.dtype)
        shift = self.bias - mean.to(values.dtype) * scale
        y: Tensor = values * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return y.to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked += 1


class _SumOverRanks(torch.autograd.Function):
    """A sum that each rank goes on with; its gradient is the sum of what each rank makes of it."""

    @staticmethod
    def forward(ctx, values, team):  # type: ignore[no-untyped-def]
        ctx.team = team
        values = values.clone()
        team.add_up([values])
        return values

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        gradient = gradient.clone()
        ctx.team.add_up([gradient])
        return gradient, None


def _local_statistics(model: nn.Module) -> list[Tensor]:
    found = []
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.running_mean is not None:
            assert module.running_var is not None
            found += [module.running_mean, module.running_var]
    return found

"""One training run on several GPUs or machines, with the same mathematics as on one.

Every rank holds all images and weights, and draws the same random numbers for the whole batch, as
they depend on seed and position only. It takes its shard of the batch, attacks it, and runs the
forward and backward pass on it; there is no communication during an attack. One all-reduce then
sums the gradients, so every rank takes the same step. torch's DistributedDataParallel would reduce
in several buckets, and after every backward pass, including that of AWP.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust.distributed import SINGLE, World


def was_restarted() -> bool:
    """Whether torchrun started this process to replace one that was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's part of a batch of `n` images: every `step`-th image from `first` on.

    Not a contiguous range, so that each rank gets about as many images of every part of the loss;
    the parts differ in cost.
    """

    n: int
    first: int = 0
    step: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """The rows of `whole`, (n, ...), that belong to this shard."""
        return whole[self.first :: self.step]

    @property
    def count(self) -> int:
        """Images of this shard."""
        return len(range(self.first, self.n, self.step))

    @property
    def weight(self) -> float:
        """Weight of the mean over this shard in the mean over the batch."""
        return self.count / self.n

    def within(self, start: int, stop: int) -> tuple[slice, Shard]:
        """The part of this shard in images `start` to `stop` of the batch: its slice and Shard."""
        before, after = (len(range(self.first, edge, self.step)) for edge in (start, stop))
        first = (self.first - start) % self.step
        return slice(before, after), Shard(n=stop - start, first=first, step=self.step)

    def draw(
        self,
        noise: Callable[[Tensor, torch.Generator], Tensor],
        x: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """`noise` for the images `x` of this shard, taken from a draw for the whole batch."""
        return self.of(noise(x.new_empty((self.n, *x.shape[1:])), generator))


class Collectives:
    """Communication between the ranks of a run within a step; counts the bytes."""

    def __init__(self, world: World = SINGLE) -> None:
        self.world = world
        self.bytes = 0  # sent through all-reduces so far

    def shard(self, n: int) -> Shard:
        """This rank's images of a batch of n."""
        return Shard(n=n, first=self.world.rank, step=self.world.size)

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in one all-reduce for all tensors."""
        if self.world.size == 1:
            return
        import torch.distributed as dist

        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        self.bytes += flat.numel() * flat.element_size()
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))

    def add_gradients(self, model: nn.Module, loss: Tensor) -> Tensor:
        """Sum gradients and loss over the ranks; returns the loss of the whole batch, a scalar.

        The running statistics of `local` norms become the mean over the ranks, so every image
        counts and all ranks keep the same model. The variance between shards is ignored.
        """
        loss = loss.detach().clone()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if self.world.size > 1:
            statistics = _local_statistics(model)
            for values in statistics:
                values /= self.world.size
            self.all_reduce_sum([*gradients, loss, *statistics])
        return loss

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        if self.world.size == 1:
            return flag
        flags = torch.tensor([float(flag)])
        self.all_reduce_sum([flags])
        return bool(flags.item())

    def with_global_norms(self, model: nn.Module) -> nn.Module:
        """`model` with batch norms that use the statistics of the whole batch.

        Parameters and buffers stay the same tensors under the same names. Uses torch's
        SyncBatchNorm on CUDA, the only device that it runs on.
        """
        if self.world.size == 1:
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
    """Batch norm over the images of all ranks, on any device; in eval mode a standard one."""

    def __init__(self, norm: nn.BatchNorm2d, collectives: Collectives) -> None:
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        self.collectives, self.training = collectives, norm.training
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.to(self.weight.dtype)
        var, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
        mean, var = mean.double(), var.double()  # the square of the mean needs the digits
        count = mean.new_tensor([x.numel() / x.shape[1]])
        sums = torch.cat([count * mean, count * (var + mean.square()), count])
        sums = _SumOverRanks.apply(sums, self.collectives)
        count = sums[-1].detach()
        mean, square = (sums[:-1] / count).chunk(2)
        var = square - mean.square()
        if self.track_running_stats:
            self._update_running_statistics(mean.detach(), var.detach() * count / (count - 1))
        scale = self.weight * (var + self.eps).rsqrt().to(values.dtype)
        shift = self.bias - mean.to(values.dtype) * scale
        y: Tensor = values * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return y.to(x.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked += 1


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks, on each; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, values, collectives):  # type: ignore[no-untyped-def]
        ctx.collectives = collectives
        values = values.clone()
        collectives.all_reduce_sum([values])
        return values

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        gradient = gradient.clone()
        ctx.collectives.all_reduce_sum([gradient])
        return gradient, None


def _local_statistics(model: nn.Module) -> list[Tensor]:
    found = []
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.running_mean is not None:
            assert module.running_var is not None
            found += [module.running_mean, module.running_var]
    return found

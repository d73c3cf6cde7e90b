"""Copies of a model for the attacks of training, with batch norms folded into convolutions."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robust.classifier import Classifier
from robust.networks import family_of


class FoldedCopy(nn.Module):
    """A frozen copy of `model` in eval mode, which maps the same images to the same logits.

    Each batch norm after a convolution is folded into it, and convolutions and matrices are in
    `dtype`, so passes have half as many layers and need no autocast. `refresh` copies the current
    weights and running statistics of `model` into the same tensors. Raises ValueError for a
    network whose family does not list its pairs of convolution and norm.
    """

    def __init__(self, model: Classifier, dtype: torch.dtype) -> None:
        super().__init__()
        pairs = family_of(model.architecture.arch).norm_pairs
        if pairs is None:
            raise ValueError(f"expected a family with norm_pairs, got {model.architecture.arch}")
        self.dtype = dtype
        own = copy.deepcopy(model).eval().requires_grad_(False)
        self.normalizes, self.mean, self.std = own.architecture.normalizes, own.mean, own.std
        self.net = own.net
        self._norms: list[_BatchNorm] = []  # of the model; SyncBatchNorm is no BatchNorm2d
        self._filters: list[tuple[Tensor, Tensor]] = []  # weights of the model, folded weights
        self._biases: list[Tensor] = []
        for conv_name, norm_name in list(pairs(self.net)):
            conv, norm = self.net.get_submodule(conv_name), model.net.get_submodule(norm_name)
            source = model.net.get_submodule(conv_name)
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(source, nn.Conv2d)
            assert isinstance(norm, _BatchNorm)
            assert conv.bias is None
            conv.bias = nn.Parameter(torch.zeros_like(norm.bias), requires_grad=False)
            self.net.set_submodule(norm_name, nn.Identity())
            conv.to(dtype)
            self._norms.append(norm)
            self._filters.append((source.weight, conv.weight))
            self._biases.append(conv.bias)
        for module in self.net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)
        folded = {id(tensor) for _, tensor in self._filters} | {id(b) for b in self._biases}
        tensors = {**dict(model.net.named_parameters()), **dict(model.net.named_buffers())}
        self._others = [
            (tensors[name], tensor)
            for name, tensor in [*self.net.named_parameters(), *self.net.named_buffers()]
            if id(tensor) not in folded
        ]
        self.eval()
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the model's current weights and running statistics."""
        if self._norms:
            scales = torch._foreach_add(
                [_tensor(norm.running_var) for norm in self._norms],
                [norm.eps for norm in self._norms],
            )
            torch._foreach_rsqrt_(scales)
            torch._foreach_mul_(scales, [norm.weight for norm in self._norms])
            shifts = torch._foreach_mul(
                [_tensor(norm.running_mean) for norm in self._norms], scales
            )
            torch._foreach_copy_(
                self._biases, torch._foreach_sub([norm.bias for norm in self._norms], shifts)
            )
            for (weight, folded), scale in zip(self._filters, scales, strict=True):
                # Not mul(..., out=folded), which takes three times as long on a CPU in bf16.
                folded.copy_(weight * scale.view(-1, 1, 1, 1))
        for source, tensor in self._others:
            tensor.copy_(source)

    def forward(self, x: Tensor) -> Tensor:
        if self.normalizes:
            x = (x - self.mean) / self.std
        logits: Tensor = self.net(x.to(self.dtype))
        return logits.float()


def _tensor(value: Tensor | None) -> Tensor:
    assert value is not None
    return value

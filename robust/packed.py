"""A frozen CPU classifier with prepacked weights and a hand-written gradient.

torch reorders the weights of a convolution in every pass, forward and backward, which takes a
third of the time for one image. Here each convolution is packed once for both directions: its
gradient is a convolution with flipped and transposed weights; at a stride of 2 it computes the four
pixels of each 2x2 square as separate channels, which are then interleaved. The sum of a block is
computed by its last convolution. The result is an autograd function, so attacks use it like any
model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.agreement import compare
from robust.inference import Dense, InferenceClassifier, Pixelwise
from robust.networks import family_of
from robust.networks.layers import SameConv2d

logger = logging.getLogger(__name__)

# Smallest fraction of gradient signs that match those without packing, and largest error of a
# logit, relative to the largest logit.
SIGN_AGREEMENT = {torch.float32: 0.99, torch.bfloat16: 0.9}
LOGIT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.01}
SLOWDOWN = 1.05  # largest time of a pass relative to one without packing
LAST = torch.channels_last
ONES = [1, 1]
Values = dict[int, Tensor]


class NotPackable(ValueError):
    """A network with a layer that can't be packed; the message names it."""


class Packed:
    """Maps images float32 (N, 3, S, S) in [0, 1] to logits float32 (N, K), differentiable once.

    Computes the same as `model`, on the CPU, with products in `dtype` even under autocast. The
    first convolution, the global average pooling and the head stay float32, see `in_bfloat16`.
    Raises NotPackable for layers other than convolutions, batch norms, ReLU, SiLU, sums, the
    max-pooling of a stem, and a final pooling and head, and RuntimeError if this torch build or
    processor lacks the kernels.
    """

    def __init__(self, model: InferenceClassifier, dtype: torch.dtype = torch.bfloat16) -> None:
        own, self._architecture = model.classifier, model.architecture
        planner = _Planner(dtype)
        add_network: Any = family_of(self._architecture.arch).onnx
        if add_network is None:
            raise NotPackable(f"{self._architecture.arch} does not list its layers")
        add_network(planner, own.net, _Map(name=0, channels=3, side=self._architecture.input_size))
        assert planner.head is not None
        self._steps, self._last, self._head = planner.steps, planner.last, planner.head
        self._mean, self._std, self._dtype = own.mean, own.std, dtype
        used = {name: place for place, step in enumerate(self._steps) for name in step.inputs}
        self._unused: list[list[int]] = [[] for _ in self._steps]  # values to free after each step
        for name, place in used.items():
            self._unused[place].append(name)
        kept = {0, *(step.keeps for step in self._steps)}  # the images are the caller's
        for step, unused in zip(self._steps, self._unused, strict=True):
            if isinstance(step, _Convolution) and step.shortcut in set(unused) - kept:
                step.overwrites_shortcut = True

    def __call__(self, x: Tensor) -> Tensor:
        side = self._architecture.input_size
        if x.shape[1:] != (3, side, side):
            raise ValueError(f"expected images (N, 3, {side}, {side}), got {tuple(x.shape)}")
        with torch.autocast("cpu", enabled=False):
            if torch.is_grad_enabled() and x.requires_grad:
                logits: Tensor = _Logits.apply(x, self)
                return logits
            return self.forward(x, None)

    def drop_gradient(self) -> None:
        """Free the weights for the gradient, half of all, until the next gradient."""
        for step in self._steps:
            vars(step).pop("_back", None)

    def forward(self, x: Tensor, saved: Values | None) -> Tensor:
        """The logits; stores what `backward` needs in `saved`."""
        if self._architecture.normalizes:
            x = (x - self._mean) / self._std
        values: Values = {0: x.contiguous(memory_format=LAST)}
        for step, unused in zip(self._steps, self._unused, strict=True):
            values[step.output] = step.forward(values, saved)
            for name in unused:
                del values[name]
        features = values[self._last].mean((2, 3), dtype=torch.float32)
        return F.linear(features, self._head.weight, self._head.bias)

    def backward(self, cotangent: Tensor, saved: Values) -> Tensor:
        """The gradient at the images of the sum of `cotangent` (N, K) times the logits."""
        side = self._steps[-1].side
        features = (cotangent @ self._head.weight / side**2).to(self._dtype)
        shape = (*features.shape, side, side)
        last = features[:, :, None, None].expand(shape).contiguous(memory_format=LAST)
        gradients: Values = {self._last: last}
        for step in reversed(self._steps):
            step.backward(gradients, saved)
        x = gradients[0].float()
        return x / self._std if self._architecture.normalizes else x


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, model: Packed) -> Tensor:
        ctx.model, ctx.saved = model, {}
        return model.forward(x.detach(), ctx.saved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        with torch.autocast("cpu", enabled=False):
            return ctx.model.backward(cotangent, ctx.saved), None


def packed_if_faster(
    model: InferenceClassifier, other: InferenceClassifier, dtype: torch.dtype = torch.bfloat16
) -> Callable[[Tensor], Tensor]:
    """`model` packed in `dtype`, unless that is wrong or, in bfloat16, slower than `other`.

    `other` is a copy of it in `dtype`, which takes its place then.
    """
    try:
        packed = Packed(model, dtype)
        reason = _reason_against(packed, other, dtype)
    except (NotPackable, RuntimeError, NotImplementedError, AttributeError) as error:
        reason = str(error).splitlines()[0]
    if reason:
        logger.info("weights are not packed: %s", reason)
        return other
    return packed


def _reason_against(packed: Packed, other: InferenceClassifier, dtype: torch.dtype) -> str:
    """The reason to use `other` instead of `packed`; empty if there is none."""
    side = other.architecture.input_size
    x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    found = compare(packed, other, x, torch.tensor([0]), clear_speedup=1)
    if not found.logit_error <= LOGIT_ERROR[dtype]:  # also for NaN
        error = f"off by {found.logit_error:.2g} of the largest logit"
        return f"{error}, above the limit of {LOGIT_ERROR[dtype]}"
    if found.sign_agreement < SIGN_AGREEMENT[dtype]:
        agrees = f"{found.sign_agreement:.1%} of the gradient's signs agree"
        return f"{agrees}, below the limit of {SIGN_AGREEMENT[dtype]:.0%}"
    # Not in float32, where results would otherwise depend on timing.
    if dtype != torch.float32 and found.speedup < 1 / SLOWDOWN:
        return f"{1 / found.speedup:.2f} times as long, above the limit of {SLOWDOWN}"
    return ""


@dataclass(frozen=True, kw_only=True)
class _Map:
    """A feature map (N, channels, side, side)."""

    name: int
    channels: int
    side: int


class _Step:
    """One layer: computes the value `output`, of `side` pixels a side, from the values `inputs`."""

    inputs: tuple[int, ...]
    output: int
    side: int
    keeps: int = 0  # the input that `backward` needs unchanged; 0 if none

    def forward(self, values: Values, saved: Values | None) -> Tensor:
        """The output; stores what `backward` needs in `saved`."""
        raise NotImplementedError

    def backward(self, gradients: Values, saved: Values) -> None:
        """Replace the gradient at the output by its contributions to those at the inputs."""
        raise NotImplementedError


class _Planner:
    """Builds the steps of a network layer by layer, like `robust.graph.GraphBuilder`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.steps: list[_Step] = []
        self.last = 0
        self.head: nn.Linear | None = None

    def convolve(self, x: _Map, layer: nn.Module) -> _Map:
        if isinstance(layer, Dense | Pixelwise):
            if isinstance(layer, Dense):
                y = self._new(layer.shape[2], layer.shape[0])
            else:
                y = self._new(len(layer.weight), (x.side - 1) // layer.stride + 1)
            self.steps.append(_Products(layer, x, y, self._dtype))
            return y
        if type(layer) not in (nn.Conv2d, SameConv2d):
            raise NotPackable(f"no packed form of {type(layer).__name__}")
        assert isinstance(layer, nn.Conv2d)
        if layer.groups != 1 or layer.dilation != (1, 1):
            raise NotPackable("no packed form of groups or dilation")
        size, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        extra = int(isinstance(layer, SameConv2d))  # it pads one row and one column
        side = (x.side + 2 * padding + extra - size) // stride + 1
        if stride > 1 and (stride > 2 or x.side != 2 * side):
            raise NotPackable(f"no packed form of a stride of {stride} at {x.side} pixels")
        y = self._new(layer.out_channels, side)
        # The first convolution takes pixels, which bfloat16 would round.
        dtype = torch.float32 if not self.steps else self._dtype
        self.steps.append(_Convolution(layer, x, y, dtype=dtype, out=self._dtype))
        return y

    def norm(self, x: _Map, layer: nn.BatchNorm2d) -> _Map:
        y = self._new(x.channels, x.side)
        self.steps.append(_Norm(layer, x, y, self._dtype))
        return y

    def activate(self, x: _Map, activation: nn.Module) -> _Map:
        if not isinstance(activation, nn.ReLU | nn.SiLU):
            raise NotPackable(f"no packed form of {type(activation).__name__}")
        y = self._new(x.channels, x.side)
        self.steps.append(_Activation(x, y, silu=isinstance(activation, nn.SiLU)))
        return y

    def add(self, x: _Map, shortcut: _Map) -> _Map:
        last = self.steps[-1]
        if isinstance(last, _Convolution) and last.output == x.name and last.can_add:
            last.shortcut, last.inputs = shortcut.name, (*last.inputs, shortcut.name)
            return x
        y = self._new(x.channels, x.side)
        self.steps.append(_Sum(x, shortcut, y))
        return y

    def pool(self, x: _Map) -> _Map:
        y = self._new(x.channels, (x.side - 1) // 2 + 1)
        self.steps.append(_MaxPool(x, y))
        return y

    def finish(self, x: _Map, head: nn.Linear) -> None:
        self.last, self.head = x.name, head

    def _new(self, channels: int, side: int) -> _Map:
        return _Map(name=len(self.steps) + 1, channels=channels, side=side)


@dataclass(frozen=True, kw_only=True)
class _Back:
    """The convolution that computes the gradient of another one."""

    weight: Tensor  # packed
    padding: int
    before: int  # rows and columns of zeros before the gradient
    after: int


class _Convolution(_Step):
    """A convolution, and perhaps the sum of its result and a shortcut."""

    shortcut = -1  # the value to add; -1 if none
    overwrites_shortcut = False  # whether nothing else needs that value

    def __init__(
        self, layer: nn.Conv2d, x: _Map, y: _Map, *, dtype: torch.dtype, out: torch.dtype
    ) -> None:
        self.inputs, self.output, self.side = (x.name,), y.name, y.side
        self._dtype, self._out, self._channels = dtype, out, x.channels
        self._stride, self._size = layer.stride[0], layer.kernel_size[0]
        self._padding = int(layer.padding[0])
        self._bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        weight = layer.weight.detach().to(dtype)
        self._same = isinstance(layer, SameConv2d)
        side = x.side + int(self._same)
        self._weight = _packed(weight, side, padding=self._padding, stride=self._stride)

    @cached_property
    def _back(self) -> _Back:
        """What computes the gradient."""
        weight = self._weight.to_dense()
        if self._stride == 1:
            back, before, after = weight.flip(2, 3).transpose(0, 1), 0, 0
            padding = self._size - 1 - self._padding
        else:
            back, before, after = _by_pixel(weight, self._padding)
            padding = 0
        packed = _packed(back, self.side + before + after, padding=padding, stride=1)
        return _Back(weight=packed, padding=padding, before=before, after=after)

    @property
    def can_add(self) -> bool:
        """Whether it can add a shortcut to its result."""
        return self.shortcut < 0 and self._dtype == self._out

    def forward(self, values: Values, saved: Values | None) -> Tensor:
        x = values[self.inputs[0]].to(self._dtype)
        if self._same:
            x = F.pad(x, [0, 1, 0, 1])
        where = self._padding, self._stride
        if self.overwrites_shortcut:
            return _convolve(x, self._weight, self._bias, *where, add_to=values[self.shortcut])
        y = _convolve(x, self._weight, self._bias, *where).to(self._out)
        return y if self.shortcut < 0 else y + values[self.shortcut]

    def backward(self, gradients: Values, saved: Values) -> None:
        gradient, name = gradients.pop(self.output), self.inputs[0]
        before = gradients.get(name)
        owners = sum(other is before for other in (gradient, *gradients.values()))
        can_change = before is not None and owners == 1 and before.dtype == self._dtype
        found = self._gradient(gradient.to(self._dtype), before if can_change else None)
        if before is not None and not can_change:
            found = before + found
        gradients[name] = found
        if self.shortcut >= 0:
            _accumulate(gradients, self.shortcut, gradient)

    def _gradient(self, gradient: Tensor, add_to: Tensor | None) -> Tensor:
        """The gradient at the input; with `add_to`, adds it to that tensor in place."""
        back = self._back
        if self._stride == 1:
            return _convolve(gradient, back.weight, None, back.padding, 1, add_to=add_to)
        if back.before or back.after:
            gradient = F.pad(gradient, [back.before, back.after] * 2)
        found = _convolve(gradient, back.weight, None, 0, 1)
        n, _, rows, columns = found.shape
        side = 1 if self._size == 1 else 2  # a 1x1 kernel reads one pixel of each square
        squares = found.permute(0, 2, 3, 1).view(n, rows, columns, side, side, self._channels)
        squares = squares.permute(0, 1, 3, 2, 4, 5)
        if add_to is None and side == 2:
            return squares.reshape(n, 2 * rows, 2 * columns, -1).permute(0, 3, 1, 2)
        if add_to is None:
            shape = (n, self._channels, 2 * rows, 2 * columns)
            add_to = torch.empty(shape, dtype=found.dtype, memory_format=LAST).zero_()
        pixels = add_to.permute(0, 2, 3, 1).view(n, rows, 2, columns, 2, self._channels)
        pixels[:, :, :side, :, :side].add_(squares)
        return add_to


class _Products(_Step):
    """A convolution on a small map as matrix products: one for each pixel, or one for all."""

    def __init__(self, layer: Dense | Pixelwise, x: _Map, y: _Map, dtype: torch.dtype) -> None:
        self.inputs, self.output, self.side = (x.name,), y.name, y.side
        self._x, self._y, self._pixelwise = x, y, isinstance(layer, Pixelwise)
        self._stride = layer.stride if isinstance(layer, Pixelwise) else 1
        self._bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self._weight = _reorder(layer.weight.detach().to(dtype))

    @cached_property
    def _back(self) -> Tensor:
        return _reorder(self._weight.to_dense().t().contiguous())

    def forward(self, values: Values, saved: Values | None) -> Tensor:
        x = values[self.inputs[0]][:, :, :: self._stride, :: self._stride]
        return self._map(_multiply(self._rows(x), self._weight, self._bias), self._y)

    def backward(self, gradients: Values, saved: Values) -> None:
        gradient = gradients.pop(self.output)
        found = self._map(
            _multiply(self._rows(gradient), self._back, None),
            self._x
            if self._stride == 1
            else _Map(name=0, channels=self._x.channels, side=self.side),
        )
        if self._stride > 1:
            shape = (len(found), self._x.channels, self._x.side, self._x.side)
            spread = torch.empty(shape, dtype=found.dtype, memory_format=LAST).zero_()
            spread[:, :, :: self._stride, :: self._stride] = found
            found = spread
        _accumulate(gradients, self.inputs[0], found)

    def _rows(self, x: Tensor) -> Tensor:
        """A feature map as a matrix with a row per pixel or per image."""
        rows = x.permute(0, 2, 3, 1)
        return rows.reshape(-1, x.shape[1]) if self._pixelwise else rows.reshape(len(x), -1)

    def _map(self, rows: Tensor, like: _Map) -> Tensor:
        """A matrix as a feature map."""
        return rows.view(-1, like.side, like.side, like.channels).permute(0, 3, 1, 2)


class _Norm(_Step):
    """A batch norm that was not folded into a convolution."""

    def __init__(self, layer: nn.BatchNorm2d, x: _Map, y: _Map, dtype: torch.dtype) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        self.inputs, self.output, self.side = (x.name,), y.name, y.side
        scale = layer.weight / (layer.running_var + layer.eps).sqrt()
        shift = layer.bias - layer.running_mean * scale
        self._scale, self._shift = (v.detach().view(-1, 1, 1).to(dtype) for v in (scale, shift))

    def forward(self, values: Values, saved: Values | None) -> Tensor:
        return torch.addcmul(self._shift, values[self.inputs[0]], self._scale)

    def backward(self, gradients: Values, saved: Values) -> None:
        _accumulate(gradients, self.inputs[0], gradients.pop(self.output) * self._scale)


class _Activation(_Step):
    def __init__(self, x: _Map, y: _Map, *, silu: bool) -> None:
        self.inputs, self.output, self.side, self._silu = (x.name,), y.name, y.side, silu
        self.keeps = x.name

    def forward(self, values: Values, saved: Values | None) -> Tensor:
        x = values[self.inputs[0]]
        if saved is not None:
            saved[self.output] = x
        return F.silu(x) if self._silu else F.relu(x)

    def backward(self, gradients: Values, saved: Values) -> None:
        x, ops = saved.pop(self.output), torch.ops.aten
        gradient = gradients.pop(self.output)
        found: Tensor = (
            ops.silu_backward(gradient, x) if self._silu else ops.threshold_backward(gradient, x, 0)
        )
        _accumulate(gradients, self.inputs[0], found)


class _MaxPool(_Step):
    """The max-pooling of an ImageNet stem: 3x3 with a stride of 2."""

    WINDOW = ([3, 3], [2, 2], [1, 1], ONES, False)  # size, stride, padding, dilation, round up

    def __init__(self, x: _Map, y: _Map) -> None:
        self.inputs, self.output, self.side = (x.name,), y.name, y.side
        self.keeps = x.name

    def forward(self, values: Values, saved: Values | None) -> Tensor:
        x = values[self.inputs[0]]
        found: Tensor
        found, at = torch.ops.aten.max_pool2d_with_indices(x, *self.WINDOW)
        if saved is not None:
            saved[self.output], saved[-self.output] = x, at
        return found

    def backward(self, gradients: Values, saved: Values) -> None:
        x, at = saved.pop(self.output), saved.pop(-self.output)
        gradient = gradients.pop(self.output)
        backward = torch.ops.aten.max_pool2d_with_indices_backward
        _accumulate(gradients, self.inputs[0], backward(gradient, x, *self.WINDOW, at))


class _Sum(_Step):
    def __init__(self, x: _Map, shortcut: _Map, y: _Map) -> None:
        self.inputs, self.output, self.side = (x.name, shortcut.name), y.name, y.side

    def forward(self, values: Values, saved: Values | None) -> Tensor:
        x, shortcut = (values[name] for name in self.inputs)
        return x + shortcut

    def backward(self, gradients: Values, saved: Values) -> None:
        gradient = gradients.pop(self.output)
        for name in self.inputs:
            _accumulate(gradients, name, gradient)


def _accumulate(gradients: Values, name: int, gradient: Tensor) -> None:
    before = gradients.get(name)
    gradients[name] = gradient if before is None else before + gradient


def _by_pixel(weight: Tensor, padding: int) -> tuple[Tensor, int, int]:
    """The gradient of a convolution with stride 2 as a convolution.

    Its output channels are the four pixels of each 2x2 square, by row, column and channel; those of
    a 1x1 kernel are only the first pixel, as the gradient at the others is 0. `weight` is
    (O, C, K, K). Also returns how many rows and columns of zeros go before and after the gradient.
    """
    out, channels, size, _ = weight.shape
    # The pixel 2 * a + r gets, through tap i, the gradient at a + d with d = (r + padding - i) / 2.
    taps = [
        (r, (r + padding - i) // 2, i)
        for r in range(2)
        for i in range(size)
        if (r + padding - i) % 2 == 0
    ]
    first, last = min(d for _, d, _ in taps), max(d for _, d, _ in taps)
    at = 2 if size > 1 else 1
    found = weight.new_zeros(at, at, channels, out, last - first + 1, last - first + 1)
    for r, d, i in taps:
        for s, e, j in taps:
            found[r, s, :, :, d - first, e - first] = weight[:, :, i, j].T
    return found.flatten(0, 2), -first, last


def _packed(weight: Tensor, side: int, *, padding: int, stride: int) -> Tensor:
    """The weights in the layout that oneDNN prefers for maps of `side` pixels a side."""
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight.contiguous(memory_format=LAST),
        [padding] * 2,
        [stride] * 2,
        ONES,
        1,
        [1, weight.shape[1], side, side],
    )
    return packed


def _convolve(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    padding: int,
    stride: int,
    *,
    add_to: Tensor | None = None,
) -> Tensor:
    """A convolution with packed weights; with `add_to`, adds it to that tensor in place."""
    ops, where = torch.ops.mkldnn, ([padding] * 2, [stride] * 2, ONES, 1)
    y: Tensor
    if add_to is None:
        y = ops._convolution_pointwise(x, packed, bias, *where, "none", [], "")
    else:
        y = ops._convolution_pointwise_.binary(
            add_to, x, packed, bias, *where, "add", 1.0, None, [], ""
        )
    return y


def _reorder(weight: Tensor) -> Tensor:
    """The weights of matrix products in the layout that oneDNN prefers."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def _multiply(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return y

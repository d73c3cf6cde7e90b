"""A frozen CPU classifier with prepacked weights and a hand-written gradient.

torch reorders the weights of a convolution in every pass, forward and backward, which takes a
third of the time for one image. Here each convolution is packed once for both directions: its
gradient is a convolution with flipped and transposed weights, with zeros inserted between the
pixels if the stride is 2. The result is an autograd function, so attacks use it like any model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.agreement import compare
from robust.networks import family_of

if TYPE_CHECKING:
    from robust.inference import InferenceClassifier

logger = logging.getLogger(__name__)

SIGN_AGREEMENT = 0.98  # smallest fraction of gradient signs that match those without packing
LOGIT_ERROR = 0.01  # largest error of a logit, relative to the largest logit
SLOWDOWN = 1.05  # largest time of a pass relative to one without packing
LAST = torch.channels_last
ONES = [1, 1]
Values = dict[int, Tensor]


class NotPackable(ValueError):
    """A network with a layer that can't be packed; the message names it."""


class Packed:
    """Maps images float32 (N, 3, S, S) in [0, 1] to logits float32 (N, K), differentiable once.

    Computes the same as `model`, on the CPU, with products in `dtype`. The first convolution, the
    global average pooling and the head stay float32, see `in_bfloat16`. Raises NotPackable for
    layers other than convolutions, batch norms, ReLU, SiLU, sums, and a final pooling and head,
    and RuntimeError if this torch build or processor lacks the kernels.
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

    def __call__(self, x: Tensor) -> Tensor:
        side = self._architecture.input_size
        if x.shape[1:] != (3, side, side):
            raise ValueError(f"expected images (N, 3, {side}, {side}), got {tuple(x.shape)}")
        if torch.is_grad_enabled() and x.requires_grad:
            logits: Tensor = _Logits.apply(x, self)
            return logits
        return self.forward(x, None)

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
            found = step.backward(gradients.pop(step.output), saved)
            for name, gradient in zip(step.inputs, found, strict=True):
                before = gradients.get(name)
                gradients[name] = gradient if before is None else before + gradient
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
        return ctx.model.backward(cotangent, ctx.saved), None


def packed_if_faster(
    model: InferenceClassifier, bf16: InferenceClassifier
) -> Callable[[Tensor], Tensor]:
    """`model` packed if that agrees with its copy `bf16` and is no slower; otherwise `bf16`."""
    try:
        packed = Packed(model)
        reason = _reason_against(packed, bf16)
    except (NotPackable, RuntimeError, NotImplementedError, AttributeError) as error:
        reason = str(error).splitlines()[0]
    if reason:
        logger.info("weights are not packed: %s", reason)
        return bf16
    return packed


def _reason_against(packed: Packed, bf16: InferenceClassifier) -> str:
    """The reason not to use `packed`; empty if there is none."""
    side = bf16.architecture.input_size
    x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    found = compare(packed, bf16, x, torch.tensor([0]), clear_speedup=1)
    if not found.logit_error <= LOGIT_ERROR:  # also for NaN
        error = f"off by {found.logit_error:.1%} of the largest logit"
        return f"{error}, above the limit of {LOGIT_ERROR:.0%}"
    if found.sign_agreement < SIGN_AGREEMENT:
        agrees = f"{found.sign_agreement:.1%} of the gradient's signs agree"
        return f"{agrees}, below the limit of {SIGN_AGREEMENT:.0%}"
    if found.speedup < 1 / SLOWDOWN:
        return f"{1 / found.speedup:.2f} times as long, above the limit of {SLOWDOWN}"
    return ""


@dataclass(frozen=True, kw_only=True)
class _Map:
    """A feature map (N, channels, side, side)."""

    name: int
    channels: int
    side: int
    rows: bool = False


class _Step:
    """One layer: computes the value `output`, of `side` pixels a side, from the values `inputs`."""

    inputs: tuple[int, ...]
    output: int
    side: int

    def forward(self, values: Values, saved: Values | None) -> Tensor:
        """The output; stores what `backward` needs in `saved`."""
        raise NotImplementedError

    def backward(self, gradient: Tensor, saved: Values) -> Sequence[Tensor]:
        """The gradient at each input, given the gradient at the output."""
        raise NotImplementedError


class _Planner:
    """Builds the steps of a network layer by layer, like `robust.graph.GraphBuilder`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.steps: list[_Step] = []
        self.last = 0
        self.head: nn.Linear | None = None

    def convolve(self, x: _Map, layer: nn.Module) -> _Map:
        if type(layer) is not nn.Conv2d or layer.groups != 1 or layer.dilation != (1, 1):
            raise NotPackable(f"no packed form of {type(layer).__name__}")
        size, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        side = (x.side + 2 * padding - size) // stride + 1
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
        y = self._new(x.channels, x.side)
        self.steps.append(_Sum(x, shortcut, y))
        return y

    def pool(self, x: _Map) -> _Map:
        raise NotPackable("no packed form of max-pooling")

    def finish(self, x: _Map, head: nn.Linear) -> None:
        self.last, self.head = x.name, head

    def _new(self, channels: int, side: int) -> _Map:
        return _Map(name=len(self.steps) + 1, channels=channels, side=side)


class _Convolution(_Step):
    def __init__(
        self, layer: nn.Conv2d, x: _Map, y: _Map, *, dtype: torch.dtype, out: torch.dtype
    ) -> None:
        self.inputs, self.output, self.side = (x.name,), y.name, y.side
        self._dtype, self._out, self._x = dtype, out, x
        self._stride, self._size = layer.stride[0], layer.kernel_size[0]
        self._padding = int(layer.padding[0])
        self._bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        weight = layer.weight.detach().to(dtype)
        self._weight = _packed(weight, x, padding=self._padding, stride=self._stride)
        self._back_padding = self._size - 1 - self._padding
        back = weight.flip(2, 3).transpose(0, 1)
        wide = x if self._stride == 2 and self._size > 1 else y
        self._back = _packed(back, wide, padding=self._back_padding, stride=1)

    def forward(self, values: Values, saved: Values | None) -> Tensor:
        x = values[self.inputs[0]].to(self._dtype)
        padding, stride = [self._padding] * 2, [self._stride] * 2
        return _convolve(x, self._weight, self._bias, padding, stride).to(self._out)

    def backward(self, gradient: Tensor, saved: Values) -> Sequence[Tensor]:
        gradient, padding = gradient.to(self._dtype), [self._back_padding] * 2
        if self._stride == 2 and self._size == 1:  # the products first, as there are fewer
            return (_with_zeros(_convolve(gradient, self._back, None, padding, ONES)),)
        if self._stride == 2:
            gradient = _with_zeros(gradient)
        return (_convolve(gradient, self._back, None, padding, ONES),)


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

    def backward(self, gradient: Tensor, saved: Values) -> Sequence[Tensor]:
        return (gradient * self._scale,)


class _Activation(_Step):
    def __init__(self, x: _Map, y: _Map, *, silu: bool) -> None:
        self.inputs, self.output, self.side, self._silu = (x.name,), y.name, y.side, silu

    def forward(self, values: Values, saved: Values | None) -> Tensor:
        x = values[self.inputs[0]]
        if saved is not None:
            saved[self.output] = x
        return F.silu(x) if self._silu else F.relu(x)

    def backward(self, gradient: Tensor, saved: Values) -> Sequence[Tensor]:
        x, ops = saved.pop(self.output), torch.ops.aten
        found: Tensor = (
            ops.silu_backward(gradient, x) if self._silu else ops.threshold_backward(gradient, x, 0)
        )
        return (found,)


class _Sum(_Step):
    def __init__(self, x: _Map, shortcut: _Map, y: _Map) -> None:
        self.inputs, self.output, self.side = (x.name, shortcut.name), y.name, y.side

    def forward(self, values: Values, saved: Values | None) -> Tensor:
        x, shortcut = (values[name] for name in self.inputs)
        return x + shortcut

    def backward(self, gradient: Tensor, saved: Values) -> Sequence[Tensor]:
        return (gradient, gradient)


def _packed(weight: Tensor, x: _Map, *, padding: int, stride: int) -> Tensor:
    """The weights in the layout that oneDNN prefers for maps like `x`."""
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight.contiguous(memory_format=LAST),
        [padding] * 2,
        [stride] * 2,
        ONES,
        1,
        [1, weight.shape[1], x.side, x.side],
    )
    return packed


def _convolve(
    x: Tensor, packed: Tensor, bias: Tensor | None, padding: list[int], stride: list[int]
) -> Tensor:
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, padding, stride, ONES, 1, "none", [], ""
    )
    return y


def _with_zeros(x: Tensor) -> Tensor:
    """`x` upsampled to twice the side, with a zero after each pixel of every row and column."""
    n, channels, height, width = x.shape
    spread = torch.empty(
        (n, channels, 2 * height, 2 * width), dtype=x.dtype, memory_format=LAST
    ).zero_()
    spread[:, :, ::2, ::2] = x
    return spread

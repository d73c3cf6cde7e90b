"""A copy of a classifier for attacks, evaluation and serving: the same function, faster."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from robust.classifier import Classifier

SMALL = 2  # side in pixels of feature maps on which matrix products beat convolutions
ROWS = 64  # of a matrix product: fewer are slower for each row, more are padding
# On a CPU with AVX-512 an image has the same bits in all passes of just so many images, and in all
# of at least so many.
FEW, MANY = 8, 16


class InferenceClassifier(nn.Module):
    """Maps images float32 (N, 3, S, S) in [0, 1] to logits float32 (N, K), S the input size.

    Logits and input gradients are those of the classifier in eval mode up to rounding. Frozen:
    no parameter needs a gradient, train and eval mode are one, and the state dict is its own.
    Raises ValueError for images of another size, as layers were replaced for this one.
    """

    def __init__(self, classifier: Classifier, device: torch.device) -> None:
        super().__init__()
        self.architecture = classifier.architecture
        own = copy.deepcopy(classifier).cpu().eval().requires_grad_(False)
        _fold_norms(own.net)
        if device.type == "cpu":
            _avoid_slow_convolutions(own)
        # On two cores with AVX-512 channels-last is 4 to 30% faster than NCHW for all networks,
        # but 5% slower for resnet18 with the cifar stem; on CUDA cuDNN prefers it.
        own = own.to(device, torch.float32, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.classifier = own
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        device: torch.device = self.classifier.mean.device
        return device

    def forward(self, x: Tensor) -> Tensor:
        side = self.architecture.input_size
        if x.shape[1:] != (3, side, side):
            raise ValueError(f"expected images (N, 3, {side}, {side}), got {tuple(x.shape)}")
        logits: Tensor = self.classifier(x.contiguous(memory_format=torch.channels_last))
        return logits


def at_least(rows: int, model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`model` called with at least so many images: where there are fewer, the last is repeated."""

    def forward(x: Tensor) -> Tensor:
        n = len(x)
        if not 0 < n < rows:
            return model(x)
        more = x[-1:].detach().expand(rows - n, *x.shape[1:])
        return model(torch.cat([x, more]))[:n]

    return forward


def for_inference(
    classifier: Classifier, device: torch.device | None = None
) -> InferenceClassifier:
    """A frozen copy with the same logits and input gradients, faster on a CPU.

    With the imagenet stem at 32x32 pixels 1.1 to 1.7 times; with the cifar stem hardly.
    Later changes of `classifier` don't reach the copy, which is on the classifier's device
    unless another is given; what `classifier` is itself, also its mode, stays as it is.
    """
    return InferenceClassifier(classifier, device or classifier.mean.device)


class Pixelwise(nn.Module):
    """A 1x1 convolution as a matrix product for each pixel."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.stride = conv.stride[0]
        self.weight = nn.Parameter(conv.weight.flatten(1), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride].permute(0, 2, 3, 1)
        rows = _product(x.flatten(0, 2), self.weight, self.bias)
        return rows.view(*x.shape[:3], len(self.weight)).permute(0, 3, 1, 2)


class Dense(nn.Module):
    """A convolution as one matrix product from all pixels to all pixels.

    On a map of 2x2 pixels 16 of the 36 products of a padded 3x3 convolution don't meet padding.
    """

    def __init__(self, conv: nn.Conv2d, side: int, out_side: int) -> None:
        super().__init__()
        assert conv.bias is not None
        self.shape = (out_side, out_side, conv.out_channels)
        weight = conv.weight.new_zeros(*self.shape, side, side, conv.in_channels)
        for top, left, row, column in product(*map(range, (out_side, out_side, side, side))):
            i = row - top * conv.stride[0] + int(conv.padding[0])
            j = column - left * conv.stride[1] + int(conv.padding[1])
            if 0 <= i < conv.kernel_size[0] and 0 <= j < conv.kernel_size[1]:
                weight[top, left, :, row, column] = conv.weight[:, :, i, j]
        weight = weight.view(out_side**2 * conv.out_channels, -1)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(conv.bias.repeat(out_side**2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = _product(x.permute(0, 2, 3, 1).flatten(1), self.weight, self.bias)
        return x.view(len(x), *self.shape).permute(0, 3, 1, 2)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` whose result for a row is the same bits whatever the number of rows, from 16.

    MKL picks how to sum by the number of rows, so it is given the same number every time. Below
    16 images oneDNN's convolutions differ as well, in any model.
    """
    n = len(x)
    if n < ROWS // 4:
        return F.linear(x, weight, bias)
    blocks = torch.split(F.pad(x, (0, 0, 0, -n % ROWS)), ROWS)
    return torch.cat([F.linear(block, weight, bias) for block in blocks])[:n]


def _fold_norms(net: nn.Module) -> None:
    """Fold each batch norm into the convolution before it, in float64."""
    for module in list(net.modules()):
        if isinstance(module, nn.Sequential) and len(module) == 2:
            first, second = module
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                module[0], module[1] = _folded(first, second), nn.Identity()
        for name, conv in list(module.named_children()):
            if name.startswith("conv") and isinstance(conv, nn.Conv2d):
                norm = module.get_submodule(name.replace("conv", "bn"))
                assert isinstance(norm, nn.BatchNorm2d)
                setattr(module, name, _folded(conv, norm))
                setattr(module, name.replace("conv", "bn"), nn.Identity())


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    return fuse_conv_bn_eval(conv.double(), norm.double()).float().requires_grad_(False)


def _avoid_slow_convolutions(classifier: Classifier) -> None:
    """Replace the convolutions that oneDNN is slow at by what computes the same."""
    for name, (side, out_side) in _sides(classifier).items():
        conv = classifier.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        replacement: nn.Module
        if conv.kernel_size == (1, 1) and out_side <= SMALL:
            replacement = Pixelwise(conv)
        elif conv.kernel_size != (1, 1) and side <= SMALL:
            replacement = Dense(conv, side, out_side)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(classifier.get_submodule(parent), child, replacement)


def _sides(classifier: Classifier) -> dict[str, tuple[int, int]]:
    """For each convolution the side of its input and output, in pixels."""
    sides: dict[str, tuple[int, int]] = {}
    net = classifier.net

    def through(name: str, side: int) -> int:
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        sides[f"net.{name}"] = side, _shrunk(layer, side)
        return sides[f"net.{name}"][1]

    side = through("conv1", classifier.architecture.input_size)
    if isinstance(net.maxpool, nn.MaxPool2d):
        side = _shrunk(net.maxpool, side)
    for name, block in net.named_blocks():
        if block.downsample is not None:
            through(f"{name}.downsample.0", side)
        for convolution in block.convolutions:
            side = through(f"{name}.{convolution}", side)
    return sides


def _shrunk(layer: nn.Conv2d | nn.MaxPool2d, side: int) -> int:
    size, stride, padding = (
        value if isinstance(value, int) else int(value[0])
        for value in (layer.kernel_size, layer.stride, layer.padding)
    )
    return (side + 2 * padding - size) // stride + 1

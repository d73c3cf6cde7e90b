"""A faster copy of a classifier, with the same logits, for attacks, evaluation and serving."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from robust.classifier import Classifier
from robust.networks import convolution_sides, family_of

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3  # largest difference of logits of one image, relative to the largest one
SMALL = 2  # side in pixels of feature maps on which matrix products beat convolutions
ROWS = 64  # rows per matrix product: MKL is 10 to 15% slower with several times as many


class InferenceClassifier(nn.Module):
    """Maps images float32 (N, 3, S, S) in [0, 1] to logits float32 (N, K), S the input size.

    Logits and input gradients are those of the classifier in eval mode up to rounding. Frozen: no
    parameter needs a gradient, train and eval mode are the same, and the state dict has its own
    keys. Raises ValueError for images of another size, as layers were replaced for this one.
    """

    def __init__(self, classifier: Classifier, device: torch.device) -> None:
        super().__init__()
        self.architecture = classifier.architecture
        own = _frozen_copy(classifier)
        if family_of(self.architecture.arch).norm_pairs is not None:
            own = _fewer_operations(own, device) or _frozen_copy(classifier)
        # On two cores with AVX-512 channels-last is 4 to 30% faster than NCHW for all networks,
        # but 5% slower for resnet18 with the cifar stem; on CUDA cuDNN prefers it.
        own = own.to(device, torch.float32, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.classifier = own
        self.eval()

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        device: torch.device = self.classifier.mean.device
        return device

    def forward(self, x: Tensor) -> Tensor:
        side = self.architecture.input_size
        if x.shape[1:] != (3, side, side):
            raise ValueError(f"expected images (N, 3, {side}, {side}), got {tuple(x.shape)}")
        logits: Tensor = self.classifier(x.contiguous(memory_format=torch.channels_last))
        return logits


class Cast(nn.Module):
    """Casts its input to another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def in_bfloat16(model: InferenceClassifier) -> InferenceClassifier | None:
    """A copy of `model` whose convolutions multiply in bfloat16, for searches.

    The first convolution, the head and a pooling that is a module `avgpool` stay float32: a
    bfloat16 pixel above 0.5 is a multiple of 1/256, and logits need more precision than bfloat16.
    Other networks average the last feature map in bfloat16. Faster only on processors with
    bfloat16 instructions; unlike autocast it casts no weights in a pass. None for a network that
    does not start with a convolution `conv1`.
    """
    if not isinstance(getattr(model.classifier.net, "conv1", None), nn.Conv2d):
        return None
    model = copy.deepcopy(model)
    net = model.classifier.net
    head = family_of(model.architecture.arch).head(net)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | Pixelwise | Dense):
            if name not in ("conv1", head):
                module.to(torch.bfloat16)
    net.set_submodule("conv1", nn.Sequential(net.get_submodule("conv1"), Cast(torch.bfloat16)))
    pool = "avgpool" if isinstance(getattr(net, "avgpool", None), nn.Module) else head
    net.set_submodule(pool, nn.Sequential(Cast(torch.float32), net.get_submodule(pool)))
    return model


def at_least(rows: int, model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Call `model` with a minimum batch size; smaller batches are padded with the last image."""

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

    It is 1.1 to 1.7 times as fast with the imagenet stem at 32x32 pixels, and hardly faster with
    the cifar stem.

    Later changes to `classifier` don't affect the copy, which is on the classifier's device unless
    another is given; `classifier` itself, including its mode, is unchanged.
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

    On a 2x2 map a padded 3x3 convolution multiplies padding in 20 of its 36 products.
    """

    def __init__(self, conv: nn.Conv2d, side: int, out_side: int) -> None:
        super().__init__()
        self.shape = (out_side, out_side, conv.out_channels)
        weight = conv.weight.new_zeros(*self.shape, side, side, conv.in_channels)
        for top, left, row, column in product(*map(range, (out_side, out_side, side, side))):
            i = row - top * conv.stride[0] + int(conv.padding[0])
            j = column - left * conv.stride[1] + int(conv.padding[1])
            if 0 <= i < conv.kernel_size[0] and 0 <= j < conv.kernel_size[1]:
                weight[top, left, :, row, column] = conv.weight[:, :, i, j]
        weight = weight.view(out_side**2 * conv.out_channels, -1)
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = conv.bias if conv.bias is not None else conv.weight.new_zeros(conv.out_channels)
        self.bias = nn.Parameter(bias.repeat(out_side**2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = _product(x.permute(0, 2, 3, 1).flatten(1), self.weight, self.bias)
        return x.view(len(x), *self.shape).permute(0, 3, 1, 2)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, in blocks of `ROWS` rows."""
    if len(x) <= ROWS:
        return F.linear(x, weight, bias)
    return torch.cat([F.linear(block, weight, bias) for block in torch.split(x, ROWS)])


def _frozen_copy(classifier: Classifier) -> Classifier:
    return copy.deepcopy(classifier).cpu().eval().requires_grad_(False)


def _fewer_operations(own: Classifier, device: torch.device) -> Classifier | None:
    """Change `own` in place to compute the same in fewer operations, and return it.

    None if logits would change.
    """
    size = own.architecture.input_size
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = own(x)
        _fold_norms(own)
        if device.type == "cpu":
            _avoid_slow_convolutions(own)
        error = float((own(x) - expected).abs().amax() / expected.abs().amax())
    if not error <= TOLERANCE:  # also if it is NaN
        arch = own.architecture.arch
        logger.warning(
            "the copy of %s for inference is off by %.2g: no norm is folded", arch, error
        )
        return None
    return own


def _fold_norms(classifier: Classifier) -> None:
    """Fold each batch norm that follows a convolution into it, in float64."""
    pairs = family_of(classifier.architecture.arch).norm_pairs
    assert pairs is not None
    net = classifier.net
    for conv_name, norm_name in list(pairs(net)):
        conv, norm = net.get_submodule(conv_name), net.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        _fold(conv, norm)
        net.set_submodule(norm_name, nn.Identity())


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    norm = norm.double()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    folded = fuse_conv_bn_weights(
        conv.weight.double(),
        None if conv.bias is None else conv.bias.double(),
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    conv.weight, conv.bias = (nn.Parameter(value.float(), requires_grad=False) for value in folded)


def _avoid_slow_convolutions(classifier: Classifier) -> None:
    """Replace convolutions that are slow in oneDNN by equivalent operations."""
    net = classifier.net
    for name, (side, out_side) in convolution_sides(
        net, classifier.architecture.input_size
    ).items():
        conv = net.get_submodule(name)
        if type(conv) is not nn.Conv2d or conv.groups != 1:  # subclasses pad differently
            continue
        if conv.kernel_size == (1, 1) and out_side <= SMALL:
            net.set_submodule(name, Pixelwise(conv))
        elif conv.kernel_size != (1, 1) and side <= SMALL:
            net.set_submodule(name, Dense(conv, side, out_side))

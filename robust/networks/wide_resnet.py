"""Wide ResNets, under the key names of the public code of TRADES.

Source: Zagoruyko & Komodakis 2016, arXiv:1605.07146; key names as in yaodongyu/TRADES and, from
there, in the repositories whose weights RobustBench lists. The variant "deepmind" pads its
strided convolutions like TensorFlow (Gowal et al. 2020, arXiv:2010.03593).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from robust.choices import CIFAR10, CIFAR100
from robust.networks.family import Family, Reading, Shapes, UnknownLayout
from robust.networks.layers import (
    activation_module,
    convolution,
    initialize_convolutions,
    named_blocks,
)

if TYPE_CHECKING:
    from robust.graph import FeatureMap, GraphBuilder

GROUPS = 3
STEM_WIDTH = 16
MAX_DEPTH, MAX_WIDTH = 106, 20  # the largest that RobustBench lists
_NAME = re.compile(r"wide_resnet(\d{2,3})_(\d{1,2})")


class WideBlock(nn.Module):
    """Norm, activation and convolution, twice, and a shortcut."""

    def __init__(
        self, channels: int, out: int, *, stride: int, variant: str, activation: str
    ) -> None:
        super().__init__()
        self.activation = activation_module(activation)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = convolution(channels, out, 3, stride, same=variant == "deepmind")
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = convolution(out, out, 3)
        self.convShortcut: nn.Conv2d | None = None  # the key's own spelling
        if channels != out:
            self.convShortcut = convolution(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.bn1(x))
        if self.convShortcut is not None:
            x = self.convShortcut(out)
        out = self.conv2(self.activation(self.bn2(self.conv1(out))))
        out = out + x
        return out


class _Group(nn.Module):
    """Blocks of one width, under the key `layer`."""

    def __init__(self, blocks: list[WideBlock]) -> None:
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """Maps images float32 (N, 3, H, W) to logits (N, K)."""

    def __init__(
        self, depth: int, width: int, num_classes: int, *, activation: str, variant: str
    ) -> None:
        super().__init__()
        self.activation = activation_module(activation)
        self.conv1 = convolution(3, STEM_WIDTH, 3)
        channels = STEM_WIDTH
        for group in range(GROUPS):
            out = STEM_WIDTH * width * 2**group
            blocks = [
                WideBlock(
                    out if number else channels,
                    out,
                    stride=2 if group and not number else 1,
                    variant=variant,
                    activation=activation,
                )
                for number in range(_blocks(depth))
            ]
            setattr(self, f"block{group + 1}", _Group(blocks))
            channels = out
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for group in range(GROUPS):
            x = self.get_submodule(f"block{group + 1}")(x)
        x = self.activation(self.bn1(x))
        logits: Tensor = self.fc(torch.mean(x, dim=(2, 3)))
        return logits


def _blocks(depth: int) -> int:
    """Blocks per group: two layers per block in three groups, and four layers outside."""
    return (depth - 4) // 6


def matches(arch: str) -> bool:
    """Whether `arch` is wide_resnetD_W with a depth of 4 more than a multiple of 6."""
    name = _NAME.fullmatch(arch)
    if name is None:
        return False
    depth, width = int(name[1]), int(name[2])
    return 10 <= depth <= MAX_DEPTH and (depth - 4) % 6 == 0 and 1 <= width <= MAX_WIDTH


def build(
    arch: str, *, num_classes: int, stem: str, activation: str, variant: str, input_size: int
) -> WideResNet:
    """wide_resnetD_W: D layers, W times as wide as a ResNet of 16, 32 and 64 channels."""
    name = _NAME.fullmatch(arch)
    assert name is not None
    depth, width = int(name[1]), int(name[2])
    return WideResNet(depth, width, num_classes, activation=activation, variant=variant)


def read(shapes: Shapes) -> Reading | None:
    """The network with these keys of TRADES or DeepMind; None for other keys.

    Some files also contain `sub_block1`, which that code creates but never calls.
    """
    deepmind = "init_conv.weight" in shapes
    renamed = {key: _own_key(key) for key in shapes} if deepmind else {}
    own = {renamed.get(key, key): shape for key, shape in shapes.items()}
    head, first = own.get("fc.weight"), own.get("block1.layer.0.conv1.weight")
    if head is None or first is None or len(head) != 2 or len(first) != 4:
        return None
    groups = [
        len({m[1] for key in own if (m := re.match(rf"block{group}\.layer\.(\d+)\.", key))})
        for group in range(1, GROUPS + 1)
    ]
    arch = f"wide_resnet{6 * groups[0] + 4}_{first[0] // STEM_WIDTH}"
    even = len(set(groups)) == 1 and first[0] % STEM_WIDTH == 0
    if not even or not matches(arch):
        raise UnknownLayout(
            f"groups of {groups} blocks with {first[0]} channels; a WideResNet has the same number "
            f"of blocks in each of 3 groups and a multiple of {STEM_WIDTH} channels"
        )
    mean, std = CIFAR100 if head[0] == 100 else CIFAR10
    return Reading(
        arch=arch,
        stem="cifar",
        num_classes=head[0],
        variant="deepmind" if deepmind else "",
        activation="silu" if deepmind else "relu",
        mean=mean if deepmind else None,
        std=std if deepmind else None,
        renamed=renamed,
        unused=tuple(key for key in own if key.startswith("sub_block1.")),
        layout="DeepMind's WideResNet" if deepmind else "",
    )


_DEEPMIND = (
    (r"^init_conv\.", "conv1."),
    (r"^batchnorm\.", "bn1."),
    (r"^logits\.", "fc."),
    (r"\.batchnorm_0\.", ".bn1."),
    (r"\.batchnorm_1\.", ".bn2."),
    (r"\.conv_0\.", ".conv1."),
    (r"\.conv_1\.", ".conv2."),
    (r"\.shortcut\.", ".convShortcut."),
)


def _own_key(key: str) -> str:
    key = re.sub(r"^layer\.(\d)\.block\.", lambda m: f"block{int(m[1]) + 1}.layer.", key)
    for pattern, replacement in _DEEPMIND:
        key = re.sub(pattern, replacement, key)
    return key


def norm_pairs(net: nn.Module) -> Iterator[tuple[str, str]]:
    """The first convolution of each block is followed by the second norm."""
    for name, _ in named_blocks(net, WideBlock):
        yield f"{name}.conv1", f"{name}.bn2"


def residual_ends(net: nn.Module) -> Iterator[Tensor]:
    """The last convolution: a norm with scale 0 before the activation would never learn."""
    for _, block in named_blocks(net, WideBlock):
        yield block.conv2.weight


def onnx(graph: GraphBuilder, net: WideResNet, x: FeatureMap) -> None:
    """The folded network, layer by layer."""
    x = graph.convolve(x, net.conv1)
    for _, block in named_blocks(net, WideBlock):
        out = graph.activate(graph.norm(x, block.bn1), block.activation)
        if block.convShortcut is not None:
            x = graph.convolve(out, block.convShortcut)
        out = graph.activate(graph.convolve(out, block.conv1), block.activation)
        x = graph.add(graph.convolve(out, block.conv2), x)
    x = graph.activate(graph.norm(x, net.bn1), net.activation)
    graph.finish(x, net.fc)


FAMILY = Family(
    archs=("wide_resnet28_10", "wide_resnet34_10", "wide_resnet34_20", "wide_resnet70_16"),
    build=build,
    head=lambda net: "fc",
    stems=("cifar",),
    variants=("", "deepmind"),
    matches=matches,
    read=read,
    norm_pairs=norm_pairs,
    residual_ends=residual_ends,
    onnx=onnx,
)

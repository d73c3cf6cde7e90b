"""ResNets equal to torchvision's: the same keys, initial weights and function.

Not imported from torchvision, whose models take longer to import than torch and need 160 MB more:
its detectors import torch's compiler. Source: He et al. 2015, arXiv:1512.03385.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from robust.choices import IMAGENET
from robust.networks.family import Family, Reading, Shapes, UnknownLayout
from robust.networks.layers import (
    activation_module,
    convolution,
    initialize_convolutions,
    named_blocks,
)

if TYPE_CHECKING:
    from robust.graph import FeatureMap, GraphBuilder

# 3x3 stems, which all have the same keys: their stride, and whether they max-pool.
SMALL_STEMS = {
    "cifar": (1, False),
    "3x3-stride2": (2, False),
    "3x3-maxpool": (1, True),
    "3x3-stride2-maxpool": (2, True),
}
STAGES = 4
WIDTH = 64  # channels of the stem and inside the blocks of the first stage; each stage doubles it


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1  # output channels per inner channel
    convolutions = ("conv1", "conv2")

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu: nn.Module = nn.ReLU(inplace=True)
        self.conv2 = convolution(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x += shortcut
        out: Tensor = self.relu(x)
        return out


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones, and a shortcut; the stride is in the 3x3 one."""

    expansion = 4
    convolutions = ("conv1", "conv2", "conv3")

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = convolution(width, width * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu: nn.Module = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x += shortcut
        out: Tensor = self.relu(x)
        return out


Block = BasicBlock | Bottleneck
_BLOCKS: dict[str, tuple[type[Block], tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


class ResNet(nn.Module):
    """Maps images float32 (N, 3, H, W) to logits (N, K)."""

    def __init__(self, arch: str, num_classes: int) -> None:
        super().__init__()
        block, depths = _BLOCKS[arch]
        self.conv1 = nn.Conv2d(3, WIDTH, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.relu: nn.Module = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        channels = WIDTH
        for stage, depth in enumerate(depths):
            width = WIDTH * 2**stage
            layer = _layer(block, channels, width, depth, stride=2 if stage else 1)
            setattr(self, f"layer{stage + 1}", layer)
            channels = width * block.expansion
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(STAGES):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _layer(
    block: type[Block], channels: int, width: int, depth: int, *, stride: int
) -> nn.Sequential:
    out = width * block.expansion
    # Initialized before the blocks, like torchvision, so that a seed gives the same network.
    downsample = None
    if stride != 1 or channels != out:
        downsample = nn.Sequential(convolution(channels, out, 1, stride), nn.BatchNorm2d(out))
    first = block(channels, width, stride)
    first.downsample = downsample
    return nn.Sequential(first, *(block(out, width, 1) for _ in range(depth - 1)))


def build(
    arch: str, *, num_classes: int, stem: str, activation: str, variant: str, input_size: int
) -> ResNet:
    """torchvision's network; `cifar` is a 3x3 stem with stride 1 and without pooling.

    The other stems are named after their differences.
    """
    net = ResNet(arch, num_classes)
    if stem in SMALL_STEMS:
        stride, pools = SMALL_STEMS[stem]
        net.conv1 = convolution(3, WIDTH, 3, stride)
        initialize_convolutions(net.conv1)
        if not pools:
            net.maxpool = nn.Identity()
    if activation != "relu":
        for module in list(net.modules()):
            if isinstance(getattr(module, "relu", None), nn.ReLU):
                module.relu = activation_module(activation)
    return net


def read(shapes: Shapes) -> Reading | None:
    """The network with these keys of torchvision or of the usual CIFAR ResNets; else None.

    The latter are the same networks with shortcuts named `shortcut` and a head named `linear`
    (kuangliu/pytorch-cifar, and from there MadryLab's robustness and RobustBench).
    """
    if not {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= shapes.keys():
        return None
    public = "linear.weight" in shapes
    stem, head = shapes["conv1.weight"], shapes.get("linear.weight", shapes.get("fc.weight"))
    if head is None or len(stem) != 4 or len(head) != 2:
        return None
    kernel = tuple(stem[2:])
    depths = stage_depths(shapes)
    bottleneck = "layer1.0.conv3.weight" in shapes
    block = Bottleneck if bottleneck else BasicBlock
    arch = next((name for name, kind in _BLOCKS.items() if kind == (block, depths)), None)
    if arch is None or kernel not in ((7, 7), (3, 3)):
        kind = "bottleneck" if bottleneck else "basic"
        raise UnknownLayout(
            f"{kind} blocks {list(depths)} after a {kernel[0]}x{kernel[-1]} stem; supported are "
            "ResNet-18, -34 and -50 with a 7x7 or a 3x3 stem; for others give arch torchvision:NAME"
        )
    doubts: tuple[str, ...] = ()
    if kernel == (3, 3) and not public:
        others = [name for name in SMALL_STEMS if name != "cifar"]
        doubts = (
            "3x3 stems with stride 2 or max-pooling have the same keys as the cifar stem: "
            f"use stem {', '.join(others)} for those",
        )
    imagenet = kernel == (7, 7) and head[0] == 1000
    return Reading(
        arch=arch,
        stem="imagenet" if kernel == (7, 7) else "cifar",
        num_classes=head[0],
        mean=IMAGENET[0] if imagenet else None,
        std=IMAGENET[1] if imagenet else None,
        input_size=224 if imagenet else 32,
        renamed={key: _own_key(key) for key in shapes if _own_key(key) != key} if public else {},
        layout="CIFAR ResNet" if public else "",
        doubts=doubts,
        stems=tuple(SMALL_STEMS) if kernel == (3, 3) else (),
    )


def stage_depths(shapes: Shapes) -> tuple[int, ...]:
    """The numbers of blocks in `layer1` to `layer4`."""
    return tuple(
        len({m[1] for key in shapes if (m := re.match(rf"layer{stage}\.(\d+)\.", key))})
        for stage in range(1, STAGES + 1)
    )


def _own_key(key: str) -> str:
    return re.sub(r"^linear\.", "fc.", key.replace(".shortcut.", ".downsample."))


def _named_blocks(net: nn.Module) -> Iterator[tuple[str, Block]]:
    return named_blocks(net, BasicBlock, Bottleneck)


def norm_pairs(net: nn.Module) -> Iterator[tuple[str, str]]:
    """Every convolution with the batch norm that follows it."""
    yield "conv1", "bn1"
    for name, block in _named_blocks(net):
        for convolution_name in block.convolutions:
            yield f"{name}.{convolution_name}", f"{name}.{convolution_name.replace('conv', 'bn')}"
        if block.downsample is not None:
            yield f"{name}.downsample.0", f"{name}.downsample.1"


def residual_ends(net: nn.Module) -> Iterator[Tensor]:
    """The scale of each branch's last norm."""
    for _, block in _named_blocks(net):
        yield (block.bn3 if isinstance(block, Bottleneck) else block.bn2).weight


def onnx(graph: GraphBuilder, net: ResNet, x: FeatureMap) -> None:
    """The folded network, layer by layer."""
    x = graph.activate(graph.convolve(x, net.conv1), net.relu)
    if isinstance(net.maxpool, nn.MaxPool2d):
        x = graph.pool(x)
    for _, block in _named_blocks(net):
        shortcut = x
        if block.downsample is not None:
            shortcut = graph.convolve(x, block.downsample.get_submodule("0"))
        for number, name in enumerate(block.convolutions):
            if number:
                x = graph.activate(x, block.relu)
            x = graph.convolve(x, block.get_submodule(name))
        x = graph.activate(graph.add(x, shortcut), block.relu)
    graph.finish(x, net.fc)


FAMILY = Family(
    archs=tuple(_BLOCKS),
    build=build,
    head=lambda net: "fc",
    stems=("imagenet", *SMALL_STEMS),
    read=read,
    norm_pairs=norm_pairs,
    residual_ends=residual_ends,
    onnx=onnx,
)

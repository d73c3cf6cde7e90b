"""ResNets, as torchvision builds them: the same keys, the same first weights, the same function.

Not torchvision's own, as importing its models takes longer than torch and brings 160 MB along:
its detectors import torch's compiler. Source: He et al. 2015, arXiv:1512.03385.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

STAGES = 4
WIDTH = 64  # channels of the stem and inside the blocks of the first stage, doubled at each next


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1  # channels out for each inside
    convolutions = ("conv1", "conv2")

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu: nn.Module = nn.ReLU(inplace=True)
        self.conv2 = _convolution(width, width, 3)
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
        self.conv1 = _convolution(channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _convolution(width, width * self.expansion, 1)
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
_BLOCKS: dict[str, tuple[type[Block], tuple[int, int, int, int]]] = {
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
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def named_blocks(self) -> Iterator[tuple[str, Block]]:
        """All blocks in the order of the forward pass, each with its name in the state dict."""
        for name, module in self.named_modules():
            if isinstance(module, BasicBlock | Bottleneck):
                yield name, module

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
    # Drawn before the blocks, as torchvision does: a seed gives the same network.
    downsample = None
    if stride != 1 or channels != out:
        downsample = nn.Sequential(_convolution(channels, out, 1, stride), nn.BatchNorm2d(out))
    first = block(channels, width, stride)
    first.downsample = downsample
    return nn.Sequential(first, *(block(out, width, 1) for _ in range(depth - 1)))


def _convolution(channels: int, out: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, size, stride=stride, padding=size // 2, bias=False)

"""Pre-activation ResNets for small images, under the key names of their public code.

Source: He et al. 2016, arXiv:1603.05027; key names as in kuangliu/pytorch-cifar and, from there,
in the repositories whose weights RobustBench lists. They differ in ways that the keys don't show;
each is a variant:

- "" ends in a norm, and a shortcut's 1x1 convolution takes the activated input;
- "no-final-norm" is the same without the last norm (kuangliu/pytorch-cifar);
- "raw-shortcut" is "no-final-norm" with shortcuts on the raw input (Wong et al. 2020,
  Andriushchenko & Flammarion 2020);
- "deepmind" ends in a norm, has 3x3 shortcuts on the raw input and pads like TensorFlow
  (Rebuffi et al. 2021, Rade & Moosavi-Dezfooli 2022).
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
from robust.networks.resnet import STAGES, WIDTH, stage_depths

if TYPE_CHECKING:
    from robust.graph import FeatureMap, GraphBuilder

VARIANTS = ("", "no-final-norm", "raw-shortcut", "deepmind")
_DEPTHS: dict[str, tuple[bool, tuple[int, ...]]] = {  # whether blocks are bottlenecks; depths
    "preact_resnet18": (False, (2, 2, 2, 2)),
    "preact_resnet34": (False, (3, 4, 6, 3)),
    "preact_resnet50": (True, (3, 4, 6, 3)),
}


class PreActBlock(nn.Module):
    """Norm, activation and convolution, two or three times, and a shortcut."""

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        stride: int,
        bottleneck: bool,
        variant: str,
        activation: str,
    ) -> None:
        super().__init__()
        out = width * 4 if bottleneck else width
        same = variant == "deepmind"
        self.raw_shortcut = variant in ("raw-shortcut", "deepmind") and not bottleneck
        self.activation = activation_module(activation)
        self.bn1 = nn.BatchNorm2d(channels)
        if bottleneck:
            self.conv1 = convolution(channels, width, 1)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv2 = convolution(width, width, 3, stride)
            self.bn3 = nn.BatchNorm2d(width)
            self.conv3 = convolution(width, out, 1)
        else:
            self.conv1 = convolution(channels, width, 3, stride, same=same)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv2 = convolution(width, width, 3)
        self.convolutions = ("conv1", "conv2", "conv3") if bottleneck else ("conv1", "conv2")
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or channels != out:
            projection = convolution(channels, out, 3 if same else 1, stride, same=same)
            self.shortcut = nn.Sequential(projection)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(x if self.raw_shortcut else out)
        out = self.bn2(self.conv1(out))
        out = self.conv2(self.activation(out))
        if len(self.convolutions) == 3:
            out = self.conv3(self.activation(self.bn3(out)))
        out = out + x
        return out


class PreActResNet(nn.Module):
    """Maps images float32 (N, 3, H, W) to logits (N, K)."""

    def __init__(self, arch: str, num_classes: int, *, activation: str, variant: str) -> None:
        super().__init__()
        bottleneck, depths = _DEPTHS[arch]
        self.activation = activation_module(activation)
        self.conv1 = convolution(3, WIDTH, 3)
        channels = WIDTH
        for stage, depth in enumerate(depths):
            blocks = []
            for number in range(depth):
                width = WIDTH * 2**stage
                block = PreActBlock(
                    channels,
                    width,
                    stride=2 if stage and not number else 1,
                    bottleneck=bottleneck,
                    variant=variant,
                    activation=activation,
                )
                blocks.append(block)
                channels = width * 4 if bottleneck else width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.bn: nn.BatchNorm2d | None = None
        if variant in ("", "deepmind"):
            self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in range(STAGES):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        if self.bn is not None:
            x = self.activation(self.bn(x))
        logits: Tensor = self.linear(torch.mean(x, dim=(2, 3)))
        return logits


def build(
    arch: str, *, num_classes: int, stem: str, activation: str, variant: str, input_size: int
) -> PreActResNet:
    """A network with a 3x3 stem of stride 1."""
    return PreActResNet(arch, num_classes, activation=activation, variant=variant)


def read(shapes: Shapes) -> Reading | None:
    """The network with these keys of kuangliu/pytorch-cifar or DeepMind; None for other keys."""
    deepmind = "conv_2d.weight" in shapes
    renamed = {key: _own_key(key) for key in shapes} if deepmind else {}
    own = {renamed.get(key, key): shape for key, shape in shapes.items()}
    head = own.get("linear.weight")
    if "layer1.0.bn1.weight" not in own or "bn1.weight" in own or head is None or len(head) != 2:
        return None
    depths, bottleneck = stage_depths(own), "layer1.0.conv3.weight" in own
    found = (bottleneck, depths)
    arch = next((name for name, value in _DEPTHS.items() if value == found), None)
    kernel = tuple(own["conv1.weight"][2:]) if "conv1.weight" in own else ()
    if arch is None or kernel != (3, 3):
        kind = "bottleneck" if bottleneck else "basic"
        raise UnknownLayout(
            f"{kind} pre-activation blocks {list(depths)} after a stem of size {kernel}; supported "
            "are PreActResNet-18, -34 and -50 with a 3x3 stem"
        )
    mean, std = CIFAR100 if head[0] == 100 else CIFAR10
    doubts: tuple[str, ...] = ()
    variant = "deepmind" if deepmind else "" if "bn.weight" in own else "raw-shortcut"
    if variant == "raw-shortcut" and bottleneck:
        variant = "no-final-norm"
    elif variant == "raw-shortcut":
        doubts = (
            "a network with shortcuts on the activated input has the same keys: use "
            f"arch {arch}:no-final-norm for it",
        )
    return Reading(
        arch=arch,
        stem="cifar",
        num_classes=head[0],
        variant=variant,
        activation="silu" if deepmind else "relu",
        mean=mean if deepmind else None,
        std=std if deepmind else None,
        renamed=renamed,
        layout="DeepMind's PreActResNet" if deepmind else "",
        doubts=doubts,
    )


_DEEPMIND = (
    (r"^conv_2d\.", "conv1."),
    (r"^batchnorm\.", "bn."),
    (r"^logits\.", "linear."),
    (r"\.batchnorm_0\.", ".bn1."),
    (r"\.batchnorm_1\.", ".bn2."),
    (r"\.conv_2d_(\d)\.", r".conv\1."),
    (r"\.shortcut\.", ".shortcut.0."),
)


def _own_key(key: str) -> str:
    key = re.sub(r"^layer_(\d)\.", lambda m: f"layer{int(m[1]) + 1}.", key)
    for pattern, replacement in _DEEPMIND:
        key = re.sub(pattern, replacement, key)
    return key


def norm_pairs(net: nn.Module) -> Iterator[tuple[str, str]]:
    """Inside a block each convolution except the last is followed by a norm."""
    for name, block in named_blocks(net, PreActBlock):
        for number in range(1, len(block.convolutions)):
            yield f"{name}.conv{number}", f"{name}.bn{number + 1}"


def residual_ends(net: nn.Module) -> Iterator[Tensor]:
    """The last convolution: a norm with scale 0 before the activation would never learn."""
    for _, block in named_blocks(net, PreActBlock):
        weight = block.get_submodule(block.convolutions[-1]).weight
        assert isinstance(weight, Tensor)
        yield weight


def onnx(graph: GraphBuilder, net: PreActResNet, x: FeatureMap) -> None:
    """The folded network, layer by layer."""
    x = graph.convolve(x, net.conv1)
    for _, block in named_blocks(net, PreActBlock):
        out = graph.activate(graph.norm(x, block.bn1), block.activation)
        if block.shortcut is not None:
            x = graph.convolve(x if block.raw_shortcut else out, block.shortcut.get_submodule("0"))
        for number, name in enumerate(block.convolutions):
            if number:
                out = graph.activate(out, block.activation)
            out = graph.convolve(out, block.get_submodule(name))
        x = graph.add(out, x)
    if net.bn is not None:
        x = graph.activate(graph.norm(x, net.bn), net.activation)
    graph.finish(x, net.linear)


FAMILY = Family(
    archs=tuple(_DEPTHS),
    build=build,
    head=lambda net: "linear",
    stems=("cifar",),
    variants=VARIANTS,
    read=read,
    norm_pairs=norm_pairs,
    residual_ends=residual_ends,
    onnx=onnx,
)

"""A classifier as an ONNX graph: of the layers of its copy for inference, in fewer operations.

Small feature maps are matrices there, a row for each pixel or, for a convolution over a whole
map, for each image: no layer of the last stages needs its values moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from robust.classifier import Classifier
from robust.inference import SMALL, Dense, InferenceClassifier, Pixelwise
from robust.resnet import Block

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 18
IR_VERSION = 10  # the oldest reader that is meant to take it: ONNX 1.16, ONNX Runtime 1.18


def build_onnx(classifier: InferenceClassifier) -> ModelProto:
    """The graph, `images` float32 (N, 3, S, S) in [0, 1] to `logits` float32 (N, K), for any N.

    Raises ImportError without the package onnx.
    """
    return _Graph().build(classifier.classifier)


@dataclass(frozen=True, kw_only=True)
class _Map:
    """A feature map (N, C, side, side), or in `rows` a matrix (N * side * side, C)."""

    name: str
    channels: int
    side: int
    rows: bool = False


class _Graph:
    """Nodes in order, and the constants they take."""

    def __init__(self) -> None:
        from onnx import helper, numpy_helper

        self._helper, self._tensor = helper, numpy_helper.from_array
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def build(self, classifier: Classifier) -> ModelProto:
        architecture, net = classifier.architecture, classifier.net
        side = architecture.input_size
        images = "images"
        if architecture.normalises:
            images = self._add("Sub", images, self._constant(classifier.mean))
            images = self._add("Div", images, self._constant(classifier.std))
        x = self._convolve(_Map(name=images, channels=3, side=side), net.conv1)
        x = self._activate(x, net.relu)
        if isinstance(net.maxpool, nn.MaxPool2d):
            x = self._pool(x)
        for _, block in net.named_blocks():
            x = self._block(x, block)
        features = self._mean(x)
        weights = self._constant(net.fc.weight), self._constant(net.fc.bias)
        self._add("Gemm", features, *weights, output="logits", transB=1)
        shapes: tuple[list[Any], list[Any]] = ["N", 3, side, side], ["N", architecture.num_classes]
        value = self._helper.make_tensor_value_info
        graph = self._helper.make_graph(
            self._nodes,
            architecture.arch,
            [value("images", 1, shapes[0])],  # 1: float32
            [value("logits", 1, shapes[1])],
            self._constants,
        )
        opsets = [self._helper.make_opsetid("", OPSET)]
        model: ModelProto = self._helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="robust"
        )
        return model

    def _block(self, x: _Map, block: Block) -> _Map:
        shortcut = x
        if block.downsample is not None:
            shortcut = self._convolve(x, block.downsample.get_submodule("0"))
        for number, name in enumerate(block.convolutions):
            if number:
                x = self._activate(x, block.relu)
            x = self._convolve(x, block.get_submodule(name))
        if x.rows != shortcut.rows:
            x, shortcut = self._as_rows(x), self._as_rows(shortcut)
        total = self._add("Add", x.name, shortcut.name)
        return self._activate(_like(x, total), block.relu)

    def _convolve(self, x: _Map, layer: nn.Module) -> _Map:
        if isinstance(layer, Dense):
            return self._dense(self._as_rows(x), layer)
        if isinstance(layer, Pixelwise):
            if x.side <= SMALL:
                return self._pixelwise(self._as_rows(x), layer)
            weight, bias = layer.weight[:, :, None, None], layer.bias
            size, stride, padding = 1, layer.stride, 0
        else:
            assert isinstance(layer, nn.Conv2d)
            assert not x.rows
            weight, bias = layer.weight, layer.bias
            size, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        assert bias is not None
        name = self._add(
            "Conv",
            x.name,
            self._constant(weight),
            self._constant(bias),
            kernel_shape=[size] * 2,
            strides=[stride] * 2,
            pads=[padding] * 4,
        )
        side = (x.side + 2 * padding - size) // stride + 1
        return _Map(name=name, channels=len(weight), side=side)

    def _dense(self, x: _Map, layer: Dense) -> _Map:
        out_side, _, channels = layer.shape
        name = self._reshape(x.name, -1, x.side**2 * x.channels)
        name = self._product(name, layer.weight, layer.bias)
        name = self._reshape(name, -1, channels)
        return _Map(name=name, channels=channels, side=out_side, rows=True)

    def _pixelwise(self, x: _Map, layer: Pixelwise) -> _Map:
        name, side = x.name, x.side
        if layer.stride > 1 and side > 1:
            name = self._reshape(name, -1, side, side, x.channels)
            bounds = ([0, 0], [side, side], [1, 2], [layer.stride, layer.stride])
            name = self._add("Slice", name, *map(self._numbers, bounds))
            name = self._reshape(name, -1, x.channels)
            side = (side - 1) // layer.stride + 1
        name = self._product(name, layer.weight, layer.bias)
        return _Map(name=name, channels=len(layer.weight), side=side, rows=True)

    def _product(self, name: str, weight: Tensor, bias: Tensor | None) -> str:
        assert bias is not None
        return self._add("Gemm", name, self._constant(weight), self._constant(bias), transB=1)

    def _activate(self, x: _Map, activation: nn.Module) -> _Map:
        if isinstance(activation, nn.ReLU):
            return _like(x, self._add("Relu", x.name))
        assert isinstance(activation, nn.SiLU)
        return _like(x, self._add("Mul", x.name, self._add("Sigmoid", x.name)))

    def _pool(self, x: _Map) -> _Map:
        name = self._add("MaxPool", x.name, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
        return _Map(name=name, channels=x.channels, side=(x.side - 1) // 2 + 1)

    def _mean(self, x: _Map) -> str:
        """The mean over the pixels of each image and channel."""
        if not x.rows:
            return self._add("Flatten", self._add("GlobalAveragePool", x.name))
        name = self._reshape(x.name, -1, x.side**2, x.channels)
        return self._add("ReduceMean", name, self._numbers([1]), keepdims=0)

    def _as_rows(self, x: _Map) -> _Map:
        if x.rows:
            return x
        name = self._add("Transpose", x.name, perm=[0, 2, 3, 1])
        name = self._reshape(name, -1, x.channels)
        return _Map(name=name, channels=x.channels, side=x.side, rows=True)

    def _reshape(self, name: str, *shape: int) -> str:
        return self._add("Reshape", name, self._numbers(shape))

    def _constant(self, tensor: Tensor) -> str:
        return self._store(tensor.detach().cpu().contiguous().numpy())

    def _numbers(self, values: object) -> str:
        return self._store(np.array(values, dtype=np.int64))

    def _store(self, array: np.ndarray) -> str:
        name = f"constant{len(self._constants)}"
        self._constants.append(self._tensor(array, name))
        return name

    def _add(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = output or f"value{len(self._nodes)}"
        self._nodes.append(self._helper.make_node(kind, list(inputs), [name], **attributes))
        return name


def _like(x: _Map, name: str) -> _Map:
    return _Map(name=name, channels=x.channels, side=x.side, rows=x.rows)

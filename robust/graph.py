"""A classifier as an ONNX graph of its inference copy's layers, with fewer operations.

Small feature maps are matrices with a row per pixel or, for a convolution over a whole map, per
image, so that the last stages need no transposes.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from robust.classifier import Classifier
from robust.inference import SMALL, Dense, InferenceClassifier, Pixelwise
from robust.networks import family_of
from robust.networks.layers import SameConv2d

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 18
IR_VERSION = 10  # for the oldest supported readers: ONNX 1.16, ONNX Runtime 1.18


def build_onnx(classifier: InferenceClassifier) -> ModelProto:
    """The graph, `images` float32 (N, 3, S, S) in [0, 1] to `logits` float32 (N, K), for any N.

    A family without an `onnx` function is exported by torch, which takes longer. Raises ImportError
    without the package onnx, and for a traced network without onnxscript.
    """
    if family_of(classifier.architecture.arch).onnx is None:
        return traced_onnx(classifier.classifier)
    return GraphBuilder().build(classifier.classifier)


def traced_onnx(classifier: Classifier) -> ModelProto:
    """The same graph from torch's exporter. Raises ImportError and the exporter's exceptions."""
    import onnxscript  # noqa: F401  (needed by the exporter, whose own message is unclear)

    size = classifier.architecture.input_size
    example = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with _quiet():
        program = torch.onnx.export(
            classifier,
            (example.to(classifier.mean.device),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None
    return program.model_proto


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """A feature map (N, C, side, side), or in `rows` a matrix (N * side * side, C)."""

    name: str
    channels: int
    side: int
    rows: bool = False


class GraphBuilder:
    """Builds a graph: nodes in order, and their constants."""

    def __init__(self) -> None:
        from onnx import helper, numpy_helper

        self._helper, self._tensor = helper, numpy_helper.from_array
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def build(self, classifier: Classifier) -> ModelProto:
        architecture = classifier.architecture
        add_network = family_of(architecture.arch).onnx
        assert add_network is not None
        side = architecture.input_size
        images = "images"
        if architecture.normalizes:
            images = self._add("Sub", images, self._constant(classifier.mean))
            images = self._add("Div", images, self._constant(classifier.std))
        add_network(self, classifier.net, FeatureMap(name=images, channels=3, side=side))
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

    def convolve(self, x: FeatureMap, layer: nn.Module) -> FeatureMap:
        """A convolution, or the layer that replaces it in the inference copy."""
        if isinstance(layer, Dense):
            return self._dense(self._as_rows(x), layer)
        if isinstance(layer, Pixelwise):
            if x.side <= SMALL:
                return self._pixelwise(self._as_rows(x), layer)
            weight, bias = layer.weight[:, :, None, None], layer.bias
            size, stride, pads = 1, layer.stride, [0] * 4
        else:
            assert isinstance(layer, nn.Conv2d)
            assert not x.rows
            weight, bias = layer.weight, layer.bias
            size, stride, pads = layer.kernel_size[0], layer.stride[0], [int(layer.padding[0])] * 4
            if isinstance(layer, SameConv2d):
                pads = [0, 0, 1, 1]
        constants = [self._constant(value) for value in (weight, bias) if value is not None]
        name = self._add(
            "Conv",
            x.name,
            *constants,
            kernel_shape=[size] * 2,
            strides=[stride] * 2,
            pads=pads,
        )
        side = (x.side + pads[0] + pads[2] - size) // stride + 1
        return FeatureMap(name=name, channels=len(weight), side=side)

    def norm(self, x: FeatureMap, layer: nn.BatchNorm2d) -> FeatureMap:
        """A batch norm that was not folded: a scale and a shift."""
        assert layer.running_mean is not None
        assert layer.running_var is not None
        scale = layer.weight.double() / (layer.running_var.double() + layer.eps).sqrt()
        shift = layer.bias.double() - layer.running_mean.double() * scale
        shape = (-1,) if x.rows else (-1, 1, 1)
        name = self._add("Mul", x.name, self._constant(scale.float().view(shape)))
        return _like(x, self._add("Add", name, self._constant(shift.float().view(shape))))

    def add(self, x: FeatureMap, shortcut: FeatureMap) -> FeatureMap:
        """The sum of a block's branch and its shortcut."""
        if x.rows != shortcut.rows:
            x, shortcut = self._as_rows(x), self._as_rows(shortcut)
        return _like(x, self._add("Add", x.name, shortcut.name))

    def finish(self, x: FeatureMap, head: nn.Linear) -> None:
        """Global average pooling, and the layer that computes the logits."""
        features = self._mean(x)
        weights = self._constant(head.weight), self._constant(head.bias)
        self._add("Gemm", features, *weights, output="logits", transB=1)

    def _dense(self, x: FeatureMap, layer: Dense) -> FeatureMap:
        out_side, _, channels = layer.shape
        name = self._reshape(x.name, -1, x.side**2 * x.channels)
        name = self._product(name, layer.weight, layer.bias)
        name = self._reshape(name, -1, channels)
        return FeatureMap(name=name, channels=channels, side=out_side, rows=True)

    def _pixelwise(self, x: FeatureMap, layer: Pixelwise) -> FeatureMap:
        name, side = x.name, x.side
        if layer.stride > 1 and side > 1:
            name = self._reshape(name, -1, side, side, x.channels)
            bounds = ([0, 0], [side, side], [1, 2], [layer.stride, layer.stride])
            name = self._add("Slice", name, *map(self._numbers, bounds))
            name = self._reshape(name, -1, x.channels)
            side = (side - 1) // layer.stride + 1
        name = self._product(name, layer.weight, layer.bias)
        return FeatureMap(name=name, channels=len(layer.weight), side=side, rows=True)

    def _product(self, name: str, weight: Tensor, bias: Tensor | None) -> str:
        constants = [self._constant(value) for value in (weight, bias) if value is not None]
        return self._add("Gemm", name, *constants, transB=1)

    def activate(self, x: FeatureMap, activation: nn.Module) -> FeatureMap:
        """ReLU or SiLU."""
        if isinstance(activation, nn.ReLU):
            return _like(x, self._add("Relu", x.name))
        assert isinstance(activation, nn.SiLU)
        return _like(x, self._add("Mul", x.name, self._add("Sigmoid", x.name)))

    def pool(self, x: FeatureMap) -> FeatureMap:
        """Max-pooling of an ImageNet stem."""
        name = self._add("MaxPool", x.name, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
        return FeatureMap(name=name, channels=x.channels, side=(x.side - 1) // 2 + 1)

    def _mean(self, x: FeatureMap) -> str:
        """The mean over the pixels of each image and channel."""
        if not x.rows:
            return self._add("Flatten", self._add("GlobalAveragePool", x.name))
        name = self._reshape(x.name, -1, x.side**2, x.channels)
        return self._add("ReduceMean", name, self._numbers([1]), keepdims=0)

    def _as_rows(self, x: FeatureMap) -> FeatureMap:
        if x.rows:
            return x
        name = self._add("Transpose", x.name, perm=[0, 2, 3, 1])
        name = self._reshape(name, -1, x.channels)
        return FeatureMap(name=name, channels=x.channels, side=x.side, rows=True)

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


def _like(x: FeatureMap, name: str) -> FeatureMap:
    return FeatureMap(name=name, channels=x.channels, side=x.side, rows=x.rows)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's messages about its internals."""
    names = ("torch.onnx", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in names:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)

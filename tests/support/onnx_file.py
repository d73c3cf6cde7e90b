"""An ONNX file for tests of models without gradients."""

from pathlib import Path

import numpy as np

SIDE, CLASSES = 32, 10


def write_onnx(path: Path, *, seed: int = 0, weights_beside: bool = False) -> None:
    """Write a linear model with random weights, which has no gradients.

    With `weights_beside` the weights are in a second file, as torch.onnx.export writes them.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    shape = (3 * SIDE**2, CLASSES)
    weights = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / 20
    nodes = [
        helper.make_node("Flatten", ["images"], ["pixels"]),
        helper.make_node("MatMul", ["pixels", "weights"], ["logits"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])
    initializer = numpy_helper.from_array(weights, "weights")
    graph = helper.make_graph(nodes, "linear", [images], [logits], [initializer])
    opset = helper.make_opsetid("", 18)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    onnx.save_model(
        model,
        str(path),
        save_as_external_data=weights_beside,
        location=f"{path.name}.data",
        size_threshold=0,
    )

"""The ONNX graph agrees with the classifier for any number of images."""

import onnxruntime
import pytest
import torch

from robust.graph import build_onnx
from robust.inference import for_inference
from tests.robust.test_inference import classifier_of, images


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(
    ("stem", "side"),  # maps of 2 and 1 pixels in the last stages, 3 to 2, and 5 to 2
    [("imagenet", 32), ("imagenet", 40), ("cifar", 8), ("cifar", 9)],
)
def test_agrees_with_the_classifier(arch: str, activation: str, stem: str, side: int) -> None:
    classifier = classifier_of(
        arch=arch,
        activation=activation,
        stem=stem,
        input_size=side,
        num_classes=7,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.25),
    )
    x = images(5, side)
    with torch.inference_mode():
        expected = classifier(x)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        build_onnx(for_inference(classifier)).SerializeToString(), options
    )
    for n in (1, 5):
        (logits,) = session.run(["logits"], {"images": x[:n].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected[:n], rtol=0, atol=1e-5)


def test_feature_map_too_large_for_a_matrix() -> None:
    classifier = classifier_of(arch="resnet18", input_size=64)
    graph = build_onnx(for_inference(classifier)).graph
    assert [node.op_type for node in graph.node].count("Conv") > 10
    assert graph.node[-1].output == ["logits"]

"""Loading a model of any format for serving."""

from pathlib import Path

import pytest
import torch

from app.engine.served_model import load_model
from app.errors import InvalidParameters
from app.http.parameters import check_model
from robust import networks
from robust.attacks import resolve_attack
from robust.checkpoint import CheckpointError
from robust.device import DeviceDisagrees
from robust.images import to_float
from robust.loading import ModelOptions
from robust.threat_model import ThreatModel

CPU, SIDE = torch.device("cpu"), 16
CODE = """
import torch
from torch import nn

def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Weights without a sidecar."""
    net = networks.build("wide_resnet10_1", num_classes=3, stem="cifar", input_size=SIDE)
    path = tmp_path / "theirs.pt"
    torch.save({"model": net.state_dict()}, path)
    return path


def test_options_complete_a_file_without_a_sidecar(bare: Path) -> None:
    options = ModelOptions(mean=(0.5,) * 3, input_size=SIDE, classes=("cat", "dog", "frog"))
    model = load_model(bare, CPU, options=options, attacks_only=True)
    assert (model.classes, model.input_size) == (("cat", "dog", "frog"), SIDE)
    assert model.sidecar.architecture.mean == (0.5,) * 3
    assert set(model.guessed) == {"arch", "stem", "activation", "std"}
    assert model.notes == ("read from its entry 'model'",)
    with pytest.raises(CheckpointError, match="3 class names"):
        load_model(bare, CPU, options=ModelOptions(classes=("cat",)))


def test_device_that_disagrees_with_the_cpu_is_not_used(
    bare: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def disagree(classifier: object, device: torch.device, size: int, *, moved: object) -> None:
        if device.type != "cpu":
            raise DeviceDisagrees(f"{device} disagrees with the CPU")

    monkeypatch.setattr("app.engine.served_model.compare_with_cpu", disagree)
    elsewhere = torch.device("meta")  # torch has it everywhere, and it computes nothing
    model = load_model(bare, elsewhere, fall_back=True, attacks_only=True)
    assert model.device == CPU
    assert "meta disagrees with the CPU: using the CPU" in caplog.text
    assert model.logits(torch.zeros(1, 3, 32, 32)).isfinite().all()
    with pytest.raises(DeviceDisagrees):
        load_model(bare, elsewhere, attacks_only=True)


def test_model_from_user_code(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    options = ModelOptions(input_size=SIDE)
    model = load_model(Path(f"{path}:make_model"), CPU, options=options, attacks_only=True)
    images = torch.arange(3 * SIDE**2).remainder(256).view(1, 3, SIDE, SIDE).to(torch.uint8)
    expected = model.exact()(to_float(images)).softmax(dim=1)
    torch.testing.assert_close(model.classify(images), expected)
    assert model.differentiable


def test_gradient_attacks_are_rejected_for_a_model_without_gradients(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["scores"]),
    ]
    entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])
    graph = helper.make_graph(
        nodes, "mean", [entry], [helper.make_tensor_value_info("scores", 1, None)]
    )
    path = tmp_path / "theirs.onnx"
    opset = helper.make_opsetid("", 18)
    path.write_bytes(
        helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
    )
    model = load_model(path, CPU, attacks_only=True)
    ball = ThreatModel(norm="linf", eps=8 / 255)
    check_model([resolve_attack("square", ball)], model)
    attacks = [resolve_attack(name, ball) for name in ("square", "fgsm")]
    with pytest.raises(InvalidParameters) as caught:
        check_model(attacks, model, curve=10)
    errors = [(error.field, error.got) for error in caught.value.errors]
    assert errors == [("attack", "fgsm"), ("curve", "10")]

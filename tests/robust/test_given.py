"""Complete models: user code, exported graphs, ONNX, hub folders, services."""

import json
import sys
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import robust
from robust.attacks import resolve_attack
from robust.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from robust.classifier import Classifier
from robust.digest import module_digest
from robust.export import export_checkpoint
from robust.inference import for_inference
from robust.loading import ModelOptions
from robust.prediction import predict
from robust.sidecar import Sidecar
from robust.threat_model import ThreatModel
from tests.robust.test_inference import classifier_of, images

SIDE, CLASSES = 16, 4
CODE = """
import torch
from torch import nn

def make_model():
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return nn.Sequential(first, nn.AdaptiveAvgPool2d(1), nn.Flatten())

def function():
    model = make_model().eval()
    return lambda x: model(x)

def softmax():
    return nn.Sequential(make_model(), nn.Softmax(dim=1))

def wrong():
    return 3

def features():
    return nn.Conv2d(3, 4, 3)

def broken():
    return nn.Linear(7, 2)

def direct(images, scale=1):
    return images.mean(dim=(2, 3))

def named():
    model = make_model().eval()
    return lambda x: {"logits": model(x)}

model = make_model()
_hidden = 3
"""
DEFINED = "make_model, function, softmax, wrong, features, broken, direct, named, model"


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "mine.py"
    path.write_text(CODE)
    return path


@pytest.fixture(scope="module")
def network(code: Path) -> nn.Module:
    scope: dict[str, Any] = {}
    exec(code.read_text(), scope)
    model: nn.Module = scope["make_model"]().eval()
    return model


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(x)
    return logits


@pytest.mark.parametrize("name", ["make_model", "function", "model"])
def test_model_from_user_code(
    name: str, code: Path, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ModelOptions(input_size=SIDE, classes=("a", "b", "c", "d"))
    loaded = load_checkpoint(f"{code}:{name}", options=options)
    x = images(3, SIDE)
    expected = logits_of(network, x)
    assert torch.equal(logits_of(loaded.classifier, x), expected)
    assert not loaded.guessed
    assert loaded.sidecar.classes == ("a", "b", "c", "d")
    monkeypatch.chdir(code.parent)
    again = load_checkpoint(f"mine:{name}", options=ModelOptions(mean=(0.5, 0.5, 0.5)))
    assert again.guessed == {"input_size": "assumed", "classes": "assumed"}
    x = images(3, 32)
    torch.testing.assert_close(logits_of(again.classifier, x), logits_of(network, x - 0.5))
    # A function's hash covers its logits at this input size.
    assert (again.sha256 == loaded.sha256) == (name != "function")
    copied = for_inference(loaded.classifier)
    x = images(3, SIDE)
    torch.testing.assert_close(logits_of(copied, x), expected, rtol=0, atol=1e-4)
    x.requires_grad_()
    copied(x).sum().backward()
    assert x.grad is not None
    assert x.grad.any()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent", f"a function or nn.Module absent, found {DEFINED}$"),
        (
            "direct",
            r"a function without arguments that returns the model, or an nn.Module, "
            r"found direct\(images, scale=1\)",
        ),
        ("wrong", "a callable from images to logits, found a int"),
        ("features", r"logits \(2, K\) of 2 images, found \(2, 4, 30, 30\)"),
        ("named", r"2 images, found dict; give a callable such as .* model\(x\)\['logits'\]$"),
        (
            "broken",
            r"images \(2, 3, 32, 32\); for another size set --input-size",
        ),
    ],
)
def test_code_without_a_classifier_is_rejected(name: str, words: str, code: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(f"{code}:{name}")


def test_code_whose_annotations_are_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Settings:\n    width: int = 1\n"
        "def make_model():\n    return lambda x: x.mean(dim=(2, 3))\n"
    )
    load_checkpoint(f"{path}:make_model")
    before = set(sys.modules)
    path.write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        load_checkpoint(f"{path}:make_model")
    assert {name for name in set(sys.modules) - before if "mine" in name} == set()


def test_the_hash_of_a_function_covers_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\nfrom pathlib import Path\n"
        "def make_model():\n"
        "    weight = torch.load(Path(__file__).with_name('weights.pt'))\n"
        "    return lambda x: x.mean(dim=(2, 3)) @ weight\n"
        "def noisy():\n    return lambda x: torch.randn(len(x), 4)\n"
    )
    hashes = []
    for seed in (0, 0, 1):
        weight = torch.randn(3, CLASSES, generator=torch.Generator().manual_seed(seed))
        torch.save(weight, tmp_path / "weights.pt")
        loaded = load_checkpoint(f"{path}:make_model")
        hashes.append((loaded.sha256, module_digest(loaded.classifier)))
    assert hashes[0] == hashes[1]
    assert all(one != other for one, other in zip(*hashes[1:], strict=True))
    noisy = [load_checkpoint(f"{path}:noisy").sha256 for _ in range(2)]
    assert noisy[0] == noisy[1]  # or an evaluation could not be resumed


def test_batch_norm_in_train_mode_inside_a_function_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from torch import nn\n"
        "net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3072, 4))\n"
        "def make_model():\n    return lambda x: net(x)\n"
    )
    expected = r"make_model: expected batch norm in eval mode, found one in train mode; call model"
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(f"{path}:make_model")
    path.write_text(f"{path.read_text()}net.eval()\n")
    load_checkpoint(f"{path}:make_model")


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_the_name_of_a_network_is_no_model(name: str) -> None:
    with pytest.raises(CheckpointError, match="a weights file, with this name as --arch"):
        load_checkpoint(name)


def test_a_python_file_without_a_name_is_listed_but_never_run(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"{CODE}\nraise SystemExit('it ran')\n")
    with pytest.raises(CheckpointError, match=rf"mine\.py:NAME with .* defines {DEFINED}$"):
        load_checkpoint(path)
    path.write_text("import torch\n")
    with pytest.raises(CheckpointError, match=r"defines none$"):
        load_checkpoint(path)
    path.write_text("def broken(:\n")
    with pytest.raises(CheckpointError, match=r"defines none$"):
        load_checkpoint(path)


def test_missing_modules_are_named(code: Path) -> None:
    with pytest.raises(CheckpointError, match="a Python file, found none of that name"):
        load_checkpoint(f"{code.parent}/absent.py:make_model")
    with pytest.raises(CheckpointError, match=r"a module no\.such, found No module named 'no'"):
        load_checkpoint("no.such:make_model")


def test_sys_path_entries_added_by_user_code_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"import sys\nsys.path.insert(0, 'added')\n{CODE}")
    monkeypatch.setattr("sys.path", [*sys.path])
    load_checkpoint(f"{path}:make_model")
    assert sys.path[0] == "added"
    assert str(tmp_path) not in sys.path


def test_weight_options_are_rejected_for_a_whole_model(code: Path) -> None:
    with pytest.raises(CheckpointError, match="for the option arch, found a whole python model"):
        load_checkpoint(f"{code}:make_model", options=ModelOptions(arch="resnet18"))


def test_probabilities_are_reported(code: Path) -> None:
    loaded = load_checkpoint(f"{code}:softmax")
    assert "it seems to return probabilities, but logits are expected" in loaded.notes


def test_torchscript(network: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(network, images(2, SIDE)).save(path)  # type: ignore[no-untyped-call]
    loaded = load_checkpoint(path, options=ModelOptions(input_size=SIDE))
    assert loaded.sidecar.architecture.arch == "torchscript"
    assert loaded.guessed == {"mean": "assumed", "std": "assumed", "classes": "assumed"}
    x = images(3, SIDE)
    torch.testing.assert_close(logits_of(loaded.classifier, x), logits_of(network, x))
    copied = for_inference(loaded.classifier)
    torch.testing.assert_close(logits_of(copied, x), logits_of(network, x), rtol=0, atol=1e-4)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_torch_export(network: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, (images(2, SIDE),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    loaded = load_checkpoint(path, options=ModelOptions(input_size=SIDE))
    assert loaded.sidecar.architecture.arch == "torch.export"
    x = images(3, SIDE).requires_grad_()
    logits = for_inference(loaded.classifier)(x)
    torch.testing.assert_close(logits, network(x))
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert gradient.any()


class Softmax(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).softmax(dim=1)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_onnx(probabilities: bool, fixed: bool, network: nn.Module, tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper

    path = tmp_path / "model.onnx"
    weight = torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(0))
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w"], ["scores"], transB=1),
    ]
    if probabilities:
        nodes.append(helper.make_node("Softmax", ["scores"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "linear",
        [
            helper.make_tensor_value_info(
                "x", TensorProto.FLOAT, [2 if fixed else "N", 3, SIDE, SIDE]
            )
        ],
        [helper.make_tensor_value_info("y" if probabilities else "scores", 1, None)],
        [numpy_helper.from_array(weight.numpy(), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    loaded = load_checkpoint(path)
    assert loaded.sidecar.architecture.input_size == SIDE
    x = images(5, SIDE)
    expected = (x.mean(dim=(2, 3)) @ weight.T).softmax(dim=1)
    torch.testing.assert_close(predict(loaded.classifier, x), expected)
    assert any("logarithms" in note for note in loaded.notes) == probabilities
    linf = ThreatModel(norm="linf", eps=8 / 255)
    loaded.check_attacks([resolve_attack("square", linf)])
    with pytest.raises(ValueError, match="such as square, got fgsm, pgd-20: onnx models give none"):
        loaded.check_attacks([resolve_attack(name, linf) for name in ("fgsm", "square", "pgd")])
    with pytest.raises(ValueError, match="square takes none"):
        resolve_attack("fgsm", linf).run(loaded.classifier, x, expected.argmax(dim=1))
    if not fixed and not probabilities:
        graph.input[0].type.tensor_type.shape.dim[1].dim_value = SIDE
        graph.input[0].type.tensor_type.shape.dim[3].dim_value = 3
        graph.node[0].input[0] = "first"
        turn = helper.make_node("Transpose", ["x"], ["first"], perm=[0, 3, 1, 2])
        graph.node.insert(0, turn)
        path.write_bytes(
            helper.make_model(
                graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10
            ).SerializeToString()
        )
        turned = load_checkpoint(path)
        assert "its input has channels last" in turned.notes
        torch.testing.assert_close(predict(turned.classifier, x), expected)
    square = resolve_attack("square", linf, steps=20)
    result = square.run(for_inference(loaded.classifier), images(5, SIDE), expected.argmax(dim=1))
    assert (result.logits.argmax(1) == expected.argmax(1)).logical_not().equal(result.success)


def test_onnx_with_weights_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def save(folder: Path, weight: np.ndarray[Any, Any]) -> None:
        folder.mkdir()
        graph = helper.make_graph(
            [
                helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
                helper.make_node("Flatten", ["pooled"], ["flat"]),
                helper.make_node("Gemm", ["flat", "w"], ["logits"], transB=1),
            ],
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])],
            [helper.make_tensor_value_info("logits", 1, None)],
            [numpy_helper.from_array(weight, "w")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.save_model(
            model,
            str(folder / "m.onnx"),
            save_as_external_data=True,
            location="m.onnx.data",
            size_threshold=0,
        )

    weight = np.arange(CLASSES * 3, dtype=np.float32).reshape(CLASSES, 3)
    save(tmp_path / "mine", weight)
    save(tmp_path / "other", -weight)
    monkeypatch.chdir(tmp_path / "other")  # its file of the same name is another model's
    loaded = load_checkpoint(tmp_path / "mine" / "m.onnx")
    x = images(2, SIDE)
    expected = x.mean(dim=(2, 3)) @ torch.from_numpy(weight).T
    torch.testing.assert_close(logits_of(loaded.classifier, x), expected)
    other = load_checkpoint("m.onnx")
    torch.testing.assert_close(logits_of(other.classifier, x), -expected)
    assert loaded.sha256 != other.sha256
    (tmp_path / "mine" / "m.onnx.data").unlink()
    with pytest.raises(CheckpointError, match=r"the file m\.onnx\.data of its weights beside it"):
        load_checkpoint(tmp_path / "mine" / "m.onnx")


def test_onnx_of_ours_names_its_classes(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    classifier = classifier_of(arch="resnet18", num_classes=3, mean=(0.4, 0.5, 0.6), input_size=32)
    sidecar = Sidecar(architecture=classifier.architecture, classes=("cat", "dog", "Schiff, groß"))
    save_checkpoint(tmp_path / "model.pt", classifier, sidecar, dtype=torch.float32)
    export_checkpoint(load_checkpoint(tmp_path / "model.pt"), tmp_path / "model.onnx", "onnx")
    (tmp_path / "model.json").unlink()
    loaded = load_checkpoint(tmp_path / "model.onnx")
    assert loaded.sidecar.classes == loaded.classifier.classes == sidecar.classes
    assert loaded.guessed == {}
    options = ModelOptions(classes=("a", "b", "c"))
    assert load_checkpoint(tmp_path / "model.onnx", options=options).sidecar.classes[0] == "a"


# Folders of the hub.


def test_our_own_hub_folder(tmp_path: Path) -> None:
    import timm

    classifier = classifier_of(arch="resnet18", num_classes=3, mean=(0.4, 0.5, 0.6), input_size=32)
    rows = [
        {"data": "a: b.npz", "attack": "clean", "accuracy": 0.75, "n": 4},
        {
            "data": "a: b.npz",
            "attack": "pgd-20",
            "norm": "linf",
            "eps": 8 / 255,
            "accuracy": 0.5,
            "n": 4,
        },
        {"data": "c", "attack": "clean", "accuracy": 1.0, "n": 4, "flags": ["training-data"]},
    ]
    sidecar = Sidecar(
        architecture=classifier.architecture, classes=("a", "b", "c"), evaluation=rows
    )
    save_checkpoint(tmp_path / "model.pt", classifier, sidecar, dtype=torch.float32)
    folder = tmp_path / "hub-model"
    usage = export_checkpoint(load_checkpoint(tmp_path / "model.pt"), folder, "hub")
    assert usage == f"import robust; model = robust.load_model({str(folder)!r})"
    loaded = load_checkpoint(folder)
    assert not loaded.guessed
    with pytest.raises(ValueError, match="another file than the checkpoint itself"):
        export_checkpoint(loaded, folder, "hub")
    assert loaded.sidecar.classes == ("a", "b", "c")
    x = images(2, 32)
    assert torch.equal(logits_of(robust.load_model(folder), x), logits_of(classifier, x))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    normalized = (x - classifier.mean) / classifier.std
    torch.testing.assert_close(logits_of(theirs, normalized), logits_of(classifier, x))

    import yaml

    _, front, page = (folder / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(front)
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"]["name"] == "a: b.npz"
    assert result["metrics"] == [
        {"type": "accuracy", "value": 0.75, "name": "clean accuracy, 4 images"},
        {
            "type": "accuracy",
            "value": 0.5,
            "name": "robust accuracy (pgd-20, linf 8/255, 4 images)",
        },
    ]
    assert "| c | clean accuracy, 4 images | 100.00% | training-data |" in page


def test_timms_hub_folder(tmp_path: Path) -> None:
    import timm

    net = timm.create_model("test_resnet", num_classes=3).eval()
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "test_resnet",
        "num_classes": 3,
        "label_names": ["a", "b", "c"],
        "pretrained_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "input_size": [3, 64, 64],
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_checkpoint(tmp_path)
    assert (loaded.sidecar.classes, loaded.guessed) == (("a", "b", "c"), {})
    assert loaded.sidecar.architecture.input_size == 64
    x = images(2, 64)
    assert torch.equal(logits_of(loaded.classifier, x), logits_of(net, (x - 0.5) / 0.5))


@pytest.mark.parametrize("labels", ["label_names", "labels"])
def test_an_older_configuration_of_timm(labels: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_resnet", num_classes=3)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "test_resnet",
        "num_classes": 3,
        labels: ["a", "b", "c"],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.5, 0.5],
        "input_size": [3, 64, 64],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_checkpoint(tmp_path)
    architecture = loaded.sidecar.architecture
    assert (loaded.sidecar.classes, architecture.input_size) == (("a", "b", "c"), 64)
    assert architecture.mean == (0.1, 0.2, 0.3)


def test_arguments_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from timm.models._hub import save_config_for_hf

    net = timm.create_model("test_resnet", num_classes=3)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    save_config_for_hf(net, tmp_path / "config.json")
    assert load_checkpoint(tmp_path).sidecar.architecture.num_classes == 3
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"] = config.get("model_args", {}) | {"global_pool": "max"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"global_pool in model_args: load it by file\.py"):
        load_checkpoint(tmp_path)


def test_labels_that_do_not_fit_a_hub_folder(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_resnet", num_classes=3)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "test_resnet", "pretrained_cfg": {}, "label_names": ["a", "b"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="3 class names, found 2; set them with the option"):
        load_checkpoint(tmp_path)
    config["pretrained_cfg"] = {"label_offset": 1, "num_classes": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="exactly the labels, got label_offset 1"):
        load_checkpoint(tmp_path)


def export_hub(tmp_path: Path, **fields: Any) -> tuple[Classifier, Path]:
    classifier = classifier_of(num_classes=3, input_size=32, **fields)
    sidecar = Sidecar(architecture=classifier.architecture, classes=("a", "b", "c"))
    save_checkpoint(tmp_path / "model.pt", classifier, sidecar, dtype=torch.float32)
    export_checkpoint(load_checkpoint(tmp_path / "model.pt"), tmp_path / "hub", "hub")
    return classifier, tmp_path / "hub"


def test_a_hub_folder_names_no_architecture_that_timm_builds_differently(tmp_path: Path) -> None:
    classifier, folder = export_hub(tmp_path, arch="resnet18", stem="imagenet", activation="silu")
    assert "architecture" not in json.loads((folder / "config.json").read_text())
    x = images(2, 32)
    assert torch.equal(logits_of(robust.load_model(folder), x), logits_of(classifier, x))


def test_a_hub_folder_has_the_size_for_position_embeddings(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    classifier, folder = export_hub(tmp_path, arch="timm:test_vit", stem="own", activation="own")
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = images(2, 32)
    normalized = (x - classifier.mean) / classifier.std
    torch.testing.assert_close(logits_of(theirs, normalized), logits_of(classifier, x))
    assert torch.equal(logits_of(robust.load_model(folder), x), logits_of(classifier, x))


def test_a_hub_folder_names_the_head_of_its_network(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    classifier = classifier_of(
        arch="timm:test_convnext", stem="own", activation="own", num_classes=3, input_size=32
    )
    sidecar = Sidecar(architecture=classifier.architecture, classes=("a", "b", "c"))
    save_checkpoint(tmp_path / "model.pt", classifier, sidecar, dtype=torch.float32)
    export_checkpoint(load_checkpoint(tmp_path / "model.pt"), tmp_path / "hub", "hub")
    tuned = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True, num_classes=5)
    assert tuned(images(1, 32)).shape == (1, 5)


def test_unusable_folders_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model.safetensors .* in the folder, found nothing"):
        load_checkpoint(tmp_path)
    save_file({"a": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["ViTForImageClassification"]}')
    with pytest.raises(
        CheckpointError, match="transformers' ViTForImageClassification; load it by file"
    ):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"id2label": {"0": "a", "2": "c"}}')
    with pytest.raises(CheckpointError, match="id2label of 2 classes without 1"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, found list"):
        load_checkpoint(tmp_path)


# Services.


class Server(ThreadingHTTPServer):
    """A linear model behind the protocol, in the ways that services differ."""

    def __init__(self, **ways: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ways = {"kind": "FP32", "binary": True, "output": "probabilities", "most": 3} | ways
        self.weight = np.random.default_rng(0).normal(size=(3, CLASSES)).astype(np.float32)
        self.busy, self.sizes = 1, []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None: ...

    def answer(self, value: object, status: int = 200, headers: Any = (), raw: bytes = b"") -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        for name, content in headers:
            self.send_header(name, content)
        self.send_header("Content-Length", str(len(text + raw)))
        self.end_headers()
        self.wfile.write(text + raw)

    def do_GET(self) -> None:
        ways = self.server.ways
        if self.path == "/v2":
            extensions = ["binary_tensor_data"] if ways["binary"] else []
            return self.answer(ways.get("about", {"extensions": extensions}))
        if self.path != "/v2/models/m":
            return self.answer({"error": "no such model"}, 404)
        shape = [-1, SIDE, SIDE, 3] if ways["kind"] == "UINT8" else [-1, 3, SIDE, SIDE]
        outputs = [
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": ways["output"], "datatype": "FP32", "shape": [-1, CLASSES]},
        ]
        inputs = [{"name": "pixels", "datatype": ways["kind"], "shape": shape}]
        about = {"name": "m", "versions": ways.get("versions", ["1"])}
        return self.answer(about | {"inputs": inputs, "outputs": outputs})

    def do_POST(self) -> None:
        ways = self.server.ways
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.busy:
            self.server.busy -= 1
            return self.answer({}, 429, [("Retry-After", "0")])
        length = int(self.headers.get("Inference-Header-Content-Length", len(body)))
        request = json.loads(body[:length])
        (tensor,) = request["inputs"]
        kind = {"FP32": "<f4", "UINT8": "u1"}[ways["kind"]]
        values = (
            np.frombuffer(body[length:], dtype=kind) if ways["binary"] else np.array(tensor["data"])
        ).reshape(tensor["shape"])
        if len(values) > ways["most"]:
            return self.answer({"error": "too many"}, 400)
        self.server.sizes.append(len(values))
        if ways["kind"] == "UINT8":
            values = values.transpose(0, 3, 1, 2) / 255
        scores = (values.mean(axis=(2, 3)) @ self.server.weight).astype(np.float32)
        if ways["output"] == "probabilities":
            exponents = np.exp(scores)
            scores = exponents / exponents.sum(axis=1, keepdims=True)
        output = {"name": ways["output"], "datatype": "FP32", "shape": list(scores.shape)}
        if not ways["binary"]:
            return self.answer({"outputs": [output | {"data": scores.flatten().tolist()}]})
        raw = scores.tobytes()
        output["parameters"] = {"binary_data_size": len(raw)}
        text = json.dumps({"outputs": [output]})
        headers = [("Inference-Header-Content-Length", str(len(text)))]
        return self.answer({"outputs": [output]}, headers=headers, raw=raw)


@pytest.fixture
def serve() -> Iterator[Any]:
    servers: list[Server] = []

    def start(**ways: Any) -> tuple[Server, str]:
        server = Server(**ways)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server, f"oip+http://127.0.0.1:{server.server_port}/v2/models/m"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "ways",
    [
        {},
        {"binary": False},
        {"output": "logits"},
        {"kind": "UINT8"},
        {"kind": "UINT8", "binary": False, "output": "scores", "most": 1},
    ],
)
def test_remote_service(ways: dict[str, Any], serve: Any) -> None:
    server, url = serve(**ways)
    loaded = load_checkpoint(Path(url))  # a path has lost a slash
    assert loaded.guessed == {"mean": "assumed", "std": "assumed", "classes": "assumed"}
    assert loaded.sidecar.architecture.input_size == SIDE
    x = (images(7, SIDE) * 255).round() / 255
    expected = (x.mean(dim=(2, 3)) @ torch.from_numpy(server.weight)).softmax(dim=1)
    torch.testing.assert_close(predict(loaded.classifier, x), expected, rtol=0, atol=1e-4)
    assert max(server.sizes) <= server.ways["most"]
    assert any("logarithms" in note for note in loaded.notes) == (
        server.ways["output"] == "probabilities"
    )
    assert any("rounded to 8 bits" in note for note in loaded.notes) == ("kind" in ways)
    with pytest.raises(ValueError, match="service models give none"):
        loaded.check_attacks([resolve_attack("fgsm", ThreatModel(norm="linf", eps=0.1))])


def test_unusable_services_are_rejected(serve: Any) -> None:
    server, url = serve()
    with pytest.raises(CheckpointError, match=r"expected a model of a service, found .*404"):
        load_checkpoint(url + "x")
    with pytest.raises(CheckpointError, match="expected a model of a service, found "):
        load_checkpoint("oip+http://127.0.0.1:1/v2/models/m")
    server.ways["output"] = "label"
    with pytest.raises(CheckpointError, match="for the option arch, found a whole service model"):
        load_checkpoint(url, options=ModelOptions(arch="resnet18"))


@pytest.mark.parametrize("about", [{"extensions": None}, {"extensions": 3}])
def test_services_with_unusual_metadata(about: Any, serve: Any) -> None:
    server, url = serve(about=about, binary=False)
    load_checkpoint(url)
    server.ways["versions"] = 3
    with pytest.raises(CheckpointError, match="metadata of the Open Inference Protocol"):
        load_checkpoint(url)

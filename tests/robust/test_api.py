"""The library in one call: any model, any form of images, the command line's names."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import robust
from robust.attacks import ModelError, resolve_attack
from robust.checkpoint import CheckpointError
from robust.classifier import Architecture, Classifier
from robust.datasets import Dataset
from robust.threat_model import ThreatModel

BALL = {"eps": "2/255", "curve": 0, "progress": False}
EPS = 2 / 255
LINF = ThreatModel(eps=EPS)


@pytest.fixture
def data(make_linear: Callable[..., nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear model with its boundary in the middle of 20 float images that no ball is cut at."""
    model = make_linear()
    x = 0.3 + 0.4 * torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    model.bias = -model.margin(x).median().item()
    return model, x, (model.margin(x) > 0).long()


def withstanding(model: nn.Module, x: Tensor) -> int:
    """How many images a linear model gets right at the worst point of the linf ball."""
    return int((model.margin(x).abs() > EPS * model.w.abs().sum()).sum())


def test_the_first_lines_of_the_readme(data: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = data
    expected = withstanding(model, x)
    assert 0 < expected < 20
    result = robust.evaluate(model, x, y, attacks=["fgsm", "pgd-5"], **BALL)
    assert isinstance(result, robust.Evaluation)
    assert [item.correct for item in result.accuracies] == [20, expected, expected]
    assert result.image_dtype == "float32"
    found = robust.attack(model, x, y, "pgd-5", eps=EPS)
    assert isinstance(found, robust.AttackResult)
    assert int((~found.success).sum()) == expected
    assert ((found.x_adv - x).abs().amax() - EPS).abs() < 1e-6


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: (x.numpy(), y.numpy().astype(np.int32)),
        lambda x, y: (x.double(), y),
        lambda x, y: (list(x), y.tolist()),
        lambda x, y: (DataLoader(TensorDataset(x, y), batch_size=7),),
        lambda x, y: (TensorDataset(x, y),),
        lambda x, y: (((image, int(label)) for image, label in zip(x, y, strict=True)),),
    ],
)
def test_images_in_any_form(
    data: tuple[nn.Module, Tensor, Tensor], form: Callable[[Tensor, Tensor], tuple[Any, ...]]
) -> None:
    model, x, y = data
    result = robust.evaluate(model, *form(x, y), attacks="fgsm", **BALL)
    assert (result.clean.correct, result.attacks[0].correct) == (20, withstanding(model, x))


def test_values_just_outside_the_range_are_clipped(data: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = data
    x[0, 0, 0, :2] = torch.tensor([1 + 5e-7, -5e-7])
    assert float(x.min()) < 0 < 1 < float(x.max())
    given, clipped = (
        robust.evaluate(model, images, y, attacks="fgsm", **BALL) for images in (x, x.clamp(0, 1))
    )
    assert given == clipped


def test_any_callable_and_8_bit_images(data: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = data
    images = (x * 255).round().to(torch.uint8)
    result = robust.evaluate(lambda z: model(z), images.numpy(), y, attacks="fgsm", **BALL)
    assert result.image_dtype == "uint8"
    right = (model.margin(images.float() / 255) > 0).long() == y
    assert result.clean.correct == int(right.sum())


def test_dataset_provides_its_labels(data: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = data
    dataset = Dataset(images=x, labels=y, classes=("cat", "dog"), name="pets")
    result = robust.evaluate(model, dataset, attacks="fgsm", **BALL)
    assert (result.clean.correct, result.attacks[0].correct) == (20, withstanding(model, x))
    assert int((~robust.attack(model, dataset, eps=EPS).success).sum()) == withstanding(model, x)
    for call in (robust.evaluate, robust.attack):
        with pytest.raises(ValueError, match="no labels beside a Dataset"):
            call(model, dataset, y)


def test_dataset_classes_are_matched_to_the_model(
    data: tuple[nn.Module, Tensor, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    net, x, y = data
    architecture = Architecture(arch="python", stem="own", activation="own", num_classes=2)
    model = Classifier(architecture, net=net)
    model.classes = ("dog", "cat")
    dataset = Dataset(images=x, labels=1 - y, classes=("cat", "dog"), name="pets")
    assert robust.evaluate(model, dataset, attacks=[], **BALL).clean.correct == 20
    assert not caplog.messages
    dataset = Dataset(images=x, labels=y, classes=("0", "1"), name="pets")
    assert robust.evaluate(model, dataset, attacks=[], **BALL).clean.correct == 20
    assert caplog.messages == [
        "pets: read labels as numbers of the model's classes: 0 is dog, 1 is cat"
    ]
    dataset = Dataset(images=x, labels=y, classes=("cow", "pig"), name="pets")
    with pytest.raises(ValueError, match="the model does not have cow, pig"):
        robust.attack(model, dataset)


def test_attack_leaves_the_prediction_or_reaches_a_target(
    data: tuple[nn.Module, Tensor, Tensor],
) -> None:
    model, x, y = data
    for labels, target in ((None, None), (y, 1 - y)):
        found = robust.attack(model, x, labels, "pgd-5", eps="2/255", target=target)
        assert int((~found.success).sum()) == withstanding(model, x)
        assert torch.equal(model(found.x_adv).argmax(dim=1) != y, found.success)


def test_one_target_for_all_images(data: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = data
    x, y = x[y == 0], y[y == 0]
    expected = robust.attack(model, x, y, "pgd-5", eps=EPS, target=torch.ones_like(y))
    assert bool(expected.success.any())
    for target in (1, np.int64(1), torch.tensor(1)):
        found = robust.attack(model, x, y, "pgd-5", eps=EPS, target=target)
        assert torch.equal(found.x_adv, expected.x_adv)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (1.0, r"target as an integer for all images or 20 of them, got float32 \(\)"),
        ([1, 1], r"target as an integer for all images or 20 of them, got int64 \(2,\)"),
        (True, r"got bool \(\)"),
        ("cat", "expected target as tensors or arrays, got a str"),
        (["cat"] * 20, "expected target as tensors or arrays, got a list"),
        (2, "targets from 0 to 1"),
    ],
)
def test_targets_that_are_refused(
    data: tuple[nn.Module, Tensor, Tensor], target: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        robust.attack(*data, "pgd-5", eps=EPS, target=target)


def test_a_result_prints_and_converts(
    data: tuple[nn.Module, Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = data
    result = robust.evaluate(model, x, y, attacks=["fgsm", "pgd-5"], **BALL)
    lines = str(result).splitlines()
    assert lines[0].split()[:3] == ["attack", "norm", "eps"]
    assert [line.split()[0] for line in lines[1:5]] == ["clean", "fgsm", "pgd-5", "worst"]
    assert result.to_markdown().startswith("| attack | norm | eps | accuracy % |")
    path = tmp_path / "result.json"
    assert path.read_text() if not result.to_json(path) else path.read_text() == result.to_json()
    assert json.loads(result.to_json())["results"][1]["attack"] == "fgsm"
    again = robust.Evaluation.from_dict(json.loads(result.to_json()))
    assert again == result

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_pandas needs pandas: pip install pandas"):
        result.to_pandas()
    monkeypatch.undo()
    frame = result.to_pandas().set_index("attack")
    assert list(frame.index) == ["clean", "fgsm", "pgd-5"]
    assert frame.loc["fgsm", "correct"] == result.attacks[0].correct
    assert frame["accuracy"].dtype == float
    assert frame.loc["clean", "accuracy"] == result.clean.value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.full((2, 3, 4, 4), 1.0001)}, "from 1.00010001659393"),
        (
            {"images": torch.full((2, 3, 4, 4), torch.nan)},
            "got values from nan to nan",
        ),
        ({"images": torch.zeros(2, 4, 4, 3)}, r"which looks like \(N, H, W, C\)"),
        ({"images": torch.zeros(2, 3, 4)}, r"images \(N, C, H, W\), uint8 or float .* \(2, 3, 4\)"),
        ({"images": [torch.zeros(2, 3, 4, 4)], "labels": None}, "batches of Tensor"),
        ({"images": [], "labels": None}, "at least 1 image"),
        ({"labels": None}, "labels with an array of images"),
        ({"labels": [0.0, 1.0]}, r"2 labels as integers, got float32 \(2,\)"),
        ({"labels": [0]}, r"2 labels as integers, got int64 \(1,\)"),
        ({"labels": [0, 2]}, "labels from 0 to 1, got 0 to 2"),
        ({"eps": "8/254/1"}, "a fraction such as 8/255"),
        ({"norm": "l1"}, "norm to be one of linf, l2, got 'l1'"),
        ({"attacks": "pgb"}, "attack to be one of fgsm, pgd"),
        ({"attacks": "fgsm", "alpha": 0.1}, "expected alpha with an attack that takes it"),
        ({"images": []}, "at least 1 image"),
        ({"images": [torch.zeros(3, 4, 4), torch.zeros(3, 5, 4)]}, "images of one size"),
        ({"images": [("a photo", 0)], "labels": None}, "tensors or arrays, got a str"),
        ({"attacks": "pgd-5", "steps": 6}, "one number of steps for pgd-5, got steps 6 too"),
        ({"attacks": [resolve_attack("fgsm", LINF)], "eps": EPS}, "by name with eps, got only"),
        ({"attacks": [resolve_attack("fgsm", LINF)], "norm": "l2"}, "by name with norm, got only"),
        ({"attacks": [resolve_attack("fgsm", LINF)], "seed": 0}, "by name with seed, got only"),
        ({"attacks": None}, "by name or as AttackSettings, got a NoneType"),
        ({"attacks": [["pgd"]]}, "by name or as AttackSettings, got a list"),
        ({"eps": [0.1, 0.2]}, r"a fraction such as 8/255, got '\[0.1, 0.2\]'"),
        ({"images": [Image.new("RGB", (4, 4))] * 2}, "tensors or arrays, got a Image"),
        ({"images": None, "labels": None}, "images as an array, got a NoneType"),
        ({"images": 3}, "images as an array, got a int"),
        ({"model": "model.pt"}, "callable from images to logits, got a str; load it with robust"),
        ({"model": None}, "callable from images to logits, got a NoneType$"),
        ({"model": nn.Linear}, "got a type Linear; make a model of it first"),
        ({"device": "foo"}, "a device such as auto, cpu, cuda, mps, xpu, got 'foo'"),
        ({"device": 3}, "a device such as auto, cpu, cuda, mps, xpu, got 3"),
        ({"batch_size": "3"}, "batch_size as a whole number of at least 1, got '3'"),
        ({"batch_size": 0}, "batch_size as a whole number of at least 1, got 0"),
        ({"curve": -1}, "curve as a whole number of at least 0, got -1"),
        ({"curve": None}, "curve as a whole number of at least 0, got None"),
        ({"num_classes": 0}, "num_classes as a whole number of at least 1, got 0"),
        ({"num_classes": "2"}, "num_classes as a whole number of at least 1, got '2'"),
        ({"steps": True}, "steps as a whole number of at least 1, got True"),
        ({"restarts": 1.5}, "restarts as a whole number of at least 1, got 1.5"),
        ({"seed": 1.5}, "seed as a whole number, got 1.5"),
        ({"seed": 2**70}, "a seed that fits 64 bits"),
        ({"eps": -1}, "a finite size of at least 0, got -1"),
        ({"eps": True}, "a fraction such as 8/255, got 'True'"),
        ({"precision": "fp16"}, "a precision out of auto, fp32, bf16, got 'fp16'"),
    ],
)
def test_rejects_invalid_arguments(
    make_linear: Callable[..., nn.Module], change: Any, message: str
) -> None:
    values = {"model": make_linear(), "images": torch.zeros(2, 3, 4, 4), "labels": [0, 1]} | change
    with pytest.raises(ValueError, match=message):
        robust.evaluate(**{"progress": False, "curve": 0, **values})


@pytest.mark.parametrize("call", [robust.evaluate, robust.attack])
def test_model_on_another_device_is_refused(
    data: tuple[nn.Module, Tensor, Tensor], call: Callable[..., Any]
) -> None:
    model, x, y = data
    message = r"the model on cpu, got one on meta; move it there with model\.to\('cpu'\)"
    with pytest.raises(ValueError, match=message):
        call(model.to("meta"), x, y, device="cpu")


def test_numpy_integers_and_device_names_are_accepted(
    data: tuple[nn.Module, Tensor, Tensor],
) -> None:
    one = np.int64(1)
    counts = {"steps": one, "restarts": one, "seed": one, "batch_size": one}
    ball = {**BALL, "curve": one - 1}
    result = robust.evaluate(*data, attacks=["pgd"], device="cpu", **counts, **ball)
    assert json.loads(result.to_json())["results"][1]["steps"] == 1
    again = robust.attack(*data, device=torch.device("cpu"), eps=EPS, **counts)
    assert again.x_adv.device.type == "cpu"


@pytest.mark.parametrize(
    ("load", "argument", "message"),
    [
        (robust.load_model, {"device": "foo"}, "a device such as auto, cpu, .* got 'foo'"),
        (robust.load_model, {"device": None}, "a device such as auto, cpu, .* got None"),
        (robust.load_model, {"classes": 3}, "class names as text, got 3"),
        (robust.load_model, {"classes": [1, 2]}, r"class names as text, got \[1, 2\]"),
        (robust.load_model, {"key": 3}, "key as text, got 3"),
        (robust.load_model, {"input_size": "32"}, "input_size as a whole number, got '32'"),
        (robust.load_dataset, {"size": "32"}, "size as a whole number of at least 1, got '32'"),
        (robust.load_dataset, {"size": -1}, "size as a whole number of at least 1, got -1"),
        (robust.load_dataset, {"train": "test"}, "train as True or False, got 'test'"),
    ],
)
def test_loading_rejects_invalid_arguments(
    load: Callable[..., Any], argument: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "none.pt", **argument)


def test_current_folder_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected model.safetensors or"):
        robust.load_model(".")


@pytest.mark.parametrize("attack", [None, ["pgd"]])
def test_attack_must_be_a_name(data: tuple[nn.Module, Tensor, Tensor], attack: Any) -> None:
    with pytest.raises(ValueError, match="an attack by name or as AttackSettings, got a"):
        robust.attack(*data, attack)


@pytest.mark.parametrize("call", [robust.evaluate, robust.attack])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nn.Module.bfloat16, r"takes float32 images \(1, 3, 4, 4\), .* are bfloat16; call .*float"),
        (nn.Module.half, r"its weights are float16; call model\.float\(\)"),
        (nn.Module.double, r"its weights are float64; call model\.float\(\)"),
        (
            lambda net: lambda x: net.train()(x),
            r"eval mode, got one in train mode; call model\.eval",
        ),
        (lambda net: net[1:], r"takes float32 images \(1, 3, 4, 4\), got an error .*\)$"),
    ],
)
def test_models_that_cannot_be_called(
    call: Callable[..., Any], change: Callable[[nn.Module], Any], message: str
) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    x, y = torch.rand(8, 3, 4, 4), torch.arange(8) % 2
    mean = net[2].running_mean.clone()
    with pytest.raises(ModelError, match=message):
        call(change(net), x, y)
    assert torch.equal(net[2].running_mean.float(), mean)
    call(net.float().eval(), x, y, eps=EPS)


@pytest.mark.parametrize("call", [robust.evaluate, robust.attack])
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda logits: SimpleNamespace(logits=logits), r"got SimpleNamespace; .*\(x\)\.logits$"),
        (lambda logits: {"logits": logits}, r"got dict; .*\(x\)\['logits'\]$"),
        (lambda logits: (logits, None), r"got tuple; .*\(x\)\[0\]$"),
        (lambda logits: {"scores": logits}, "got dict$"),
        (lambda logits: logits[0], r"with at least 2 classes, got \(2,\) from the model"),
    ],
)
def test_error_shows_how_to_return_logits(
    data: tuple[nn.Module, Tensor, Tensor],
    call: Callable[..., Any],
    wrap: Callable[[Tensor], Any],
    message: str,
) -> None:
    model, x, y = data
    with pytest.raises(ModelError, match=f"expected logits .*{message}"):
        call(lambda images: wrap(model(images)), x, y)


def test_names_are_case_insensitive(data: tuple[nn.Module, Tensor, Tensor]) -> None:
    for norm, default in (("L2", 0.5), ("Linf", 8 / 255)):
        result = robust.evaluate(*data, attacks="FGSM", norm=norm, curve=0, progress=False)
        threat_model = result.attacks[0].attack.threat_model
        assert (threat_model.norm, threat_model.eps) == (norm.lower(), default)


def test_attacks_keep_their_order_without_duplicates(
    data: tuple[nn.Module, Tensor, Tensor],
) -> None:
    settings = resolve_attack("pgd-3", LINF)
    attacks = [settings, "fgsm", settings, "pgd-3"]
    result = robust.evaluate(*data, attacks=attacks, **BALL)
    assert [item.label for item in result.attacks] == ["pgd-3", "fgsm"]
    assert robust.evaluate(*data, attacks=[], **BALL).attacks == ()


def test_attack_without_labels_validates_the_same_arguments(
    data: tuple[nn.Module, Tensor, Tensor],
) -> None:
    model, x, _ = data
    with pytest.raises(ValueError, match="batch_size as a whole number of at least 1, got 0"):
        robust.attack(model, x, batch_size=0)
    with pytest.raises(ValueError, match="at least 1 image"):
        robust.attack(model, x[:0])
    with pytest.raises(ValueError, match="logits as a tensor, got tuple"):
        robust.attack(lambda images: (model(images),), x)


def test_results_and_data_print_in_one_line(data: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = data
    found = robust.attack(model, x, y, "pgd-5", eps=EPS)
    fooled = 20 - withstanding(model, x)
    assert repr(found) == (
        f"AttackResult(success={fooled} of 20, distance<=0.007843, x_adv=(20, 3, 4, 4))"
    )
    dataset = Dataset(images=x, labels=y, classes=("cat", "dog"), name="pets.npz")
    assert repr(dataset) == "Dataset('pets.npz': images float32 (20, 3, 4, 4), 2 classes)"


def test_the_version_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} 1.2")
    assert robust.__version__ == "robust 1.2"

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    assert robust.__version__ == "unknown"


def test_importing_robust_is_fast() -> None:
    code = "import robust, sys; assert 'torch' not in sys.modules; print(dir(robust))"
    public = [*robust._PUBLIC, "__version__"]
    assert [name for name in dir(robust) if not isinstance(getattr(robust, name), ModuleType)] == (
        sorted(public)
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    for name in ("AttackResult", "Evaluation", "ThreatModel", "attack", "evaluate", "load_model"):
        assert f"'{name}'" in shown
        assert getattr(robust, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        robust.nothing  # noqa: B018

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open
from torch import Tensor

from robust import files
from robust.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, sidecar_path
from robust.classifier import Classifier
from robust.export import SUFFIXES, _check_onnx, export_checkpoint
from robust.sidecar import Sidecar

CLASSES = ("cat", "dog", "frog", "Schiff, groß")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "odd": {"stem": "cifar", "activation": "silu"},
    "normalizing": {"activation": "silu", "mean": MEAN, "std": STD, "input_size": 40},
}


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, make_classifier: Callable[..., Classifier]
) -> dict[str, Checkpoint]:
    folder, loaded = tmp_path_factory.mktemp("export"), {}
    for name, fields in VARIANTS.items():
        classifier = make_classifier(**fields)
        sidecar = Sidecar(architecture=classifier.architecture, classes=CLASSES)
        save_checkpoint(folder / f"{name}.pt", classifier, sidecar)
        loaded[name] = load_checkpoint(folder / f"{name}.pt")
    return loaded


@pytest.fixture(scope="module")
def onnx_file(
    checkpoints: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The normalizing model as ONNX, exported once, and how to load it."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return path, export_checkpoint(checkpoints["normalizing"], path, "onnx")


def images(checkpoint: Checkpoint) -> Tensor:
    size = checkpoint.classifier.architecture.input_size
    return torch.rand(5, 3, size, size, generator=torch.Generator().manual_seed(0))


def logits(checkpoint: Checkpoint) -> Tensor:
    with torch.inference_mode():
        return checkpoint.classifier(images(checkpoint))


# Runs what `export_checkpoint` returned, word for word, where this project can't be imported.
STRANGER = """
import json, sys
for name in ("robust", "training", "app", "robust_cli"):
    sys.modules[name] = None
import numpy as np, torch
torch.set_num_threads(1)
for name, usage in json.load(open("usages.json")).items():
    images = np.load(name + "-images.npy")
    scope = {"images": images}
    exec(usage, scope)
    if "logits" not in scope:
        x = torch.from_numpy(images)
        with torch.inference_mode():
            scope["logits"] = scope["model"](scope.get("normalize", lambda x: x)(x)).numpy()
    np.save(name + "-logits.npy", scope["logits"])
"""


def test_exports_load_without_this_project(
    checkpoints: dict[str, Checkpoint], onnx_file: tuple[Path, str], tmp_path: Path
) -> None:
    usages, expected = {}, {}
    for variant, kind in [
        ("plain", "torchvision"),
        ("odd", "torchvision"),
        ("odd", "safetensors"),
        ("normalizing", "safetensors"),
    ]:
        name = f"{variant}-{kind}"
        checkpoint = checkpoints[variant]
        path = tmp_path / f"{name}{SUFFIXES[kind][0]}"
        usages[name] = export_checkpoint(checkpoint, path, kind)  # type: ignore[arg-type]
        np.save(tmp_path / f"{name}-images.npy", images(checkpoint).numpy())
        expected[name] = logits(checkpoint)
    onnx_path, usages["normalizing-onnx"] = onnx_file
    shutil.copy(onnx_path, tmp_path)
    np.save(tmp_path / "normalizing-onnx-images.npy", images(checkpoints["normalizing"]).numpy())
    expected["normalizing-onnx"] = logits(checkpoints["normalizing"])
    (tmp_path / "usages.json").write_text(json.dumps(usages))
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name, value in expected.items():
        found = torch.from_numpy(np.load(tmp_path / f"{name}-logits.npy"))
        tolerance = 1e-4 if "onnx" in name else 1e-5
        torch.testing.assert_close(found, value, rtol=0, atol=tolerance)
        assert found.std() > 0.01  # or closeness would mean nothing


def test_torchvision_file_is_a_strict_float32_state_dict(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    path = tmp_path / "model.pth"
    export_checkpoint(checkpoints["plain"], path, "torchvision")
    state = torch.load(path, weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    model = torchvision.models.resnet18(num_classes=4)
    model.load_state_dict(state, strict=True)
    with torch.inference_mode():
        assert torch.equal(model.eval()(images(checkpoints["plain"])), logits(checkpoints["plain"]))


def test_export_that_would_lose_normalization_is_rejected(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="use onnx or safetensors"):
        export_checkpoint(checkpoints["normalizing"], tmp_path / "model.pth", "torchvision")
    assert list(tmp_path.iterdir()) == []


def test_safetensors_metadata(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    export_checkpoint(checkpoints["normalizing"], path, "safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert json.loads(metadata["mean"]) == list(MEAN)
    assert json.loads(metadata["std"]) == list(STD)
    assert (metadata["architecture"], metadata["input_size"]) == ("resnet18", "40")
    assert metadata["source_sha256"] == checkpoints["normalizing"].sha256


def test_onnx_takes_any_batch_and_names_its_classes(
    checkpoints: dict[str, Checkpoint], onnx_file: tuple[Path, str]
) -> None:
    import onnx
    import onnxruntime

    path, _ = onnx_file
    assert [item.name for item in path.parent.iterdir()] == ["model.onnx"]  # nothing on the side
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,), (exit_,) = session.get_inputs(), session.get_outputs()
    assert (entry.name, entry.type, entry.shape[1:]) == ("images", "tensor(float)", [3, 40, 40])
    assert exit_.name == "logits"
    x, expected = images(checkpoints["normalizing"]), logits(checkpoints["normalizing"])
    for n in (1, 5):
        (found,) = session.run(None, {"images": x[:n].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected[:n], rtol=0, atol=1e-4)
    properties = {item.key: item.value for item in onnx.load(path).metadata_props}
    assert json.loads(properties["classes"]) == list(CLASSES)


@pytest.mark.parametrize("runtime", [True, False])
def test_onnx_is_checked_against_torch(
    checkpoints: dict[str, Checkpoint],
    onnx_file: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    runtime: bool,
) -> None:
    if not runtime:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    data = onnx_file[0].read_bytes()
    classifier = checkpoints["normalizing"].classifier
    _check_onnx(data, classifier)
    other = copy.deepcopy(classifier)
    other.net.fc.bias[0] += 0.01 * logits(checkpoints["normalizing"]).abs().max()
    with pytest.raises(RuntimeError, match=r"off by 0\.01\d* of its largest logit"):
        _check_onnx(data, other)


def test_onnx_of_large_logits_is_exported(
    checkpoints: dict[str, Checkpoint], onnx_file: tuple[Path, str]
) -> None:
    """Their rounding errors are large too."""
    import onnx

    classifier, scale = copy.deepcopy(checkpoints["normalizing"].classifier), 1e5
    model = onnx.load(onnx_file[0])
    heads = [item for item in model.graph.initializer if ".fc." in item.name]
    assert len(heads) == 2
    for item in heads:
        values = scale * onnx.numpy_helper.to_array(item)
        item.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), item.name))
    with torch.no_grad():
        for parameter in classifier.net.fc.parameters():
            parameter *= scale
    _check_onnx(model.SerializeToString(), classifier)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_extra_is_named(
    checkpoints: dict[str, Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"pip install 'robust\[onnx\]'"):
        export_checkpoint(checkpoints["plain"], tmp_path / "model.onnx", "onnx")


def test_the_checkpoint_is_never_overwritten(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints["plain"]
    for path in (checkpoint.path, sidecar_path(checkpoint.path)):
        with pytest.raises(ValueError, match="another file than the checkpoint itself"):
            export_checkpoint(checkpoint, path.parent / "." / path.name, "safetensors")
    with pytest.raises(ValueError, match="whose sidecar does not match this file"):
        export_checkpoint(checkpoint, checkpoint.path.with_suffix(".pth"), "torchvision")
    assert load_checkpoint(checkpoint.path).sha256 == files.sha256_file(checkpoint.path)


def test_hub_folder_with_files_of_others_is_rejected(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    for name in ("README.md", "config.json", "train.py"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(ValueError, match=f"new or empty folder, .* with {name}"):
            export_checkpoint(checkpoints["plain"], folder, "hub")
        assert [path.name for path in folder.iterdir()] == [name]
        assert (folder / name).read_text() == "{}"


def test_hub_folder_of_an_earlier_export_is_replaced(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    (tmp_path / ".gitattributes").write_text("")
    for name in ("plain", "normalizing"):
        export_checkpoint(checkpoints[name], tmp_path, "hub")
    assert load_checkpoint(tmp_path).classifier.architecture.mean == MEAN


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("model.pt", "onnx", r"\.onnx for"),
        ("model.pt", "safetensors", r"\.safetensors for"),
        ("model.onnx", "torchvision", r"\.pt or \.pth or \.bin for"),
        ("model", "onnx", r"\.onnx for"),
    ],
)
def test_suffix_of_another_format_is_rejected(
    checkpoints: dict[str, Checkpoint], tmp_path: Path, name: str, kind: str, expected: str
) -> None:
    with pytest.raises(ValueError, match=f"expected a file that ends in {expected} the {kind}"):
        export_checkpoint(checkpoints["plain"], tmp_path / name, kind)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_unknown_format(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format to be one of torchvision, safetensors, onnx, hub"):
        export_checkpoint(checkpoints["plain"], tmp_path / "model", "keras")  # type: ignore[arg-type]


def test_failed_write_leaves_the_old_file(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    import resource

    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            export_checkpoint(checkpoints["plain"], path, "safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1

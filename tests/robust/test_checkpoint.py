import errno
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from robust import files
from robust.checkpoint import (
    CheckpointError,
    load_checkpoint,
    record_evaluation,
    save_checkpoint,
    sidecar_path,
)
from robust.classifier import STEMS, Architecture, Classifier
from robust.datasets import DatasetError
from robust.networks import UnknownLayout, read_layout
from robust.sidecar import DataRecord, Sidecar
from robust.threat_model import ThreatModel

CLASSES = ("cat", "dog", "frog", "ship")
Make = Callable[..., Classifier]


@pytest.fixture
def pair(checkpoint_path: Path, tmp_path: Path) -> Path:
    """A checkpoint with sidecar that may be written to."""
    for path in (checkpoint_path, sidecar_path(checkpoint_path)):
        shutil.copy(path, tmp_path)
    return tmp_path / checkpoint_path.name


@pytest.fixture
def bare(pair: Path) -> Path:
    """The same weights without a sidecar."""
    sidecar_path(pair).unlink()
    return pair


def full_sidecar(architecture: Architecture) -> Sidecar:
    return Sidecar(
        architecture=architecture,
        classes=CLASSES,
        threat_model=ThreatModel(norm="l2", eps=0.5),
        recipe={"name": "quick", "epochs": 3},
        data=DataRecord(name="digits", count=1437, sha256="ab" * 32),
        seed=7,
        versions={"torch": "2"},
        device="cpu",
        duration_seconds=1.5,
        evaluation=[{"attack": "clean", "accuracy": 0.5}],
    )


def names(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir()}


def refused(path: Path, *words: str) -> None:
    """Loading says which file, and what; nothing but CheckpointError comes out."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    for word in (str(path.with_suffix("")), "expected ", ", found ", *words):
        assert word in message
    assert "\n" not in message


# What is saved is what is loaded.


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_round_trip(tmp_path: Path, make_classifier: Make, dtype: torch.dtype) -> None:
    classifier = make_classifier(mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3), activation="silu")
    path = tmp_path / "model.pt"
    saved = save_checkpoint(path, classifier, full_sidecar(classifier.architecture), dtype=dtype)
    loaded = load_checkpoint(path)
    assert loaded.sidecar == saved
    assert loaded.sha256 == saved.weights_sha256 == files.sha256_file(path)
    assert names(tmp_path) == {"model.pt", "model.json"}
    for key, value in classifier.net.state_dict().items():
        expected = value.to(dtype).float() if value.is_floating_point() else value
        assert torch.equal(loaded.classifier.net.state_dict()[key], expected)
    assert not any(module.training for module in loaded.classifier.modules())
    assert not any(parameter.requires_grad for parameter in loaded.classifier.parameters())
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tolerance = 0.0 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(loaded.classifier(x), classifier(x), rtol=0, atol=tolerance)


def test_torchvision_loads_the_weights_alone(checkpoint_path: Path) -> None:
    model = torchvision.models.resnet18(num_classes=4)
    model.load_state_dict(torch.load(checkpoint_path, weights_only=True))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = load_checkpoint(checkpoint_path).classifier(x)
        assert torch.equal(model.eval()(x), expected)


def test_same_model_same_bytes(tmp_path: Path, make_classifier: Make) -> None:
    sidecar = Sidecar(architecture=make_classifier().architecture, classes=CLASSES)
    digests = {
        save_checkpoint(tmp_path / name, make_classifier(), sidecar).weights_sha256
        for name in ("a.pt", "b.pt")
    }
    assert len(digests) == 1


# Bare state dicts.


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("num_classes", [2, 37])
def test_architecture_is_read_from_the_keys(arch: str, stem: str, num_classes: int) -> None:
    with torch.device("meta"):
        state = Classifier(
            Architecture(arch=arch, stem=stem, num_classes=num_classes)
        ).net.state_dict()
    reading = read_layout({key: value.shape for key, value in state.items()})
    assert reading is not None
    assert (reading.arch, reading.stem, reading.num_classes) == (arch, stem, num_classes)
    assert not reading.renamed


def test_bare_state_dict_loads(bare: Path, checkpoint_path: Path) -> None:
    loaded = load_checkpoint(bare)
    assert loaded.sidecar.classes == ("0", "1", "2", "3")
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(loaded.classifier(x), load_checkpoint(checkpoint_path).classifier(x))


def test_old_state_dict_without_batch_counters_loads(bare: Path) -> None:
    state = torch.load(bare, weights_only=True)
    kept = {key: value for key, value in state.items() if "num_batches" not in key}
    assert len(kept) < len(state)
    torch.save(kept, bare)
    load_checkpoint(bare)


# Files that are no checkpoint.


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.pt", "no such file")


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "model.pt").mkdir()
    refused(tmp_path / "model.pt", "model.safetensors", "in the folder")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"not a checkpoint, but a long enough text", "found a"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "found a"),
        (b"PK\x03\x04" + bytes(100), "found a"),
        (pickle.dumps({"a": 1}), "found"),
        (pickle.dumps([1, 2], protocol=2), "found"),
    ],
)
def test_foreign_files(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    refused(path, found)


def test_truncated_at_any_offset(bare: Path) -> None:
    content = bare.read_bytes()
    offsets = [1, 2, 3, 4, 10, 29, 30, 64, 100, 1000, len(content) - 1, len(content) - 22]
    offsets += [len(content) * part // 10 for part in range(1, 10)]
    for offset in offsets:
        bare.write_bytes(content[:offset])
        refused(bare)


@pytest.mark.parametrize("zipped", [True, False])
def test_bytes_changed_anywhere(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save({key: torch.ones(3) for key in "abc"}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for offset in range(0, len(content), 11):
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 0x55]) + content[offset + 1 :])
        refused(path)  # whole or broken, it is never a ResNet


class Command:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("how", ["torch", "old torch", "pickle", "beside the weights"])
def test_pickled_code_never_runs(tmp_path: Path, bare: Path, how: str) -> None:
    marker = tmp_path / "ran"
    command = Command(marker)
    if how == "pickle":
        bare.write_bytes(pickle.dumps(command, protocol=2))
    elif how == "beside the weights":
        torch.save({**torch.load(bare, weights_only=True), "more": command}, bare)
    else:
        torch.save({"a": command}, bare, _use_new_zipfile_serialization=how == "torch")
    refused(bare, "system")
    assert not marker.exists()


def test_pickled_module_is_rejected(bare: Path, make_classifier: Make) -> None:
    torch.save(make_classifier().net, bare)
    refused(bare, "a pickle that refers to")


@pytest.mark.parametrize("value", [[1, 2], {"model": {"a": torch.ones(1)}}, {1: torch.ones(1)}, 3])
def test_other_values_are_rejected(bare: Path, value: object) -> None:
    torch.save(value, bare)
    refused(bare, "a state dict, or a file with only one")


# State dicts of something else.


def changed(path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    return path


def test_other_networks(bare: Path) -> None:
    torch.save({"features.0.weight": torch.ones(3)}, bare)
    refused(bare, "a state dict", "no weights in features.0.weight")
    torch.save({"features.0.weight": torch.ones(3, 3)}, bare)
    refused(bare, "the keys of resnet18, ", "1 keys such as features.0.weight")
    torch.save({}, bare)
    refused(bare, "no weights in nothing")
    with torch.device("meta"):
        state = torchvision.models.resnet101().state_dict()
    with pytest.raises(UnknownLayout, match=r"bottleneck blocks \[3, 4, 23, 3\]"):
        read_layout({key: value.shape for key, value in state.items()})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("layer4.1.bn2.bias"), ["1 missing (layer4.1.bn2.bias)"]),
        (lambda s: s.update(extra=torch.ones(1)), ["1 left over (extra)"]),
        (
            lambda s: s.update({"bn1.bias": torch.ones(5)}),
            ["1 of another shape (bn1.bias (5,) instead of (64,))"],
        ),
        (lambda s: s["bn1.bias"].fill_(torch.nan), ["finite weights", "in bn1.bias"]),
        (lambda s: s["bn1.bias"].fill_(torch.inf), ["finite weights", "in bn1.bias"]),
        (lambda s: s.update({"bn1.bias": torch.ones(64).int()}), ["of floats", "torch.int32"]),
        (lambda s: s.update({"bn1.bias": torch.ones(64).to_sparse()}), ["of floats"]),
        (
            lambda s: s.update({"bn1.bias": torch.ones(64, dtype=torch.complex64)}),
            ["of floats", "complex64"],
        ),
        (
            lambda s: s.update({"bn1.bias": torch.ones(64).to(torch.float8_e4m3fn)}),
            ["of floats", "float8"],
        ),
        (
            lambda s: s.update({"fc.weight": torch.ones(1, 512).expand(10**9, 512)}),
            ["expected 2 to 100000 classes"],
        ),
        (lambda s: s.update({"conv1.weight": torch.ones(64, 3, 5, 5)}), ["5x5 stem"]),
    ],
)
def test_wrong_entries(
    bare: Path, change: Callable[[dict[str, Tensor]], object], words: list[str]
) -> None:
    refused(changed(bare, change), *words)


def test_loading_skips_random_initialization_and_accepts_large_weights(bare: Path) -> None:
    value = torch.full((64,), 3e38)  # finite, though their sum is not
    before = torch.get_rng_state()
    loaded = load_checkpoint(changed(bare, lambda state: state.update({"bn1.bias": value})))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loaded.classifier.net.state_dict()["bn1.bias"], value)


# Sidecars.


def edited(path: Path, **fields: object) -> Path:
    sidecar = sidecar_path(path)
    values = json.loads(sidecar.read_text()) | fields
    sidecar.write_text(json.dumps(values))
    return path


def architecture(**fields: object) -> dict[str, object]:
    return {"arch": "resnet18", "num_classes": 4, **fields}


def test_sidecar_of_other_weights_is_rejected(pair: Path) -> None:
    changed(pair, lambda state: state["bn1.bias"].add_(1))
    refused(pair, "as in its sidecar", files.sha256_file(pair))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architecture": architecture(arch="resnet34")}, ["keys of resnet34", "missing (layer"]),
        (
            {"architecture": architecture(stem="cifar")},
            ["conv1.weight (64, 3, 7, 7) instead of (64, 3, 3, 3)"],
        ),
        (
            {"architecture": architecture(num_classes=3), "classes": ["a", "b", "c"]},
            ["fc.weight (4, 512) instead of (3, 512)"],
        ),
        ({"classes": ["cat", "dog"]}, ["expected 4 class names, got 2"]),
        ({"classes": [1, 2, 3, 4]}, ["class names to be strings"]),
        ({"classes": "abcd"}, ["another type for classes, got str"]),
        ({"architecture": architecture(num_classes=4.0)}, ["num_classes a whole number"]),
        ({"architecture": architecture(num_classes="4")}, ["num_classes a whole number"]),
        ({"architecture": architecture(arch="vit")}, ["expected arch to be one of"]),
        ({"architecture": architecture(depth=3)}, ["fields of Architecture"]),
        ({"architecture": architecture(mean=["x", "y", "z"])}, ["fields of Architecture"]),
        ({"architecture": None}, ["another type for architecture"]),
        ({"threat_model": {"norm": "linf", "eps": 8}}, ["linf eps in [0, 1]"]),
        ({"data": {"name": "x"}}, ["fields of DataRecord"]),
        ({"format_version": 2}, ["expected format_version 1, got 2"]),
        ({"format_version": None}, ["expected format_version 1, got None"]),
        ({"surprise": 1}, ["got also ['surprise']"]),
        ({"weights_sha256": 5}, ["another type for weights_sha256"]),
    ],
)
def test_wrong_sidecars(pair: Path, fields: dict[str, object], words: list[str]) -> None:
    refused(edited(pair, **fields), *words)


@pytest.mark.parametrize("field", ["architecture", "classes", "weights_sha256"])
def test_sidecar_without_a_field(pair: Path, field: str) -> None:
    values = json.loads(sidecar_path(pair).read_text())
    del values[field]
    sidecar_path(pair).write_text(json.dumps(values))
    refused(pair, field)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"format_version": 1', b"\xff\xfe", b"[" * 100_000],
)
def test_broken_sidecars(pair: Path, content: bytes) -> None:
    sidecar_path(pair).write_bytes(content)
    refused(pair, "a valid sidecar")


def test_sidecar_cut_off_anywhere(pair: Path) -> None:
    content = sidecar_path(pair).read_bytes()
    for length in range(0, len(content) - 2, 53):
        sidecar_path(pair).write_bytes(content[:length])
        refused(pair, "a valid sidecar")


@pytest.mark.parametrize(
    "text",
    [
        '{"checkpoint": "model.pt", "results": []}',  # as robust evaluate --json writes it
        '["cat", "dog"]',
        "null",
    ],
)
def test_unrelated_json_is_not_a_sidecar(
    text: str, bare: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sidecar_path(bare).write_text(text)
    assert load_checkpoint(bare).sidecar.classes == ("0", "1", "2", "3")
    assert f"{sidecar_path(bare)} does not describe a checkpoint and is ignored" in caplog.messages


def test_sidecar_is_not_accepted_as_a_checkpoint(pair: Path, make_classifier: Make) -> None:
    refused(sidecar_path(pair), "the name of a weights file")
    classifier = make_classifier()
    sidecar = Sidecar(architecture=classifier.architecture, classes=CLASSES)
    with pytest.raises(CheckpointError, match="that of its sidecar"):
        save_checkpoint(sidecar_path(pair), classifier, sidecar)
    load_checkpoint(pair)


# Saving that goes wrong.


class Crash(BaseException):
    """The process ends here, as far as the code can see."""


def crash_at(patch: pytest.MonkeyPatch, call: int) -> None:
    """Let the rename of that number, counted from 0, and all after it not happen."""
    real, calls = files.commit, iter(range(100))

    def commit(temporary: Path, path: Path) -> None:
        if next(calls) >= call:
            raise Crash
        real(temporary, path)

    patch.setattr(files, "commit", commit)


def save_other(pair: Path, make_classifier: Make, seed: int = 1) -> Sidecar:
    classifier = make_classifier()
    torch.nn.init.constant_(classifier.net.fc.bias, seed)
    sidecar = Sidecar(architecture=classifier.architecture, classes=CLASSES, seed=seed)
    return save_checkpoint(pair, classifier, sidecar)


@pytest.mark.parametrize("call", [0, 1, 2])
def test_crash_at_each_rename(
    pair: Path, make_classifier: Make, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    old = load_checkpoint(pair).sha256
    with monkeypatch.context() as patch:
        crash_at(patch, call)
        with pytest.raises(Crash):
            save_other(pair, make_classifier)
    loaded = load_checkpoint(pair)
    # Renames: the pending sidecar, the weights, the sidecar.
    assert (loaded.sha256 == old) == (call < 2)
    assert loaded.sidecar.seed == (None if call < 2 else 1)
    assert names(pair.parent) - {"model.json.new"} == {"model.pt", "model.json"}
    third = save_other(pair, make_classifier, seed=3)
    assert load_checkpoint(pair).sidecar == third
    assert names(pair.parent) == {"model.pt", "model.json"}


def test_crash_right_after_the_weights_are_in_place(
    pair: Path, make_classifier: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.commit

    def commit(temporary: Path, path: Path) -> None:
        real(temporary, path)
        if path == pair:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "commit", commit)
        with pytest.raises(KeyboardInterrupt):
            save_other(pair, make_classifier)
    assert load_checkpoint(pair).sidecar.seed == 1


def test_sidecar_renamed_while_it_is_looked_for_is_found(
    pair: Path, make_classifier: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a service loads a checkpoint between the renames of its two files."""
    old, own = sidecar_path(pair).read_bytes(), sidecar_path(pair)
    new = save_other(pair, make_classifier)
    pending = own.rename(own.with_suffix(".json.new"))
    own.write_bytes(old)
    read = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        content = read(path)
        if path == own and pending.exists():
            pending.replace(own)
        return content

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert load_checkpoint(pair).sidecar == new


def test_failed_save_after_a_crash_keeps_the_pending_sidecar(
    pair: Path, make_classifier: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        crash_at(patch, 2)
        with pytest.raises(Crash):
            save_other(pair, make_classifier)
        patch.undo()
        crash_at(patch, 1)  # the next save gets no further than its sidecar's first rename
        with pytest.raises(Crash):
            save_other(pair, make_classifier, seed=2)
    assert load_checkpoint(pair).sidecar.seed == 1


@pytest.mark.parametrize("failing", range(3))
def test_full_disk_leaves_the_old_pair(
    pair: Path, make_classifier: Make, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The disk fills up while the weights, the sidecar or the folder's entry are flushed."""
    old = load_checkpoint(pair).sha256
    real, calls = os.fsync, iter(range(100))

    def fsync(handle: int) -> None:
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(CheckpointError, match="no space left on device"):
            save_other(pair, make_classifier)
    assert load_checkpoint(pair).sha256 == old
    assert names(pair.parent) == {"model.pt", "model.json"}


def test_write_error_leaves_the_old_pair(pair: Path, make_classifier: Make) -> None:
    import resource

    old = load_checkpoint(pair).sha256
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="a folder that can be written to"):
            save_other(pair, make_classifier)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(pair).sha256 == old
    assert names(pair.parent) == {"model.pt", "model.json"}


def test_folder_that_is_a_file(tmp_path: Path, make_classifier: Make) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="a folder that can be written to"):
        save_other(tmp_path / "taken" / "model.pt", make_classifier)


@pytest.mark.parametrize(("weight", "dtype"), [(float("nan"), torch.float32), (1e6, torch.float16)])
def test_non_finite_weights_are_not_saved(
    tmp_path: Path, make_classifier: Make, weight: float, dtype: torch.dtype
) -> None:
    classifier = make_classifier()
    torch.nn.init.constant_(classifier.net.fc.bias, weight)
    sidecar = Sidecar(architecture=classifier.architecture, classes=CLASSES)
    with pytest.raises(CheckpointError, match="expected finite weights"):
        save_checkpoint(tmp_path / "model.pt", classifier, sidecar, dtype=dtype)
    assert names(tmp_path) == set()


def test_sidecar_of_another_architecture_is_not_saved(
    tmp_path: Path, make_classifier: Make
) -> None:
    sidecar = Sidecar(architecture=Architecture(num_classes=4), classes=CLASSES)
    with pytest.raises(CheckpointError, match="expected a sidecar of Architecture"):
        save_checkpoint(tmp_path / "model.pt", make_classifier(), sidecar)
    assert names(tmp_path) == set()


def test_result_is_recorded_once(pair: Path) -> None:
    row = {"data": "test.npz", "attack": "fgsm", "norm": "linf", "eps": 0.1, "accuracy": 0.5}
    row["data_sha256"] = "all"
    other = {**row, "attack": "clean", "accuracy": 0.9}
    few = {**row, "data_sha256": "few", "accuracy": 0.7}
    before = load_checkpoint(pair).sidecar.evaluation
    record_evaluation(load_checkpoint(pair), [row, other, few])
    record_evaluation(load_checkpoint(pair), [{**row, "accuracy": 0.4}])
    rows = load_checkpoint(pair).sidecar.evaluation[len(before) :]
    expected = [("fgsm", "all", 0.4), ("clean", "all", 0.9), ("fgsm", "few", 0.7)]
    assert [(r["attack"], r["data_sha256"], r["accuracy"]) for r in rows] == expected


def test_results_recorded_concurrently_are_all_kept(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, write = load_checkpoint(pair), files.write_json
    first_writes, recorded = threading.Event(), threading.Event()

    def write_late(path: Path, value: object) -> None:
        if not first_writes.is_set():  # the second has time to read what is about to change
            first_writes.set()
            recorded.wait(0.2)
        write(path, value)

    def record(attack: str) -> None:
        record_evaluation(measured, [{"data": "test.npz", "attack": attack}])

    monkeypatch.setattr(files, "write_json", write_late)
    first = threading.Thread(target=record, args=["fgsm"])
    first.start()
    assert first_writes.wait(280)
    second = threading.Thread(target=lambda: (record("pgd"), recorded.set()))
    second.start()
    first.join()
    second.join()
    rows = load_checkpoint(pair).sidecar.evaluation[len(measured.sidecar.evaluation) :]
    assert [row["attack"] for row in rows] == ["fgsm", "pgd"]


def test_results_of_other_weights_are_not_recorded(pair: Path) -> None:
    measured = load_checkpoint(pair)
    save_checkpoint(pair, Classifier(measured.classifier.architecture), measured.sidecar)
    with pytest.raises(CheckpointError, match="expected the measured weights"):
        record_evaluation(measured, [{"data": "test.npz", "attack": "clean"}])
    assert load_checkpoint(pair).sidecar.evaluation == measured.sidecar.evaluation


def test_results_are_not_recorded_for_a_guessed_model(bare: Path) -> None:
    measured = load_checkpoint(bare)
    with pytest.raises(CheckpointError, match=r"json: expected a sidecar to add results to"):
        record_evaluation(measured, [{"data": "test.npz", "attack": "clean"}])
    assert not sidecar_path(bare).exists()


def test_guesses_are_reported(bare: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_checkpoint(bare)
    half, message = caplog.messages
    assert half == f"{bare}: converted float16 weights to float32"
    assert message.startswith(f"{bare}: read off the keys: resnet18, stem imagenet")
    assert "assumed: activation relu" in message


def test_symlinked_checkpoint_finds_its_sidecar(
    pair: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    link = tmp_path / "links" / "current.pt"
    link.parent.mkdir()
    link.symlink_to(pair)
    assert load_checkpoint(link).sidecar == load_checkpoint(pair).sidecar
    assert not caplog.messages
    record_evaluation(load_checkpoint(link), [{"data": "linked.npz", "attack": "clean"}])
    assert load_checkpoint(pair).sidecar.evaluation[-1]["data"] == "linked.npz"
    assert names(link.parent) == {"current.pt"}
    save_checkpoint(link, load_checkpoint(pair).classifier, load_checkpoint(pair).sidecar)
    assert names(link.parent) == {"current.pt", "current.json"}
    assert load_checkpoint(link).sidecar.classes == load_checkpoint(pair).sidecar.classes


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("a.pt", "weights", "none"),
        DatasetError("b.npz", expected="images", found="text"),
    ],
)
def test_errors_can_be_pickled(error: ValueError) -> None:
    sent = pickle.loads(pickle.dumps(error))
    assert (type(sent), str(sent), vars(sent)) == (type(error), str(error), vars(error))

"""Weights files as people have them: every form gives the same logits, or a reason."""

import json
import os
import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from robust.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from robust.classifier import Classifier
from robust.export import export_checkpoint
from robust.loading import ModelOptions
from robust.loading.options import NAMED_MEANS, NAMED_STDS, parse_classes, parse_rgb
from robust.sidecar import Sidecar
from tests.robust.test_inference import classifier_of, images

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
State = dict[str, Tensor]


class Normalize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A small network whose keys a family knows."""
    return classifier_of(arch="wide_resnet10_1", stem="cifar", num_classes=4, input_size=32).net


@pytest.fixture(scope="module")
def state(network: nn.Module) -> State:
    return network.state_dict()


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def optimizer(network: nn.Module) -> dict[str, Any]:
    weights = [nn.Parameter(value.clone()) for value in network.parameters()]
    used = torch.optim.AdamW(weights)
    sum(weight.sum() for weight in weights).backward()  # type: ignore[union-attr]
    used.step()
    return used.state_dict()


def madry(state: State) -> State:
    normalizer = {"new_mean": torch.tensor(MEAN).view(3, 1, 1), "new_std": torch.tensor(STD)}
    return {
        **prefixed(normalizer, "module.normalizer."),
        **prefixed(state, "module.model."),
        **prefixed(normalizer, "module.attacker.normalize."),
        **prefixed(state, "module.attacker.model."),
    }


# What is saved, and words of the line that tells what was taken off.
FORMS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "state_dict": (lambda net: {"state_dict": net.state_dict(), "epoch": 3}, "'state_dict'"),
    "model": (lambda net: {"model": net.state_dict(), "optimizer": optimizer(net)}, "'model'"),
    "model_state_dict": (lambda net: {"model_state_dict": net.state_dict()}, "'model_state_dict'"),
    "net": (lambda net: {"net": net.state_dict(), "acc": 93.1}, "'net'"),
    "ema": (lambda net: {"ema": net.state_dict()}, "'ema'"),
    "params": (lambda net: {"params": net.state_dict()}, "'params'"),
    "any one name": (lambda net: {"weights": net.state_dict()}, "'weights'"),
    "nested": (lambda net: {"model": {"state_dict": net.state_dict()}}, "'state_dict' in 'model'"),
    "two, the better known": (
        lambda net: {"ema": prefixed(net.state_dict(), "bad."), "state_dict": net.state_dict()},
        "'state_dict' (not ema; see the option key)",
    ),
    "Lightning": (
        lambda net: {
            "epoch": 1,
            "pytorch-lightning_version": "2.5",
            "state_dict": {**prefixed(net.state_dict(), "net."), "criterion.weight": torch.ones(4)},
            "optimizer_states": [optimizer(net)],
            "hparams_name": "kwargs",
        },
        "criterion.weight, which no output depends on; stripped the prefix 'net.'",
    ),
    **{
        prefix: (lambda net, prefix=prefix: prefixed(net.state_dict(), prefix), f"{prefix!r}")  # type: ignore[misc]
        for prefix in (
            *("module.", "model.", "net.", "backbone.", "_orig_mod."),
            *("module.model.", "_orig_mod.module.", "model._orig_mod.", "module.1."),
        )
    },
    "AveragedModel": (lambda net: AveragedModel(net).state_dict(), "n_averaged"),
    "DataParallel": (lambda net: nn.DataParallel(net).state_dict(), "'module.'"),
    "after a layer": (lambda net: nn.Sequential(nn.Identity(), net).state_dict(), "'1.'"),
    "before a layer": (lambda net: nn.Sequential(net, nn.Identity()).state_dict(), "'0.'"),
    "OrderedDict": (lambda net: OrderedDict(net.state_dict()), ""),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_logits(
    form: str, network: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, words = FORMS[form]
    path = tmp_path / "weights.pt"
    torch.save(make(network), path)
    loaded = load_checkpoint(path)
    x = images(2, 32)
    with torch.inference_mode():
        assert torch.equal(loaded.classifier(x), network(x))
    assert words in "; ".join(loaded.notes)
    assert loaded.notes == () or f"{path}: {'; '.join(loaded.notes)}" in caplog.messages


@pytest.mark.parametrize("form", ["sequential", "madry", "mu and sigma"])
def test_normalization_layer_is_used(
    form: str, network: nn.Module, state: State, tmp_path: Path
) -> None:
    made: State = {
        "sequential": nn.Sequential(Normalize(), network).state_dict(),
        "madry": madry(state),
        "mu and sigma": {**state, "mu": torch.tensor(MEAN), "sigma": torch.tensor(STD)},
    }[form]
    path = tmp_path / "weights.pt"
    torch.save({"model": made} if form == "madry" else made, path)
    loaded = load_checkpoint(path)
    assert loaded.sidecar.architecture.mean == MEAN
    assert loaded.sidecar.architecture.std == STD
    assert not {"mean", "std"} & loaded.guessed.keys()
    x = images(2, 32)
    by_hand = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.classifier(x), network(by_hand), rtol=0, atol=1e-5)
    assert "mean 0.4914, 0.4822, 0.4465" in "; ".join(loaded.notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"module.attacker.model.fc.bias": torch.ones(4)}, "another module.attacker.model.fc.bias"),
        (
            {"module.normalizer.new_mean": torch.zeros(3)},
            "expected one normalization, found differ",
        ),
    ],
)
def test_two_models_in_one_file_are_refused(
    change: State, words: str, state: State, tmp_path: Path
) -> None:
    torch.save({"model": {**madry(state), **change}}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(tmp_path / "weights.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_reported(
    dtype: torch.dtype, network: nn.Module, state: State, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pt"
    half = {
        key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()
    }
    torch.save(half, path)
    loaded = load_checkpoint(path)
    for key, value in loaded.classifier.net.state_dict().items():
        assert torch.equal(value, half[key].to(value.dtype))
    assert f"{str(dtype)[6:]} weights" in "; ".join(loaded.notes)


def test_safetensors(network: nn.Module, state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(prefixed(state, "model."), path)
    x = images(2, 32)
    with torch.inference_mode():
        assert torch.equal(load_checkpoint(path).classifier(x), network(x))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="expected a safetensors file, found a broken one"):
        load_checkpoint(path)


@pytest.mark.parametrize("classes", ["[" * 200_000, "9" * 6000, "3", '{"a": 1}x', "\u0661"])
def test_invalid_metadata_is_rejected(state: State, tmp_path: Path, classes: str) -> None:
    path = tmp_path / "weights.safetensors"
    about = {"architecture": "resnet18", "stem": "imagenet", "activation": "relu"}
    about |= {"mean": "[0, 0, 0]", "std": "[1, 1, 1]", "input_size": "32", "classes": classes}
    save_file(dict(state), path, about)
    with pytest.raises(CheckpointError, match="expected the metadata of our export"):
        load_checkpoint(path)


def test_metadata_of_another_program_is_ignored(state: State, tmp_path: Path) -> None:
    save_file(dict(state), tmp_path / "weights.safetensors", {"architecture": "wrn"})
    assert load_checkpoint(tmp_path / "weights.safetensors").guessed["arch"] == "read off the keys"


def test_exported_safetensors_need_no_guesses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classifier = classifier_of(
        arch="preact_resnet18",
        variant="raw-shortcut",
        stem="cifar",
        activation="silu",
        num_classes=4,
        input_size=24,
        mean=MEAN,
        std=STD,
    )
    sidecar = Sidecar(architecture=classifier.architecture, classes=("a", "b", "c", "d"))
    save_checkpoint(tmp_path / "model.pt", classifier, sidecar, dtype=torch.float32)
    export_checkpoint(
        load_checkpoint(tmp_path / "model.pt"), tmp_path / "m.safetensors", "safetensors"
    )
    loaded = load_checkpoint(tmp_path / "m.safetensors")
    assert loaded.sidecar.architecture == classifier.architecture
    assert loaded.sidecar.classes == sidecar.classes
    assert not loaded.guessed
    assert not caplog.messages
    x = images(2, 24)
    with torch.inference_mode():
        assert torch.equal(loaded.classifier(x), classifier(x))
    load_checkpoint(tmp_path / "m.safetensors", options=ModelOptions(mean=MEAN, activation="silu"))
    with pytest.raises(CheckpointError, match="others; the metadata has std"):
        load_checkpoint(tmp_path / "m.safetensors", options=ModelOptions(std=(1.0, 1.0, 1.0)))
    # Under the checkpoint's own name, whose sidecar has another hash.
    export_checkpoint(
        load_checkpoint(tmp_path / "model.pt"), tmp_path / "model.safetensors", "safetensors"
    )
    again = load_checkpoint(tmp_path / "model.safetensors")
    assert again.sidecar.architecture == classifier.architecture


def test_key_option_selects_the_entry(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    other = {key: value * 0 for key, value in state.items()}
    torch.save({"last": state, "best": {"weights": other}}, path)
    with pytest.raises(
        CheckpointError, match="weights in each of last, best: choose one with the option key"
    ):
        load_checkpoint(path)
    loaded = load_checkpoint(path, options=ModelOptions(key="best.weights"))
    assert not loaded.classifier.net.state_dict()["fc.weight"].any()
    with pytest.raises(CheckpointError, match=r"an entry 'middle', found last, best"):
        load_checkpoint(path, options=ModelOptions(key="middle"))


def test_guesses_are_reported_and_recorded(
    state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    loaded = load_checkpoint(path)
    assert loaded.guessed == {
        "arch": "read off the keys",
        "stem": "read off the keys",
        "activation": "assumed",
        "input_size": "assumed",
        "mean": "assumed",
        "std": "assumed",
        "classes": "assumed",
    }
    (line,) = caplog.messages
    assert line == (
        f"{path}: read off the keys: wide_resnet10_1, stem cifar; assumed: activation relu, "
        "32 pixels, mean 0, 0, 0, std 1, 1, 1, classes 0 to 3 (see the options arch, stem, "
        "activation, input size, mean, std, classes)"
    )
    assert json.loads(json.dumps(loaded.origin()))["guessed"] == loaded.guessed


def test_given_options_are_not_guessed(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    options = ModelOptions(
        arch="wide_resnet10_1:deepmind",
        stem="cifar",
        activation="silu",
        input_size=40,
        mean=MEAN,
        std=STD,
        classes=("a", "b", "c", "d"),
    )
    loaded = load_checkpoint(path, options=options)
    assert not loaded.guessed
    architecture = loaded.sidecar.architecture
    assert (architecture.variant, architecture.activation) == ("deepmind", "silu")
    assert (architecture.input_size, architecture.mean) == (40, MEAN)
    assert loaded.sidecar.classes == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "resnet18"}, "keys of resnet18, found those of wide_resnet10_1"),
        ({"arch": "resnet99"}, "expected arch to be one of resnet18"),
        ({"stem": "imagenet"}, "the imagenet stem, found a 3x3 convolution"),
        ({"classes": ("a", "b")}, "expected 4 class names, found 2"),
        ({"activation": "gelu"}, "expected activation to be one of relu, silu"),
        ({"stem": "7x7"}, "a stem of imagenet, cifar, 3x3-stride2, .*, found 7x7"),
        (
            {"mean": (123.7, 116.3, 103.5)},
            r"pt: expected a mean and std of pixels in \[0, 1\], found 123.7, 116.3, 103.5: divide",
        ),
        ({"std": (0.0, 0.0, 0.0)}, r"pt: expected a std of 3 positive numbers, found \(0.0, "),
    ],
)
def test_given_options_must_match_the_weights(
    options: dict[str, Any], words: str, state: State, tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=words):
        load_checkpoint(tmp_path / "weights.pt", options=ModelOptions(**options))


def test_options_must_not_contradict_the_sidecar(checkpoint_path: Path) -> None:
    load_checkpoint(checkpoint_path, options=ModelOptions(arch="resnet18", input_size=32))
    with pytest.raises(CheckpointError, match="others; the sidecar has input_size 32"):
        load_checkpoint(checkpoint_path, options=ModelOptions(input_size=64))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: {k: v for k, v in s.items() if ".bn2." not in k},
            r"12 missing \(block1.layer.0.bn2.weight, .*, \.\.\.\)$",
        ),
        (lambda s: {**s, "a": s["fc.bias"]}, r"found 1 left over \(a\)$"),
        (
            lambda s: {**s, "fc.bias": torch.ones(5)},
            r"1 of another shape \(fc.bias \(5,\) instead of \(4,\)\)$",
        ),
        (lambda s: {"fc.weight": s["fc.weight"]}, "found 1 keys such as fc.weight"),
    ],
)
def test_mismatched_entries_are_named(
    change: Callable[[State], State], words: str, state: State, tmp_path: Path
) -> None:
    torch.save(change(state), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=words) as caught:
        load_checkpoint(tmp_path / "weights.pt")
    assert caught.value.expected != caught.value.found
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (
            nn.Sequential(nn.Dropout(), nn.Linear(512, 4)),
            r"2 missing \(fc.weight, fc.bias\); 2 left over \(fc.1.weight, fc.1.bias\); for",
        ),
        (
            nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 4)),
            r"2 missing \(fc.weight, fc.bias\); 4 left over \(fc.0.weight, .*, fc.2.bias\); for",
        ),
    ],
)
def test_a_head_of_several_layers_is_named(head: nn.Module, found: str, tmp_path: Path) -> None:
    import torchvision

    net = torchvision.models.resnet18()
    net.fc = head
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=f"expected the keys of resnet18, found {found}"):
        load_checkpoint(tmp_path / "weights.pt")
    options = ModelOptions(arch="torchvision:resnet18")
    with pytest.raises(CheckpointError, match=r"expected fc.weight of .* such as fc\.\d\.weight"):
        load_checkpoint(tmp_path / "weights.pt", options=options)


def test_pickle_with_other_classes_is_rejected_by_name(state: State, tmp_path: Path) -> None:
    unsafe = Unsafe(tmp_path / "ran")
    torch.save({"state_dict": state, "more": unsafe}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"refers to posix.mkdir, .* state dict alone"):
        load_checkpoint(tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()


class Unsafe:
    """A pickle that creates a folder when it is loaded unsafely."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_other_entries_beside_the_weights_are_ignored(state: State, tmp_path: Path) -> None:
    """Settings of the run, paths and NumPy's numbers, as Lightning and train scripts keep them."""
    beside = {
        "hyper_parameters": {"root": tmp_path, "args": Namespace(lr=0.1)},
        "best_acc": np.float64(0.5),
        "history": np.arange(3),
        "when": datetime(2026, 1, 1),
    }
    torch.save({"state_dict": state, **beside}, tmp_path / "weights.ckpt")
    loaded = load_checkpoint(tmp_path / "weights.ckpt")
    assert loaded.notes[0] == "read from its entry 'state_dict'"
    weight = loaded.classifier.net.state_dict()["conv1.weight"]
    torch.testing.assert_close(weight, state["conv1.weight"])


@pytest.mark.parametrize("name", ["easydict.EasyDict", "yacs.config.CfgNode"])
def test_settings_in_a_subclass_of_dict_are_ignored(
    name: str, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, attribute = name.rpartition(".")
    made = type(attribute, (dict,), {"__module__": module})
    with monkeypatch.context() as patch:
        for part in (module, module.partition(".")[0]):
            patch.setitem(sys.modules, part, ModuleType(part))
        setattr(sys.modules[module], attribute, made)
        settings = made(lr=0.1)
        settings.lr = 0.1
        torch.save({"model": state, "cfg": settings}, tmp_path / "weights.pt")
    assert load_checkpoint(tmp_path / "weights.pt").notes[0] == "read from its entry 'model'"


def test_pickle_protocol_that_torch_does_not_load_safely(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "weights.pt", pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"Unsupported operand \d+\); .*pickle_protocol=2"):
        load_checkpoint(tmp_path / "weights.pt")
    (tmp_path / "weights.pt").write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match=r"Unsupported operand 60\)$"):
        load_checkpoint(tmp_path / "weights.pt")


def test_dicts_that_occur_many_times_are_searched_once(state: State, tmp_path: Path) -> None:
    nested: dict[str, Any] = {}
    for _ in range(60):
        nested = {"a": nested, "b": nested}
    torch.save(nested, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="no weights in a, b"):
        load_checkpoint(tmp_path / "weights.pt")
    torch.save({"run": nested, "model": state}, tmp_path / "weights.pt")
    assert load_checkpoint(tmp_path / "weights.pt").notes[0] == "read from its entry 'model'"


def test_a_dict_that_contains_itself(state: State, tmp_path: Path) -> None:
    own: dict[str, Any] = {}
    own["model"] = own
    torch.save(own, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="no weights in model"):
        load_checkpoint(tmp_path / "weights.pt")
    own["ema"] = state
    torch.save(own, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="a dict that contains itself"):
        load_checkpoint(tmp_path / "weights.pt")
    load_checkpoint(tmp_path / "weights.pt", options=ModelOptions(key="ema"))


def test_a_zip_that_python_can_not_read(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 6] = 70  # the version needed to read it
    path.write_bytes(data)
    load_checkpoint(path)  # torch can


def test_a_head_without_bias(network: nn.Module, state: State, tmp_path: Path) -> None:
    torch.save({k: v for k, v in state.items() if k != "fc.bias"}, tmp_path / "weights.pt")
    loaded = load_checkpoint(tmp_path / "weights.pt")
    x = images(2, 32)
    with torch.inference_mode():
        expected = network(x) - state["fc.bias"]
        torch.testing.assert_close(loaded.classifier(x), expected, rtol=0, atol=1e-5)
    assert "no fc.bias: assumed to be zero" in loaded.notes


@pytest.mark.parametrize("kernel", [3, 7])
def test_torchvision_stems(kernel: int, tmp_path: Path) -> None:
    stem = "cifar" if kernel == 3 else "imagenet"
    net = classifier_of(arch="resnet18", stem=stem, num_classes=1000).net
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    loaded = load_checkpoint(tmp_path / "weights.pt")
    architecture = loaded.sidecar.architecture
    assert architecture.stem == stem
    assert architecture.input_size == (224 if kernel == 7 else 32)
    assert architecture.mean == (NAMED_MEANS["imagenet"] if kernel == 7 else (0, 0, 0))
    assert any("stride 2" in note for note in loaded.notes) == (kernel == 3)
    said = ModelOptions(stem="cifar", activation="relu", input_size=32)
    if kernel == 3:
        assert "stride 2" not in str(load_checkpoint(tmp_path / "weights.pt", options=said).notes)


@pytest.mark.parametrize("pools", [False, True])
def test_a_small_stem_of_stride_2(pools: bool, tmp_path: Path) -> None:
    net = classifier_of(arch="resnet18", stem="cifar").net.eval()
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    net.get_submodule("conv1").stride = (2, 2)
    if pools:
        net.maxpool = nn.MaxPool2d(3, 2, 1)
    stem = "3x3-stride2-maxpool" if pools else "3x3-stride2"
    loaded = load_checkpoint(tmp_path / "weights.pt", options=ModelOptions(stem=stem))
    assert loaded.sidecar.architecture.stem == stem
    assert "stride 2" not in str(loaded.notes)
    x = images(2, 32)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.classifier(x), net(x))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5", (0.5, 0.5, 0.5)),
        ("0.1,0.2, 0.3", (0.1, 0.2, 0.3)),
        ("CIFAR10", NAMED_STDS["cifar10"]),
        ([0.1, 0.2, 0.3], (0.1, 0.2, 0.3)),
    ],
)
def test_mean_and_std(text: Any, expected: tuple[float, ...]) -> None:
    assert parse_rgb(text, NAMED_STDS) == expected


@pytest.mark.parametrize("text", ["0.1,0.2", "red", "127.5", ""])
def test_wrong_mean(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_rgb(text, NAMED_MEANS)


def test_class_names(tmp_path: Path) -> None:
    assert parse_classes("cat, dog") == ("cat", "dog")
    many = tuple(f"class {k}" for k in range(1000))  # longer than any file name
    assert parse_classes(",".join(many)) == many
    (tmp_path / "names.txt").write_text("cat\ndog\n\n")
    assert parse_classes(str(tmp_path / "names.txt")) == ("cat", "dog")
    with pytest.raises(ValueError, match="different class names, got cat twice"):
        parse_classes("cat,dog,cat")
    (tmp_path / "names.txt").write_text("crane\nmaillot\ncrane\n")
    with pytest.raises(ValueError, match=r"names\.txt: expected different class names, got crane"):
        parse_classes(str(tmp_path / "names.txt"))
    (tmp_path / "names.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"names\.txt: expected class names in UTF-8"):
        parse_classes(str(tmp_path / "names.txt"))


def test_network_from_a_library(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import torchvision

    net = torchvision.models.squeezenet1_1(num_classes=5).eval()
    torch.save(prefixed(net.state_dict(), "model."), tmp_path / "weights.pt")
    options = ModelOptions(arch="torchvision:squeezenet1_1", input_size=64)
    loaded: Checkpoint = load_checkpoint(tmp_path / "weights.pt", options=options)
    architecture = loaded.sidecar.architecture
    assert (architecture.num_classes, architecture.input_size) == (5, 64)
    assert architecture.mean == NAMED_MEANS["imagenet"]
    assert loaded.guessed["mean"] == "from the library's configuration"
    assert "mean 0.485, 0.456, 0.406" in caplog.messages[-1]
    x = images(2, 64)
    with torch.inference_mode():
        normalized = (x - loaded.classifier.mean) / loaded.classifier.std
        assert torch.equal(loaded.classifier(x), net(normalized))
    assert isinstance(loaded.classifier, Classifier)


def test_an_option_that_replaces_the_normalization_of_the_file(
    network: nn.Module, tmp_path: Path
) -> None:
    torch.save(nn.Sequential(Normalize(), network).state_dict(), tmp_path / "weights.pt")
    options = ModelOptions(mean=(0.5, 0.5, 0.5), std=STD)
    loaded = load_checkpoint(tmp_path / "weights.pt", options=options)
    assert loaded.sidecar.architecture.mean == (0.5, 0.5, 0.5)
    replaced = [note for note in loaded.notes if "replaces" in note]
    assert replaced == ["the option mean replaces the file's 0.4914, 0.4822, 0.4465"]


def test_an_inception_rescales_its_input_as_the_pretrained_one(tmp_path: Path) -> None:
    import torchvision

    net = torchvision.models.googlenet(
        num_classes=3, init_weights=True, transform_input=True, aux_logits=True
    ).eval()
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    options = ModelOptions(
        arch="torchvision:googlenet", input_size=64, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    loaded = load_checkpoint(tmp_path / "weights.pt", options=options)
    assert any("transform_input is assumed to be True" in note for note in loaded.notes)
    assert any("never uses (aux1, aux2)" in note for note in loaded.notes)
    x = images(2, 64)
    with torch.inference_mode():
        assert torch.equal(loaded.classifier(x), net(x))


def test_a_network_of_a_library_that_does_not_fit(tmp_path: Path) -> None:
    import torchvision

    torch.save(torchvision.models.alexnet(num_classes=3).state_dict(), tmp_path / "weights.pt")
    options = ModelOptions(arch="torchvision:alexnet", input_size=32)
    with pytest.raises(CheckpointError, match=r"\(2, 3, 32, 32\); for another size set"):
        load_checkpoint(tmp_path / "weights.pt", options=options)
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"timm has a configuration of, got 'resnet18.foo'"):
        load_checkpoint(tmp_path / "weights.pt", options=ModelOptions(arch="timm:resnet18.foo"))


def test_a_json_file_of_another_program_is_no_sidecar(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "model.pt")
    (tmp_path / "model.json").write_text('{"architecture": "test_resnet", "num_classes": 4}')
    assert load_checkpoint(tmp_path / "model.pt").guessed

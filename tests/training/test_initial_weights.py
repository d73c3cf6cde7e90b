from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from robust.checkpoint import load_checkpoint
from robust.classifier import Architecture, Classifier
from robust.loading.options import NAMED_MEANS, NAMED_STDS
from training.initial_weights import load_initial_weights
from training.state import TrainingError

IMAGENET_MEAN, IMAGENET_STD = NAMED_MEANS["imagenet"], NAMED_STDS["imagenet"]
CLASSES = ("cat", "dog", "frog", "ship")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Path]:
    """Makes a file of nothing but the weights of a torchvision ResNet-18."""

    def save(num_classes: int, wrapper: str = "") -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(num_classes)
            net = Classifier(Architecture(arch="resnet18", num_classes=num_classes)).net
        path = tmp_path_factory.mktemp("bare") / "resnet18.pth"
        torch.save({wrapper: net.state_dict()} if wrapper else net.state_dict(), path)
        return path

    return save


def fresh(**fields: object) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Classifier(Architecture(arch="resnet18", num_classes=4, **fields))  # type: ignore[arg-type]


def test_imagenet_weights_get_a_new_head_and_the_normalization_of_the_recipe(
    bare: Callable[..., Path],
) -> None:
    init = load_checkpoint(bare(1000))
    model = fresh(mean=IMAGENET_MEAN, std=IMAGENET_STD, input_size=64)
    head = model.net.get_submodule("fc").weight.clone()  # type: ignore[union-attr, operator]
    words = load_initial_weights(model, init, CLASSES)
    ours, theirs = model.net.state_dict(), init.classifier.net.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if not key.startswith("fc."))
    assert torch.equal(ours["fc.weight"], head)
    assert model.architecture.mean == IMAGENET_MEAN
    assert "resnet18.pth: took 120 of 122 tensors" in words
    assert "new head for 4 classes, as the file has 1000" in words
    assert "continued at 64 instead of" in words
    assert "activation, mean, std from the recipe, as the file does not have them" in words
    assert "--set mean=imagenet" not in words
    assert "add --set mean=imagenet" in load_initial_weights(fresh(), init, CLASSES)


def test_wrapped_file_with_the_same_class_count_keeps_its_head(bare: Callable[..., Path]) -> None:
    init = load_checkpoint(bare(4, "state_dict"))
    model = fresh(activation="silu")
    words = load_initial_weights(model, init, CLASSES)
    assert "took 122 of 122 tensors" in words
    ours, theirs = model.net.state_dict(), init.classifier.net.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_head_is_kept_for_numbered_classes_and_reported_if_dropped(
    checkpoint_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    init, model = load_checkpoint(checkpoint_path), fresh()  # its classes have names
    words = load_initial_weights(model, init, ("0", "1", "2", "3"))
    assert "took 122 of 122 tensors" in words
    assert f"took 0, 1, ... for its classes {', '.join(init.sidecar.classes)}" in words
    ours, theirs = model.net.state_dict(), init.classifier.net.state_dict()
    assert torch.equal(ours["fc.weight"], theirs["fc.weight"])
    assert not caplog.messages
    load_initial_weights(fresh(), init, ("a", "b", "c", "d"))
    (message,) = caplog.messages
    assert message.endswith("are not a, b, c, d")


def test_hint_prints_all_digits_of_the_normalization(checkpoint_path: Path) -> None:
    init = load_checkpoint(checkpoint_path)
    digits = replace(init.sidecar.architecture, mean=(0.4914001, 0.5, 1 / 3))
    init = replace(init, sidecar=replace(init.sidecar, architecture=digits))
    with pytest.raises(TrainingError, match=r"--set mean=0\.4914001,0\.5,0\.3333333333333333"):
        load_initial_weights(fresh(), init, CLASSES)


@pytest.mark.parametrize("kind", ["onnx", "torchscript", "timm:convnext_atto"])
def test_model_that_training_cannot_build_is_refused(kind: str, checkpoint_path: Path) -> None:
    init = load_checkpoint(checkpoint_path)
    own = replace(init.sidecar.architecture, arch=kind, stem="own", activation="own")
    init = replace(init, sidecar=replace(init.sidecar, architecture=own))
    with pytest.raises(TrainingError, match=f"expected weights of a ResNet, .* got a {kind} model"):
        load_initial_weights(fresh(), init, CLASSES)


def test_own_checkpoint_needs_no_options(checkpoint_path: Path) -> None:
    init = load_checkpoint(checkpoint_path)
    words = load_initial_weights(fresh(), init, CLASSES)
    assert words.endswith("took 122 of 122 tensors")
    others = tuple(reversed(CLASSES))
    assert "for 4 classes, as the file has 4 others" in load_initial_weights(fresh(), init, others)
    with pytest.raises(TrainingError) as caught:
        load_initial_weights(fresh(activation="silu", mean=IMAGENET_MEAN), init, CLASSES)
    assert "architecture, activation silu, mean 0.485,0.456,0.406, found activation relu" in str(
        caught.value
    )
    assert "change the recipe with --set activation=relu --set mean=0,0,0" in str(caught.value)

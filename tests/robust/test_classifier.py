import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torchvision

from robust.classifier import STEMS, Architecture, Classifier
from robust.networks.resnet import ResNet

RESNETS = ("resnet18", "resnet34", "resnet50")


@pytest.mark.parametrize("arch", RESNETS)
@pytest.mark.parametrize("stem", STEMS)
def test_state_dict_is_torchvisions(arch: str, stem: str) -> None:
    with torch.device("meta"):
        net = Classifier(Architecture(arch=arch, stem=stem)).net  # type: ignore[arg-type]
        own = getattr(torchvision.models, arch)(num_classes=10)
    assert list(net.state_dict()) == list(own.state_dict())
    assert net.state_dict()["fc.weight"].shape[0] == 10


@pytest.mark.parametrize("arch", RESNETS)
def test_seeded_network_equals_torchvisions(arch: str) -> None:
    built = []
    for build in (getattr(torchvision.models, arch), lambda num_classes: ResNet(arch, num_classes)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            built.append(build(num_classes=7))
    theirs, ours = built
    expected = theirs.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(x), theirs(x))  # in train mode, so the norms' statistics move as well
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_neither_torchvision_nor_the_compiler_is_imported() -> None:
    code = (
        "import sys, robust.classifier as c, robust.inference as i\n"
        "i.for_inference(c.Classifier(c.Architecture(arch='resnet18')))\n"
        "print([m for m in ('torchvision', 'torch._dynamo', 'sympy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_normalization_is_inside(make_classifier: Callable[..., Classifier]) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    bare, normalizing = make_classifier(), make_classifier(mean=mean, std=std)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    by_hand = (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(normalizing(x), bare.net(by_hand))
        assert torch.equal(bare(x), bare.net(x))
    assert normalizing.architecture.normalizes
    assert not bare.architecture.normalizes
    assert normalizing.state_dict().keys() == bare.state_dict().keys()


def test_cifar_stem_keeps_the_resolution(make_classifier: Callable[..., Classifier]) -> None:
    x = torch.zeros(1, 3, 32, 32)
    sides = {}
    for stem in STEMS:
        net = make_classifier(stem=stem).net
        with torch.inference_mode():
            sides[stem] = net.maxpool(net.conv1(x)).shape[-1]
    assert sides == {"imagenet": 8, "cifar": 32}


def test_silu_replaces_every_relu(make_classifier: Callable[..., Classifier]) -> None:
    kinds = {type(module).__name__ for module in make_classifier(activation="silu").modules()}
    assert "SiLU" in kinds
    assert "ReLU" not in kinds


def test_logits_are_float32_also_from_half_precision(
    make_classifier: Callable[..., Classifier],
) -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert make_classifier()(torch.zeros(1, 3, 32, 32)).dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arch": "resnet101"}, "expected arch to be one of resnet18, resnet34, resnet50"),
        ({"arch": []}, "expected arch"),
        ({"stem": "vit"}, "expected stem to be one of"),
        ({"activation": "gelu"}, "expected activation to be one of"),
        ({"num_classes": 1}, "expected 2 to 100000 classes, got 1"),
        ({"num_classes": 10**9}, "expected 2 to 100000 classes"),
        ({"num_classes": 10.0}, "num_classes a whole number"),
        ({"num_classes": True}, "num_classes a whole number"),
        ({"input_size": 4}, "8 to 1024 pixels"),
        ({"input_size": 32.5}, "input_size a whole number"),
        ({"mean": (0.0, 0.0)}, "mean of 3 finite"),
        ({"mean": (0.0, 0.0, math.nan)}, "mean of 3 finite"),
        ({"std": (1.0, 0.0, 1.0)}, "std of 3 positive"),
    ],
)
def test_architecture_rejects_invalid_values(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Architecture(**fields)  # type: ignore[arg-type]

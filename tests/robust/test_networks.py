"""The families of the registry: public key names, the copy for inference, the graph, training."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from robust import networks
from robust.classifier import Architecture, Classifier
from robust.graph import build_onnx
from robust.inference import for_inference
from robust.networks.layers import SameConv2d, SkipInitialization
from tests.robust.test_inference import classifier_of, images, logits_and_gradient

# Keys and shapes of the networks in RobustBench's model zoo, written down from its public code.
LAYOUTS: dict[str, dict[str, torch.Size]] = {
    name: {key: torch.Size(map(int, shape.split("x"))) for key, shape in layout.items()}
    for name, layout in json.loads(
        Path(__file__).with_name("public_layouts.json").read_text()
    ).items()
}
READ_AS = {
    "ResNet-18": ("resnet18", "", "relu"),
    "ResNet-50": ("resnet50", "", "relu"),
    "PreActResNet-18 raw shortcut": ("preact_resnet18", "raw-shortcut", "relu"),
    "PreActResNet-18 v2 final norm": ("preact_resnet18", "", "relu"),
    "PreActResNet-50": ("preact_resnet50", "no-final-norm", "relu"),
    "WideResNet-28-10": ("wide_resnet28_10", "", "relu"),
    "WideResNet-28-10 sub_block1": ("wide_resnet28_10", "", "relu"),
    "WideResNet-34-10": ("wide_resnet34_10", "", "relu"),
    "WideResNet-34-20": ("wide_resnet34_20", "", "relu"),
    "WideResNet-70-16": ("wide_resnet70_16", "", "relu"),
    "DeepMind WideResNet-28-10": ("wide_resnet28_10", "deepmind", "silu"),
    "DeepMind WideResNet-70-16": ("wide_resnet70_16", "deepmind", "silu"),
    "DeepMind PreActResNet-18": ("preact_resnet18", "deepmind", "silu"),
    "DeepMind PreActResNet-34": ("preact_resnet34", "deepmind", "silu"),
}
# Small networks of each family and variant.
SMALL = [
    ("preact_resnet18", ""),
    ("preact_resnet18", "no-final-norm"),
    ("preact_resnet18", "raw-shortcut"),
    ("preact_resnet18", "deepmind"),
    ("wide_resnet10_1", ""),
    ("wide_resnet16_2", "deepmind"),
]


@pytest.mark.parametrize("name", LAYOUTS)
def test_public_layouts_are_read(name: str) -> None:
    layout = LAYOUTS[name]
    reading = networks.read_layout(layout)
    assert reading is not None
    assert (reading.arch, reading.variant, reading.activation) == READ_AS[name]
    assert (reading.stem, reading.num_classes) == ("cifar", 10)
    with torch.device("meta"):
        net = networks.build(reading.arch, num_classes=10, stem="cifar", variant=reading.variant)
    own = {
        key: value.shape
        for key, value in net.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    given = {reading.renamed.get(key, key): shape for key, shape in layout.items()}
    assert {key: shape for key, shape in given.items() if key not in reading.unused} == own
    assert bool(reading.unused) == ("sub_block1" in name)


def test_values_not_in_the_keys_are_reported_as_doubts() -> None:
    reading = networks.read_layout(LAYOUTS["PreActResNet-18 raw shortcut"])
    assert reading is not None
    assert "use arch preact_resnet18:no-final-norm" in reading.doubts[0]
    with torch.device("meta"):
        net = networks.build("resnet18", num_classes=10, stem="cifar")
    reading = networks.read_layout({key: value.shape for key, value in net.state_dict().items()})
    assert reading is not None
    assert "stride 2" in reading.doubts[0]


@pytest.mark.parametrize(
    ("name", "key", "shape", "message"),
    [
        ("WideResNet-28-10", "block2.layer.4.bn1.weight", (1,), r"groups of \[4, 5, 4\] blocks"),
        ("PreActResNet-18 v2 final norm", "conv1.weight", (64, 3, 5, 5), r"stem of size \(5, 5\)"),
        ("ResNet-50", "layer3.6.conv1.weight", (1,), r"bottleneck blocks \[3, 4, 7, 3\]"),
    ],
)
def test_unknown_networks_are_rejected(
    name: str, key: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(networks.UnknownLayout, match=message):
        networks.read_layout({**LAYOUTS[name], key: torch.Size(shape)})


@pytest.mark.parametrize(("arch", "variant"), SMALL)
def test_inference_copy_agrees(arch: str, variant: str) -> None:
    classifier = classifier_of(
        arch=arch,
        variant=variant,
        stem="cifar",
        activation="silu",  # whose gradient has no jumps
        input_size=8,  # maps of 4, 2 and 1 pixels
        num_classes=7,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.25),
    )
    x = images(4, 8)
    expected, slope = logits_and_gradient(classifier, x)
    fast = for_inference(classifier)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert 0 < norms < sum(isinstance(m, nn.BatchNorm2d) for m in classifier.modules())
    logits, gradient = logits_and_gradient(fast, x)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(gradient, slope, rtol=1e-2, atol=1e-5)
    assert expected.std() > 0.01


def test_disagreeing_copy_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a family whose entry names the wrong norms."""
    classifier = classifier_of(arch="wide_resnet10_1", stem="cifar", input_size=8)
    monkeypatch.setattr("robust.inference._fold", lambda conv, norm: None)
    fast, x = for_inference(classifier), images(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), classifier(x), rtol=0, atol=1e-4)
    assert "the copy of wide_resnet10_1 for inference is off by" in caplog.text


@pytest.mark.parametrize(("arch", "variant"), SMALL[2:])
def test_onnx_graph_agrees(arch: str, variant: str) -> None:
    import onnxruntime

    classifier = classifier_of(arch=arch, variant=variant, stem="cifar", input_size=16)
    x = images(3, 16)
    session = onnxruntime.InferenceSession(
        build_onnx(for_inference(classifier)).SerializeToString()
    )
    (logits,) = session.run(["logits"], {"images": x.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(logits), classifier(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("arch", ["resnet18", "preact_resnet18", "wide_resnet10_1"])
def test_zeroed_residuals_get_gradients(arch: str) -> None:
    classifier = Classifier(Architecture(arch=arch, stem="cifar", input_size=16, num_classes=3))
    classifier.zero_residuals()
    ends = networks.family_of(arch).residual_ends
    assert ends is not None
    weights = list(ends(classifier.net))
    assert weights
    assert not any(weight.any() for weight in weights)
    classifier(images(4, 16)).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in weights)


def test_same_padding_matches_tensorflow() -> None:
    """Of the first pixel nothing lies outside, of the last one row and one column."""
    conv = SameConv2d(1, 1)
    nn.init.ones_(conv.weight)
    with torch.no_grad():
        assert conv(torch.ones(1, 1, 4, 4)).squeeze().tolist() == [[9, 6], [6, 4]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arch": "wide_resnet28_10"}, "to be one of cifar for wide_resnet28_10, got 'imagenet'"),
        ({"arch": "wide_resnet27_10", "stem": "cifar"}, "expected arch to be one of resnet18"),
        ({"arch": "mobilenet_v2"}, r"'mobilenet_v2'; did you mean torchvision:mobilenet_v2\?$"),
        ({"arch": "WideResNet28_10"}, r"; did you mean wide_resnet28_10\?$"),
        ({"arch": "transformer"}, "got 'transformer'$"),
        ({"arch": "resnet18", "variant": "deepmind"}, "variant to be one of '' for resnet18"),
    ],
)
def test_invalid_options_are_rejected(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Architecture(**fields)  # type: ignore[arg-type]


def test_feature_map_sizes_match_a_forward_pass() -> None:
    net = networks.build("resnet18", num_classes=2, stem="imagenet")
    sides = networks.convolution_sides(net, 32)
    assert sides["conv1"] == (32, 16)
    assert sides["layer1.0.conv1"] == (8, 8)
    assert sides["layer4.0.downsample.0"] == (2, 1)
    assert all(parameter.device.type == "cpu" for parameter in net.parameters())


@pytest.mark.timeout(60)
def test_skipped_initialization_ends_whatever_memory_holds() -> None:
    weight = torch.full((8, 8), 9.0)
    with SkipInitialization():
        nn.init.trunc_normal_(weight)  # samples again while a value is outside [-2, 2]
        assert bool((weight == 0).all())
        kept = nn.init.kaiming_uniform_(torch.full((8, 8), 9.0))
    assert bool((kept == 9).all())

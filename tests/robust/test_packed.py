"""A packed classifier computes what the classifier does, and its gradient what autograd does."""

from collections.abc import Callable
from itertools import chain, cycle

import pytest
import torch
from torch import Tensor, nn

from robust import packed
from robust.classifier import Architecture, Classifier
from robust.evaluation.precision import in_bf16
from robust.inference import InferenceClassifier, for_inference
from robust.packed import NotPackable, Packed, packed_if_faster

CPU = torch.device("cpu")


def classifier_of(arch: str = "resnet18", **changed: object) -> InferenceClassifier:
    """With statistics of batch norms that fold into something."""
    settings = {"num_classes": 4, "input_size": 16, "stem": "cifar", **changed}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = Classifier(Architecture(arch=arch, **settings)).eval()  # type: ignore[arg-type]
        for module in classifier.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
                assert module.running_mean is not None
                assert module.running_var is not None
                nn.init.normal_(module.running_mean, std=0.2)
                nn.init.uniform_(module.running_var, 0.5, 2)
    return for_inference(classifier)


def gradient(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    pixels = x.clone().requires_grad_()
    logits = model(pixels)
    weights = torch.linspace(-1, 2, logits.numel()).view_as(logits)
    (found,) = torch.autograd.grad((logits * weights).sum(), pixels)
    return logits.detach(), found


def assert_close_gradients(found: Tensor, expected: Tensor) -> None:
    """Of most images: where a ReLU's input is a rounding error from 0, the gradient jumps."""
    error = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.median() < 1e-4


def images(n: int = 3, side: int = 16) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "changed",
    [
        {"input_size": 32},
        {"activation": "silu", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "input_size": 32},
        {"arch": "preact_resnet18", "input_size": 32},
        {"arch": "preact_resnet18", "variant": "deepmind", "input_size": 32},
        {"stem": "imagenet", "input_size": 32},
        {"stem": "3x3-stride2", "input_size": 32},
        {"stem": "imagenet", "input_size": 64, "arch": "resnet50", "activation": "silu"},
    ],
    ids=[
        "resnet18",
        "silu, normalized",
        "norms not folded",
        "SAME padding",
        "products",
        "3x3-stride2",
        "max-pooling, resnet50",
    ],
)
def test_logits_and_gradient_match_autograd(changed: dict[str, object]) -> None:
    model = classifier_of(**changed)  # type: ignore[arg-type]
    fast = Packed(model, torch.float32)
    x = images(side=model.architecture.input_size)
    (logits, found), (expected, slope) = gradient(fast, x), gradient(model, x)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert_close_gradients(found, slope)
    with torch.no_grad():
        most = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(fast(x), logits, rtol=0, atol=most)


def test_images_of_the_caller_are_unchanged() -> None:
    model = classifier_of(input_size=32)
    x = images(side=32).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    fast = Packed(model, torch.float32)
    pixels = x.requires_grad_()
    fast(pixels).sum().backward()
    with torch.no_grad():
        fast(x)
        assert torch.equal(x, before)


def test_gradient_can_be_dropped_and_computed_again() -> None:
    model = Packed(classifier_of(stem="imagenet", input_size=32), torch.float32)
    first = gradient(model, images(side=32))
    model.drop_gradient()
    assert not any("_back" in vars(step) for step in model._steps)
    assert all(map(torch.equal, gradient(model, images(side=32)), first))


def test_autocast_changes_nothing() -> None:
    model = Packed(classifier_of(input_size=32), torch.float32)
    logits, found = gradient(model, images(side=32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = gradient(model, images(side=32))
    assert all(map(torch.equal, (logits, found), again))


def test_gradient_of_a_pass_is_kept_while_others_run() -> None:
    model = classifier_of(input_size=32)
    fast = Packed(model, torch.float32)
    x, other = images(side=32), images(side=32).flip(0)
    pixels = x.clone().requires_grad_()
    logits = fast(pixels)
    gradient(fast, other)
    (found,) = torch.autograd.grad(logits.sum(), pixels)
    pixels = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(pixels).sum(), pixels)
    assert_close_gradients(found, slope)


def test_unsupported_layer_is_named() -> None:
    model = classifier_of(input_size=32)
    model.classifier.net.conv1 = nn.Conv2d(3, 64, 3, padding=2, dilation=2)
    with pytest.raises(NotPackable, match="no packed form of groups or dilation"):
        Packed(model, torch.float32)
    model.classifier.net.conv1 = nn.ConvTranspose2d(3, 64, 3, padding=1)
    with pytest.raises(NotPackable, match="no packed form of ConvTranspose2d"):
        Packed(model, torch.float32)
    with pytest.raises(NotPackable, match="no packed form of a stride of 2 at 7 pixels"):
        Packed(classifier_of(arch="preact_resnet18", input_size=28), torch.float32)
    with pytest.raises(ValueError, match=r"expected images \(N, 3, 32, 32\), got \(3, 3, 16, 16\)"):
        Packed(classifier_of(input_size=32), torch.float32)(images())


def test_disagreeing_or_slower_packed_copy_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = classifier_of(input_size=32)
    times = (1.0, 1.0), (2.0, 1.0, 1.2, 1.0), (1.0, 1.0)  # packed, not packed, and again

    def same(x: Tensor) -> Tensor:
        logits: Tensor = model(x)
        return logits

    ticks = (at for seconds in chain(*times) for at in (0.0, seconds))
    monkeypatch.setattr("robust.agreement.time.process_time", lambda: next(ticks))
    monkeypatch.setattr(packed, "Packed", lambda model, dtype: same)
    assert packed_if_faster(model, model) is same
    with caplog.at_level("INFO", "robust.packed"):
        assert packed_if_faster(model, model) is model
    assert "1.20 times as long, above the limit of 1.05" in caplog.text
    monkeypatch.setattr(packed, "Packed", lambda model, dtype: lambda x: -model(x))
    with caplog.at_level("INFO", "robust.packed"):
        assert packed_if_faster(model, model) is model
    assert "of the largest logit, above the limit of 0.01" in caplog.text


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bfloat16"
)
def test_bfloat16_searches_use_packed_weights_if_no_slower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = classifier_of(input_size=32)
    monkeypatch.setattr("robust.agreement.time.process_time", cycle([0.0, 1.0]).__next__)
    rough = in_bf16(model, CPU)
    assert isinstance(rough, Packed)
    (logits, found), (expected, slope) = (
        gradient(rough, images(side=32)),
        gradient(model, images(side=32)),
    )
    assert float((logits - expected).abs().max() / expected.abs().max()) < 0.05
    assert float((found.sign() == slope.sign()).float().mean()) > 0.9

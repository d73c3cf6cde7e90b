import copy

import pytest
import torch
from torch import Tensor, nn

from robust.classifier import Architecture, Classifier
from robust.inference import for_inference, in_bfloat16


def classifier_of(**fields: object) -> Classifier:
    """In eval mode, with statistics as after training, so that a forgotten norm shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = Classifier(Architecture(**fields))  # type: ignore[arg-type]
    for norm in classifier.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.2, generator=generator)  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2, generator=generator)  # type: ignore[union-attr]
            nn.init.uniform_(norm.weight, 0.5, 1, generator=generator)
            nn.init.normal_(norm.bias, 0, 0.2, generator=generator)
    return classifier.eval()


def images(n: int, side: int) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def logits_and_gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), x)
    return logits.detach(), gradient


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(
    ("stem", "side"),  # 32 and 8 meet maps of 2 and 1 pixels, 40 of 3 to 2, 9 of 5, 3 and 2
    [("imagenet", 32), ("imagenet", 8), ("imagenet", 40), ("cifar", 8), ("cifar", 9)],
)
def test_agrees_with_the_classifier(arch: str, activation: str, stem: str, side: int) -> None:
    classifier = classifier_of(
        arch=arch,
        activation=activation,
        stem=stem,
        input_size=side,
        num_classes=7,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.25),
    )
    x = images(6, side)
    expected, slope = logits_and_gradient(classifier, x)
    logits, gradient = logits_and_gradient(for_inference(classifier), x)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    error = (gradient - slope).flatten(1).norm(dim=1) / slope.flatten(1).norm(dim=1)
    # Where a ReLU's input is a rounding error from 0, the gradient jumps: not in most images.
    assert (error.median() if activation == "relu" else error.max()) < 1e-4


def test_a_large_image() -> None:
    classifier = classifier_of(arch="resnet18", input_size=224)
    x = images(2, 224)
    expected, _ = logits_and_gradient(classifier, x)
    logits, _ = logits_and_gradient(for_inference(classifier), x)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_other_image_size_is_rejected() -> None:
    fast = for_inference(classifier_of(arch="resnet18"))
    for shape in ((1, 3, 33, 33), (1, 3, 16, 16), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match=r"expected images \(N, 3, 32, 32\), got"):
            fast(torch.zeros(shape))
    assert fast(torch.zeros(0, 3, 32, 32)).shape == (0, 10)


def test_copy_is_frozen_and_the_classifier_is_unchanged() -> None:
    classifier = classifier_of(arch="resnet18").train()
    before = copy.deepcopy(classifier.state_dict())
    fast = for_inference(classifier)
    assert not fast.training
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert all(parameter.requires_grad for parameter in classifier.parameters())
    assert all(module.training for module in classifier.modules())
    assert classifier.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in classifier.state_dict().items())


def test_later_changes_do_not_affect_the_copy() -> None:
    classifier = classifier_of(arch="resnet18")
    fast, x = for_inference(classifier), images(2, 32)
    expected, _ = logits_and_gradient(fast, x)
    with torch.no_grad():
        for tensor in classifier.state_dict().values():
            tensor.zero_()
    assert torch.equal(logits_and_gradient(fast, x)[0], expected)
    assert torch.equal(logits_and_gradient(fast.train(), x)[0], expected)


@pytest.mark.parametrize(
    ("arch", "stem"),
    [
        ("resnet18", "imagenet"),
        ("resnet18", "cifar"),
        ("preact_resnet18", "cifar"),
        ("wide_resnet10_1", "cifar"),
    ],
)
def test_a_bfloat16_copy_keeps_pixels_and_logits_in_float32(arch: str, stem: str) -> None:
    classifier = classifier_of(
        arch=arch,
        stem=stem,
        activation="silu",
        input_size=16,
        mean=(0.4, 0.4, 0.4),
        std=(0.2, 0.2, 0.2),
    )
    fast, x = for_inference(classifier), images(8, 16)
    rough = in_bfloat16(fast)
    assert rough is not None
    assert torch.bfloat16 in {value.dtype for value in rough.parameters()}
    expected, slope = logits_and_gradient(fast, x)
    logits, gradient = logits_and_gradient(rough, x)
    assert logits.dtype == gradient.dtype == torch.float32
    assert 0 < (logits - expected).abs().max() < 0.02 * expected.abs().max()
    cosine = torch.cosine_similarity(gradient.flatten(1), slope.flatten(1))
    assert cosine.min() > 0.99
    assert (gradient.sign() == slope.sign()).float().mean() > 0.95
    # A change of less than bfloat16's spacing above 0.5 still reaches the logits.
    assert not torch.equal(rough(torch.full_like(x, 0.8)), rough(torch.full_like(x, 0.801)))
    assert {value.dtype for value in fast.parameters()} == {torch.float32}
    assert torch.equal(logits_and_gradient(fast, x)[0], expected)


@pytest.mark.gpu
def test_copy_is_on_the_classifiers_device() -> None:
    classifier = classifier_of(arch="resnet18")
    x = images(2, 32)
    expected, _ = logits_and_gradient(classifier, x)
    for fast in (for_inference(classifier, torch.device("cuda")), for_inference(classifier.cuda())):
        logits, _ = logits_and_gradient(fast, x.cuda())
        torch.testing.assert_close(logits.cpu(), expected, rtol=0, atol=1e-2)  # TF32

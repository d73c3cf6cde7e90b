"""Device selection, and devices that disagree with the CPU."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from robust.classifier import Classifier
from robust.device import DeviceDisagrees, compare_with_cpu, resolve_device


def test_named_devices() -> None:
    assert resolve_device("cpu").type == "cpu"
    for name in ("banana", "meta"):
        with pytest.raises(ValueError, match="expected a device such as auto, cpu, cuda, mps, xpu"):
            resolve_device(name)


@pytest.mark.parametrize(
    ("found", "taken"), [("cuda", "cuda"), ("mps", "mps"), ("xpu", "xpu"), ("hpu", "cpu")]
)
def test_auto_uses_the_device_torch_finds(
    found: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = SimpleNamespace(type=found)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: accelerator)
    assert resolve_device("auto") == torch.device(taken)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert resolve_device("auto") == torch.device("cpu")


def test_device_index_out_of_range_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="from 0 to 1, got 'cuda:2'"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "mps", "xpu"])
def test_unavailable_devices_are_rejected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.get_device_module(name), "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"expected a {name.upper()} device for '{name}', found"):
        resolve_device(name)


class Elsewhere(torch.nn.Module):
    """A model that computes otherwise once it is moved; torch's meta device stands for another."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change, self.moved = change, False
        self.weight = torch.nn.Parameter(torch.randn(3, 4, generator=torch.manual_seed(0)))

    def to(self, *_: object, **__: object) -> "Elsewhere":
        self.moved = True
        return self

    def forward(self, x: Tensor) -> Tensor:
        logits = x.mean(dim=(2, 3)) @ self.weight
        return self.change(logits) if self.moved else logits


def refuse(logits: Tensor) -> Tensor:
    raise NotImplementedError("aten::foo is not implemented here")


class Device:
    """Looks like an accelerator; images stay where they are."""

    type = "fake"

    def __str__(self) -> str:
        return "fake:0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits * 1.001, None),
        (lambda logits: logits * 1.1, "fake:0 disagrees with the CPU: logits are off by 10.0%"),
        (lambda logits: logits + (logits - logits.detach()), "gradients are off by 1"),
        (lambda logits: logits * torch.nan, "logits are off by inf"),
        (refuse, "can't compute this model .aten::foo is not implemented here"),
    ],
)
def test_a_device_is_compared_with_the_cpu(
    change: Callable[[Tensor], Tensor], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "to", lambda self, *_: self)
    model, device = Elsewhere(change), Device()
    if message is None:
        compare_with_cpu(model, device, 8)  # type: ignore[arg-type]
    else:
        with pytest.raises(DeviceDisagrees, match=message):
            compare_with_cpu(model, device, 8)  # type: ignore[arg-type]
    assert model.moved


class Masked(torch.nn.Module):
    """A model without a gradient at its images: it is 0 there, or they are detached."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale
        self.weight = torch.nn.Parameter(torch.randn(3, 4, generator=torch.manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        still = x.detach()
        if self.scale is not None:
            still = still + self.scale * (x - still)
        return still.mean(dim=(2, 3)) @ self.weight


@pytest.mark.parametrize("scale", [0.0, None])
def test_masked_gradients_agree(scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "to", lambda self, *_: self)
    compare_with_cpu(Masked(scale), Device(), 8, moved=Masked(scale))  # type: ignore[arg-type]
    with pytest.raises(DeviceDisagrees, match="gradients are off by inf"):
        compare_with_cpu(Masked(scale), Device(), 8, moved=Masked(1.0))  # type: ignore[arg-type]
    with pytest.raises(DeviceDisagrees, match="gradients are off by 100"):
        compare_with_cpu(Masked(1.0), Device(), 8, moved=Masked(scale))  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_gpu_agrees(make_classifier: Callable[..., Classifier]) -> None:
    classifier = make_classifier(activation="silu")
    compare_with_cpu(classifier, torch.device("cuda"), 32)
    assert classifier.mean.device.type == "cuda"

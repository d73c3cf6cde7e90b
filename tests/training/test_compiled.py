import logging
import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from training.compiled import compiled_attack, compiled_loss, compiles
from training.recipes import quick


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


@pytest.fixture
def x() -> Tensor:
    return torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_auto_is_for_cuda() -> None:
    assert quick().compile == "auto"
    chosen = {
        (choice, device): compiles(replace(quick(), compile=choice), torch.device(device))  # type: ignore[arg-type]
        for choice in ("auto", "on", "off")
        for device in ("cpu", "cuda")
    }
    assert [key for key, value in chosen.items() if value] == [
        ("auto", "cuda"),
        ("on", "cpu"),
        ("on", "cuda"),
    ]


def test_failing_compiler_is_reported_and_skipped(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(nn.Module):
        """Fails once statistics have moved."""

        def forward(self, x: Tensor) -> Tensor:
            model(x)
            raise RuntimeError("no such instruction\nin line 7")

    monkeypatch.setattr(torch, "compile", lambda module, **settings: Broken())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        assert compiled_loss(model, x, bf16=False) is model
        assert compiled_attack(model, [x], bf16=False, predicts=False) is model
    message = "torch.compile failed (RuntimeError: no such instruction); continuing without it"
    assert caplog.messages == [message] * 2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_graph_of_a_step_is_tried(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, bool, int]] = []

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            norm = model[1]
            asked.append((norm.training, torch.is_grad_enabled(), len(x)))  # type: ignore[arg-type]
            logits: Tensor = model(x)
            return logits

    monkeypatch.setattr(torch, "compile", lambda module, **settings: Seen())
    assert isinstance(compiled_loss(model, x, bf16=False), Seen)
    assert isinstance(compiled_attack(model, [x[:2], x], bf16=False, predicts=False), Seen)
    assert asked == [(True, True, 8), (False, True, 2), (False, True, 8)]
    compiled_attack(model, [x], bf16=False, predicts=True)
    assert asked[3:] == [(False, True, 8), (False, False, 8)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_passes_match_the_model(bf16: bool, model: nn.Module, x: Tensor) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast = compiled_loss(model, x, bf16=bf16)
    assert fast is not model
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.allclose(fast(x), model(x), atol=1e-5)  # in train mode, statistics moved twice
    assert model[1].num_batches_tracked == 2
    model.eval()
    assert torch.allclose(fast(x), model(x), atol=1e-5)
    with torch.no_grad():
        model[4].weight.zero_()  # in place, as optimizer and AWP do it
    assert torch.allclose(fast(x), model[4].bias.expand(8, 3))

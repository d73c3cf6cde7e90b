from dataclasses import replace

import pytest
import torch
from torch import nn

from robust.classifier import Architecture, Classifier, Stem
from training.ema import AveragedModel, refresh_norms
from training.optimizer import learning_rate, make_optimizer, uses_bf16
from training.recipe import Phase
from training.recipes import quick
from training.state import TrainingError


def test_learning_rate_warms_up_then_follows_a_cosine() -> None:
    phase = Phase(name="a", epochs=1, learning_rate=0.4, warmup=0.1)
    rates = [learning_rate(phase, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.04)
    assert rates[9] == rates[10] == pytest.approx(0.4)
    assert rates[55] == pytest.approx(0.2)
    assert rates[99] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_phase_starts_at_the_learning_rate_of_the_previous_end() -> None:
    first = Phase(name="a", epochs=1, learning_rate=0.4, warmup=0.1, final_rate=0.25)
    second = Phase(name="b", epochs=1, learning_rate=0.1, warmup=0)
    assert max(learning_rate(first, step, 100) for step in range(100)) == 0.4
    assert learning_rate(first, 55, 100) == pytest.approx(0.25)  # half way down from 0.4 to 0.1
    assert learning_rate(first, 100, 100) == pytest.approx(learning_rate(second, 0, 100))


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate(Phase(name="a", epochs=1, learning_rate=0.4, warmup=0), 0, 10) == 0.4


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_norms_and_biases_are_not_decayed(optimizer: str) -> None:
    model = Classifier(Architecture(arch="resnet18"))
    recipe = replace(quick(), optimizer=optimizer, weight_decay=0.3)  # type: ignore[arg-type]
    decayed, others = make_optimizer(model, recipe).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(
        "conv" in n or "downsample.0" in n or "fc.w" in n
        for n in (names[id(p)] for p in decayed["params"])
    )
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_sgd_uses_nesterov_or_plain_momentum() -> None:
    model = nn.Linear(2, 2)
    group = make_optimizer(model, replace(quick(), optimizer="sgd")).param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.9, True)
    group = make_optimizer(model, replace(quick(), optimizer="sgd", momentum=0.0)).param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.0, False)


def test_ema_has_its_own_buffers_and_tracks_the_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    averaged = AveragedModel(model, decay=0.9)
    averaged.steps = 1000  # past the warm-up
    start = {key: value.clone() for key, value in averaged.module.state_dict().items()}
    with torch.no_grad():
        model[0].weight.add_(1.0)
    model(torch.randn(8, 4) + 5)
    assert torch.equal(averaged.module.state_dict()["1.running_mean"], start["1.running_mean"])
    averaged.update()
    for key, value in averaged.module.state_dict().items():
        theirs = model.state_dict()[key]
        expected = theirs
        if value.is_floating_point():
            expected = 0.9 * start[key] + 0.1 * theirs
        assert torch.allclose(value, expected), key
    assert not averaged.module.training


def test_zero_ema_decay_copies_the_model() -> None:
    model = nn.Linear(3, 3)
    averaged = AveragedModel(model, decay=0.0)
    with torch.no_grad():
        model.weight.add_(1.0)
    averaged.update()
    assert torch.allclose(averaged.module.weight, model.weight)  # type: ignore[arg-type]


def test_precision_can_be_forced() -> None:
    cpu = torch.device("cpu")
    assert uses_bf16(replace(quick(), precision="bf16"), cpu)
    assert not uses_bf16(replace(quick(), precision="fp32"), cpu)


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 16)])
def test_cpu_avoids_bf16_if_feature_maps_shrink_to_a_pixel(stem: Stem, size: int) -> None:
    cpu = torch.device("cpu")
    recipe = replace(quick(), stem=stem, input_size=size)
    assert not uses_bf16(replace(recipe, precision="auto"), cpu)
    with pytest.raises(TrainingError, match=f"expected fp32 for images of {size} pixels"):
        uses_bf16(replace(recipe, precision="bf16"), cpu)
    assert uses_bf16(replace(recipe, precision="bf16", input_size=size + 1), cpu)


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16"])
def test_auto_uses_bf16_if_the_cpu_supports_it(
    feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, found = torch.device("cpu"), {"avx512_f": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert not uses_bf16(quick(), cpu)
    found[feature] = True
    assert uses_bf16(quick(), cpu)


@pytest.mark.parametrize("side", [8, 4, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_torch_bf16_weight_gradients_are_accurate_above_one_pixel(side: int, stride: int) -> None:
    """Checks torch: `uses_bf16` avoids bfloat16 on the CPU only where maps are one pixel wide."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 128, 3, stride, padding=1, bias=False)
    conv = conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(32, 64, side, side).contiguous(memory_format=torch.channels_last)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = conv(x)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
        gradients += torch.autograd.grad(out, conv.weight, weights)
    exact, rough = gradients
    assert float((rough - exact).norm() / exact.norm()) < 0.01


def test_refreshed_norms_are_those_of_images_from_everywhere() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    # Sorted: a batch of neighbors would have a variance of 0.
    images = torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1).expand(200, 3, 4, 4)
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    before = norm.running_mean
    refresh_norms(model, images, batch_size=50)
    with torch.no_grad():
        var, mean = torch.var_mean(model[0](images / 255), dim=(0, 2, 3))
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var, rtol=0.05, atol=0)
    assert norm.running_mean is before  # the average updates the same tensors
    assert not model.training

from dataclasses import replace

import pytest
import torch

from training import cost as cost_module
from training.cost import OVERHEAD, available_bytes, describe_cost, estimate, resident_bytes
from training.recipe import Recipe

CPU = torch.device("cpu")


def test_run_cost_follows_from_its_size(tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_module, "_seconds_per_image", lambda *args, **kwargs: 0.5)
    recipe = replace(tiny, arch="resnet18", stem="imagenet", optimizer="sgd")
    cost = estimate(recipe, images=80, num_classes=4, device=CPU)
    assert cost.steps == 5 * recipe.epochs
    assert cost.data_bytes == 80 * 3 * 16 * 16
    weights = 11_178_564 * 4  # torchvision's resnet18 with 4 classes, float32
    assert cost.model_bytes == 4 * weights  # weights, gradients, momentum and average
    assert cost.seconds == 0.5 * 80 * (1 * 3 + 2 * 5)  # half of each batch is attacked twice
    parts = cost.data_bytes + cost.model_bytes + cost.activation_bytes
    assert cost.memory_bytes == round(OVERHEAD * parts)
    shared = estimate(recipe, images=80, num_classes=4, device=CPU, ranks=2)
    assert (shared.steps, shared.activation_bytes) == (cost.steps, cost.activation_bytes // 2)
    assert shared.seconds == cost.seconds / 2
    untimed = estimate(recipe, images=80, num_classes=4, device=CPU, timed=False)
    assert untimed == replace(cost, seconds=None)
    sizes = (64, 128)
    small, large = (
        estimate(replace(recipe, input_size=size), images=80, num_classes=4, device=CPU)
        for size in sizes
    )
    assert large.activation_bytes == pytest.approx(4 * small.activation_bytes, rel=0.05)


def test_pass_is_timed_and_free_memory_is_known(tiny: Recipe) -> None:
    seconds = estimate(tiny, images=80, num_classes=4, device=CPU).seconds
    assert seconds is not None
    assert seconds > 0
    free = available_bytes(CPU)
    assert free is None or free > 1 << 20
    assert resident_bytes() > 100 << 20  # torch alone


def test_too_little_memory_gives_a_warning(
    tiny: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cost_module, "_seconds_per_image", lambda *args, **kwargs: 0.5)
    monkeypatch.setattr(cost_module, "resident_bytes", lambda: 1_000_000_000)
    recipe = replace(tiny, arch="resnet18", stem="imagenet")
    for free, warned in ((10_000_000_000, False), (1_000_000, True)):
        monkeypatch.setattr(cost_module, "available_bytes", lambda device, free=free: free)
        line = describe_cost(recipe, images=80, num_classes=4, device=CPU)
        assert line.startswith("15 steps of 16 images, about 1.3 GB of memory and 9 min")
        assert ("found 0.0 GB free: lower batch_size" in caplog.text) is warned
    line = describe_cost(recipe, images=80, num_classes=4, device=CPU, timed=False)
    assert line == "5 steps an epoch, of 16 images, about 1.3 GB of memory"


def test_gpu_is_timed_with_a_whole_batch_if_it_fits(
    tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(tiny, batch_size=512)
    counts: list[int] = []

    def seconds(*args: object, count: int, **options: object) -> float:
        counts.append(count)
        return 1.0

    monkeypatch.setattr(cost_module, "_seconds_per_image", seconds)
    for name, free in (("cuda", 1 << 40), ("cuda", 1), ("cpu", 1 << 40)):
        monkeypatch.setattr(cost_module, "available_bytes", lambda device, free=free: free)
        estimate(recipe, images=1024, num_classes=4, device=torch.device(name), ranks=2)
    assert counts == [256, 64, 64]

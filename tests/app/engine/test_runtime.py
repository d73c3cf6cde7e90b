"""Runtimes for predictions: chosen by measurement, replaced by torch when their outputs differ."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.engine import runtime, runtime_plan
from app.engine import served_model as served
from app.engine.runtime import Runtime, runtimes_for
from app.engine.runtime_plan import RuntimePlan, examples, gap, make_plan
from app.metrics import Metrics
from app.settings import Settings
from robust.checkpoint import load_checkpoint
from robust.images import to_float
from robust.inference import for_inference
from tests.app.conftest import write_checkpoint
from tests.robust.test_inference import classifier_of
from tests.support.serving import pixels, png, serving, until

SIDE = 8


class Slow:
    """A sum of pixels as two logits; `off` by so much, and broken when told."""

    def __init__(self, name: str, clock: list[float], seconds: float, off: float = 0.0) -> None:
        self.clock, self.seconds, self.off = clock, seconds, off
        self.batches: list[int] = []
        self.broken = False
        self.runtime = Runtime(name=name, logits=self)

    def __call__(self, x: Tensor) -> Tensor:
        if self.broken:
            raise RuntimeError("broken")
        self.batches.append(len(x))
        self.clock[0] += self.seconds * (len(x) if self.seconds < 1e-3 else 1)
        total = x.flatten(1).mean(dim=1)
        return torch.stack([total, self.off - total], dim=1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(runtime_plan.time, "perf_counter", lambda: now[0])
    return now


def failures(metrics: Metrics, name: str, reason: str) -> float | None:
    return metrics.registry.get_sample_value(
        "robust_runtime_failures_total", {"runtime": name, "reason": reason}
    )


def test_each_batch_size_uses_the_fastest_runtime(clock: list[float]) -> None:
    by_image = Slow("torch", clock, 0.0005)  # 0.5 ms an image
    by_batch = Slow("other", clock, 0.005)  # 5 ms a batch
    plan = make_plan([by_image.runtime, by_batch.runtime], side=SIDE, metrics=Metrics())
    chosen = [(choice.images, choice.runtime.name) for choice in plan.choices]
    assert chosen == [(1, "torch"), (4, "torch"), (16, "other"), (64, "other")]
    assert plan.choices[-1].rate == pytest.approx(64 / 0.005)
    for images, taken, parts in ((3, by_image, [3]), (5, by_batch, [5]), (70, by_batch, [64, 6])):
        taken.batches.clear()
        assert plan(examples(images, SIDE)).shape == (images, 2)
        assert taken.batches == parts


def test_small_batches_are_used_if_large_ones_are_not_faster(clock: list[float]) -> None:
    slow = Slow("torch", clock, 0.0005)
    plan = make_plan([slow.runtime], side=SIDE, metrics=Metrics())
    assert [choice.images for choice in plan.choices] == [1]
    slow.batches.clear()
    plan(examples(3, SIDE))
    assert slow.batches == [1, 1, 1]


def test_measuring_respects_its_time_budget(clock: list[float]) -> None:
    slow = Slow("torch", clock, 0.3)
    make_plan([slow.runtime], side=SIDE, metrics=Metrics())
    assert max(slow.batches) <= runtime_plan.EXAMPLES
    assert clock[0] < 4 * runtime_plan.SECONDS


@pytest.mark.parametrize("off", [3e-4, float("nan")])
def test_runtime_with_different_outputs_is_rejected(clock: list[float], off: float) -> None:
    exact, wrong = Slow("torch", clock, 0.01), Slow("other", clock, 0.001, off)
    metrics = Metrics()
    plan = make_plan([exact.runtime, wrong.runtime], side=SIDE, metrics=metrics)
    assert {choice.runtime.name for choice in plan.choices} == {"torch"}
    assert failures(metrics, "other", "disagreed") == 1


def test_batch_of_a_failing_runtime_is_computed_by_torch(clock: list[float]) -> None:
    exact, other = Slow("torch", clock, 0.01), Slow("other", clock, 0.001)
    metrics = Metrics()
    plan = make_plan([exact.runtime, other.runtime], side=SIDE, metrics=metrics)
    assert {choice.runtime.name for choice in plan.choices} == {"other"}
    x = examples(2, SIDE)
    expected = plan(x)
    other.broken = True
    assert torch.equal(plan(x), expected)
    assert failures(metrics, "other", "failed") == 1
    again = make_plan([exact.runtime, other.runtime], side=SIDE, metrics=metrics)
    assert {choice.runtime.name for choice in again.choices} == {"torch"}


def test_urgent_work_can_run_between_measurements(clock: list[float]) -> None:
    exact = Slow("torch", clock, 0.01)
    pauses: list[int] = []
    make_plan([exact.runtime], side=SIDE, metrics=Metrics(), pause=lambda: pauses.append(1))
    assert len(pauses) == len(exact.batches)


def test_gap_compares_confident_and_unconfident_outputs() -> None:
    sure = torch.tensor([[40.0, 0.0]])
    assert gap(sure, sure) == 0
    assert gap(sure + torch.tensor([[0.4, 0.0]]), sure) == pytest.approx(0.01, rel=1e-3)
    assert gap(torch.tensor([[0.1, 0.0]]), torch.zeros(1, 2)) == pytest.approx(0.1)
    assert gap(torch.full((1, 2), torch.nan), torch.zeros(1, 2)) == float("inf")


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_all_runtimes_agree_at_any_batch_size(stem: str) -> None:
    classifier = classifier_of(arch="resnet18", stem=stem, input_size=16)
    metrics = Metrics()
    runtimes = runtimes_for(for_inference(classifier), threads=1, metrics=metrics)
    assert [item.name for item in runtimes] == ["torch", "onnxruntime"]
    x = examples(21, 16)
    with torch.inference_mode():
        expected = classifier(x)
        for item in runtimes:
            for n in (1, 2, 5, 21):
                logits = torch.cat([item.logits(part) for part in torch.split(x, n)])
                torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_torch_serves_without_the_optional_packages(checkpoint: Path) -> None:
    code = (
        "import sys, torch\n"
        "sys.modules.update(onnx=None, onnxruntime=None)\n"
        "from pathlib import Path\n"
        "from app.metrics import Metrics\n"
        "from app.engine.served_model import load_model\n"
        f"model = load_model(Path({str(checkpoint)!r}), torch.device('cpu'), threads=1)\n"
        "shape = model.classify(torch.zeros(1, 3, 32, 32)).shape\n"
        "print([item.name for item in model.runtimes], shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['torch'] torch.Size([1, 10])\n"


def test_classifier_is_kept_in_float16_without_loss(checkpoint: Path) -> None:
    expected = load_checkpoint(checkpoint).classifier
    model = served.load_model(checkpoint, torch.device("cpu"), threads=1)
    assert isinstance(model.classifier, served.HalfClassifier)
    for _ in range(2):
        state = model.exact().state_dict()
        assert all(torch.equal(value, state[key]) for key, value in expected.state_dict().items())
    expected.net.get_parameter("conv1.weight").data[0, 0, 0, 0] = 1 / 3
    assert not served.HalfClassifier.is_exact(expected)


def test_reload_builds_the_runtimes_of_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "robust_model.pt"
    write_checkpoint(path, seed=1)
    settings = Settings(checkpoint=path, threads=1, device="cpu", reload_seconds=0.05)
    real = runtime.onnx_runtime

    def wrong(graph: bytes, threads: int) -> runtime.Logits:
        logits = real(graph, threads)
        return lambda x: logits(x).flip(1)

    with serving(settings) as running:
        told = running.client.get("/model").json()["runtimes"]
        assert {item["runtime"] for item in told} <= {"torch", "onnxruntime"}
        assert told[0]["images"] == 1
        for seed, broken in ((2, False), (3, True)):
            if broken:
                monkeypatch.setattr(runtime, "onnx_runtime", wrong)
            sha256 = write_checkpoint(path, seed=seed)
            until(lambda new=sha256: running.client.get("/model").json()["sha256"] == new)
            images = pixels(0, 3)
            with torch.inference_mode():
                expected = load_checkpoint(path).classifier(to_float(images[:1])).softmax(dim=1)
            result = running.client.post("/predict", content=png()).json()["results"][0]
            assert result["probability"] == pytest.approx(float(expected.max()), abs=1e-4)
        plan = running.service.models.current.plan
        assert isinstance(plan, RuntimePlan)
        assert {choice.runtime.name for choice in plan.choices} == {"torch"}
        assert failures(running.service.metrics, "onnxruntime", "disagreed") == 1

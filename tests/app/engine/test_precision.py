"""bfloat16 predictions and attacks: when they are chosen, reported and rejected."""

import base64
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.engine import runtime_plan, served_model
from app.engine.runtime import Runtime
from app.engine.runtime_plan import make_plan
from app.metrics import Metrics
from app.settings import Settings
from robust.checkpoint import load_checkpoint, save_checkpoint
from robust.evaluation.precision import SearchPrecision
from robust.images import to_float
from robust.prediction import predict
from tests.app.http.test_attack import attacked
from tests.support.images import decode_png
from tests.support.onnx_file import write_onnx
from tests.support.serving import Running, labeled, png, serving

SIDE = 8


class Timed:
    """Logits of two classes by the mean pixel, at so many seconds for each image."""

    def __init__(self, clock: list[float], seconds: float, off: float = 0.0) -> None:
        self.clock, self.seconds, self.off = clock, seconds, off

    def __call__(self, x: Tensor) -> Tensor:
        self.clock[0] += self.seconds * len(x)
        mean = x.flatten(1).mean(dim=1)
        return torch.stack([5 + mean + self.off, torch.zeros_like(mean)], dim=1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(runtime_plan.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("asked", "seconds", "off", "taken", "reason"),
    [
        ("auto", 0.01, 0.0, "bf16", "bfloat16 classifies 2.0 times as many images per second"),
        ("auto", 0.018, 0.0, "fp32", "images per second as float32, below the limit of 1.2"),
        ("auto", 0.01, -3.0, "fp32", "probabilities are off by 0.0"),
        ("auto", 0.01, -9.0, "fp32", "above the limit of 0.01"),
        ("bf16", 0.04, 0.0, "bf16", "as requested"),
        ("bf16", 0.01, -9.0, "fp32", "torch in bfloat16: probabilities are off by"),
        ("fp32", 0.01, 0.0, "fp32", "as requested"),
    ],
)
def test_bfloat16_is_chosen_if_it_agrees_and_is_faster(
    clock: list[float], asked: str, seconds: float, off: float, taken: str, reason: str
) -> None:
    exact = Runtime(name="torch", logits=Timed(clock, 0.02))
    rough = Runtime(name="torch", logits=Timed(clock, seconds, off), precision="bf16")
    runtimes = [exact, rough] if asked != "fp32" else [exact]
    plan = make_plan(runtimes, side=SIDE, metrics=Metrics(), precision=asked)  # type: ignore[arg-type]
    assert plan.precision == taken
    assert reason in plan.reason
    assert {choice.runtime for choice in plan.choices} == {rough if taken == "bf16" else exact}


def test_bfloat16_slower_for_one_image_is_rejected(clock: list[float]) -> None:
    def slow_alone(x: Tensor) -> Tensor:
        clock[0] += 0.03 if len(x) == 1 else 0.0
        return Timed(clock, 0.005)(x)

    exact = Runtime(name="torch", logits=Timed(clock, 0.02))
    rough = Runtime(name="torch", logits=slow_alone, precision="bf16")
    plan = make_plan([exact, rough], side=SIDE, metrics=Metrics())
    assert plan.precision == "fp32"
    expected = "for 1 images bfloat16 takes 1.75 times as long as float32, above the limit of 1.05"
    assert plan.reason == expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_runtime_that_returns_too_few_logits_is_rejected(clock: list[float], dtype: str) -> None:
    exact = Runtime(name="torch", logits=Timed(clock, 0.02))
    other = Runtime(
        name="other",
        logits=lambda x: Timed(clock, 0.01)(x)[:0],
        precision=dtype,  # type: ignore[arg-type]
    )
    plan = make_plan([exact, other], side=SIDE, metrics=Metrics())
    assert {choice.runtime for choice in plan.choices} == {exact}
    if dtype == "bf16":
        assert plan.reason == "other in bfloat16: expected logits of shape (1, 2), got (0, 2)"


def test_changed_label_rejects_bfloat16() -> None:
    near, expected = torch.tensor([[0.5, 0.501]]), torch.tensor([[0.501, 0.5]])
    assert (
        runtime_plan._bf16_problem(near, expected) == "1 of 1 labels differ, above the limit of 0"
    )
    assert runtime_plan._bf16_problem(expected, expected) == ""


@pytest.fixture(scope="module")
def steady(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that answers nearly the same in any processor's bfloat16."""
    loaded, path = load_checkpoint(checkpoint), tmp_path_factory.mktemp("steady") / "model.pt"
    head = loaded.classifier.net.fc.requires_grad_(False)  # type: ignore[union-attr]
    head.weight /= 16
    head.bias /= 16
    head.bias[3] += 2  # ahead of the other classes by more than any rounding
    save_checkpoint(path, loaded.classifier, loaded.sidecar)
    return path


@pytest.fixture(scope="module")
def rounded(steady: Path) -> Iterator[Running]:
    settings = Settings(
        checkpoint=steady, threads=1, device="cpu", precision="bf16", deadline_seconds=120
    )
    with serving(settings) as running:
        yield running


def test_precision_is_reported_in_each_response(rounded: Running) -> None:
    told = rounded.client.get("/model")
    card = told.json()
    assert (card["precision"], card["precision_reason"]) == ("bf16", "as requested")
    assert card["search_precision"] == "bf16 search, fp32 verified"
    assert told.headers["X-Model-Precision"] == "bf16"
    response = rounded.client.post("/predict", content=png())
    assert response.headers["X-Model-Precision"] == "bf16"
    exact = load_checkpoint(rounded.service.settings.checkpoint).classifier
    expected = predict(exact, to_float(decode_png(png()))[None])[0]
    (found,) = response.json()["results"]
    assert found["index"] == int(expected.argmax())
    assert found["probability"] == pytest.approx(float(expected.max()), abs=0.01)


def test_onnx_file_is_served_in_float32(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its runtime computes in float32, whatever torch's autocast is set to."""
    pytest.importorskip("onnxruntime")
    write_onnx(tmp_path / "theirs.onnx")
    settings = Settings(
        checkpoint=tmp_path / "theirs.onnx", threads=1, device="cpu", precision="bf16"
    )
    with caplog.at_level(logging.WARNING, "app"), serving(settings) as running:
        card = running.client.get("/model").json()
        response = running.client.post("/predict", content=png())
    reason = "only torch modules can run in bfloat16"
    assert (card["precision"], card["precision_reason"]) == ("fp32", reason)
    assert (card["search_precision"], card["search_precision_reason"]) == ("fp32", reason)
    assert response.headers["X-Model-Precision"] == "fp32"
    assert reason in caplog.text


def test_attacks_search_in_bfloat16_and_are_scored_in_float32(rounded: Running) -> None:
    exact = load_checkpoint(rounded.service.settings.checkpoint).classifier
    begun = rounded.client.post("/evaluate", files={"file": labeled(4)}, data={"attack": "fgsm"})
    assert begun.status_code == 202
    assert begun.headers["X-Model-Precision"] == "fp32; search=bf16"
    body = attacked(rounded, png(), attack="pgd", steps="3")
    response = rounded.client.post("/attack", content=png(), params={"attack": "fgsm"})
    assert response.headers["X-Model-Precision"] == "fp32; search=bf16"
    (result,) = body["results"]
    image = decode_png(base64.b64decode(result["adversarial_png"]))
    after = predict(exact, to_float(image)[None])[0]
    for row in result["after"]["top"]:
        assert row["probability"] == pytest.approx(float(after[row["index"]]), abs=1e-5)
    before = predict(exact, to_float(decode_png(png()))[None])[0]
    assert body["before"]["probability"] == pytest.approx(float(before.max()), abs=1e-5)


def test_evaluations_search_in_bfloat16_and_report_why(rounded: Running) -> None:
    response = rounded.client.post(
        "/evaluate",
        files={"file": labeled(4)},
        data={"attack": "fgsm", "curve": "0"},
        headers={"Prefer": "wait=120"},
    )
    assert response.status_code == 200, response.text
    evaluation = response.json()["evaluation"]
    assert evaluation["precision"] == "bf16 search, fp32 verified"
    assert evaluation["precision_reason"] == "as requested"


def test_model_that_bfloat16_changes_is_served_in_float32(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exact = load_checkpoint(checkpoint).classifier

    def flipped(x: Tensor) -> Tensor:
        return exact(x).flip(1)

    monkeypatch.setattr(served_model, "in_bf16", lambda fast, device: flipped)
    monkeypatch.setattr("app.engine.runtime.openvino_bf16", lambda graph, threads: flipped)
    settings = Settings(checkpoint=checkpoint, threads=1, device="cpu", precision="bf16")
    with caplog.at_level(logging.WARNING, "app"), serving(settings) as running:
        card = running.client.get("/model").json()
        assert card["precision"] == "fp32"
        assert "in bfloat16: probabilities are off by " in card["precision_reason"]
        assert running.client.post("/predict", content=png()).headers["X-Model-Precision"] == "fp32"
    assert f"predictions in fp32 ({card['precision_reason']})" in caplog.text


def test_float32_builds_no_bfloat16_model(running: Running) -> None:
    model = running.service.models.current
    assert (model.precision, model.precision_reason, model.bf16) == ("fp32", "as requested", None)
    assert model.search == SearchPrecision(bf16=False, reason="as requested")
    response = running.client.post("/attack", content=png(), params={"attack": "fgsm"})
    assert response.headers["X-Model-Precision"] == "fp32"


def test_reason_of_the_bfloat16_search_is_not_given_for_float32_predictions(
    running: Running,
) -> None:
    search = SearchPrecision(bf16=True, reason="bfloat16 is faster")
    model = replace(running.service.models.current, plan=None, search=search)
    assert model.precision == "fp32"
    assert model.precision_reason == "no runtime was chosen for predictions"

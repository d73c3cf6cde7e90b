"""POST /predict gives the library's results."""

import io
import threading
from typing import Any

import pytest
import torch
from PIL import Image

from app.http.routes import predict as route
from app.http.schemas import Seen
from app.http.views import to_prediction
from app.settings import Settings
from robust.checkpoint import load_checkpoint
from robust.images import decode_image, fit_image, to_float
from robust.prediction import predict
from tests.support.serving import CLASSES, Running, gated, jpeg, png, serving, until


def library_probabilities(checkpoint, data: bytes) -> torch.Tensor:
    classifier = load_checkpoint(checkpoint).classifier
    return predict(classifier, to_float(fit_image(decode_image(data), 32)).unsqueeze(0))[0]


@pytest.mark.parametrize("data", [png(), jpeg()], ids=["png", "jpeg"])
@pytest.mark.parametrize("way", ["form", "raw", "raw as curl says it"])
def test_one_image(running: Running, checkpoint, data: bytes, way: str) -> None:
    if way == "form":
        response = running.client.post("/predict", files={"file": data}, data={"top_k": "10"})
    else:
        kind = "application/x-www-form-urlencoded" if "curl" in way else "image/whatever"
        headers = {"Content-Type": kind}
        response = running.client.post("/predict?top_k=10", content=data, headers=headers)
    assert response.status_code == 200
    body = response.json()
    expected = library_probabilities(checkpoint, data)
    (result,) = body["results"]
    assert result["index"] == int(expected.argmax())
    assert result["label"] == CLASSES[result["index"]]
    assert sorted(item["index"] for item in result["top"]) == list(range(10))
    found = [item["probability"] for item in result["top"]]
    assert found == sorted(found, reverse=True)
    for item in result["top"]:
        assert item["probability"] == pytest.approx(float(expected[item["index"]]), abs=2e-4)
    assert sum(item["probability"] for item in result["top"]) == pytest.approx(1, abs=1e-5)
    assert body["model_sha256"] == response.headers["X-Model-SHA256"]
    assert body["model_sha256"] == load_checkpoint(checkpoint).sha256


def test_several_images_give_the_same_results_as_each_alone(running: Running) -> None:
    images = [png(seed) for seed in range(5)]
    together = running.client.post("/predict", files=[("file", data) for data in images]).json()
    assert [result["image"] for result in together["results"]] == [0, 1, 2, 3, 4]
    for data, result in zip(images, together["results"], strict=True):
        (alone,) = running.client.post("/predict", files={"file": data}).json()["results"]
        assert alone["index"] == result["index"]
        assert alone["probability"] == pytest.approx(result["probability"], abs=2e-4)
    assert len({result["probability"] for result in together["results"]}) == 5


def test_top_k_limits_the_classes(running: Running) -> None:
    response = running.client.post("/predict?top_k=2", content=png())
    assert len(response.json()["results"][0]["top"]) == 2
    response = running.client.post("/predict?top_k=1000", content=png())
    assert len(response.json()["results"][0]["top"]) == len(CLASSES)


def test_large_responses_are_made_in_a_thread(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def noted(*arguments: Any) -> Seen:
        threads.append(threading.current_thread().name)
        return to_prediction(*arguments)

    monkeypatch.setattr(route, "to_prediction", noted)
    small = running.client.post("/predict?top_k=3", content=png()).json()
    monkeypatch.setattr(route, "INLINE", len(CLASSES) - 1)
    assert running.client.post("/predict?top_k=3", content=png()).json() == small
    assert [name.partition("_")[0] == "codec" for name in threads] == [False, True]


def test_queued_requests_share_a_batch(running: Running) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with gated(running.service) as gate, ThreadPoolExecutor(8) as pool:
        first = pool.submit(running.client.post, "/predict", content=png())
        until(lambda: gate.waiting)
        rest = [pool.submit(running.client.post, "/predict", content=png(i)) for i in range(1, 7)]
        until(lambda: queued(running) == 7)
        gate.open.set()
        answers = [future.result().json() for future in (first, *rest)]
        assert gate.batches == [1, 6]
    for seed, answer in enumerate(answers):
        (alone,) = running.client.post("/predict", content=png(seed)).json()["results"]
        assert alone["probability"] == pytest.approx(answer["results"][0]["probability"], abs=2e-4)


def queued(running: Running) -> float:
    value = running.service.metrics.registry.get_sample_value
    return value("robust_queued_forwards", {"kind": "predict"}) or 0


def test_exif_orientation_is_applied(running: Running, checkpoint) -> None:
    image = Image.open(io.BytesIO(jpeg(3)))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", exif=exif)
    turned = running.client.post("/predict", content=buffer.getvalue()).json()["results"][0]
    expected = library_probabilities(checkpoint, buffer.getvalue())
    assert turned["probability"] == pytest.approx(float(expected.max()), abs=2e-4)


def test_more_images_than_ever_fit_into_the_queue_are_refused_for_good(checkpoint) -> None:
    settings = Settings(
        checkpoint=checkpoint, threads=1, device="cpu", queue_limit=4, client_share=0.5
    )
    with serving(settings) as running:
        assert running.client.get("/limits").json()["max_images"] == 2
        for n, status in ((2, 200), (3, 422)):
            files = [("file", png(seed)) for seed in range(n)]
            assert running.client.post("/predict", files=files).status_code == status

"""POST /attack: the reported results are those of the returned PNG."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from app.settings import Settings
from robust.attacks import resolve_attack
from robust.threat_model import ThreatModel
from tests.app.conftest import write_checkpoint
from tests.support.images import decode_png
from tests.support.serving import CLASSES, Running, gated, jpeg, labeled, png, serving, until


def decoded(text: str) -> Tensor:
    return decode_png(base64.b64decode(text)).int()


def attacked(running: Running, data: bytes, **parameters: Any) -> dict[str, Any]:
    response = running.client.post("/attack", files={"file": data}, data=parameters)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    assert body["model_sha256"] == response.headers["X-Model-SHA256"]
    return body


def predicted(running: Running, data: bytes) -> dict[str, Any]:
    result: dict[str, Any] = running.client.post("/predict", content=data).json()["results"][0]
    return result


@pytest.mark.parametrize(
    ("norm", "eps", "levels"), [("linf", "8/255", 8), ("linf", "0.02", 5), ("l2", "0.5", None)]
)
def test_returned_png_is_the_image_that_was_scored(
    running: Running, norm: str, eps: str, levels: int
) -> None:
    body = attacked(running, jpeg(), norm=norm, eps=eps, steps="3")
    assert [item["parameters"]["attack"] for item in body["results"]] == ["fgsm", "pgd-3"]
    origin = decoded(body["input_png"])
    for result in body["results"]:
        change = decoded(result["adversarial_png"]) - origin
        assert change.abs().sum() > 0
        if levels is not None:
            assert int(change.abs().max()) <= levels
        else:
            assert float(change.double().norm()) / 255 <= 0.5 + 1e-9
        assert result["linf"] == pytest.approx(int(change.abs().max()) / 255, abs=1e-9)
        assert result["l2"] == pytest.approx(float(change.double().norm()) / 255, abs=1e-9)
        again = predicted(running, base64.b64decode(result["adversarial_png"]))
        assert again["index"] == result["after"]["index"]
        assert again["probability"] == pytest.approx(result["after"]["probability"], abs=2e-4)
        assert result["success"] == (again["index"] != body["label"]["index"])
        assert result["after"]["probability"] == result["after"]["top"][0]["probability"]


def test_default_label_is_the_prediction(
    running: Running,
) -> None:
    data = jpeg(1)
    body, seen = attacked(running, data, attack="fgsm"), predicted(running, data)
    assert body["label"] == {"label": seen["label"], "index": seen["index"]}
    assert body["before"]["index"] == seen["index"]
    assert body["before"]["probability"] == pytest.approx(seen["probability"], abs=2e-4)
    assert body["already_wrong"] is False
    assert body["target"] is None


def test_pgd_reaches_the_target(running: Running) -> None:
    data = png(2)
    least = running.client.post("/predict?top_k=10", content=data).json()["results"][0]["top"][-1]
    body = attacked(running, data, attack="pgd", eps="32/255", steps="20", target=least["label"])
    (result,) = body["results"]
    assert body["target"]["index"] == least["index"]
    after = predicted(running, base64.b64decode(result["adversarial_png"]))
    assert result["success"] is (after["index"] == least["index"])
    assert result["after"]["index"] != body["before"]["index"]


def test_target_that_is_the_prediction_is_named_as_such(running: Running) -> None:
    seen = running.client.post("/predict", content=png()).json()["results"][0]["label"]
    fields = {"attack": "fgsm", "target": seen}
    response = running.client.post("/attack", files={"file": png()}, data=fields)
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert (error["field"], error["got"]) == ("target", "the class the model predicts")
    assert "label" not in error["expected"]


def test_label_by_name_or_index_is_attacked(running: Running) -> None:
    seen = predicted(running, png(3))
    other = (seen["index"] + 1) % len(CLASSES)
    by_index = attacked(running, png(3), attack="pgd", steps="2", label=str(other))
    by_name = attacked(running, png(3), attack="pgd", steps="2", label=CLASSES[other])
    assert by_index["label"] == by_name["label"] == {"label": CLASSES[other], "index": other}
    assert by_index["already_wrong"] is True
    assert by_index["results"][0]["adversarial_png"] == by_name["results"][0]["adversarial_png"]


def test_eps_zero_is_the_identity(running: Running) -> None:
    body = attacked(running, png(), eps="0", steps="2")
    for result in body["results"]:
        assert result["adversarial_png"] == body["input_png"]
        assert (result["success"], result["linf"], result["l2"]) == (False, 0, 0)
        assert set(decoded(result["perturbation_png"]).flatten().tolist()) == {128}


def test_seed_determines_the_random_start(running: Running) -> None:
    images = [
        attacked(running, png(4), attack="pgd", steps="2", seed=seed)["results"][0][
            "adversarial_png"
        ]
        for seed in ("1", "1", "2")
    ]
    assert images[0] == images[1] != images[2]


def test_resolved_parameters_are_reported(running: Running) -> None:
    body = attacked(
        running, png(), attack=["pgd-7", "fgsm"], norm="linf", eps="4/255", alpha="0.01"
    )
    pgd, fgsm = (item["parameters"] for item in body["results"])
    assert (pgd["name"], pgd["steps"], pgd["restarts"], pgd["seed"]) == ("pgd", 7, 1, 0)
    assert (pgd["alpha"], pgd["eps_text"]) == (0.01, "4/255")
    assert (fgsm["steps"], fgsm["random_start"]) == (1, False)
    assert fgsm["alpha"] == pytest.approx(4 / 255)


def test_attack_names_are_case_insensitive(running: Running) -> None:
    body = attacked(running, png(), attack=["FGSM", "Pgd-2"], norm="L2", eps="1")
    found = [(item["parameters"]["name"], item["parameters"]["norm"]) for item in body["results"]]
    assert found == [("fgsm", "l2"), ("pgd", "l2")]
    response = running.client.post("/attack", params={"attack": "pgd20"}, content=png())
    assert response.status_code == 422
    assert response.json()["errors"][0]["expected"].endswith("or pgd-N; did you mean pgd-20?")


def test_accept_png_returns_the_image(running: Running) -> None:
    body = attacked(running, png(5), attack="pgd", steps="3")
    response = running.client.post(
        "/attack?attack=pgd&steps=3", content=png(5), headers={"Accept": "image/png"}
    )
    assert response.headers["Content-Type"] == "image/png"
    assert response.content == base64.b64decode(body["results"][0]["adversarial_png"])
    assert Image.open(io.BytesIO(response.content)).size == (32, 32)
    assert response.headers["X-Attack"] == "pgd-3"
    assert response.headers["X-Before"] == body["before"]["label"]
    assert response.headers["X-After"] == body["results"][0]["after"]["label"]
    assert response.headers["X-Success"] == str(body["results"][0]["success"]).lower()
    assert response.headers["X-Model-SHA256"] == body["model_sha256"]
    assert float(response.headers["X-Linf"]) <= 8 / 255 + 1e-6


def test_accept_png_needs_one_attack(running: Running) -> None:
    response = running.client.post("/attack", content=png(), headers={"Accept": "image/png"})
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == "attack"


def test_attack_that_needs_more_classes_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "pair.pt"
    write_checkpoint(path, classes=("cat", "dog"))
    with serving(Settings(checkpoint=path, threads=1, device="cpu")) as running:
        query = {"attack": ["apgd-ce", "apgd-dlr"], "steps": "2"}
        labels = np.arange(4) % 2
        for response in (
            running.client.post("/attack", content=png(), params=query),
            running.client.post("/evaluate", content=labeled(4, labels=labels), params=query),
        ):
            assert response.status_code == 422
            (error,) = response.json()["errors"]
            assert (error["field"], error["got"]) == ("attack", "apgd-dlr, which needs 3")
            assert "the 2 classes of the model" in error["expected"]
        attacked(running, png(), attack="apgd-ce", steps="2")


@pytest.mark.parametrize(
    ("name", "targeted", "needed"),
    [("apgd-dlr", False, 3), ("apgd-dlr", True, 4), ("apgd-ce", True, 2), ("autoattack", False, 2)],
)
def test_classes_that_an_attack_needs(name: str, targeted: bool, needed: int) -> None:
    assert resolve_attack(name, ThreatModel(eps=0.1)).classes_needed(targeted=targeted) == needed


def test_attack_past_its_deadline_returns_504_and_stops(checkpoint) -> None:
    settings = Settings(checkpoint=checkpoint, threads=1, device="cpu", deadline_seconds=0.3)
    with serving(settings) as running, gated(running.service) as gate:
        response = running.client.post("/attack?attack=pgd&steps=50", content=png())
        assert response.status_code == 504
        assert response.json()["title"] == "Deadline exceeded"
        gate.open.set()
        until(lambda: not gate.waiting)
        calls = gate.calls
        assert running.client.get("/livez").status_code == 200
        assert gate.calls == calls <= 1  # a slow machine may not have begun


def test_attack_stops_when_its_client_disconnects(running: Running) -> None:
    import socket

    with gated(running.service) as gate:
        data = png()
        head = (
            "POST /attack?attack=pgd&steps=100 HTTP/1.1\r\nHost: x\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        ).encode()
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + data)
            until(lambda: gate.waiting)
        until(lambda: running.service.in_flight.count == 0)
        gate.open.set()
        until(lambda: not gate.waiting)
        assert predicted(running, png())["index"] is not None
        # The step it was in, and the prediction after it.
        assert gate.calls == 2


def test_attack_leaves_the_served_model_unchanged(running: Running) -> None:
    """No attack leaves gradients or another mode behind in the served model."""
    classifier = running.service.models.current.exact()
    attacked(running, png(), steps="2")
    assert not any(module.training for module in classifier.modules())
    assert all(p.grad is None and not p.requires_grad for p in classifier.parameters())
    assert torch.is_grad_enabled()

"""The Open Inference Protocol gives the results of /predict in its own format."""

import json
import struct
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor

from app.http import open_inference_codec as codec
from app.settings import Settings
from robust.checkpoint import load_checkpoint
from robust.images import to_float
from robust.prediction import predict
from tests.support.serving import CLASSES, Running, gated, pixels, png, serving, until

INFER = "/v2/models/robust/infer"


def tensor(images: Tensor, datatype: str = "UINT8", *, flat: bool = True) -> dict[str, Any]:
    values = images if datatype == "UINT8" else to_float(images)
    data = (values.flatten() if flat else values).tolist()
    return {"name": "images", "datatype": datatype, "shape": list(images.shape), "data": data}


def infer(running: Running, **body: Any) -> dict[str, Any]:
    response = running.client.post(INFER, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    assert answer["model_name"] == "robust"
    assert answer["model_version"] == response.headers["X-Model-SHA256"]
    return answer


def expected(checkpoint: Any, images: Tensor) -> Tensor:
    return predict(load_checkpoint(checkpoint).classifier, to_float(images))


def error(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["X-Request-ID"]
    body = response.json()
    assert set(body) == {"error"}
    return str(body["error"])


@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
@pytest.mark.parametrize("flat", [True, False])
def test_response_equals_the_librarys_logits(
    running: Running, checkpoint: Any, datatype: str, flat: bool
) -> None:
    images = pixels(3, n=3)
    answer = infer(running, inputs=[tensor(images, datatype, flat=flat)], id="mine")
    assert answer["id"] == "mine"
    outputs = {output["name"]: output for output in answer["outputs"]}
    rows = expected(checkpoint, images)
    assert outputs["probabilities"]["shape"] == [3, 10]
    assert outputs["probabilities"]["datatype"] == "FP32"
    assert outputs["probabilities"]["data"] == pytest.approx(rows.flatten().tolist(), abs=2e-4)
    indices = rows.argmax(dim=1).tolist()
    assert (outputs["index"]["datatype"], outputs["index"]["data"]) == ("INT64", indices)
    assert outputs["label"]["datatype"] == "BYTES"
    assert outputs["label"]["data"] == [CLASSES[index] for index in indices]


def test_float_images_are_not_rounded(running: Running, checkpoint: Any) -> None:
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    data = {**tensor(pixels()), "datatype": "FP32", "data": x.flatten().tolist()}
    answer = infer(running, inputs=[data], outputs=[{"name": "probabilities"}])
    (output,) = answer["outputs"]
    classifier = load_checkpoint(checkpoint).classifier
    exact = predict(classifier, x)[0]
    rounded = predict(classifier, (x * 255).round() / 255)[0]
    got = torch.tensor(output["data"])
    assert float((got - exact).abs().max()) < 0.1 * float((rounded - exact).abs().max())


def test_uint8_and_float_images_share_a_batch(running: Running, checkpoint: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    kinds = ["UINT8", "UINT8", "FP32", "UINT8"]
    with gated(running.service) as gate, ThreadPoolExecutor(4) as pool:
        answers = []
        for seed, kind in enumerate(kinds):
            answers.append(pool.submit(infer, running, inputs=[tensor(pixels(seed), kind)]))
            if not seed:
                until(lambda: gate.waiting)
        value = running.service.metrics.registry.get_sample_value
        until(lambda: value("robust_queued_forwards", {"kind": "predict"}) == len(kinds))
        gate.open.set()
        got = [future.result() for future in answers]
        assert gate.batches == [1, 3]
    for seed, answer in enumerate(got):
        row = expected(checkpoint, pixels(seed)).flatten().tolist()
        assert answer["outputs"][0]["data"] == pytest.approx(row, abs=2e-4)


@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
def test_binary_tensor_data(running: Running, checkpoint: Any, datatype: str) -> None:
    images = pixels(7, n=2)
    values = images if datatype == "UINT8" else to_float(images)
    raw = values.numpy().tobytes()
    head = tensor(images, datatype) | {"parameters": {"binary_data_size": len(raw)}}
    del head["data"]
    text = json.dumps(
        {
            "inputs": [head],
            "outputs": [
                {"name": "index"},
                {"name": "probabilities", "parameters": {"binary_data": True}},
                {"name": "label", "parameters": {"binary_data": True}},
            ],
        }
    ).encode()
    response = running.client.post(
        INFER, content=text + raw, headers={"Inference-Header-Content-Length": str(len(text))}
    )
    assert response.status_code == 200, response.text
    length = int(response.headers["Inference-Header-Content-Length"])
    index, probabilities, label = json.loads(response.content[:length])["outputs"]
    rest = response.content[length:]
    rows = expected(checkpoint, images)
    assert index["data"] == rows.argmax(dim=1).tolist()
    size = probabilities["parameters"]["binary_data_size"]
    assert np.frombuffer(rest[:size], "<f4") == pytest.approx(rows.flatten().numpy(), abs=2e-4)
    assert label["parameters"]["binary_data_size"] == len(rest) - size
    names, rest = [], rest[size:]
    while rest:
        (count,) = struct.unpack("<I", rest[:4])
        names.append(rest[4 : 4 + count].decode())
        rest = rest[4 + count :]
    assert names == [CLASSES[i] for i in index["data"]]


def test_server_and_model_metadata(running: Running) -> None:
    sha256 = running.service.models.current.sha256
    get = running.client.get
    assert get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert get("/v2/health/live").json() == {"live": True}
    assert get("/v2/health/ready").json() == {"ready": True}
    model = get("/v2/models/robust").json()
    assert model["platform"] == "pytorch_wide_resnet10_1"
    assert model["versions"] == [sha256]
    assert model["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 32, 32]}]
    answer = infer(running, inputs=[tensor(pixels(n=2))])
    for told, given in zip(model["outputs"], answer["outputs"], strict=True):
        assert (told["name"], told["datatype"]) == (given["name"], given["datatype"])
        assert [2, *told["shape"][1:]] == given["shape"]
    for path in ("/v2/models/robust", f"/v2/models/robust/versions/{sha256}"):
        assert get(path).json() == model
        assert get(f"{path}/ready").json() == {"name": "robust", "ready": True}
        response = running.client.post(f"{path}/infer", json={"inputs": [tensor(pixels())]})
        assert response.status_code == 200
    for way in ("", "/ready"):
        error(get(f"/v2/models/robust/versions/1{way}"), 404)


ONE = tensor(pixels())
SHORT = ONE | {"data": ONE["data"][1:]}
FLOATS = ONE | {"datatype": "FP32"}
NO_DATA = {name: value for name, value in ONE.items() if name != "data"}
WRONG: list[tuple[Any, str]] = [
    (b"", "JSON"),
    (b"{", "JSON"),
    (b"[" * 100_000, "JSON"),
    (b"\xff\xfe", "JSON"),
    ([], "request"),
    ({}, "inputs"),
    ({"inputs": []}, "inputs"),
    ({"inputs": [ONE, ONE]}, "inputs"),
    ({"inputs": [ONE | {"name": "x"}]}, "inputs.name"),
    ({"inputs": [ONE | {"datatype": "FP16"}]}, "inputs.datatype"),
    ({"inputs": [ONE | {"shape": [3, 32, 32]}]}, "shape"),
    ({"inputs": [ONE | {"shape": [1, 3, 32, 31]}]}, "shape"),
    ({"inputs": [ONE | {"shape": [0, 3, 32, 32]}]}, "shape"),
    ({"inputs": [ONE | {"shape": [65, 3, 32, 32]}]}, "shape"),
    ({"inputs": [ONE | {"shape": [-1, 3, 32, 32]}]}, "shape"),
    ({"inputs": [ONE | {"shape": [10**30, 3, 32, 32]}]}, ""),
    ({"inputs": [ONE | {"shape": "secret"}]}, "inputs.shape"),
    ({"inputs": [ONE | {"shape": [2, 3, 32, 32]}]}, "data"),
    ({"inputs": [SHORT]}, "data"),
    ({"inputs": [NO_DATA]}, "data"),
    ({"inputs": [SHORT | {"data": [*SHORT["data"], 256]}]}, "whole numbers"),
    ({"inputs": [SHORT | {"data": [*SHORT["data"], 0.5]}]}, "whole numbers"),
    ({"inputs": [SHORT | {"data": [*SHORT["data"], None]}]}, "whole numbers"),
    ({"inputs": [SHORT | {"data": [*SHORT["data"], [1, 2]]}]}, "data"),
    ({"inputs": [SHORT | {"data": [*SHORT["data"], {"secret": 1}]}]}, "data"),
    ({"inputs": [SHORT | {"data": [*SHORT["data"], "secret"]}]}, "data"),
    ({"inputs": [SHORT | {"data": [*SHORT["data"], 10**400]}]}, ""),
    ({"inputs": [FLOATS]}, "from 0 to 1"),
    ({"inputs": [FLOATS | {"data": [-0.001, *[0.5] * 3071]}]}, "from 0 to 1"),
    ({"inputs": [FLOATS | {"data": [1.001, *[0.5] * 3071]}]}, "from 0 to 1"),
    ({"inputs": [FLOATS | {"data": [float("nan"), *[0.5] * 3071]}]}, ""),
    ({"inputs": [ONE | {"parameters": {"binary_data_size": 5}}]}, "data"),
    ({"inputs": [ONE], "outputs": [{"name": "secret"}]}, "outputs"),
]


@pytest.mark.parametrize(("body", "told"), WRONG, ids=lambda value: str(value)[-40:])
def test_invalid_requests_get_the_protocols_error_format(
    running: Running, body: Any, told: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    text = error(running.client.post(INFER, content=content), 400)
    assert told in text
    assert "secret" not in text
    assert len(text) < 300


@pytest.mark.parametrize("item", [b"0", b"[]", b"{}", b'""'])
def test_too_many_values_are_rejected_before_parsing(
    running: Running, monkeypatch: pytest.MonkeyPatch, item: bytes
) -> None:
    monkeypatch.setattr(codec, "from_json", None)
    text = json.dumps({"inputs": [ONE | {"data": "items"}]}).encode()
    content = text.replace(b'"items"', b"[" + (item + b",") * 250_000 + item + b"]")
    assert "at most 196608 numbers" in error(running.client.post(INFER, content=content), 400)


def test_largest_request_in_nested_json_is_answered(running: Running) -> None:
    answer = infer(running, inputs=[tensor(pixels(n=64), flat=False)], outputs=[{"name": "index"}])
    assert answer["outputs"][0]["shape"] == [64]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 2.0])
def test_binary_floats_are_checked(running: Running, value: float) -> None:
    raw = np.full(3072, value, "<f4").tobytes()
    head = NO_DATA | {"datatype": "FP32", "parameters": {"binary_data_size": len(raw)}}
    text = json.dumps({"inputs": [head]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    response = running.client.post(INFER, content=text + raw, headers=headers)
    assert "from 0 to 1" in error(response, 400)


@pytest.mark.parametrize("length", ["x", "-1", "²", "99999999", "9" * 20])
def test_wrong_json_length_is_rejected(running: Running, length: str) -> None:
    headers = {"Inference-Header-Content-Length": length.encode("latin-1")}
    error(running.client.post(INFER, content=b"{}", headers=headers), 400)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/other", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("GET", INFER, 405),
    ],
)
def test_unknown_paths_get_the_protocols_error_format(
    running: Running, method: str, path: str, status: int
) -> None:
    error(running.client.request(method, path), status)


def test_paths_outside_v2_get_problem_json(running: Running) -> None:
    response = running.client.get("/v2x")
    assert response.headers["Content-Type"] == "application/problem+json"


def test_limits_apply_to_the_protocol(checkpoint: Any) -> None:
    settings = Settings(
        checkpoint=checkpoint, threads=1, device="cpu", api_keys="key", queue_limit=2,
        client_share=1.0,
        max_body_bytes=10 * 2**20,
    )  # fmt: skip
    with serving(settings) as running:
        assert running.client.get("/v2/health/live").status_code == 200
        assert running.client.get("/v2/health/ready").status_code == 200
        error(running.client.get("/v2/models/robust"), 401)
        running.client.headers["X-API-Key"] = "key"
        response = running.client.post(INFER, json={"inputs": [tensor(pixels(n=3))]})
        assert "2 images" in error(response, 400)  # as many as fit into the queue
        error(running.client.post(INFER, content=bytes(11 * 2**20)), 413)
        text = error(running.client.post(INFER, content=b" " * (9 * 2**20)), 413)
        assert "binary" in text
        assert running.client.post("/predict", content=png()).status_code == 200
        running.service.draining = True
        error(running.client.get("/v2/health/ready"), 503)
        error(running.client.get("/v2/models/robust/ready"), 503)
        response = running.client.post(INFER, json={"inputs": [tensor(pixels())]})
        assert int(response.headers["Retry-After"]) >= 1
        error(response, 503)


@pytest.mark.parametrize("name", ["classification", "class_count"])
def test_classification_parameter_returns_top_classes_as_text(name: str, running: Running) -> None:
    asked: list[dict[str, Any]] = [{"name": "probabilities", "parameters": {name: 2}}]
    body = {"inputs": [tensor(pixels(n=2))], "outputs": [*asked, {"name": "index"}]}
    top, index = running.client.post(INFER, json=body).json()["outputs"]
    assert (top["datatype"], top["shape"]) == ("BYTES", [2, 2])
    firsts = [item.split(":") for item in top["data"][::2]]
    assert [int(place) for _, place, _ in firsts] == index["data"]
    assert all(0 < float(value) <= 1 for value, _, _ in firsts)
    asked[0]["name"] = "label"
    assert name in error(running.client.post(INFER, json=body), 400)

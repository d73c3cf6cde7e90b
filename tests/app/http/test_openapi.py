"""The OpenAPI document: its routes, statuses and examples match the service."""

from typing import Any

import jsonschema
import pytest

from app.application import create_app
from app.http.auth import is_public
from app.settings import Settings
from tests.support.serving import Running, labeled, png

DOCUMENT = create_app(Settings(device="cpu")).openapi()
OPERATIONS = [
    pytest.param(method, path, operation, id=f"{method} {path}")
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
]
# Of a kind that has no schema to hold it against.
TEXT = {"text/event-stream", "text/plain", "image/png"}


def check(value: Any, schema: dict[str, Any]) -> None:
    whole = {**schema, "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(whole).validate(value)


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS)
def test_every_response_has_a_valid_example(
    method: str, path: str, operation: dict[str, Any]
) -> None:
    for status, response in operation["responses"].items():
        for kind, content in response["content"].items():
            if kind == "image/png":
                continue
            assert "example" in content, (status, kind)
            if kind not in TEXT:
                check(content["example"], content["schema"])
                assert int(status) < 400 or content["example"].get("status", 0) in (0, int(status))


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS)
def test_operations_are_complete(method: str, path: str, operation: dict[str, Any]) -> None:
    assert operation["summary"]
    assert ("401" in operation["responses"]) != is_public(path)
    assert (operation.get("security") == []) == is_public(path)
    described = {item["name"] for item in operation.get("parameters", [])}
    assert described == {name.strip("{}") for name in path.split("/") if name.startswith("{")}
    for status in ("429", "503"):
        if status in operation["responses"]:
            assert "Retry-After" in operation["responses"][status]["headers"]


@pytest.mark.parametrize("path", ["/predict", "/attack", "/evaluate"])
def test_swagger_shows_a_file_picker(path: str) -> None:
    form = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"]
    file = form["schema"]["properties"]["file"]
    assert {"type": "string", "format": "binary"} in (file, file.get("items"))


def test_open_inference_example_is_answered(running: Running) -> None:
    path = "/v2/models/robust/infer"
    body = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    check(body["example"], body["schema"])
    response = running.client.post(path, json=body["example"])
    assert response.status_code == 200, response.text


def test_responses_match_the_schema(running: Running) -> None:
    client = running.client
    job = client.post("/evaluate?attack=fgsm", files={"file": labeled(5)})
    id = job.json()["id"]
    asked = [
        ("/predict", client.post("/predict", content=png())),
        ("/attack", client.post("/attack?attack=fgsm", content=png())),
        ("/evaluate", job),
        ("/evaluate/{id}", client.get(f"/evaluate/{id}")),
        ("/evaluate/{id}", client.delete(f"/evaluate/{id}")),
        *[
            (path, client.get(path))
            for path in DOCUMENT["paths"]
            if "get" in DOCUMENT["paths"][path] and "{" not in path and path != "/metrics"
        ],
        ("/predict", client.post("/predict", content=b"no image")),
        ("/attack", client.post("/attack?eps=-1", content=png())),
        ("/evaluate/{id}", client.get("/evaluate/none")),
        ("/v2/models/robust/infer", client.post("/v2/models/robust/infer", content=b"")),
    ]
    for path, response in asked:
        operation = DOCUMENT["paths"][path][response.request.method.lower()]
        described = operation["responses"][str(response.status_code)]["content"]
        kind = response.headers["Content-Type"].partition(";")[0]
        check(response.json(), described[kind]["schema"])

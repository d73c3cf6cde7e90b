"""Every bad request gets the same error format, and none brings a 5xx."""

import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.settings import Settings
from tests.support.serving import Running, gated, jpeg, labeled, png, serving, until

IMAGE = {"file": png()}
SECRET = "sEcReT"
ROOT = Path(__file__).parents[3]


def assert_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """The canonical shape of an error."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert set(body) == {
        "type", "title", "status", "detail", "instance", "request_id", "errors"
    }  # fmt: skip
    assert body["status"] == status
    assert re.fullmatch(r"urn:robust:problem:[a-z-]+", body["type"])
    assert body["request_id"] == response.headers["X-Request-ID"]
    assert body["instance"] == f"urn:robust:request:{body['request_id']}"
    assert body["title"]
    assert body["detail"]
    for error in body["errors"]:
        assert set(error) == {"field", "expected", "got"}
        assert all(error.values())
    assert SECRET not in response.text
    assert "Traceback" not in response.text
    assert str(ROOT) not in response.text
    return body


def form(**fields: Any) -> dict[str, Any]:
    return {"files": IMAGE, "data": fields}


BAD_PARAMETERS = [
    ("/attack", {"eps": "-1"}, "eps", "-1"),
    ("/attack", {"eps": "banana" + SECRET}, "eps", "text of 12 characters"),
    ("/attack", {"eps": "nan"}, "eps", "text of 3 characters"),
    ("/attack", {"eps": "1/0"}, "eps", "1/0"),
    ("/attack", {"eps": "0.9"}, "eps", "0.9"),
    ("/attack", {"eps": "11", "norm": "l2"}, "eps", "11"),
    ("/attack", {"eps": ["0.1", "0.2"]}, "eps", "2"),
    ("/attack", {"steps": "1000000000"}, "steps", "1000000000"),
    ("/attack", {"steps": "9" * 4096}, "steps", "text of 4096 characters"),
    ("/attack", {"steps": "0"}, "steps", "0"),
    ("/attack", {"steps": "2.5"}, "steps", "2.5"),
    ("/attack", {"attack": "pgd-5000"}, "attack", "5000"),
    ("/attack", {"attack": "fgsm", "steps": "3"}, "steps", "only fgsm"),
    ("/evaluate", {"attack": ["fgsm", "audit"], "steps": "3"}, "steps", "only fgsm, audit"),
    ("/attack", {"attack": "pgd-50", "steps": "20"}, "steps", "20"),
    ("/evaluate", {"attack": ["fgsm", "pgd-50"], "steps": "20"}, "steps", "20"),
    ("/attack", {"attack": SECRET}, "attack", "text of 6 characters"),
    ("/attack", {"attack": ["pgd"] * 9}, "attack", "9 values"),
    ("/attack", {"norm": SECRET}, "norm", "text of 6 characters"),
    ("/attack", {"restarts": "11"}, "restarts", "11"),
    ("/attack", {"attack": ["pgd-200", "pgd-199", "pgd-198"], "restarts": "10"}, "attack", None),
    ("/attack", {"attack": "autoattack"}, "attack", "10166"),
    (
        "/attack",
        {"attack": ["pgd", "apgd-ce", "apgd-dlr"], "steps": "200", "restarts": "10"},
        "steps",
        None,
    ),
    ("/attack", {"seed": "-1"}, "seed", "-1"),
    ("/attack", {"label": "10"}, "label", "10"),
    ("/attack", {"label": SECRET}, "label", "text of 6 characters"),
    ("/attack", {"target": "-1"}, "target", "-1"),
    ("/attack", {"label": "cat", "target": "3"}, "target", "the label itself"),
    ("/attack", {SECRET: "1"}, "unknown", "another one"),
    ("/predict", {"top_k": "0"}, "top_k", "0"),
    ("/predict", {"top_k": "many"}, "top_k", "text of 4 characters"),
    ("/predict", {"file": "text"}, "file", None),
    ("/evaluate", {"limit": "0"}, "limit", "0"),
    ("/evaluate", {"dataset": "x"}, "file", "both"),
]


@pytest.mark.parametrize(("path", "fields", "field", "got"), BAD_PARAMETERS)
def test_bad_parameters(
    running: Running, path: str, fields: dict[str, Any], field: str, got: str | None
) -> None:
    body = assert_problem(running.client.post(path, files=IMAGE, data=fields), 422)
    assert [error["field"] for error in body["errors"]] == [field]
    assert got is None or body["errors"][0]["got"] == got


def test_zero_steps_is_not_reported_as_an_unknown_attack(running: Running) -> None:
    fields = {"attack": ["pgd-0", "nothing"]}
    body = assert_problem(running.client.post("/attack", files=IMAGE, data=fields), 422)
    no_steps, unknown = body["errors"]
    assert (no_steps["field"], no_steps["expected"]) == ("attack", "an attack with at least 1 step")
    assert unknown["expected"].startswith("an attack out of fgsm, pgd,")


def test_steps_given_twice_with_the_same_value_are_accepted(running: Running) -> None:
    fields = {"attack": "pgd-2", "steps": "2"}
    assert running.client.post("/attack", files=IMAGE, data=fields).status_code == 200


BOMB = png()[:16] + (30_000).to_bytes(4, "big") * 2 + png()[24:]

BAD_REQUESTS: list[tuple[str, str, dict[str, Any], int]] = [
    ("POST", "/predict", {}, 400),
    ("POST", "/predict", {"files": {"file": b""}}, 400),
    ("POST", "/predict", {"files": {"file": png()[:300]}}, 400),
    ("POST", "/predict", {"files": {"file": jpeg()[:300]}}, 400),
    ("POST", "/predict", {"files": {"file": b"GIF89a" + bytes(50)}}, 415),
    ("POST", "/predict", {"content": SECRET}, 415),
    ("POST", "/predict", {"files": {"file": BOMB}}, 413),
    ("POST", "/predict", {"files": {"image": png()}}, 422),
    ("POST", "/predict", {"files": [("file", png())] * 65}, 422),
    ("POST", "/attack", {"files": [("file", png())] * 2}, 422),
    ("POST", "/predict", {"data": {"file": "text"}}, 422),
    (
        "POST",
        "/predict",
        {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
        400,
    ),
    (
        "POST",
        "/predict",
        {"content": b"--b\r\nno", "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
        400,
    ),
    (
        "POST",
        "/predict",
        {
            "content": b'--b\r\nContent-Disposition: form-data; name="\xff\xfe"\r\n\r\n.\r\n--b--',
            "headers": {"Content-Type": "multipart/form-data; boundary=b; charset=idna"},
        },
        422,
    ),
    ("POST", "/predict", {"files": IMAGE, "data": {f"f{i}": "1" for i in range(99)}}, 400),
    ("POST", "/evaluate", {}, 422),
    ("POST", "/evaluate", {"files": {"file": png()}}, 422),
    ("GET", f"/evaluate/{SECRET}", {}, 404),
    ("GET", f"/evaluate/{SECRET}/events", {}, 404),
    ("DELETE", f"/evaluate/{SECRET}", {}, 404),
    ("GET", f"/{SECRET}", {}, 404),
    ("GET", "/docs/assets/../../etc/passwd", {}, 404),
    ("GET", "/predict", {}, 405),
    ("PUT", "/evaluate/x", {}, 405),
    ("BREW", "/model", {}, 400),  # not a method of HTTP
]


@pytest.mark.parametrize(
    ("method", "path", "request_", "status"), BAD_REQUESTS, ids=lambda value: str(value)[:30]
)
def test_bad_requests(
    running: Running, method: str, path: str, request_: dict[str, Any], status: int
) -> None:
    response = running.client.request(method, path, **request_)
    assert_problem(response, status)
    if status == 405:
        assert response.headers["Allow"]


@pytest.mark.parametrize("ending", [b"", b"--b", b"--b-", b"--b\r\nContent-Disp"])
def test_truncated_form_is_rejected(running: Running, ending: bytes) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%s\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    whole = part % png() + part % png(1)
    response = running.client.post("/predict", content=whole + ending, headers=headers)
    assert "closing boundary" in assert_problem(response, 400)["detail"]
    response = running.client.post("/predict", content=whole + b"--b--", headers=headers)
    assert [result["image"] for result in response.json()["results"]] == [0, 1]


def test_bad_images_are_named_by_position(running: Running) -> None:
    files = [("file", png()), ("file", b""), ("file", png()), ("file", b"GIF89a")]
    body = assert_problem(running.client.post("/predict", files=files), 400)
    assert [error["field"] for error in body["errors"]] == ["file[1]", "file[3]"]


def test_command_in_an_uploaded_pickle_does_not_run(running: Running, tmp_path: Any) -> None:
    import os
    import pickle

    import torch

    target = tmp_path / "ran"

    class Bad:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {target}",)

    torch.save({"images": Bad(), "labels": Bad()}, tmp_path / "bad.pt")
    for data in ((tmp_path / "bad.pt").read_bytes(), pickle.dumps(Bad())):
        assert_problem(running.client.post("/evaluate", files={"file": data}), 422)
    assert not target.exists()


def test_internal_error_is_a_500_without_details(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(running.service.engine, "predict", broken)
    response = running.client.post(
        "/predict", content=png(), headers={"X-Request-ID": "my-request"}
    )
    assert assert_problem(response, 500)["request_id"] == "my-request"
    assert SECRET in caplog.text  # the log says why


def test_unsafe_request_id_is_replaced(running: Running) -> None:
    given = "x" * 65
    response = running.client.get("/livez", headers={"X-Request-ID": given})
    assert re.fullmatch("[0-9a-f]{32}", response.headers["X-Request-ID"])


@pytest.fixture(scope="module")
def small(checkpoint: Any) -> Any:
    limits = Settings(
        checkpoint=checkpoint,
        threads=1,
        device="cpu",
        max_body_bytes=20_000,
        max_held_bytes=30_000,
        queue_limit=4,
        max_requests=2,
        client_share=1.0,
        deadline_seconds=60,
        max_upload_images=5,
    )
    with serving(limits) as running:
        yield running


@pytest.fixture
def short_upload_timeout(small: Running, monkeypatch: pytest.MonkeyPatch) -> Running:
    """`small`, which now waits for bodies half a second."""
    changed = small.service.settings.model_copy(update={"upload_seconds": 0.5})
    monkeypatch.setattr(small.service, "settings", changed)
    return small


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (413, b"Content-Length: 1000000000"),
        (415, b"Transfer-Encoding: chunked\r\nContent-Encoding: br"),
    ],
)
def test_body_rejected_by_its_headers_is_not_read(
    small: Running, status: int, headers: bytes
) -> None:
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n" % headers)
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"application/problem+json" in answer
    assert b"connection: close" in answer.lower()


def test_oversized_chunked_body_is_rejected_while_reading(small: Running) -> None:
    sent = 0

    def chunks() -> Any:
        nonlocal sent
        while sent < 100_000:
            sent += 1
            time.sleep(0.0005)
            yield bytes(1000)

    try:
        assert_problem(small.client.post("/predict", content=chunks()), 413)
    except httpx.TransportError:  # closed while we were still writing: cut off all the same
        pass
    assert sent < 50_000


def test_slow_body_times_out_with_408(short_upload_timeout: Running) -> None:
    host, port = short_upload_timeout.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_stalled_chunked_body_times_out_with_408(short_upload_timeout: Running) -> None:
    host, port = short_upload_timeout.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head + b"3\r\nabc\r\n")
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_request_larger_than_the_queue_is_422(small: Running) -> None:
    assert_problem(small.client.post("/attack?attack=pgd&steps=2", content=png()), 422)
    assert_problem(small.client.post("/predict", files=[("file", png())] * 5), 422)
    assert small.client.post("/predict", files=[("file", png())] * 4).status_code == 200


def test_requests_over_max_requests_get_429(small: Running) -> None:
    with gated(small.service) as gate, ThreadPoolExecutor(2) as pool:
        ask = partial(httpx.post, f"{small.url}/predict", content=png(), timeout=120)
        asking = [pool.submit(ask) for _ in range(2)]
        until(lambda: small.service.shares.slots == 2)
        response = small.client.post("/predict", content=png())
        assert_problem(response, 429)
        assert int(response.headers["Retry-After"]) >= 1
        assert response.headers["RateLimit-Policy"] == '"places";q=2;qu="concurrent-requests"'
        assert response.headers["RateLimit"].startswith('"places";r=0;t=')
        assert small.client.get("/readyz").status_code == 200
        gate.open.set()
        assert {item.result().status_code for item in asking} == {200}
    until(lambda: small.service.shares.slots == 0)  # given back after the answer


def test_requests_reading_their_bodies_hold_no_slot(small: Running) -> None:
    host, port = small.url.removeprefix("http://").split(":")
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    slow = [socket.create_connection((host, int(port))) for _ in range(20)]
    try:
        for connection in slow:
            connection.sendall(head + b"x")
        until(lambda: small.service.in_flight.posts == 20)
        response = small.client.post("/predict", content=png())
        assert response.status_code == 200
        assert response.headers["RateLimit"] == '"places";r=2'
    finally:
        for connection in slow:
            connection.close()
    until(lambda: small.service.in_flight.posts == 0)


def test_requests_waiting_for_a_job_hold_no_slot(
    small: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_flight, shares, jobs = small.service.in_flight, small.service.shares, small.service.jobs
    waiting, ended = [], jobs.ended

    async def watched(job: Any, seconds: float) -> Any:
        waiting.append((in_flight.posts, shares.bytes, shares.slots))
        return await ended(job, seconds)

    monkeypatch.setattr(jobs, "ended", watched)
    with gated(small.service) as gate, ThreadPoolExecutor(3) as pool:
        ask = {"content": labeled(3), "headers": {"Prefer": "wait=60"}, "timeout": 120}
        asking = []
        for count in (1, 2):  # one by one, as reading the set does take one of the two places
            asking.append(pool.submit(httpx.post, f"{small.url}/evaluate?attack=fgsm", **ask))
            until(lambda n=count: len(waiting) == n)
        assert waiting == [(1, 0, 0), (2, 0, 0)]
        # Both may wait, as many as one client may watch; another one is answered at once.
        third = httpx.post(f"{small.url}/evaluate?attack=fgsm", **ask)
        assert (third.status_code, "Preference-Applied" in third.headers) == (202, False)
        gate.open.set()
        assert {item.result().status_code for item in asking} == {200}


def test_chunk_extensions_count_toward_the_body_size(small: Running) -> None:
    host, port = small.url.removeprefix("http://").split(":")
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        connection.sendall(head)
        sent = 0
        try:
            while sent < 10_000_000:
                sent += connection.send(b"1;" + b"x" * 8000 + b"\r\ny\r\n")
            answer = b""
        except OSError:
            answer = b"HTTP/1.1 413 "
        assert sent < 5_000_000  # what the kernel holds of it, too
        try:
            answer = connection.recv(13) or answer
        except OSError:
            pass
    assert answer == b"HTTP/1.1 413 "


def test_total_body_bytes_are_limited(small: Running) -> None:
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 19999\r\n\r\n")
        connection.sendall(bytes(19_990))
        until(lambda: small.service.shares.bytes == 19_990)
        response = small.client.post("/predict", content=bytes(15_000))
        assert_problem(response, 429)
        assert int(response.headers["Retry-After"]) >= 1
        assert small.client.post("/predict", content=png()).status_code == 200
    until(lambda: small.service.in_flight.count == 0)
    assert small.service.shares.bytes == 0


def test_dataset_with_too_many_images_is_rejected(small: Running) -> None:
    body = assert_problem(small.client.post("/evaluate", files={"file": labeled(6)}), 422)
    assert body["errors"][0]["field"] == "file"


def test_draining_service_rejects_new_work(small: Running) -> None:
    small.service.draining = True
    try:
        for method, path in (("POST", "/predict"), ("GET", "/readyz")):
            response = small.client.request(method, path)
            assert_problem(response, 503)
            assert int(response.headers["Retry-After"]) >= 1
        assert small.client.get("/livez").status_code == 200
    finally:
        small.service.draining = False


def test_openapi_lists_every_error(running: Running) -> None:
    document = running.client.get("/openapi.json").json()
    problem = document["components"]["schemas"]["Problem"]
    assert set(problem["properties"]) >= {"type", "title", "status", "detail", "errors"}
    for path in ("/predict", "/attack", "/evaluate"):
        responses = document["paths"][path]["post"]["responses"]
        assert {"400", "413", "422", "429", "503"} <= set(responses)
        assert "application/problem+json" in responses["422"]["content"]
        form = document["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"]
        assert "file" in form["schema"]["properties"]
    # Every reference leads somewhere.
    for name in re.findall(r"#/components/schemas/(\w+)", json.dumps(document)):
        assert name in document["components"]["schemas"]

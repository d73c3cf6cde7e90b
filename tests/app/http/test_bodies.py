"""Formats of a request body: accepted, or rejected by name."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import zlib
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message

from app.http.compression import PIECE_BYTES, Inflater
from app.http.uploads import BASE64_PIECE, Upload, read_upload
from tests.app.http.test_errors import assert_problem
from tests.support.faults import Peak, unharmed
from tests.support.serving import Running, labeled, pixels, png

DATA_URL = "data:image/png;base64," + base64.b64encode(png()).decode()
TEXT = base64.b64encode(png()).decode()
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
JSON = {"Content-Type": "application/json"}
RAW_DEFLATE = zlib.compressobj(wbits=-15)


def part(disposition: str, data: bytes) -> bytes:
    head = f"--b\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode()
    return head + data + b"\r\n--b--\r\n"


def large_png() -> bytes:
    """A PNG of some 90 KB."""
    from robust.images import encode_png

    return encode_png(pixels(seed=3, n=40).permute(1, 0, 2, 3).reshape(3, 40 * 32, 32))


def ask(running: Running, path: str = "/predict", **request: Any) -> list[Any]:
    response = running.client.post(path, **request)
    assert response.status_code in (200, 202), response.text
    results: list[Any] = response.json()["results"]
    return results


@pytest.mark.parametrize(
    "request_",
    [
        {"content": part('name="file"', png()), "headers": FORM},
        {"content": part('name=file; filename=""', png()), "headers": FORM},
        {"content": part('name="file"', DATA_URL.encode()), "headers": FORM},
        {"content": DATA_URL.encode()},
        {"json": {"image": TEXT}},
        {"json": {"image": DATA_URL, "top_k": 5}},
        {"json": {"images": [TEXT], "top_k": "5"}},
        {"content": gzip.compress(png()), "headers": {"Content-Encoding": "gzip"}},
        {"content": zlib.compress(png()), "headers": {"Content-Encoding": "deflate"}},
        {
            "content": RAW_DEFLATE.compress(png()) + RAW_DEFLATE.flush(),
            "headers": {"Content-Encoding": "deflate"},
        },
        {
            "content": gzip.compress(json.dumps({"image": TEXT}).encode()),
            "headers": {"Content-Encoding": "gzip", **JSON},
        },
        {"content": png(), "headers": {"Content-Encoding": "identity"}},
        {"content": png(), "headers": JSON},
    ],
)
def test_every_body_format_gives_the_same_prediction(
    running: Running, request_: dict[str, Any]
) -> None:
    assert ask(running, **request_) == ask(running, content=png())


@pytest.mark.parametrize("declared", [b"application/octet-stream", b"application/json"])
def test_decoding_large_base64_does_not_block_other_requests(declared: bytes) -> None:
    image = bytes(range(256)) * 2**14  # 4 MiB
    text = base64.b64encode(image)
    is_json = declared == b"application/json"
    body = b'{"image": "%s"}' % text if is_json else b"data:image/png;base64," + text
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def run() -> Upload:
        scope = {"type": "http", "query_string": b"", "headers": [(b"content-type", declared)]}
        task = asyncio.create_task(others())
        try:
            return await read_upload(Request(scope, receive), max_files=1)
        finally:
            task.cancel()

    assert asyncio.run(run()).files == [image]
    assert turns >= len(text) // BASE64_PIECE


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_body_may_arrive_byte_by_byte(encoding: str) -> None:
    body = gzip.compress(b"pixels") if encoding == "gzip" else zlib.compress(b"pixels")
    inflater = Inflater(encoding)
    assert b"".join(inflater.inflate(bytes([byte])) for byte in body) == b"pixels"
    assert inflater.complete


def test_part_without_a_filename_may_have_any_size(running: Running) -> None:
    data = large_png()
    assert len(data) > 50_000
    expected = ask(running, content=data)
    assert ask(running, content=part('name="file"', data), headers=FORM) == expected


def test_parameters_may_be_json(running: Running) -> None:
    body = {"image": TEXT, "attack": ["fgsm"], "eps": "4/255", "seed": 1}
    (result,) = ask(running, "/attack", json=body)
    assert result["parameters"]["eps_text"] == "4/255"
    set_ = base64.b64encode(labeled(3, seed=8)).decode()
    response = running.client.post("/evaluate", json={"file": set_, "attack": "fgsm"})
    assert response.status_code == 202
    running.client.delete(response.headers["Location"])


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ({"content": png(), "headers": {"Content-Type": "multipart/form-data"}}, 400, "boundary"),
        ({"content": part('name="file"', b"horse.jpg"), "headers": FORM}, 422, "-F file=@NAME"),
        ({"json": {"image": "?"}}, 422, "base64"),
        ({"json": {"image": 3}}, 422, "base64"),
        ({"json": {"image": TEXT, "eps": {"a": 1}}}, 422, "text or a number"),
        ({"json": {"image": TEXT, "picture": TEXT}}, 422, "one of the parameters"),
        ({"content": b'{"image": ', "headers": JSON}, 400, "JSON"),
        ({"json": {"image": TEXT, "top_k": [0] * 2000}}, 400, "1000 values"),
        ({"content": b"data:image/png,abc"}, 422, "base64"),
        # Padding within the text, at the end of a piece.
        ({"json": {"image": "A" * (BASE64_PIECE - 2) + "==AAAA"}}, 422, "base64"),
        ({"content": png(), "headers": {"Content-Encoding": "br"}}, 415, "gzip or deflate"),
        ({"content": png(), "headers": {"Content-Encoding": "gzip"}}, 400, "Content-Encoding"),
        (
            {"content": gzip.compress(png())[:-9], "headers": {"Content-Encoding": "gzip"}},
            400,
            "incomplete",
        ),
        (
            {"content": gzip.compress(png()) + b"x", "headers": {"Content-Encoding": "gzip"}},
            400,
            "after the end",
        ),
    ],
)
def test_unsupported_bodies_are_rejected_by_name(
    running: Running, request_: dict[str, Any], status: int, words: str
) -> None:
    assert words in json.dumps(assert_problem(running.client.post("/predict", **request_), status))


def test_decompression_bomb_is_rejected_while_decompressing(running: Running) -> None:
    squeeze = zlib.compressobj(wbits=31)
    bomb = b"".join(squeeze.compress(bytes(2**20)) for _ in range(256)) + squeeze.flush()
    assert len(bomb) < 300_000
    with unharmed(running):
        peak = Peak()
        response = running.client.post(
            "/predict", content=bomb, headers={"Content-Encoding": "gzip"}
        )
        assert_problem(response, 413)
        limit = running.service.settings.max_body_bytes
        assert peak.grown() < limit + 64 * PIECE_BYTES


def test_attack_outcome_is_one_of_three(running: Running) -> None:
    seen = running.client.post("/predict", content=png()).json()["results"][0]
    other = (seen["index"] + 1) % 10
    fields = {"attack": "fgsm", "eps": "0"}
    (still,) = ask(running, "/attack", files={"file": png()}, data=fields)
    assert (still["outcome"], still["success"]) == ("withstood", False)
    (wrong,) = ask(running, "/attack", files={"file": png()}, data={**fields, "label": str(other)})
    assert (wrong["outcome"], wrong["success"]) == ("already_wrong", False)
    strong = {"attack": "pgd", "eps": "64/255"}
    (broken,) = ask(running, "/attack", files={"file": png()}, data=strong)
    assert (broken["outcome"], broken["success"]) == ("broken", True)


@pytest.mark.parametrize(("eps", "status"), [("0", 200), ("1/255", 200), ("0.4/255", 422)])
def test_eps_below_one_8_bit_level_is_rejected(running: Running, eps: str, status: int) -> None:
    fields = {"attack": "fgsm", "eps": eps}
    response = running.client.post("/attack", files={"file": png()}, data=fields)
    assert response.status_code == status
    if status == 422:
        assert "no other 8-bit image" in assert_problem(response, 422)["detail"]


def test_json_null_means_the_parameter_is_omitted(running: Running) -> None:
    body = {"image": TEXT, "top_k": None, "images": [TEXT]}
    response = running.client.post("/predict", json={**body, "": None})
    assert response.status_code in (200, 422), response.text  # never a server error
    assert ask(running, json={"image": TEXT, "top_k": None}) == ask(running, json={"image": TEXT})

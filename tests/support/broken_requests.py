"""Requests with something wrong in them, the same ones in every run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random

from tests.support.serving import jpeg, labeled, png

NASTY = [
    b"", b" ", b"0", b"-1", b"1e999", b"nan", b"8/0", b"9" * 400, b"../../etc/passwd", b"%00",
    b"%ff", b"\xff\xfe", b"\xc3\x28", b"a" * 5000, b"'\";--", b"{}", b"[]", b"null", b"true",
    b"\r\n", b"*",
    b"pgd-99999999999999999999", b"fgsm,pgd", b"1_000", "\u0661".encode(), b"0x10", b"+5", b"\0",
]  # fmt: skip
METHODS = b"GET HEAD POST PUT DELETE OPTIONS PATCH TRACE BREW get".split()
PARAMETERS = b"top_k attack eps steps norm label seed limit dataset restarts \xff".split()
PATHS = [
    b"/predict", b"/attack", b"/evaluate", b"/evaluate/none", b"/evaluate/none/events",
    b"/evaluate/none/report", b"/v2/models/robust/infer", b"/v2/models/other/infer", b"/model",
    b"/metrics", b"/limits", b"/docs", b"/docs/assets/../../x", b"/openapi.json", b"//predict",
    b"/predict/", b"/%70redict", b"/predict%00", b"*", b"http://other/predict",
    b"/playground/%2e%2e/x", b"/" + b"a" * 3000, b"/evaluate/" + b"%ff" * 20,
]  # fmt: skip
HEADERS = [
    b"Content-Length: -1", b"Content-Length: 5, 5", b"Content-Length: 99999999999999999999",
    b"Content-Length: 0", b"Content-Length: 7", b"Content-Length: abc",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Transfer-Encoding: identity",
    b"Content-Encoding: gzip", b"Content-Type: application/json",
    b"Content-Type: multipart/form-data",
    b"Content-Type: multipart/form-data; boundary=", b"Content-Type: multipart/mixed; boundary=b",
    b'Content-Type: multipart/form-data; boundary="b', b"Content-Type: image/png; charset=idna",
    b"Content-Type: multipart/form-data; boundary=b; charset=rot13", b"Content-Type: \xff",
    b"Content-Type: multipart/form-data; boundary=" + b"b" * 200,
    b"Content-Type: application/x-www-form-urlencoded", b"Expect: 100-continue", b"Expect: x",
    b"Upgrade: websocket\r\nConnection: upgrade", b"Range: bytes=5-1", b"Range: bytes=0-0",
    b"Accept: image/png", b"Accept: application/pdf", b"Accept: \xff", b"If-None-Match: *",
    b"Prefer: wait=0", b"Prefer: wait=999999999", b"X-Request-ID: \xff",
    b"X-Request-ID: " + b"x" * 900,
    b"Idempotency-Key: ", b"Idempotency-Key: \xff", b"Authorization: Bearer \xff", b"Host: \xff",
    b"Origin: null", b"traceparent: 00-x", b"Inference-Header-Content-Length: 9",
    b"Inference-Header-Content-Length: -9", b"X-Long: " + b"x" * 70_000, b": no name", b"no colon",
    b"Folded: a\r\n b", b"Bare: a\nb", b"Nul: \0",
]  # fmt: skip


def form(fields: dict[bytes, bytes], file: bytes) -> bytes:
    parts = [
        b'Content-Disposition: form-data; name="%s"\r\n\r\n%s' % item for item in fields.items()
    ]
    head = b'Content-Disposition: form-data; name="file"; filename="a.png"\r\n'
    parts.append(head + b"Content-Type: image/png\r\n\r\n" + file)
    return b"".join(b"--b\r\n%s\r\n" % part for part in parts) + b"--b--\r\n"


def tensors() -> bytes:
    data = [128] * (3 * 32 * 32)
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 3, 32, 32], "data": data}
    return json.dumps({"inputs": [tensor], "outputs": [{"name": "label"}]}).encode()


def whole_requests() -> list[tuple[bytes, bytes, list[bytes], bytes]]:
    """Method, address, headers and body of requests with nothing wrong."""
    multipart, text = b"Content-Type: multipart/form-data; boundary=b", b"Content-Type: text/plain"
    return [
        (b"POST", b"/predict?top_k=3", [text], png()),
        (b"POST", b"/predict", [multipart], form({b"top_k": b"2"}, jpeg())),
        (b"POST", b"/attack?attack=fgsm&eps=8%2F255", [text], png()),
        (
            b"POST",
            b"/attack",
            [multipart, b"Accept: image/png"],
            form({b"attack": b"pgd-2", b"norm": b"l2", b"eps": b"0.5", b"target": b"3"}, png()),
        ),
        (
            b"POST",
            b"/evaluate",
            [multipart, b"Prefer: wait=1", b"Idempotency-Key: a"],
            form({b"attack": b"fgsm", b"limit": b"2"}, labeled(3)),
        ),
        (b"POST", b"/v2/models/robust/infer", [b"Content-Type: application/json"], tensors()),
        (b"GET", b"/evaluate", [], b""),
        (b"GET", b"/evaluate/none/events", [], b""),
        (b"DELETE", b"/evaluate/none", [], b""),
        (b"GET", b"/docs", [], b""),
    ]


def broken_requests(n: int, seed: int) -> Iterator[bytes]:
    random, whole = Random(seed), whole_requests()
    for _ in range(n):
        yield _broken(random, *random.choice(whole))


def _broken(random: Random, method: bytes, path: bytes, headers: list[bytes], body: bytes) -> bytes:
    """The request with one to three things wrong in its parts, and sometimes in its bytes."""
    headers, length, ending = list(headers), len(body), b"Connection: close"
    for _ in range(random.choice((1, 1, 2, 3))):
        match random.choice(("method", "path", "parameter", "header", "drop", "body", "boundary")):
            case "method":
                method = random.choice(METHODS)
            case "path":
                path = random.choice(PATHS)
            case "parameter":
                value = random.choice(NASTY).replace(b" ", b"+").replace(b"\r\n", b"%0d%0a")
                given = random.choice(PARAMETERS) + b"=" + value.replace(b"\0", b"%00")
                path += (b"&" if b"?" in path else b"?") + given
            case "header":
                headers.insert(random.randrange(len(headers) + 1), random.choice(HEADERS))
            case "drop" if headers:
                headers.pop(random.randrange(len(headers)))
            case "boundary":
                body = body.replace(
                    b"--b", random.choice((b"--c", b"--b--", b"--", b"", b"\n--b")), 1
                )
            case _:
                body = _with_flips(random, body, random.choice((1, 10)))
                body = body[: random.choice((len(body), random.randrange(len(body) + 1)))]
    sizes = [len(body)] * 20 + [length] * 6 + [len(body) + 1] * 3 + [10**12]
    framing = b"Content-Length: %d" % random.choice(sizes)
    if random.random() < 0.25:
        framing, body = b"Transfer-Encoding: chunked", _in_chunks(random, body)
    head = b"\r\n".join(
        [method + b" " + path + b" HTTP/1.1", b"Host: x", framing, ending, *headers]
    )
    if random.random() < 0.15:
        head = _with_flips(random, head, random.choice((1, 3)))
    return head + b"\r\n\r\n" + body


def _in_chunks(random: Random, body: bytes) -> bytes:
    right = b"%x" % len(body)
    size = random.choice([right] * 6 + [b"-1", b"0", b"g", b"f" * 18, b"1", right + b";a=b"])
    end = random.choice([b"\r\n0\r\n\r\n"] * 6 + [b"", b"\r\n", b"0"])
    return size + b"\r\n" + body + end


def _with_flips(random: Random, data: bytes, n: int) -> bytes:
    changed = bytearray(data)
    for _ in range(n if data else 0):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)

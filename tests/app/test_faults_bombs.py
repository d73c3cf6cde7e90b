"""Decompression bombs are rejected before they cost memory or time."""

from __future__ import annotations

import gzip
import io
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app.settings import Settings
from tests.robust.test_images import chunk
from tests.support.faults import Peak, unharmed
from tests.support.serving import Running, labeled, serving

MANY = 512 << 20


@pytest.fixture(scope="module")
def default(checkpoint: Path) -> Iterator[Running]:
    # No answer here may depend on how fast the machine is.
    settings = Settings(checkpoint=checkpoint, threads=1, device="cpu", deadline_seconds=300)
    with serving(settings) as running:
        yield running


def png_of(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join([header, *chunks, chunk(b"IEND", b"")])


def zeros(n: int) -> bytes:
    """`n` zero bytes, deflated piece by piece."""
    squeeze, piece = zlib.compressobj(1), bytes(1 << 20)
    return b"".join(squeeze.compress(piece) for _ in range(n >> 20)) + squeeze.flush()


def npz(n: int) -> tuple[bytes, int]:
    """A set of so many black images, and the bytes that it declares for them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as file:
            shape = f"({n}, 3, 32, 32)"
            header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
            file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
            piece = bytes(3072 * 100)
            for _ in range(n // 100):
                file.write(piece)
        labels = io.BytesIO()
        np.save(labels, np.zeros(n, dtype=np.int64))
        archive.writestr("labels.npy", labels.getvalue())
    return buffer.getvalue(), 3072 * n + 10 + len(header)


JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
INFER = "/v2/models/robust/infer"


def bombs() -> dict[str, tuple[str, dict[str, Any], set[int]]]:
    """What to send where, and which answers are right."""
    many, (honest, size) = zeros(MANY), npz(170_000)
    lying = honest.replace(struct.pack("<I", size), struct.pack("<I", 1_000_000))
    assert lying != honest
    return {
        "a size that is not there": ("/predict", {"content": png_of(60_000, 60_000)}, {413}),
        "just under the largest size": ("/predict", {"content": png_of(7_000, 7_000)}, {400}),
        "more pixels than the size": (
            "/predict",
            {"content": png_of(32, 32, chunk(b"IDAT", many))},
            {200, 400},
        ),
        **{
            name: ("/predict", {"content": png_of(32, 32, chunk(kind, b"k\0\0" + many))}, {400})
            for name, kind in (("text", b"zTXt"), ("a profile", b"iCCP"))
        },
        "an encoded body": (
            "/predict",
            {"content": gzip.compress(bytes(100_000_000)), "headers": {"Content-Encoding": "gzip"}},
            {413},
        ),
        "a set": ("/evaluate", {"content": honest}, {422}),
        "a set that lies": ("/evaluate", {"content": lying}, {422}),
        "deep JSON": (INFER, {"content": b"[" * 5_000_000, "headers": JSON}, {400}),
        "a long number": (
            INFER,
            {"content": b'{"inputs": [' + b"9" * 5_000_000 + b"]}", "headers": JSON},
            {400},
        ),
        "many fields": (
            "/predict",
            {
                "content": b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 250_000,
                "headers": FORM,
            },
            {400},
        ),
        "a long head of a part": (
            "/predict",
            {"content": b"--b\r\n" + b"A: b\r\n" * 3_000_000, "headers": FORM},
            {400},
        ),
    }


def test_bombs_are_rejected_without_allocating_their_size(default: Running) -> None:
    every = bombs()
    with unharmed(default):
        for name, (path, request, expected) in every.items():
            peak, began = Peak(), time.process_time()
            response = default.client.post(path, **request)
            assert response.status_code in expected, (name, response.text)
            grown = peak.grown() / 2**20
            # An encoded body is held until it is larger than any body may be.
            held = default.service.settings.max_body_bytes / 2**20 if "encoded" in name else 0
            assert grown < max(64, held + 8), (name, grown)
            assert time.process_time() - began < 5, name


def test_largest_datasets_are_read_one_at_a_time(default: Running) -> None:
    data, size = npz(80_000)  # not more than an upload may hold once inflated, but too many images

    def send(_: int) -> httpx.Response:
        return httpx.post(f"{default.url}/evaluate", content=data, timeout=120)

    with unharmed(default), ThreadPoolExecutor(3) as pool:
        peak = Peak()
        answers = pool.map(send, range(3))
        assert {response.status_code for response in answers} == {422}
        assert peak.grown() < 3.5 * size
        assert default.client.post("/evaluate?attack=fgsm", content=labeled(5)).status_code == 202

"""Decoding costs are estimated from the header, and the worst headers cost milliseconds."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robust.image_headers import MAX_SCANS, read_header
from robust.images import (
    ImageError,
    decode_image,
    fit_image,
    read_image,
)
from tests.support.images import decode_cost

MIB8 = 8 << 20
STATUS = Path("/proc/self/status")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, bits: int, color: int) -> bytes:
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    row = bytes(1 + (width * samples * bits + 7) // 8)
    head = chunk(b"IHDR", struct.pack(">2I5B", width, height, bits, color, 0, 0, 0))
    palette = chunk(b"PLTE", bytes(768)) if color == 3 else b""
    pixels = chunk(b"IDAT", zlib.compress(row * height))
    return b"\x89PNG\r\n\x1a\n" + head + palette + pixels + chunk(b"IEND", b"")


def with_scans(count: int, side: int) -> bytes:
    """A progressive JPEG whose last scan is repeated, `count` in all."""
    data = encoded(Image.new("L", (side, side)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * (count - data.count(b"\xff\xda")) + b"\xff\xd9"


SMALL = encoded(Image.new("RGB", (64, 64)), "JPEG")
HEAD = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", 32, 32, 8, 2, 0, 0, 0))
WORST = {
    "fill bytes": (b"\xff\xd8\xff" + b"\xff" * MIB8, "broken"),
    "empty tables": (b"\xff\xd8" + b"\xff\xdb\0\x02" * (MIB8 // 4), "too_large"),
    "stray bytes": (b"\xff\xd8\xff" + b"\xff\0" * (MIB8 // 2), "too_large"),
    "restart markers": (b"\xff\xd8" + b"\xff\xd0" * (MIB8 // 2), "too_large"),
    "starts of scans": (SMALL[:-2] + b"\xff\xda" * (MIB8 // 2), "too_large"),
    "empty IDATs": (HEAD + chunk(b"IDAT", b"") * (MIB8 // 12), "too_large"),
    "empty RIFF chunks": (
        b"RIFF\0\0\x80\0WEBPVP8X\x0a\0\0\0" + bytes(10) + b"abcd\0\0\0\0" * (MIB8 // 8),
        "too_large",
    ),
    "600 scans": (with_scans(600, 2000), "too_large"),
    "12,000 scans": (with_scans(12_000, 2000), "too_large"),
}


@pytest.mark.parametrize("name", WORST)
def test_worst_headers_are_rejected_in_milliseconds(name: str) -> None:
    data, kind = WORST[name]
    start = time.thread_time()
    for refuse in (lambda: decode_cost(data, size=32), lambda: read_image(data, 32)):
        with pytest.raises(ImageError) as caught:
            refuse()
        assert caught.value.kind == kind
    assert time.thread_time() - start < 3  # some 0.1 s at most; it was 5 to 11 s


def test_ordinary_progressive_jpegs_pass_and_the_scan_limit_is_inclusive() -> None:
    assert read_image(with_scans(MAX_SCANS, 64), 32).shape == (3, 32, 32)
    with pytest.raises(ImageError, match="at most 64 scans, found 65"):
        read_image(with_scans(MAX_SCANS + 1, 64), 32)
    photo = Image.effect_noise((300, 300), 50).convert("RGB")
    cost = decode_cost(encoded(photo, "JPEG", progressive=True), size=32)
    assert 5 * 90_000 < cost.work < 12 * 95_000 + 100_000


SOS = b"\xff\xda"


def test_what_follows_a_jpeg_is_not_counted_or_decoded() -> None:
    """Phones append a video, or further JPEGs, to a photo."""
    photo = Image.effect_noise((96, 64), 80).convert("RGB")
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 1}, {"quality": 100}):
        data = encoded(photo, "JPEG", **options)
        plain = read_header(data)
        for added in (b"\0\0\0\x18ftypmp42" + SOS * 1000, with_scans(40, 64), b"\xff" * 100):
            assert read_header(data + added) == plain
            assert torch.equal(read_image(data + added, 32), read_image(data, 32))


def test_end_of_a_jpeg_is_not_sought_inside_its_segments() -> None:
    data = encoded(Image.effect_noise((64, 64), 50), "JPEG", progressive=True)
    second = data.index(SOS, data.index(SOS) + 2)
    comment = b"\xff\xfe\0\x06\xff\xd9" + SOS  # the bytes of an end and of a scan
    inside = data[:second] + comment + data[second:]
    header = read_header(inside)
    assert header.scans == read_header(data).scans + 1  # an upper bound
    assert torch.equal(read_image(inside, 32), read_image(data, 32))
    many = data[:second] + comment * MAX_SCANS + data[second:]
    with pytest.raises(ImageError, match="at most 64 scans"):
        read_image(many, 32)


def scans_after(end: bytes) -> bytes:
    """A JPEG whose first scan ends with `end`, and 999 more scans."""
    data = with_scans(1000, 64)
    first_end = data.index(b"\xff\xc4", data.index(SOS))
    return data[:first_end] + end + data[first_end:]


@pytest.mark.parametrize("end", [b"", b"\xff\xfe\xff", b"\xff\xd8", b"\xff\x02", b"\xff\xda\0"])
def test_scans_are_limited_however_they_are_hidden(end: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        read_header(scans_after(end))
    assert caught.value.kind == "too_large"


def test_scans_after_the_end_never_reach_the_decoder() -> None:
    header = read_header(scans_after(b"\xff\xd9"))
    assert (header.scans, header.pixels.count(SOS)) == (1, 1)


def test_a_png_may_have_many_small_chunks() -> None:
    noise = np.random.default_rng(0)
    pixels = zlib.compress(b"".join(b"\0" + noise.bytes(96) for _ in range(32)))
    many = HEAD + b"".join(chunk(b"IDAT", pixels[i : i + 1]) for i in range(len(pixels)))
    one = HEAD + chunk(b"IDAT", pixels)
    end = chunk(b"IEND", b"")
    assert torch.equal(read_image(many + end, 32), read_image(one + end, 32))


def reset_peak() -> int:
    """Forget the process's peak of resident memory; returns what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return field("VmRSS")


def field(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


SIDE = (2000, 1600)
SAMPLES = {
    "JPEG gray": encoded(Image.new("L", SIDE), "JPEG"),
    "JPEG": encoded(Image.new("RGB", SIDE), "JPEG"),
    "JPEG upright": encoded(
        Image.new("RGB", SIDE),
        "JPEG",
        exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0",
    ),
    "JPEG progressive": encoded(Image.new("RGB", SIDE), "JPEG", progressive=True, subsampling=0),
    "JPEG progressive CMYK": encoded(Image.new("CMYK", SIDE), "JPEG", progressive=True),
    "WebP": encoded(Image.new("RGB", SIDE), "WEBP"),
    "WebP lossless": encoded(Image.new("RGB", SIDE), "WEBP", lossless=True),
    "WebP alpha": encoded(Image.new("RGBA", SIDE), "WEBP", lossless=True),
    "WebP animation": encoded(
        Image.new("RGBA", SIDE),
        "WEBP",
        save_all=True,
        append_images=[Image.new("RGBA", SIDE, "red")],
    ),
} | {
    f"PNG {bits} bits, color type {color}": png(*SIDE, bits, color)
    for bits, color in ((1, 0), (8, 0), (16, 0), (16, 2), (8, 3), (16, 4), (16, 6))
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of /proc/self")
@pytest.mark.parametrize("name", SAMPLES)
def test_decoding_stays_within_the_estimated_memory(name: str) -> None:
    data = SAMPLES[name]
    cost = decode_cost(data, size=32)
    before = reset_peak()
    read_image(data, 32)
    assert field("VmHWM") - before < cost.memory
    assert cost.memory < 24 * SIDE[0] * SIDE[1]


def test_cost_of_the_worst_accepted_images() -> None:
    deep = decode_cost(png(3000, 3000, 16, 0), size=32)
    assert deep.memory < 110e6  # it took 200 MB
    lossless = Image.new("RGB", (2000, 2000))
    assert decode_cost(encoded(lossless, "WEBP", lossless=True), size=32).memory < 100e6
    assert decode_cost(with_scans(50, 2000), size=32).work > 50 * 2000**2


def test_a_large_jpeg_is_decoded_at_a_reduced_scale_with_the_same_result() -> None:
    y, x = np.mgrid[:1760, :2400]
    levels = (x // 12 % 200 + y // 40).astype(np.uint8)
    large = Image.fromarray(np.stack([levels, 255 - levels, levels], -1))
    data = encoded(large, "JPEG", quality=90)
    reduced, whole = read_image(data, 32), fit_image(decode_image(data), 32)
    assert (reduced.int() - whole.int()).abs().max() <= 1
    assert decode_cost(data, size=32).memory < decode_cost(data, size=200).memory / 2
    # With less than eight pixels to spare for one nothing is reduced, nor is a small image.
    assert torch.equal(read_image(data, 120), fit_image(decode_image(data), 120))
    small = encoded(large.resize((1600, 1200)), "JPEG")
    assert torch.equal(read_image(small, 32), fit_image(decode_image(small), 32))


def test_image_error_can_be_pickled() -> None:
    error = ImageError("too_large", expected="a", found="b")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.kind, str(again)) == (ImageError, error.kind, str(error))

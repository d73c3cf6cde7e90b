"""Image files with something wrong in them, the same ones in every run."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from random import Random

import numpy as np
from PIL import Image

Mutation = Callable[[Random, bytes, bytes], bytes]

_LENGTHS = [0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
_HEADERS = [
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff\xe0\x00\x10JFIF\0",
    b"\xff\xd8\xff\xda",
    b"RIFF\xff\xff\xff\xffWEBPVP8 ",
    b"RIFF\0\0\0\0WEBPVP8X",
    b"RIFF\x10\0\0\0WEBPVP8L",
    b"GIF89a",
    b"BM",
    b"",
]


def broken_images(n: int, seed: int) -> Iterator[bytes]:
    """So many mutated files, of each format as many."""
    random, formats = Random(seed), list(whole_images().values())
    every = [data for files in formats for data in files]
    for _ in range(n):
        yield mutated(random, random.choice(random.choice(formats)), random.choice(every))


def whole_images() -> dict[str, list[bytes]]:
    """Whole files of each format and many of its forms: depths, palettes, alpha, frames, EXIF."""
    values = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    rgb = Image.fromarray(values)
    gray = rgb.convert("L")
    rgba = rgb.copy()
    rgba.putalpha(gray)
    deep = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    palette = rgb.quantize(16)
    forms: dict[str, list[tuple[Image.Image, dict[str, object]]]] = {
        "PNG": [
            (rgb, {}),
            (rgba, {"exif": exif}),
            (deep, {}),
            (palette, {"transparency": 3, "bits": 4}),
            (gray.convert("1"), {}),
            (rgb, frames),
        ],
        "JPEG": [
            (rgb, {"exif": exif}),
            (rgb, {"progressive": True}),
            (rgb.convert("CMYK"), {}),
            (gray, {"restart_marker_rows": 1}),
        ],
        "WEBP": [(rgb, {}), (rgba, {"exif": exif}), (rgb, {"lossless": True}), (rgb, frames)],
        "GIF": [(rgb, {}), (rgb, frames)],
    }
    return {
        kind: [_encoded(image, kind, options) for image, options in items]
        for kind, items in forms.items()
    }


def _encoded(image: Image.Image, kind: str, options: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def mutated(random: Random, data: bytes, other: bytes) -> bytes:
    """`data` with one to four things wrong in it; `other` gives what is spliced in."""
    for _ in range(random.choice((1, 1, 2, 4))):
        data = random.choice(_MUTATIONS)(random, data, other)
    return _with_checksums(data) if random.random() < 0.5 else data


def _flip(random: Random, data: bytes, _: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 3, 30))):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _cut_short(random: Random, data: bytes, _: bytes) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _splice(random: Random, data: bytes, other: bytes) -> bytes:
    at, (start, end) = random.randrange(len(data) + 1), _span(random, other)
    return data[:at] + other[start:end] + data[at + random.choice((0, end - start)) :]


def _repeat(random: Random, data: bytes, _: bytes) -> bytes:
    start, end = _span(random, data)
    return data[:end] + data[start:end] * random.choice((1, 2, 50)) + data[end:]


def _drop(random: Random, data: bytes, _: bytes) -> bytes:
    start, end = _span(random, data)
    return data[:start] + data[end:]


def _another_header(random: Random, data: bytes, _: bytes) -> bytes:
    header = random.choice(_HEADERS)
    return header + data[random.choice((0, len(header))) :]


def _another_length(random: Random, data: bytes, _: bytes) -> bytes:
    form = random.choice((">I", "<I", ">H", "<H"))
    value = random.choice(_LENGTHS) & (0xFFFF if form[1] == "H" else 0xFFFFFFFF)
    # Most lengths and sizes stand near the start.
    at = random.randrange(random.choice((64, len(data) + 1)) or 1)
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


def _span(random: Random, data: bytes) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.choice((1, 4, 16, 256)))


def _with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks all have the right checksum, so that its decoder looks into them."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    fixed, position = bytearray(data), 8
    while position + 12 <= len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        end = position + 8 + length
        if end + 4 > len(data):
            break
        fixed[end : end + 4] = struct.pack(">I", zlib.crc32(data[position + 4 : end]))
        position = end + 4
    return bytes(fixed)


_MUTATIONS: list[Mutation] = [
    _flip, _cut_short, _splice, _repeat, _drop, _another_header, _another_length
]  # fmt: skip

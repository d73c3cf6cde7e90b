"""Files that are small to send and expensive to decode."""

from __future__ import annotations

import functools
import io
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image


def png_chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


@functools.cache
def progressive_jpeg(side: int = 7000, scans: int = 60) -> bytes:
    """A black square whose last scan, of no bits, is repeated: each time all pixels are gone over.

    8 KB and 0.05 s to decode for each scan of 49 million pixels.
    """
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((side, side), np.uint8)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    have = data.count(b"\xff\xda")
    return data[:-2] + data[last:-2] * (scans - have) + data[-2:]


@functools.cache
def deep_gray_png(side: int = 7000) -> bytes:
    """A black square of 16 bits a pixel: some 95 KB."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((side, side), np.uint16)).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


@functools.cache
def deep_color_png(side: int = 4900) -> bytes:
    """A black square of 48 bits a pixel, by the filter that takes longest: some 150 KB.

    The dearest found among those quick to decode by their header: 0.7 s of a processor.
    """
    header = png_chunk(b"IHDR", struct.pack(">2I5B", side, side, 16, 2, 0, 0, 0))
    rows = zlib.compress((b"\x04" + bytes(6 * side)) * side)
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


@functools.cache
def lossless_webp(side: int = 7000) -> bytes:
    """A black square in some 2 KB."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "WEBP", lossless=True, quality=0, method=0)
    return buffer.getvalue()


def fill_bytes(size: int) -> bytes:
    """The start of a JPEG, and then fill bytes between segments that never come."""
    return b"\xff\xd8\xff" + b"\xff" * size


def empty_segments(size: int) -> bytes:
    """A JPEG of nothing but empty tables."""
    return b"\xff\xd8" + b"\xff\xdb\x00\x02" * (size // 4)


def empty_chunks(size: int) -> bytes:
    """A PNG of nothing but empty parts of its pixels."""
    header = png_chunk(b"IHDR", struct.pack(">2I5B", 32, 32, 8, 2, 0, 0, 0))
    empty = png_chunk(b"IDAT", b"")
    return b"\x89PNG\r\n\x1a\n" + header + empty * (size // 12) + png_chunk(b"IEND", b"")


def pickle_of_many_operations(millions: float = 2.0) -> bytes:
    """A `.pt` of some 2 KB whose pickle has so many million operations."""
    operations = b"\x80\x02" + b")0" * int(millions * 500_000) + b"N."
    return _zip({"archive/data.pkl": operations, "archive/version": b"3\n"})


def npz_of_one_large_image(side: int = 9000) -> bytes:
    """An `.npz` with one black image, some 237 KB."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': (1, 3, {side}, {side}), }}"
    text = header.encode()
    images = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(3 * side * side)
    labels = io.BytesIO()
    np.save(labels, np.zeros(1, np.int64))
    return _zip({"images.npy": images, "labels.npy": labels.getvalue()})


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()

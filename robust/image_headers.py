"""Parses image headers before any decoder runs: format, size and the cost of decoding.

One linear pass in bounded time: the parsers read a bounded number of segments, and skip the bytes
in between at C speed. Metadata that decoders would parse (text chunks, EXIF directories, color
profiles, animation control) is removed.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

ErrorKind = Literal["empty", "unsupported", "broken", "too_large"]
Format = Literal["JPEG", "PNG", "WEBP"]

MAX_PIXELS = 50_000_000
"""Default limit of `decode_image` on width times height."""
MAX_SCANS = 64
"""Scans of a JPEG; an ordinary progressive one has about 10."""
MAX_SEGMENTS = 4096
"""JPEG markers before the first scan, chunks of a WebP, and chunks of a PNG in addition to those
that its length accounts for."""

_BYTES_PER_CHUNK = 512  # of a PNG, on average; libpng writes 8,192 and more

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_JPEG_WITHOUT_LENGTH = frozenset(range(0xD0, 0xD9)) | {
    0x00,
    0x01,
}  # 0x00: a stray byte between segments
# JFIF and Adobe give the color encoding; every other APPn and the comments are metadata.
_JPEG_METADATA = (frozenset(range(0xE0, 0xF0)) | {0xFE}) - {0xE0, 0xEE}
_NOT_FILL = re.compile(rb"[^\xff]")
# After the start of the pixels: not FF 00, an escaped FF of the pixels, and no restart marker.
_JPEG_MARKER_IN_PIXELS = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
_JPEG_END = 0xD9
_OTHER_FORMATS = {
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"II*\x00": "a TIFF",
    b"MM\x00*": "a TIFF",
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip archive",
}
_HEIF_BRANDS = {  # bytes 8 to 12 of a file; bytes 4 to 8 are "ftyp"
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "a HEIC"),
    **dict.fromkeys((b"avif", b"avis"), "an AVIF"),
    **dict.fromkeys((b"mif1", b"msf1"), "a HEIF"),
}


class ImageError(ValueError):
    """An image can't be used: says what was expected and what was found, never the bytes.

    `kind` is `empty`, `unsupported`, `broken` or `too_large`.
    """

    def __init__(self, kind: ErrorKind, *, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.kind = kind
        self.expected = expected
        self.found = found

    def __reduce__(self) -> tuple[Any, ...]:  # it is sent between processes
        return partial(type(self), expected=self.expected, found=self.found), (self.kind,)


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of an image."""

    format: Format
    size: tuple[int, int]
    """Width and height in pixels."""
    pixels: bytes
    """The file without its metadata."""
    exif: bytes = b""
    frames: int = 1
    """Frames that a PNG declares, of which decoding gives the first; 1 for the other formats."""
    sample_bits: int = 8
    """Bits per sample of a PNG; 8 for the other formats."""
    scans: int = 1
    """Upper bound on the passes over all pixels that decoding makes."""
    bytes_per_pixel: int = 4
    """Upper bound on the memory that decoding and converting to RGB take at a time, per pixel."""
    coefficients: int = 0
    """Bytes of a JPEG's coefficients, if the decoder has to keep them all."""


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Header:
    """Read the header of a JPEG, PNG or WebP, recognized by content.

    Linear in `len(data)`, milliseconds for megabytes of the worst input. Raises ImageError:
    `empty`, `unsupported` for another format, `broken`, and `too_large` above `max_pixels` (width
    times height), MAX_SCANS or MAX_SEGMENTS.
    """
    if not data:
        raise ImageError("empty", expected="a JPEG, PNG or WebP image", found="no bytes")
    parse = _parser_of(data)
    try:
        header = parse(data)
    except ImageError:
        raise
    except (IndexError, ValueError, struct.error):
        raise broken(data) from None
    width, height = header.size
    if width * height > max_pixels:
        raise ImageError(
            "too_large", expected=f"at most {max_pixels} pixels", found=f"{width}x{height}"
        )
    return header


def broken(data: bytes) -> ImageError:
    """The error for a file of a known format that does not decode."""
    kinds = {b"\x89": "PNG", b"\xff": "JPEG", b"R": "WEBP", b"G": "GIF", b"B": "BMP", b"P": "PPM"}
    return ImageError(
        "broken",
        expected="a complete image",
        found=f"{len(data)} bytes of {kinds.get(data[:1], 'TIFF')} that do not decode",
    )


def orientation(exif: bytes) -> int:
    """The value of tag 0x0112 in the first directory; 1 (upright) if it is missing or broken."""
    order: Literal["little", "big"] = "little" if exif[:2] == b"II" else "big"

    def number(start: int, length: int) -> int:
        return int.from_bytes(exif[start : start + length], order)

    if exif[:2] not in (b"II", b"MM"):
        return 1
    directory = number(4, 4)
    for index in range(min(number(directory, 2), len(exif) // 12, MAX_SEGMENTS)):
        entry = directory + 2 + 12 * index
        if number(entry, 2) == 0x0112:
            return number(entry + 8, 2)
    return 1


def _parser_of(data: bytes) -> Callable[[bytes], Header]:
    if data.startswith(_PNG_SIGNATURE):
        return _png_header
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg_header
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp_header
    names = (name for magic, name in _OTHER_FORMATS.items() if data.startswith(magic))
    name = _HEIF_BRANDS.get(data[8:12]) if data[4:8] == b"ftyp" else next(names, None)
    raise ImageError(
        "unsupported",
        expected="a JPEG, PNG or WebP image",
        found=name or f"{len(data)} bytes of an unknown format",
    )


def _too_many(what: str, most: int) -> ImageError:
    return ImageError("too_large", expected=f"at most {most} {what}", found="more")


def _png_header(data: bytes) -> Header:
    width, height, bits, color = struct.unpack(">4x4s2I2B", data[8:26])[1:]
    most = MAX_SEGMENTS + len(data) // _BYTES_PER_CHUNK
    kept, exif, frames, position = [_PNG_SIGNATURE], b"", 1, 8
    name, transparent = b"", color in (4, 6)
    for _ in range(most):
        length, name = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise ValueError("a chunk is cut short")
        if name == b"eXIf":
            exif = data[position + 8 : end - 4]
        elif name == b"acTL":
            frames = int.from_bytes(data[position + 8 : position + 12], "big")
        elif name in _PNG_PIXEL_CHUNKS:
            transparent |= name == b"tRNS"
            kept.append(data[position:end])
        if name == b"IEND":
            break
        position = end
    else:
        raise _too_many(f"chunks in a PNG of {len(data)} bytes", most)
    stored = 1 if color == 3 or (color == 0 and bits <= 8) else 2 if color == 0 else 4
    return Header(
        format="PNG",
        size=(width, height),
        pixels=b"".join(kept),
        exif=exif,
        frames=frames,
        sample_bits=bits,
        bytes_per_pixel=8 if transparent else 4 if color == 2 else stored + 4,
    )


def _jpeg_header(data: bytes) -> Header:
    kept, exif, position = [b"\xff\xd8"], b"", 2
    frame, progressive = b"", False
    for _ in range(MAX_SEGMENTS):
        position = data.index(b"\xff", position)
        found = _NOT_FILL.search(data, position)
        if found is None:
            raise ValueError("fill bytes up to the end")
        position = found.start() - 1
        marker = data[position + 1]
        if marker in _JPEG_WITHOUT_LENGTH:
            position += 2
            continue
        if marker == 0xDA:  # start of scan: from here on pixels
            break
        (length,) = struct.unpack_from(">H", data, position + 2)
        segment = data[position : position + 2 + length]
        if length < 2:
            raise ValueError("a segment without its length")
        if marker in _JPEG_SIZE_MARKERS:
            frame = frame or segment
            progressive |= marker in _JPEG_PROGRESSIVE
        if marker == 0xE1 and segment[4:10] == b"Exif\0\0":
            exif = segment[10:]
        if marker not in _JPEG_METADATA:
            kept.append(segment)
        position += len(segment)
    else:
        raise _too_many("segments before the pixels of a JPEG", MAX_SEGMENTS)
    end = _jpeg_end(data, position)
    # A marker in compressed data is escaped, so this counts every scan and seldom more.
    scans = data.count(b"\xff\xda", position, end)
    if scans > MAX_SCANS:
        raise ImageError("too_large", expected=f"at most {MAX_SCANS} scans", found=str(scans))
    height, width, components = struct.unpack(">HHB", frame[5:10])
    whole = progressive or scans > 1 or data[position + 4] < components
    kept.append(data[position:end])
    return Header(
        format="JPEG",
        size=(width, height),
        pixels=b"".join(kept),
        exif=exif,
        scans=scans,
        bytes_per_pixel=4 if components == 3 else 5 if components == 1 else 8,
        coefficients=_coefficients(width, height, frame[10:]) if whole else 0,
    )


def _jpeg_end(data: bytes, position: int) -> int:
    """Where the image with its first scan at `position` ends; at the latest where the file does.

    Another image or a video may follow (MPO, Ultra HDR, motion photos). The decoder gets nothing
    beyond this, so a wrong answer can't make it decode more than was counted.
    """
    for _ in range(MAX_SEGMENTS):
        found = _JPEG_MARKER_IN_PIXELS.search(data, position)
        if found is None:
            return len(data)
        position = found.end()
        if data[position - 1] == _JPEG_END:
            return position
        position += int.from_bytes(data[position : position + 2], "big")
    raise _too_many("segments in a JPEG", MAX_SEGMENTS)


def _coefficients(width: int, height: int, components: bytes) -> int:
    """Bytes of all DCT coefficients, two each; `components` are id, sampling and table bytes."""
    across = [max(byte >> 4, 1) for byte in components[1::3]]
    down = [max(byte & 15, 1) for byte in components[1::3]]
    blocks = sum(a * b for a, b in zip(across, down, strict=True))
    units = -(-width // (8 * max(across))) * -(-height // (8 * max(down)))
    return units * blocks * 64 * 2


def _webp_header(data: bytes) -> Header:
    kind, exif = data[12:16], b""
    if kind == b"VP8X":
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
        exif = _riff_chunk(data, b"EXIF").removeprefix(b"Exif\0\0")
    elif kind == b"VP8L":
        (bits,) = struct.unpack("<I", data[21:25])
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", data[26:30]))
    return Header(
        format="WEBP",
        size=(width, height),
        pixels=data,
        exif=exif,
        bytes_per_pixel=16,  # two canvases, the decoder's own pixels, and the copy it returns
    )


def _riff_chunk(data: bytes, wanted: bytes) -> bytes:
    position = 12
    for _ in range(MAX_SEGMENTS):
        if position + 8 > len(data):
            return b""
        name, length = struct.unpack_from("<4sI", data, position)
        if name == wanted:
            return data[position + 8 : position + 8 + length]
        position += 8 + length + length % 2
    raise _too_many("chunks in a WebP", MAX_SEGMENTS)

"""Images: bytes to RGB, RGB to the model's input, and 8-bit tensors to and from PNG.

The formats' headers are read here, before Pillow sees a byte: the pixel cap holds before anything
is allocated, and the metadata that Pillow would parse (text chunks, EXIF directories, animation
control) never reaches it.
"""

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

ErrorKind = Literal["empty", "unsupported", "broken", "too_large"]

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_WITHOUT_LENGTH = frozenset(range(0xD0, 0xD9)) | {0x01}
# JFIF and Adobe say how the colours are coded; every other APPn and the comments are metadata.
_JPEG_METADATA = (frozenset(range(0xE0, 0xF0)) | {0xFE}) - {0xE0, 0xEE}
_OTHER_FORMATS = {
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"II*\x00": "a TIFF",
    b"MM\x00*": "a TIFF",
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip archive",
}
_EXIF_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that can't be used: says what was expected and what came, never the bytes.

    `kind` is `empty`, `unsupported`, `broken` or `too_large`.
    """

    def __init__(self, kind: ErrorKind, *, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.kind = kind
        self.expected = expected
        self.found = found


@dataclass(frozen=True, kw_only=True)
class _Header:
    size: tuple[int, int]
    pixels: bytes
    """The file without its metadata."""
    exif: bytes
    sample_bits: int = 8


def decode_image(data: bytes, *, max_pixels: int = 50_000_000) -> Image.Image:
    """Decode a JPEG, PNG or WebP, told apart by content, to an upright RGB image.

    EXIF orientation is applied, alpha is composited on white, 16-bit, grey and CMYK are converted,
    and of an animation the first frame is taken. `max_pixels` is width times height, checked
    before decoding. Raises ImageError, and nothing else, for any bytes.
    """
    if not data:
        raise ImageError("empty", expected="a JPEG, PNG or WebP image", found="no bytes")
    read_header, opener = _format_of(data)
    try:
        header = read_header(data)
        width, height = header.size
        if width * height > max_pixels:
            raise ImageError(
                "too_large", expected=f"at most {max_pixels} pixels", found=f"{width}x{height}"
            )
        image = opener(io.BytesIO(header.pixels))
        if image.size != header.size:  # of two headers, the decoders take the last
            raise ValueError("the decoder sees another size than the header")
        image.load()
        _scale_transparency(image, header.sample_bits)
        return _upright(to_rgb(image), header.exif)
    except ImageError:
        raise
    except (MemoryError, Image.DecompressionBombError):
        raise ImageError(
            "too_large", expected=f"at most {max_pixels} pixels", found="more than memory holds"
        ) from None
    except Exception:  # decoders raise whatever they like on broken files
        raise ImageError(
            "broken",
            expected="a complete JPEG, PNG or WebP image",
            found=f"{len(data)} bytes of {opener.format} that do not decode",
        ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any 8- or 16-bit Pillow image to RGB: alpha on white, 16-bit grey divided by 257.

    Raises ImageError for modes without a fixed range (`I` beyond 16 bits, `F`).
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ImageError("unsupported", expected="8 or 16 bits a channel", found="32-bit floats")
    if image.mode.startswith("I"):
        return _rgb_of_deep_grey(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        # RGBa and La are premultiplied; Pillow unmultiplies each only to its own plain mode.
        plain = {"RGBa": "RGBA", "La": "LA"}.get(image.mode, image.mode)
        rgba = image.convert(plain).convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def fit_image(image: Image.Image, size: int) -> Tensor:
    """Centre-crop to a square and resize, antialiased, to a uint8 tensor `(3, size, size)`.

    An image that already has that size passes bit-exactly.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    rgb = to_rgb(image.crop(box) if image.size != (side, side) else image)
    if side != size:
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
    return _tensor_of(rgb)


def to_float(images: Tensor) -> Tensor:
    """Turn uint8 images, or whole levels from 0 to 255, of any shape into float32 in [0, 1].

    The same bits on every device: by a number CUDA divides as it multiplies by the reciprocal,
    which is another value for half of the levels.
    """
    return images.to(torch.float32) / torch.full((), 255.0, device=images.device)


def to_uint8(images: Tensor) -> Tensor:
    """Round float images in [0, 1] of any shape to the nearest uint8, clipping values outside."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def encode_png(image: Tensor) -> bytes:
    """Encode a uint8 image `(3, H, W)` as PNG, losslessly; raises ValueError for other tensors."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        found = f"{image.dtype} {tuple(image.shape)}"
        raise ValueError(f"expected a uint8 image (3, H, W), found {found}")
    buffer = io.BytesIO()
    pixels = image.detach().cpu().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> Tensor:
    """Decode an image to uint8 `(3, H, W)` at its own size, the inverse of `encode_png`.

    Raises ImageError as `decode_image` does.
    """
    return _tensor_of(decode_image(data))


def _tensor_of(rgb: Image.Image) -> Tensor:
    # Of numpy's alone: each of torch's operations lets go of the interpreter and waits for it.
    return torch.from_numpy(np.array(np.asarray(rgb).transpose(2, 0, 1), order="C"))


def _format_of(
    data: bytes,
) -> tuple[
    Callable[[bytes], _Header], type[PngImageFile] | type[JpegImageFile] | type[WebPImageFile]
]:
    # The format's class is called directly: Image.open would try every format it knows, and warn.
    if data.startswith(_PNG_SIGNATURE):
        return _png_header, PngImageFile
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg_header, JpegImageFile
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp_header, WebPImageFile
    names = (name for magic, name in _OTHER_FORMATS.items() if data.startswith(magic))
    raise ImageError(
        "unsupported",
        expected="a JPEG, PNG or WebP image",
        found=next(names, f"{len(data)} bytes of an unknown format"),
    )


def _png_header(data: bytes) -> _Header:
    width, height, bits = struct.unpack(">4x4s2IB", data[8:25])[1:]
    kept, exif, position = [_PNG_SIGNATURE], b"", 8
    name = b""
    while name != b"IEND":
        length, name = struct.unpack(">I4s", data[position : position + 8])
        end = position + 12 + length
        if end > len(data):
            raise ValueError("a chunk is cut short")
        if name == b"eXIf":
            exif = data[position + 8 : end - 4]
        elif name in _PNG_PIXEL_CHUNKS:
            kept.append(data[position:end])
        position = end
    return _Header(size=(width, height), pixels=b"".join(kept), exif=exif, sample_bits=bits)


def _jpeg_header(data: bytes) -> _Header:
    kept, exif, size, position = [b"\xff\xd8"], b"", (0, 0), 2
    while True:
        position = data.index(b"\xff", position)
        marker = data[position + 1]
        if marker in (0x00, 0xFF):  # stray or fill bytes between segments
            position += 1
            continue
        if marker in _JPEG_WITHOUT_LENGTH:
            position += 2
            continue
        if marker == 0xDA:  # start of scan: from here on pixels
            kept.append(data[position:])
            return _Header(size=size, pixels=b"".join(kept), exif=exif)
        (length,) = struct.unpack(">H", data[position + 2 : position + 4])
        segment = data[position : position + 2 + length]
        if length < 2:
            raise ValueError("a segment without its length")
        if marker in _JPEG_SIZE_MARKERS and size == (0, 0):
            height, width = struct.unpack(">HH", segment[5:9])
            size = (width, height)
        if marker == 0xE1 and segment[4:10] == b"Exif\0\0":
            exif = segment[10:]
        if marker not in _JPEG_METADATA:
            kept.append(segment)
        position += len(segment)


def _webp_header(data: bytes) -> _Header:
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
    return _Header(size=(width, height), pixels=data, exif=exif)


def _riff_chunk(data: bytes, wanted: bytes) -> bytes:
    position = 12
    while position + 8 <= len(data):
        name, length = struct.unpack("<4sI", data[position : position + 8])
        if name == wanted:
            return data[position + 8 : position + 8 + length]
        position += 8 + length + length % 2
    return b""


def _scale_transparency(image: Image.Image, sample_bits: int) -> None:
    """Bring PNG's transparent colour, given in the file's sample depth, to 8 bits."""
    key = image.info.get("transparency")
    if isinstance(key, tuple) and sample_bits == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif isinstance(key, int) and image.mode == "L" and sample_bits < 8:
        image.info["transparency"] = key * 255 // (2**sample_bits - 1)


def _rgb_of_deep_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(
            "unsupported", expected="8 or 16 bits a channel", found="32-bit whole numbers"
        )
    grey = ((values + 128) // 257).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _upright(image: Image.Image, exif: bytes) -> Image.Image:
    transpose = _EXIF_TRANSPOSE.get(_orientation(exif))
    return image if transpose is None else image.transpose(transpose)


def _orientation(exif: bytes) -> int:
    """Read tag 0x0112 of the first directory; 1 (upright) when there is none or EXIF is broken."""
    order: Literal["little", "big"] = "little" if exif[:2] == b"II" else "big"

    def number(start: int, length: int) -> int:
        return int.from_bytes(exif[start : start + length], order)

    if exif[:2] not in (b"II", b"MM"):
        return 1
    directory = number(4, 4)
    for index in range(min(number(directory, 2), len(exif) // 12)):
        entry = directory + 2 + 12 * index
        if number(entry, 2) == 0x0112:
            return number(entry + 8, 2)
    return 1

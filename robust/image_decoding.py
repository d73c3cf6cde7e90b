"""Decodes images to RGB, and fits RGB to the model's input, without torch.

Headers are read first (`image_headers.py`), so limits apply before anything is allocated. Nothing
here imports torch, so that a decode worker starts quickly; `images.py` does the same for tensors.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from robust.image_headers import (
    MAX_PIXELS,
    Format,
    Header,
    ImageError,
    broken,
    orientation,
    read_header,
)

Pixels = npt.NDArray[np.uint8]

# Each format's class is called directly: Image.open would try every format it knows, and warn.
_OPENERS: dict[Format, Callable[[io.BytesIO], Image.Image]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
}
# Read only from the user's own folders: Pillow parses their headers.
_FOLDER_OPENERS: dict[bytes, Callable[[io.BytesIO], Image.Image]] = {
    b"GIF87a": GifImageFile,
    b"GIF89a": GifImageFile,
    b"BM": BmpImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
    **{f"P{kind}".encode() + space: PpmImageFile for kind in "123456" for space in (b"\n", b" ")},
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
_BITS_PER_SAMPLE = 258  # tag of a TIFF
_LARGE_JPEG = 4_000_000  # pixels above which a JPEG is decoded at a reduced scale
_DRAFT_SIDES = 8  # pixels of a reduced JPEG per pixel of the result, along each side
_BAND = 1 << 20  # pixels converted at a time
_FIXED_MEMORY = 8 << 20  # bands, tables and strips of decoders, at any size


@dataclass(frozen=True, kw_only=True)
class DecodeCost:
    """Upper bounds on the cost of `read_pixels` for one image, besides the bytes of the file."""

    memory: int
    """Bytes allocated at the peak."""
    work: int
    """Pixels times passes over them (scans of a JPEG), and the bytes of the file.

    A unit takes 1 to 50 ns of a core: 10 million are half a second at most."""


def _cost(header: Header, size: int | None) -> DecodeCost:
    width, height = header.size
    scale = 1 if size is None else _draft_scale(header, size)
    reduced = -(-width // scale) * -(-height // scale)
    copies = 4  # the crop, or the upright copy
    memory = (
        _FIXED_MEMORY
        + 2 * len(header.pixels)
        + header.coefficients
        + 256 * min(width, 1 << 16)  # strips of decoders
        + 32 * height  # pointers to rows
        + reduced * (header.bytes_per_pixel + copies)
    )
    work = (width + 16) * height * header.scans + len(header.pixels)
    return DecodeCost(memory=memory, work=work)


@dataclass(frozen=True, kw_only=True)
class OpenedImage:
    """A decoded image, and the properties of its file."""

    image: Image.Image
    """Upright RGB, perhaps at a reduced scale."""
    size: tuple[int, int]
    """Width and height in the file, upright."""
    frames: int
    """Frames or pages in the file, of which `image` is the first."""
    deep: bool = False
    """Whether the file has more than 8 bits per channel, which `image` has reduced to 8."""
    transparent: bool = False
    """Whether some pixels were not opaque, and `image` has them on white; set by `any_format`."""


def read_pixels(data: bytes, size: int, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode an image like `decode_image` and fit it like `fit_pixels`: uint8 (3, S, S).

    A JPEG of more than 4 megapixels is decoded at 1/2, 1/4 or 1/8 of its scale if that leaves 8
    pixels per pixel of the result along each side. Raises ImageError, and nothing else.
    """
    return fit_pixels(open_image(data, size=size, max_pixels=max_pixels).image, size)


def read_cheap_pixels(
    data: bytes, size: int, *, most: DecodeCost, max_pixels: int = MAX_PIXELS
) -> Pixels | DecodeCost:
    """The result of `read_pixels`, or only the cost if it exceeds `most` in memory or work.

    The cost is computed from the header alone: without decoding, with less than three times
    `len(data)` of memory, in linear time, milliseconds for megabytes of the worst input. Raises
    ImageError, and nothing else.
    """
    header = read_header(data, max_pixels=max_pixels)
    cost = _cost(header, size)
    if cost.work > most.work or cost.memory > most.memory:
        return cost
    opened = _guarded(lambda: _opened(header, size), data, max_pixels)
    return fit_pixels(opened.image, size)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a JPEG, PNG or WebP, recognized by content, to an upright RGB image.

    EXIF orientation is applied, alpha is composited on white, 16-bit, gray and CMYK are converted,
    and the first frame of an animation is used. `max_pixels` is width times height, checked
    before decoding. Raises ImageError, and nothing else, for any bytes.
    """
    return open_image(data, max_pixels=max_pixels).image


def is_image(head: bytes) -> bool:
    """Whether a file starts like an image that `open_image` reads."""
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    magics = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", *_FOLDER_OPENERS)
    return webp or head.startswith(magics)


def open_image(
    data: bytes,
    *,
    size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    any_format: bool = False,
) -> OpenedImage:
    """Decode an image like `decode_image`, possibly at a reduced scale for a result of `size`.

    With `any_format` GIF, BMP, TIFF and PPM are read too: use these decoders only for the user's
    own files. Raises ImageError, and nothing else, for any bytes.
    """
    if any_format:
        opener = next((o for magic, o in _FOLDER_OPENERS.items() if data.startswith(magic)), None)
        if opener is not None:
            return _guarded(lambda: _open_with(opener, data, max_pixels), data, max_pixels)
    try:
        header = read_header(data, max_pixels=max_pixels)
    except ImageError as error:
        if any_format and error.kind in ("empty", "unsupported"):
            expected = "a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM image"
            raise ImageError(error.kind, expected=expected, found=error.found) from None
        raise
    return _guarded(lambda: _opened(header, size, transparency=any_format), data, max_pixels)


def _guarded(decode: Callable[[], OpenedImage], data: bytes, max_pixels: int) -> OpenedImage:
    try:
        return decode()
    except ImageError:
        raise
    except (MemoryError, Image.DecompressionBombError):
        raise ImageError(
            "too_large", expected=f"at most {max_pixels} pixels", found="more than memory holds"
        ) from None
    except Exception:  # decoders raise all kinds of exceptions on broken files
        raise broken(data) from None


def _opened(header: Header, size: int | None, *, transparency: bool = False) -> OpenedImage:
    image = _OPENERS[header.format](io.BytesIO(header.pixels))
    if image.size != header.size:  # if there are two headers, decoders use the last
        raise ValueError("the decoder sees another size than the header")
    if size is not None and (scale := _draft_scale(header, size)) > 1:
        width, height = image.size
        image.draft(None, (width // scale, height // scale))
    image.load()
    _scale_transparency(image, header.sample_bits)
    transparent = transparency and is_transparent(image)
    opened = _upright(image, header.size, orientation(header.exif))
    frames = max(opened.frames, header.frames)  # those of a PNG are removed before decoding
    return replace(opened, frames=frames, deep=header.sample_bits > 8, transparent=transparent)


def _open_with(
    opener: Callable[[io.BytesIO], Image.Image], data: bytes, max_pixels: int
) -> OpenedImage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata
        image = opener(io.BytesIO(data))
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                "too_large", expected=f"at most {max_pixels} pixels", found=f"{width}x{height}"
            )
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (8,)) if isinstance(image, TiffImageFile) else ()
        image.load()  # Pillow applies a TIFF's orientation itself
        deep = is_deep(image) or any(depth > 8 for depth in bits)
        transparent = is_transparent(image)
        opened = _upright(image, image.size, 1, deep_bits=12 if bits == (12,) else 16)
        return replace(opened, deep=deep, transparent=transparent)


def _upright(
    image: Image.Image, size: tuple[int, int], orientation: int, *, deep_bits: int = 16
) -> OpenedImage:
    frames = getattr(image, "n_frames", 1)
    transpose = _EXIF_TRANSPOSE.get(orientation)
    rgb = to_rgb(image, deep_bits=deep_bits)
    if transpose is not None:
        rgb = rgb.transpose(transpose)
    return OpenedImage(
        image=rgb, size=size if orientation < 5 else (size[1], size[0]), frames=frames
    )


def _draft_scale(header: Header, size: int) -> int:
    width, height = header.size
    if header.format != "JPEG" or width * height <= _LARGE_JPEG:
        return 1
    spare = min(width, height) // (_DRAFT_SIDES * size)
    return next(scale for scale in (8, 4, 2, 1) if scale <= max(spare, 1))


def to_rgb(image: Image.Image, *, deep_bits: int = 16) -> Image.Image:
    """Convert any 8- or 16-bit Pillow image to RGB: alpha on white, deep gray scaled and rounded.

    White in a mode of more than 8 bits (`is_deep`) is `2**deep_bits - 1`. Raises ImageError for
    modes without a fixed range (`I` beyond these bits, `F`).
    """
    transparent = _has_alpha(image)
    if image.mode == "RGB" and not transparent:
        return image
    if image.mode == "F":
        raise ImageError("unsupported", expected="8 or 16 bits a channel", found="32-bit floats")
    if is_deep(image):
        return _by_bands(image, partial(_rgb_of_deep_gray, white=2**deep_bits - 1))
    return _by_bands(image, _on_white) if transparent else image.convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether a Pillow image has more than 8 bits per channel."""
    return image.mode.startswith("I")


def is_transparent(image: Image.Image) -> bool:
    """Whether some pixels of a Pillow image are not opaque."""
    if is_deep(image) or not _has_alpha(image):
        return _has_alpha(image)  # of 16 bits: a gray level that is transparent
    alphas = (np.asarray(_rgba(band).getchannel("A")) for _, band in _bands(image))
    return any(bool((alpha < 255).any()) for alpha in alphas)


def _has_alpha(image: Image.Image) -> bool:
    return "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La")


def _by_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert to RGB a few rows at a time, because intermediate copies take memory."""
    if image.width * image.height <= _BAND:
        return convert(image)
    rgb = Image.new("RGB", image.size)
    for top, band in _bands(image):
        rgb.paste(convert(band), (0, top))
    return rgb


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Each band of rows and where it begins."""
    width, height = image.size
    rows = max(1, _BAND // max(width, 1))
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def _rgba(image: Image.Image) -> Image.Image:
    # RGBa and La are premultiplied; Pillow unmultiplies each only to its own plain mode.
    plain = {"RGBa": "RGBA", "La": "LA"}.get(image.mode, image.mode)
    return image.convert(plain).convert("RGBA")


def _on_white(image: Image.Image) -> Image.Image:
    rgba = _rgba(image)
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def fit_pixels(image: Image.Image, size: int) -> Pixels:
    """Center-crop to a square and resize, antialiased, to uint8 `(3, size, size)`.

    An image that already has that size is returned unchanged.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    rgb = to_rgb(image.crop(box) if image.size != (side, side) else image)
    if side != size:
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
    return pixels_of(rgb)


def pixels_of(rgb: Image.Image) -> Pixels:
    """The pixels of an RGB image, uint8 (3, H, W)."""
    return np.array(np.asarray(rgb).transpose(2, 0, 1), order="C")


def _scale_transparency(image: Image.Image, sample_bits: int) -> None:
    """Bring PNG's transparent color, given in the file's sample depth, to 8 bits."""
    key = image.info.get("transparency")
    if isinstance(key, tuple) and sample_bits == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif isinstance(key, int) and image.mode == "L" and sample_bits < 8:
        image.info["transparency"] = key * 255 // (2**sample_bits - 1)


def _rgb_of_deep_gray(image: Image.Image, white: int) -> Image.Image:
    values = np.asarray(image).astype(np.int32)
    if values.min() < 0 or values.max() > white:
        raise ImageError(
            "unsupported", expected="8 or 16 bits a channel", found="32-bit whole numbers"
        )
    gray = ((values * 255 + white // 2) // white).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        gray[values == key] = 255
    return Image.fromarray(gray).convert("RGB")

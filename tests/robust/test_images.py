import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from robust.images import (
    ImageError,
    decode_image,
    encode_png,
    fit_image,
    open_image,
    to_float,
    to_rgb,
    to_uint8,
)
from tests.support.images import decode_png

FORMATS = ("PNG", "JPEG", "WEBP")


def photo(width: int = 40, height: int = 30) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    channels = (x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, bits: int, color: int, rows: bytes, *extra: bytes) -> bytes:
    header = struct.pack(">2I5B", width, height, bits, color, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), *extra, pixels, chunk(b"IEND", b"")]
    )


def pixel(data: bytes, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    value = decode_image(data).getpixel(at)
    assert isinstance(value, tuple)
    return value


def kind_of(data: bytes, **options: int) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, **options)
    assert len(str(caught.value)) < 200
    return caught.value.kind


@pytest.mark.parametrize("kind", FORMATS)
def test_decodes_each_format_by_content(kind: str) -> None:
    image = decode_image(encoded(photo(), kind, quality=95))
    assert (image.mode, image.size) == ("RGB", (40, 30))
    difference = np.asarray(image).astype(int) - np.asarray(photo())
    assert np.abs(difference).mean() < (0.001 if kind == "PNG" else 6)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_unsupported(kind: str) -> None:
    data = encoded(photo(), kind)
    assert kind_of(data) == "unsupported"
    with pytest.raises(ImageError, match=f"found a {kind}"):
        decode_image(data)


@pytest.mark.parametrize(
    ("brand", "name"), [(b"heic", "a HEIC"), (b"avif", "an AVIF"), (b"mif1", "a HEIF")]
)
def test_photos_of_phones_in_other_formats_are_named(brand: bytes, name: str) -> None:
    with pytest.raises(ImageError, match=rf"found {name}$") as caught:
        decode_image(b"\0\0\0\x18ftyp" + brand + bytes(40))
    assert caught.value.kind == "unsupported"


def test_empty_and_unknown_bytes_are_rejected() -> None:
    assert kind_of(b"") == "empty"
    assert kind_of(b"hello, hello") == "unsupported"
    with pytest.raises(ImageError) as caught:
        decode_image(b"secret-secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_pixel_cap_is_inclusive(kind: str) -> None:
    data = encoded(photo(), kind)
    assert decode_image(data, max_pixels=1200).size == (40, 30)
    assert kind_of(data, max_pixels=1199) == "too_large"


def test_png_bomb_is_rejected_by_its_header() -> None:
    rows = zlib.compressobj()
    body = b"".join([rows.compress(bytes(3750)) for _ in range(2000)]) + rows.flush()
    header = chunk(b"IHDR", struct.pack(">2I5B", 30_000, 30_000, 1, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    assert len(bomb) < 20_000
    assert kind_of(bomb) == "too_large"


def test_sizes_above_pillows_warning_limit_are_accepted_under_a_larger_cap() -> None:
    data = png(100_000, 1000, 1, 0, bytes(12_501) * 1000)
    assert decode_image(data, max_pixels=100_000_000).size == (100_000, 1000)


@pytest.mark.parametrize(
    ("body", "at"),
    [(b"VP8X", 24), (b"VP8L", 21), (b"VP8 ", 26)],
)
def test_webp_bombs_are_rejected_by_their_header(body: bytes, at: int) -> None:
    data = bytearray(b"RIFF\x40\0\0\0WEBP" + body + bytes(60))
    data[at : at + 6] = b"\xff" * 6
    assert kind_of(bytes(data)) == "too_large"


def test_jpeg_bomb_is_rejected_by_its_header() -> None:
    data = bytearray(encoded(photo(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    assert kind_of(bytes(data)) == "too_large"


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_files_are_broken(kind: str) -> None:
    data = encoded(photo(), kind)
    assert {kind_of(data[:length]) for length in range(16, len(data))} == {"broken"}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode_image(encoded(photo(), kind, exif=exif, quality=100))
    # The corner that the tag says is the top left one.
    corner = {1: (0, 0), 2: (39, 0), 3: (39, 29), 4: (0, 29)}.get(orientation)
    corner = corner or {5: (0, 0), 6: (0, 29), 7: (39, 29), 8: (39, 0)}[orientation]
    assert upright.size == ((40, 30) if orientation < 5 else (30, 40))
    np.testing.assert_allclose(upright.getpixel((0, 0)), photo().getpixel(corner), atol=12)


def test_webp_exif_may_have_a_jpeg_prefix() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(), "WEBP", exif=exif)
    at = data.index(b"EXIF") + 4
    (length,) = struct.unpack("<I", data[at : at + 4])
    body = b"Exif\0\0" + data[at + 4 : at + 4 + length]
    data = data[:at] + struct.pack("<I", len(body)) + body
    data = data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    assert decode_image(data).size == (30, 40)


def test_second_header_does_not_bypass_the_pixel_cap() -> None:
    small, large = encoded(photo(1, 1), "PNG"), encoded(photo(), "PNG")
    assert kind_of(small[:33] + large[8:], max_pixels=1) == "broken"
    small, large = encoded(photo(), "JPEG"), encoded(photo(300, 300), "JPEG")
    at, other = small.index(b"\xff\xc0"), large.index(b"\xff\xc0")
    data = small[: at + 19] + large[other : other + 19] + small[at + 19 :]
    assert kind_of(data, max_pixels=1200) == "broken"


def test_broken_exif_is_ignored() -> None:
    for exif in (b"Exif\0\0II", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 40):
        data = encoded(photo(), "JPEG", exif=exif)
        assert decode_image(data).size == (40, 30)


def test_alpha_is_composited_on_white() -> None:
    for color, expected in {
        (255, 0, 0, 0): (255, 255, 255),
        (255, 0, 0, 255): (255, 0, 0),
        (0, 0, 0, 51): (204, 204, 204),
    }.items():
        assert pixel(encoded(Image.new("RGBA", (2, 2), color), "PNG")) == expected
        lossless = encoded(Image.new("RGBA", (2, 2), color), "WEBP", lossless=True, exact=True)
        assert pixel(lossless) == expected
    assert pixel(encoded(Image.new("LA", (2, 2), (0, 51)), "PNG")) == (204, 204, 204)


def test_palette_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    opaque = encoded(image, "PNG")
    assert [pixel(opaque, (x, 0)) for x in (0, 1)] == [(255, 0, 0), (0, 0, 255)]
    for transparency, second in ((1, (255, 255, 255)), (bytes([255, 51]), (204, 204, 255))):
        data = encoded(image, "PNG", transparency=transparency)
        assert [pixel(data, (x, 0)) for x in (0, 1)] == [(255, 0, 0), second]


@pytest.mark.parametrize(
    ("bits", "row", "key", "expected"),
    [
        (1, b"\x40", 1, [0, 255]),
        (2, b"\xe0", 3, [255, 170]),
        (2, b"\xe0", 2, [255, 255]),
        (4, b"\x5a", 5, [255, 170]),
        (8, b"\x55\xaa", 0x55, [255, 170]),
        (16, b"\x55\x55\xaa\xaa", 0x5555, [255, 170]),
    ],
)
def test_transparent_gray_of_any_bit_depth(
    bits: int, row: bytes, key: int, expected: list[int]
) -> None:
    data = png(2, 1, bits, 0, b"\0" + row, chunk(b"tRNS", struct.pack(">H", key)))
    assert [pixel(data, (x, 0))[0] for x in (0, 1)] == expected


def test_transparent_16_bit_color() -> None:
    rows = b"\0" + struct.pack(">6H", 65535, 0, 0, 0, 0, 65535)
    data = png(2, 1, 16, 2, rows, chunk(b"tRNS", struct.pack(">3H", 65535, 0, 0)))
    assert [pixel(data, (x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]


def test_16_bit_gray_is_scaled_not_clipped() -> None:
    expected = {
        0: 0,
        128: 0,
        129: 1,
        257: 1,
        256 * 128: 128,
        257 * 200: 200,
        65407: 255,
        65535: 255,
    }
    data = png(8, 1, 16, 0, b"\0" + struct.pack(">8H", *expected))
    assert [pixel(data, (x, 0))[0] for x in range(8)] == list(expected.values())
    assert pixel(png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 65535, 257 * 7, 0))) == (255, 7, 0)


def test_12_bit_tiff_is_scaled_not_dark() -> None:
    levels = [0, 8, 9, 2047, 2048, 4095]  # a level of 8 bits is 16.06 of 12
    bits = "".join(f"{level:012b}" for level in levels)
    pixels = int(bits, 2).to_bytes(9, "big")
    # Tags in order: width, height, bits, compression, gray from black, where, samples, rows, bytes.
    values = {256: 6, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in values.items())
    directory = struct.pack("<H", len(values)) + entries + bytes(4)
    data = b"II*\0" + struct.pack("<I", 8 + 10) + pixels + b"\0" + directory
    opened = open_image(data, any_format=True)
    assert [opened.image.getpixel((x, 0))[0] for x in range(6)] == [0, 0, 1, 127, 128, 255]
    assert opened.deep


def test_gray_and_cmyk_become_rgb() -> None:
    assert pixel(encoded(Image.new("L", (8, 8), 77), "PNG")) == (77, 77, 77)
    red = np.array(pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")))
    np.testing.assert_allclose(red, (255, 0, 0), atol=3)
    np.testing.assert_allclose(pixel(encoded(Image.new("L", (8, 8), 77), "JPEG")), 77, atol=1)


def test_modes_without_a_range_are_rejected() -> None:
    for image in (Image.new("F", (2, 2)), Image.new("I", (2, 2), 70_000)):
        with pytest.raises(ImageError) as caught:
            to_rgb(image)
        assert caught.value.kind == "unsupported"


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_first_frame_of_an_animation_is_used(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert pixel(data) == (255, 0, 0)
    assert open_image(data).frames == 3
    assert open_image(encoded(frames[0], kind)).frames == 1


def test_metadata_raises_no_warnings() -> None:
    body = struct.pack(">2I", 0, 0)  # an animation of no frames: Pillow warns of it
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**7)))  # and refuses this
    assert pixel(png(1, 1, 8, 0, b"\0\x07", chunk(b"acTL", body), text)) == (7, 7, 7)


def test_resizing_to_the_same_size_is_exact() -> None:
    image = photo(32, 32)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(fit_image(image, 32), expected)


def test_fitting_crops_the_center() -> None:
    values = np.zeros((4, 10, 3), np.uint8)
    values[:, 3:7] = 200
    assert (fit_image(Image.fromarray(values), 4) == 200).all()
    assert (fit_image(Image.fromarray(values.swapaxes(0, 1).copy()), 4) == 200).all()


def test_fitting_is_antialiased() -> None:
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    fitted = fit_image(Image.fromarray(board), 8)
    assert fitted.shape == (3, 8, 8)
    assert fitted.dtype == torch.uint8
    assert ((fitted > 120) & (fitted < 135)).all()
    assert fit_image(photo(3, 2), 32).shape == (3, 32, 32)


def test_float_round_trip_is_the_identity() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    floats = to_float(values)
    assert floats.dtype == torch.float32
    assert (floats.min(), floats.max()) == (0, 1)
    assert torch.equal(to_uint8(floats), values)
    assert to_uint8(torch.tensor([-0.1, 0.5 / 255 + 1e-4, 1.2])).tolist() == [0, 1, 255]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_float_values_are_correctly_rounded_on_every_device(device: str) -> None:
    values = torch.arange(256, dtype=torch.uint8)
    expected = (values.double() / 255).float()
    assert torch.equal(to_float(values.to(device)).cpu(), expected)
    assert torch.equal(to_float(values.float().to(device)).cpu(), expected)


def test_png_round_trip_is_the_identity() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8, generator=generator)
    assert torch.equal(decode_png(encode_png(image)), image)
    for bad in (image.float(), image[:1], image[None]):
        with pytest.raises(ValueError, match="expected a uint8 image"):
            encode_png(bad)

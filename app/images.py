"""From the files of a request to one batch of the model's input."""

from __future__ import annotations

import asyncio

import torch
from torch import Tensor

from app.errors import FieldError, UnusableImages
from app.model import ServedModel
from app.pixels import together
from app.service import Service
from robust.images import ImageError, decode_image, fit_image


async def decode(service: Service, model: ServedModel, files: list[bytes]) -> Tensor:
    """The images as uint8 (n, 3, H, W) of the model's size, in order; no file is an empty one.

    Raises UnusableImages naming every image that can't be used, by its place from 0.
    """
    size, max_pixels = model.input_size, service.settings.max_pixels
    decoded = await asyncio.gather(
        *(service.beside(_decode, data, size, max_pixels) for data in files or [b""])
    )
    images = [item for item in decoded if isinstance(item, Tensor)]
    errors = {i: item for i, item in enumerate(decoded) if isinstance(item, ImageError)}
    if errors:
        first = next(iter(errors.values()))
        raise UnusableImages(
            first.kind,
            [
                FieldError(
                    field="file" if len(decoded) == 1 else f"file[{index}]",
                    expected=error.expected,
                    got=error.found,
                )
                for index, error in errors.items()
            ],
        )
    return together([torch.from_numpy(image.numpy()[None]) for image in images])


def _decode(data: bytes, size: int, max_pixels: int) -> Tensor | ImageError:
    try:
        return fit_image(decode_image(data, max_pixels=max_pixels), size)
    except ImageError as error:
        return error

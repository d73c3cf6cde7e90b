"""Decodes and resizes images one by one into one tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from robust.datasets.arrays import conversion_notes, resize_note
from robust.datasets.dataset import Dataset
from robust.datasets.source import Source
from robust.image_decoding import is_deep, is_transparent, open_image
from robust.image_headers import ImageError
from robust.images import fit_image

_MAX_SIZES = 3  # image sizes with a note each; more have one note in all


class ImageList:
    """Collects `count` images of any size as uint8 (count, 3, size, size) and records resizes."""

    def __init__(self, source: Source, count: int) -> None:
        source.check_count(count)
        source.check_fitted(count)
        source.check_output(count, 1)
        self.source = source
        self.images = torch.empty((count, 3, source.size, source.size), dtype=torch.uint8)
        self.count = 0
        self._sizes = Counter[tuple[int, int]]()
        self._several_frames, self._deep, self._transparent = 0, 0, 0

    def add_bytes(self, data: bytes) -> None:
        """Decode and add an image of any format allowed in folders. Raises ImageError."""
        size, limits = self.source.size, self.source.limits
        opened = open_image(data, size=size, max_pixels=limits.max_pixels, any_format=True)
        self._several_frames += opened.frames > 1
        self._deep += opened.deep
        self._transparent += opened.transparent
        self._add(opened.image, opened.size)

    def add_image(self, image: Image.Image) -> None:
        """Add a decoded image. Raises ImageError unless it has 8 or 16 bits per channel."""
        if image.width * image.height > self.source.limits.max_pixels:
            found = f"{image.width}x{image.height}"
            expected = f"at most {self.source.limits.max_pixels} pixels"
            raise ImageError("too_large", expected=expected, found=found)
        self._deep += is_deep(image)
        self._transparent += is_transparent(image)
        self._add(image, image.size)

    def repeat(self, index: int) -> None:
        """Add the image at `index` again."""
        self.images[self.count] = self.images[index]
        self.count += 1

    def _add(self, image: Image.Image, original_size: tuple[int, int]) -> None:
        self.images[self.count] = fit_image(image, self.source.size)
        self.count += 1
        if original_size != (self.source.size,) * 2:
            self._sizes[original_size] += 1

    def dataset(
        self, labels: Tensor, classes: Sequence[str], *, changes: Sequence[str] = ()
    ) -> Dataset:
        """The Dataset of the images with labels int64 (count,)."""
        assert self.count == len(self.images)
        notes = list(changes)
        size, total = self.source.size, self._sizes.total()
        if len(self._sizes) > _MAX_SIZES:
            sides = sorted(self._sizes, key=lambda side: side[0] * side[1])
            low, high = ("x".join(map(str, side)) for side in (sides[0], sides[-1]))
            notes.append(
                f"resized {total} images of {len(sides)} sizes, {low} to {high}, to {size}x{size}, "
                "after cropping those that are not square to the square in the center"
            )
        else:
            notes += [resize_note(n, *sides, size) for sides, n in self._sizes.items()]
        notes += conversion_notes(
            several_frames=self._several_frames, deep=self._deep, transparent=self._transparent
        )
        return Dataset(
            images=self.images,
            labels=labels,
            classes=tuple(classes),
            name=self.source.name,
            changes=tuple(notes),
        )

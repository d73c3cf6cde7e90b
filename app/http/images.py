"""Decodes the image files of a request into one batch at the model's input size."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from starlette.requests import Request
from torch import Tensor

from app.decoding.pool import DecodeFailed, WorkerPool
from app.engine.numpy_ops import concatenate
from app.engine.served_model import ServedModel
from app.errors import FieldError, UnusableImages
from app.service import Service
from robust.image_decoding import DecodeCost, Pixels, read_cheap_pixels
from robust.image_headers import ImageError

T = TypeVar("T")

# Up to this cost an image is decoded in a thread, which can't be stopped: about 100 ms at most.
CHEAP = DecodeCost(work=2_000_000, memory=64 * 2**20)
# Up to this cost a worker for quick images decodes it: photographs of up to about 20 megapixels.
# The slowest such image found takes 0.7 s of CPU time.
QUICK_WORK = 250_000_000


async def decode(
    service: Service, request: Request, model: ServedModel, files: Sequence[bytes]
) -> Tensor:
    """The images as uint8 (n, 3, H, W) at the model's input size, in the order of `files`.

    Images whose header says that they are cheap to decode are decoded in a thread, all others in a
    worker process that is killed with the request. Raises DeadlineExceeded, or UnusableImages,
    which names every unusable image by its index.
    """
    files = files or [b""]  # a request without a file fails like one with an empty file
    size = model.input_size
    with service.engine.decoding():
        found = await _all([_decode_in_thread(service, request, data, size) for data in files])
    decoded: list[Pixels | ImageError | DecodeFailed]
    decoded = [item for item in found if not isinstance(item, DecodeCost)]
    if len(decoded) < len(found):  # some are expensive
        decoded = await _all(
            [
                _decode_in_worker(service, request, data, size, item)
                if isinstance(item, DecodeCost)
                else _as_coroutine(item)
                for data, item in zip(files, found, strict=True)
            ]
        )
    errors = [
        (item, "file" if len(files) == 1 else f"file[{index}]")
        for index, item in enumerate(decoded)
        if not isinstance(item, np.ndarray)
    ]
    if errors:
        raise UnusableImages(
            _kind(errors[0][0]),
            [
                FieldError(field=field, expected=error.expected, got=error.found)
                for error, field in errors
            ],
        )
    images = [torch.from_numpy(item[None]) for item in decoded if isinstance(item, np.ndarray)]
    return concatenate(images)


async def _decode_in_thread(
    service: Service, request: Request, data: bytes, size: int
) -> Pixels | DecodeCost | ImageError:
    async with service.thread_slots.hold(request.state.caller.client):
        return await service.run_in_thread(
            _decode_if_cheap, data, size, service.settings.max_pixels
        )


def _decode_if_cheap(data: bytes, size: int, max_pixels: int) -> Pixels | DecodeCost | ImageError:
    try:
        return read_cheap_pixels(data, size, most=CHEAP, max_pixels=max_pixels)
    except ImageError as error:
        return error


async def _decode_in_worker(
    service: Service, request: Request, data: bytes, size: int, cost: DecodeCost
) -> Pixels | ImageError | DecodeFailed:
    """Decode with a worker for quick images if `cost` is low, or if that fails, for large ones.

    So a quick image never waits for a large one.
    """
    ask = partial(_ask_worker, service, request, data, size, cost)
    if cost.work <= QUICK_WORK and cost.memory <= service.quick_memory:
        found = await ask(service.quick_workers)
        if not isinstance(found, DecodeFailed) or found.reason != "cpu":
            return found
    return await ask(service.image_workers)


async def _ask_worker(
    service: Service,
    request: Request,
    data: bytes,
    size: int,
    cost: DecodeCost,
    workers: WorkerPool,
) -> Pixels | ImageError | DecodeFailed:
    try:
        answer, parts = await workers.run(
            {"task": "image", "size": size, "max_pixels": service.settings.max_pixels},
            [data],
            client=request.state.caller.client,
            memory=cost.memory,
            most=3 * size * size,
            deadline=service.deadline(request),
        )
    except DecodeFailed as error:
        return error
    if "error" in answer:
        return ImageError(answer["error"], expected=answer["expected"], found=answer["found"])
    return np.frombuffer(parts[0], dtype=np.uint8).reshape(3, size, size)


def _kind(error: ImageError | DecodeFailed) -> str:
    if isinstance(error, ImageError):
        return error.kind
    return "too_large" if error.reason == "memory" else "undecodable"


async def _as_coroutine(item: T) -> T:
    return item


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order; if one raises or this is cancelled, the others are cancelled."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()

"""Loads labeled datasets for evaluation: uploaded, or registered by the operator."""

from __future__ import annotations

import asyncio
import io
import re
import time
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from starlette.requests import Request

from app.decoding.pool import DecodeFailed
from app.engine.served_model import ServedModel
from app.errors import DeadlineExceeded, invalid
from app.http.parameters import describe
from app.service import Service
from app.settings import Settings
from robust.datasets import Dataset, DatasetError, load_dataset, load_upload
from robust.datasets.dataset import DTYPES
from robust.datasets.errors import TooManyToFit
from robust.datasets.registry import form_of_file
from robust.matching import first_images, match_classes

# A set within these limits is cheap: it is read in a thread, which can't be stopped, within about
# 200 ms. An npz file, or a pt file of torch.save, is a zip archive.
FAST_BYTES = 32 * 2**20  # of all members of the archive, decompressed
FAST_FITTED = 1000  # images to resize
FAST_OTHER_BYTES = 2**20  # of a member without images
FAST_PICKLE_BYTES = 64 * 2**10  # every byte of a pickle may be an operation
FAST_DIRECTORY_BYTES = 16 * 2**10  # of the archive's directory: some 60 bytes per member
_IMAGES = re.compile(r"images\.npy|.*/data/\d+")


def registered(settings: Settings) -> dict[str, Path]:
    """The path of each set in the operator's folder, by its name.

    That of a file is without the suffix, unless another set has the same name then.
    """
    folder = settings.datasets
    if folder is None or not folder.is_dir():
        return {}
    short = {
        path: path.name if path.is_dir() else path.stem
        for path in sorted(folder.iterdir())
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", path.name)
        and (path.is_dir() or form_of_file(path.name))
    }
    count = Counter(short.values())
    return {
        name if count[name] == 1 else path.name: path.absolute() for path, name in short.items()
    }


async def load_set(
    service: Service,
    request: Request,
    model: ServedModel,
    *,
    files: Sequence[bytes],
    name: str | None,
    limit: int | None,
) -> Dataset:
    """Load the set that a request uploads or names: its first `limit` images, at the model's size.

    A name is looked up, never used as a path. A cheap set is read in a thread, any other in a
    worker process that is killed with the request; at most one of each at a time. An upload must be
    read before the request's deadline, the wait for its turn included. Raises InvalidParameters,
    DatasetError or DeadlineExceeded.
    """
    if bool(files) == (name is not None):
        expected = 'either a set in the field "file" or the name of one in "dataset"'
        raise invalid("file", expected, "both" if files else "neither")
    source = files[0] if name is None else await asyncio.to_thread(_find, service.settings, name)
    seconds = service.deadline(request) - time.monotonic() if name is None else None
    try:
        async with asyncio.timeout(seconds):
            dataset = await _read(service, request, source, model.input_size)
            return await asyncio.to_thread(_first_of_model, dataset, model.classes, limit)
    except TimeoutError:
        raise DeadlineExceeded("The dataset was not read in time.") from None


async def _read(service: Service, request: Request, source: bytes | Path, size: int) -> Dataset:
    client, dataset = request.state.caller.client, None
    if await asyncio.to_thread(is_cheap, source):
        async with service.cheap_set_slots.hold(client):
            dataset = await asyncio.to_thread(_read_if_cheap, source, size, service.settings)
    if dataset is None:
        async with service.set_slots.hold(client):
            dataset = await _read_in_worker(service, request, source, size)
    return dataset


def _first_of_model(dataset: Dataset, classes: Sequence[str], limit: int | None) -> Dataset:
    """The first `limit` images, or all, with the labels of the model."""
    dataset = match_classes(dataset, classes)
    return dataset if limit is None else first_images(dataset, limit)


def is_cheap(source: bytes | Path) -> bool:
    """Whether a set is likely cheap to read, from its size and directory, in milliseconds."""
    if isinstance(source, Path):
        if not source.is_file() or source.stat().st_size > FAST_BYTES:
            return False
        source = source.read_bytes()
    if not source.startswith(b"PK\3\4"):
        return len(source) <= FAST_PICKLE_BYTES
    # The directory's size is checked first: reading a million members takes seconds.
    if _directory_bytes(source) > FAST_DIRECTORY_BYTES:
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(source)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError):
        return True  # reading it fails at the same place, quickly
    if sum(member.file_size for member in members) > FAST_BYTES:
        return False
    return all(
        member.file_size <= _fast_bytes(member.filename)
        for member in members
        if not member.is_dir()
    )


def _directory_bytes(source: bytes) -> int:
    """The declared size of a zip file's directory: the larger one if the zip64 record differs."""
    # Look for the end record where zipfile does: at the very end, else at the last signature. The
    # record itself may contain the signature, in its offset of the directory.
    at_the_end = source[-22:-18] == b"PK\5\6" and source[-2:] == b"\0\0"
    end = len(source) - 22 if at_the_end else source.rfind(b"PK\5\6")
    if end < 0:  # truncated, so that reading it fails
        return 0
    length = int.from_bytes(source[end + 12 : end + 16], "little")
    locator = end - 20
    if source[locator : locator + 4] != b"PK\6\7":
        return length
    records = locator - 56, int.from_bytes(source[locator + 8 : locator + 16], "little")
    lengths = [int.from_bytes(source[at + 40 : at + 48], "little") for at in records if at >= 0]
    return max([0 if length == 2**32 - 1 else length, *lengths])


def _fast_bytes(name: str) -> int:
    """The largest size of a member of that name in a cheap set."""
    if _IMAGES.fullmatch(name):
        return FAST_BYTES
    return FAST_PICKLE_BYTES if name.endswith(".pkl") else FAST_OTHER_BYTES


def _find(settings: Settings, name: str) -> Path:
    known = registered(settings)
    if name not in known:
        names = ", ".join(known) or "there is none"
        raise invalid("dataset", f"the name of a registered set ({names})", describe(name))
    return known[name]


def _read_if_cheap(source: bytes | Path, size: int, settings: Settings) -> Dataset | None:
    """The set, or None if too many of its images need resizing for this thread."""
    if isinstance(source, Path):
        return load_dataset(source, size=size, train=False)
    try:
        return load_upload(
            source,
            None,
            size=size,
            max_images=settings.max_upload_images,
            max_pixels=settings.max_pixels,
            max_fitted=FAST_FITTED,
        )
    except TooManyToFit:
        return None


async def _read_in_worker(
    service: Service, request: Request, source: bytes | Path, size: int
) -> Dataset:
    settings = service.settings
    path = isinstance(source, Path)
    try:
        answer, parts = await service.set_workers.run(
            {
                "task": "set",
                "path": str(source) if path else None,
                "size": size,
                "max_images": settings.max_upload_images,
                "max_pixels": settings.max_pixels,
            },
            [] if isinstance(source, Path) else [source],
            client=request.state.caller.client,
            # Of a registered set nothing is known or limited, so it reserves nothing: however long
            # that takes to read, images are decoded meanwhile.
            memory=0 if path else service.set_memory,
            most=2**40 if path else settings.max_upload_images * (4 * 3 * size * size + 8),
            trusted=path,
        )
    except DecodeFailed as error:
        raise DatasetError("upload", expected=error.expected, found=error.found) from None
    if "error" in answer:
        raise DatasetError(answer["source"], expected=answer["expected"], found=answer["found"])
    images, labels = parts
    return Dataset(
        images=torch.frombuffer(images, dtype=DTYPES[answer["dtype"]]).view(-1, 3, size, size),
        labels=torch.frombuffer(labels, dtype=torch.int64),
        classes=tuple(answer["classes"]),
        name=answer["name"],
        changes=tuple(answer["changes"]),
    )

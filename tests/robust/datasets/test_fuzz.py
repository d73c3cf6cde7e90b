"""Random damage to every form that comes from outside: read, or refused, and never slow.

    pytest -m slow tests/robust/datasets/test_fuzz.py

What broke once is a test of its own elsewhere; this looks for more.
"""

from __future__ import annotations

import io
import pickle
import time
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Subset, TensorDataset

from robust.datasets import Dataset, DatasetError, load_upload
from robust.image_decoding import open_image
from robust.image_headers import ImageError
from tests.support.images import decode_cost

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), dtype=np.uint8)
TENSORS = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).contiguous()
LABELS = torch.tensor([0, 1, 2])
PICTURES = [Image.fromarray(image) for image in PIXELS]


def written(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


FORMATS: tuple[tuple[str, dict[str, object]], ...] = (
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("GIF", {}),
    ("BMP", {}),
)
IMAGES = [
    written(lambda file, kind=kind, options=options: PICTURES[0].save(file, kind, **options))
    for kind, options in FORMATS
]
VALUES = (
    {"images": TENSORS, "labels": LABELS},
    (TENSORS / 254.0, LABELS),
    [(picture, index) for index, picture in enumerate(PICTURES)],
    {"imgs": PICTURES, "labels": torch.eye(3)},
    Subset(TensorDataset(TENSORS, LABELS), [0, 2]),
    {"data": PIXELS, "targets": np.arange(3)},
)
UPLOADS = [
    written(lambda file, value=value, zipped=zipped: torch.save(
        value, file, _use_new_zipfile_serialization=zipped
    ))
    for value in VALUES
    for zipped in (True, False)
]  # fmt: skip
UPLOADS += [pickle.dumps(value, protocol) for value in VALUES for protocol in (2, 4)]
UPLOADS += [
    written(lambda file: np.savez(file, images=PIXELS, labels=np.arange(3))),
    written(lambda file: np.savez_compressed(file, x_test=PIXELS / 255, y_test=np.eye(3))),
]

CHANGES = st.lists(
    st.tuples(st.floats(0, 1), st.binary(min_size=0, max_size=5), st.integers(0, 5)),
    min_size=1,
    max_size=8,
)
"""Where, what is put there, and how many bytes it takes the place of."""
THOROUGH = settings(
    max_examples=20_000, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def damaged(data: bytes, changes: list[tuple[float, bytes, int]]) -> bytes:
    for place, new, width in changes:
        at = int(place * len(data))
        data = data[:at] + new + data[at + width :]
    return data


def damaged_inside(data: bytes, changes: list[tuple[float, bytes, int]]) -> bytes:
    """Damage the largest member of a zip, whose checksums stay right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = [name for name in members if name.endswith(".pkl")]
    name = pickled[0] if pickled else max(members, key=lambda name: len(members[name]))
    members[name] = damaged(members[name], changes)

    def write(file: io.BytesIO) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)

    return written(write)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, on metadata
@THOROUGH
@given(original=st.sampled_from(IMAGES), changes=CHANGES)
def test_images(original: bytes, changes: list[tuple[float, bytes, int]]) -> None:
    data = damaged(original, changes)
    start = time.thread_time()
    try:
        opened = open_image(data, size=4, max_pixels=1_000_000, any_format=True)
    except ImageError:
        return
    finally:
        assert time.thread_time() - start < 2
    assert opened.image.mode == "RGB"
    if data[:2] not in (b"GI", b"BM"):
        decode_cost(data, size=4, max_pixels=1_000_000)  # what decodes has a cost


@pytest.mark.slow
@THOROUGH
@given(original=st.sampled_from(UPLOADS), changes=CHANGES, inside=st.booleans())
def test_uploads(original: bytes, changes: list[tuple[float, bytes, int]], inside: bool) -> None:
    damage = damaged_inside if inside and original.startswith(b"PK") else damaged
    data = damage(original, changes)
    start = time.thread_time()
    try:
        dataset = load_upload(data, "x", size=4, max_images=50)
    except DatasetError:
        return
    finally:
        assert time.thread_time() - start < 2
    assert isinstance(dataset, Dataset)
    assert 1 <= len(dataset) <= 50

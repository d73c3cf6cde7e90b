import io
import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from robust.datasets import DatasetError, load_dataset

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def save(folder: Path, **arrays: object) -> Path:
    path = folder / "data.npz"
    np.savez(path, **{"images": IMAGES, "labels": LABELS, **arrays})
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        load_dataset(path)
    assert str(caught.value).startswith(f"{path.name}: expected ")
    return caught.value.found


def test_uint8_arrays_pass_bit_exactly(tmp_path: Path) -> None:
    dataset = load_dataset(save(tmp_path, classes=np.array(["cat", "dog", "eel", "fox"])))
    assert torch.equal(dataset.images, torch.from_numpy(IMAGES))
    assert dataset.labels.tolist() == LABELS.tolist()
    assert dataset.labels.dtype == torch.int64
    assert dataset.classes == ("cat", "dog", "eel", "fox")
    assert dataset.name == "data.npz"


@pytest.mark.parametrize(
    "images",
    [
        IMAGES.transpose(0, 2, 3, 1),
        np.asfortranarray(IMAGES),
        (IMAGES / 255).astype(np.float32),
        (IMAGES / 255).astype(">f8"),
        (IMAGES / 255).astype(np.float16),
    ],
    ids=["NHWC", "fortran", "float32", "big-endian", "float16"],
)
def test_layouts_and_floats_give_the_same_images(tmp_path: Path, images: object) -> None:
    dataset = load_dataset(save(tmp_path, images=images))
    assert torch.equal(dataset.images, torch.from_numpy(IMAGES))
    assert dataset.classes == ("0", "1", "2")


@pytest.mark.parametrize("shape", [(6, 32, 32), (6, 1, 32, 32), (6, 32, 32, 1)])
def test_grey_becomes_three_equal_channels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    dataset = load_dataset(save(tmp_path, images=IMAGES[:, 0].reshape(shape)))
    assert torch.equal(dataset.images, torch.from_numpy(IMAGES[:, :1]).expand(-1, 3, -1, -1))


def test_other_sizes_are_resized_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = np.repeat(IMAGES, 2, axis=2).repeat(2, axis=3)
    with caplog.at_level(logging.INFO):
        dataset = load_dataset(save(tmp_path, images=images))
    assert dataset.images.shape == (6, 3, 32, 32)
    assert "resizing 6 images from 64x64 to 32" in caplog.text
    flat = np.full((6, 3, 48, 48), 9, np.uint8)
    assert (load_dataset(save(tmp_path, images=flat), size=20).images == 9).all()


@pytest.mark.parametrize("labels", [LABELS.astype(np.uint16), LABELS + 0.0, LABELS[:, None]])
def test_whole_labels_of_any_type(tmp_path: Path, labels: object) -> None:
    assert load_dataset(save(tmp_path, labels=labels)).labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (LABELS[:5], "shape (5,)"),
        (LABELS + 0.5, "fractions or NaN"),
        (np.array([0, 1, 2, 0, 1, np.nan]), "fractions or NaN"),
        (LABELS - 1, "labels from -1 to 1"),
        (LABELS * 10**6, "labels from 0 to 2000000"),
        (LABELS > 0, "torch.bool"),
        (LABELS * 0 + 2, "6 of class 2 only"),
        (np.eye(6), "shape (6, 6)"),
        (np.array(3), "a single number"),
        (LABELS.astype(object), "an object array"),
        (LABELS.astype(str), "dtype <U21"),
        (LABELS + 0j, "an array of another type"),
    ],
)
def test_bad_labels(tmp_path: Path, labels: object, found: str) -> None:
    assert refusal(save(tmp_path, labels=labels)) == found


def with_one(value: float) -> object:
    images = (IMAGES / 255).astype(np.float32)
    images[5, 2, 31, 31] = value
    return images


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (IMAGES[:0], "none"),
        (IMAGES[0, 0], "shape (32, 32)"),
        (IMAGES[:, :2], "shape (6, 2, 32, 32)"),
        (IMAGES[None], "shape (1, 6, 3, 32, 32)"),
        (IMAGES[..., :0], "shape (6, 3, 32, 0)"),
        (IMAGES.astype(np.int64), "torch.int64"),
        (with_one(np.nan), "NaN or infinity"),
        (with_one(np.inf), "NaN or infinity"),
        (with_one(1.01), "values from 0 to 1.01"),
        (with_one(-0.01), "values from -0.01 to 1"),
        (IMAGES.astype(object), "an object array"),
        (
            IMAGES.astype([("r", "u1")]),
            "a header of another form (records and objects are refused)",
        ),
    ],
)
def test_bad_images(tmp_path: Path, images: object, found: str) -> None:
    assert refusal(save(tmp_path, images=images)) == found


def test_bad_classes(tmp_path: Path) -> None:
    assert refusal(save(tmp_path, classes=np.array(["a", "b"]))) == "2 class names and a label 2"
    assert refusal(save(tmp_path, classes=np.array([1, 2, 3]))) == "dtype int64, shape (3,)"


def test_missing_arrays_files_and_unknown_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=IMAGES)
    assert refusal(tmp_path / "x.npz") == "none named labels"
    (tmp_path / "x.csv").write_text("1,2")
    assert refusal(tmp_path / "x.csv") == ".csv"
    with pytest.raises(DatasetError, match="nowhere: expected a file, a folder, 'cifar10'"):
        load_dataset("nowhere")


def test_files_cut_short_anywhere(tmp_path: Path) -> None:
    data = save(tmp_path, images=IMAGES[:, :, :4, :4]).read_bytes()
    path = tmp_path / "cut.npz"
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        assert "damaged" in refusal(path)


def rewritten(path: Path, name: str, old: bytes, new: bytes) -> Path:
    """Replace bytes of one member, keeping the zip's own checksums right."""
    with zipfile.ZipFile(path) as archive:
        members = {info: archive.read(info) for info in archive.namelist()}
    assert old in members[name]
    members[name] = members[name].replace(old, new, 1)
    with zipfile.ZipFile(path, "w") as archive:
        for info, data in members.items():
            archive.writestr(info, data)
    return path


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"(6, 3, 32, 32)", b"(6000000000000, 3)"),
        (b"(6, 3, 32, 32)", b"(6, 3, 32, 33)"),
        (b"(6, 3, 32, 32)", b"(" + b"1," * 60 + b")"),
        (b"(6, 3, 32, 32)", b"(-6, -3, 32, 32)"),
        (b"(6, 3, 32, 32)", b"([].a, 3, 32)"),
        (b"'|u1'", b"'|u9'"),
        (b"NUMPY\x01", b"NUMPY\x09"),
        (b"\x93NUMPY", b"\x93PICKL"),
    ],
)
def test_declared_shapes_are_not_trusted(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = rewritten(save(tmp_path), "images.npy", old, new)
    with pytest.raises(DatasetError, match=r"data.npz: expected a plain array in images.npy"):
        load_dataset(path)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    path = save(tmp_path, classes=np.array([print, print, print], dtype=object))
    assert refusal(path) == "an object array"


def test_text_that_is_none(tmp_path: Path) -> None:
    path = save(tmp_path, classes=np.array(["a", "b", "c"]))
    rewritten(path, "classes.npy", b"a\0\0\0", b"\xff\xff\xff\xff")
    assert refusal(path) == "no text"


def test_encrypted_members(tmp_path: Path) -> None:
    path = save(tmp_path)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert refusal(path) == "another method or encryption"


def test_members_named_twice(tmp_path: Path) -> None:
    path, buffer = save(tmp_path), io.BytesIO()
    np.save(buffer, LABELS)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("labels.npy", buffer.getvalue())
    assert refusal(path) == "a member named twice"

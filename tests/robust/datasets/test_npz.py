import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from robust.datasets import DatasetError, load_dataset, load_upload

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
        IMAGES.reshape(6, -1),
    ],
    ids=["NHWC", "fortran", "float32", "big-endian", "rows"],
)
def test_layouts_and_floats_give_the_same_images(tmp_path: Path, images: object) -> None:
    dataset = load_dataset(save(tmp_path, images=images))
    assert torch.equal(dataset.images, torch.from_numpy(IMAGES))
    assert dataset.classes == ("0", "1", "2")


@pytest.mark.parametrize("shape", [(6, 32, 32), (6, 1, 32, 32), (6, 32, 32, 1)])
def test_grey_becomes_three_equal_channels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    dataset = load_dataset(save(tmp_path, images=IMAGES[:, 0].reshape(shape)))
    assert torch.equal(dataset.images, torch.from_numpy(IMAGES[:, :1]).expand(-1, 3, -1, -1))


def test_other_sizes_are_resized_and_noted(tmp_path: Path) -> None:
    images = np.repeat(IMAGES, 2, axis=2).repeat(2, axis=3)
    dataset = load_dataset(save(tmp_path, images=images))
    assert dataset.images.shape == (6, 3, 32, 32)
    assert dataset.changes == ("resized 6 images from 64x64 to 32x32",)
    flat = np.full((6, 3, 48, 48), 9, np.uint8)
    assert (load_dataset(save(tmp_path, images=flat), size=20).images == 9).all()


@pytest.mark.parametrize("labels", [LABELS.astype(np.uint16), LABELS + 0.0, LABELS[:, None]])
def test_whole_labels_of_any_type(tmp_path: Path, labels: object) -> None:
    assert load_dataset(save(tmp_path, labels=labels)).labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (LABELS[:5], "shape (5,)"),
        (LABELS + 0.5, "fractions, NaN or infinity"),
        (np.array([0, 1, 2, 0, 1, np.nan]), "fractions, NaN or infinity"),
        (np.array([0, 1, 2, 0, 1, np.inf]), "fractions, NaN or infinity"),
        (LABELS - 1, "labels from -1 to 1"),
        (LABELS * 10**6, "labels from 0 to 2000000"),
        (np.eye(7)[:, :6], "shape (7, 6)"),
        (np.eye(6) * 0.9, "other values (6, 6)"),
        (np.ones((6, 6)), "rows without a single 1"),
        (np.eye(6) * np.nan, "other values (6, 6)"),
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
        (with_one(1.01), "values from 0.0 to 1.01"),
        (with_one(1.0000021), "values from 0.0 to 1.0000021"),
        (with_one(-0.01), "values from -0.01 to 1.0"),
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
    assert refusal(tmp_path / "x.npz") == "images"
    np.savez(tmp_path / "x.npz", images=IMAGES, adv=IMAGES, labels=LABELS)
    assert refusal(tmp_path / "x.npz") == "both, among images, adv, labels"
    np.savez(tmp_path / "x.npz", pictures=IMAGES, Labels=LABELS)
    with pytest.raises(DatasetError, match=r"images named images, imgs, .*found pictures, Labels"):
        load_dataset(tmp_path / "x.npz")
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


def test_declared_lengths_are_not_trusted(tmp_path: Path) -> None:
    path, short = tmp_path / "data.npz", io.BytesIO()
    np.save(short, IMAGES)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", short.getvalue()[:-10])
    real, declared = (struct.pack("<I", len(short.getvalue()) - cut) for cut in (10, 0))
    data = path.read_bytes()
    assert data.count(real) == 2  # in the member's own header and in the directory
    path.write_bytes(data.replace(real, declared))
    np.save(tmp_path / "labels.npy", LABELS)
    assert refusal(path) == "a damaged one (images.npy ends early)"


def test_object_arrays_are_never_unpickled(tmp_path: Path) -> None:
    path = save(tmp_path, classes=np.array([print, print, print], dtype=object))
    assert refusal(path) == "an object array"


def test_invalid_text_arrays_are_rejected(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("x_test", "y_test"),
        ("data", "targets"),
        ("adv_complete", "labels"),
        ("X", "Y"),
        ("test_images", "test_labels"),
        ("x_adv", "y_true"),
    ],
)
def test_the_usual_names(tmp_path: Path, images: str, labels: str) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **{images: IMAGES, labels: LABELS})
    dataset = load_dataset(path)
    assert torch.equal(dataset.images, torch.from_numpy(IMAGES))
    assert dataset.changes == ()


def test_requested_split_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mnist.npz"
    parts = {"x_train": IMAGES[:4], "y_train": LABELS[:4]}
    parts |= {"x_test": IMAGES[4:], "y_test": LABELS[4:]}
    np.savez(path, **parts)
    torch.save({name: torch.from_numpy(v) for name, v in parts.items()}, path.with_suffix(".pt"))
    for file in (path, path.with_suffix(".pt")):
        dataset = load_dataset(file)
        assert torch.equal(dataset.images, torch.from_numpy(IMAGES[:4]))
        assert dataset.changes == ("read x_train, not x_test (train=False reads that)",)
        dataset = load_dataset(file, train=False)
        assert dataset.labels.tolist() == [1, 2]
        assert dataset.changes == ("read x_test, not x_train (--train or train=True reads that)",)
    uploaded = load_upload(path.read_bytes(), "a.npz", size=32, max_images=9)
    assert uploaded.changes == ("read x_train, not x_test",)


@pytest.mark.parametrize(
    ("names", "train", "expected"),
    [
        (("x_train", "y_train"), False, "images and labels of the split test or validation or"),
        (("images", "y_train"), False, "images and labels of the split test or validation or"),
        (("x_test", "y_train"), False, "images named"),
        (("x_train", "y_test"), False, "images named"),
        (("x_test", "y_val"), False, "images named"),
    ],
)
def test_training_images_do_not_replace_missing_test_images(
    tmp_path: Path, names: tuple[str, str], train: bool, expected: str
) -> None:
    np.savez(tmp_path / "a.npz", **dict(zip(names, (IMAGES, LABELS), strict=True)))
    content = dict(zip(names, map(torch.from_numpy, (IMAGES, LABELS)), strict=True))
    torch.save(content, tmp_path / "a.pt")
    for file in ("a.npz", "a.pt"):
        with pytest.raises(DatasetError) as caught:
            load_dataset(tmp_path / file, train=train)
        assert caught.value.expected.startswith(expected)
        assert caught.value.found == ", ".join(names)


def test_a_class_name_given_twice(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS, classes=["cat", "cat", "dog", "eel"])
    content = {"images": torch.from_numpy(IMAGES), "labels": torch.from_numpy(LABELS)}
    torch.save({**content, "classes": ["cat", "cat", "dog", "eel"]}, tmp_path / "a.pt")
    for file in ("a.npz", "a.pt"):
        with pytest.raises(DatasetError, match="a different name for each class, found cat twice"):
            load_dataset(tmp_path / file)


def test_name_ending_in_an_underscore_is_not_a_split(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=IMAGES, labels=LABELS, images_=IMAGES[:1], _labels=LABELS[:1])
    assert load_dataset(path).labels.tolist() == LABELS.tolist()


def test_labels_in_a_file_beside(tmp_path: Path) -> None:
    path = tmp_path / "aa.npz"
    np.savez(path, adv_complete=IMAGES)
    np.save(tmp_path / "labels.npy", LABELS)
    dataset = load_dataset(path)
    assert dataset.labels.tolist() == LABELS.tolist()
    assert dataset.changes == ("read the labels from labels.npy",)


@pytest.mark.parametrize(
    "labels",
    [np.eye(4)[LABELS], np.eye(4, dtype=bool)[LABELS], np.eye(4, dtype=np.uint8)[LABELS]],
)
def test_one_hot_labels(tmp_path: Path, labels: object) -> None:
    assert load_dataset(save(tmp_path, labels=labels)).labels.tolist() == LABELS.tolist()


def test_boolean_labels_one_class_and_one_image(tmp_path: Path) -> None:
    dataset = load_dataset(save(tmp_path, labels=LABELS > 0))
    assert (dataset.labels.tolist(), dataset.classes) == ([0, 1, 1, 0, 1, 1], ("0", "1"))
    dataset = load_dataset(save(tmp_path, labels=LABELS * 0 + 2))
    assert dataset.classes == ("0", "1", "2")
    for one in (np.array([2]), np.array(2)):
        dataset = load_dataset(save(tmp_path, images=IMAGES[:1], labels=one))
        assert (dataset.labels.tolist(), len(dataset.images)) == ([2], 1)


FLOATS = RNG.random((6, 3, 32, 32)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["f4", ">f4", "f8", "f2"])
def test_floats_stay_floats(tmp_path: Path, dtype: str) -> None:
    dataset = load_dataset(save(tmp_path, images=FLOATS.astype(dtype)))
    assert (dataset.dtype, dataset.images.dtype) == ("float32", torch.float32)
    assert np.array_equal(dataset.images.numpy(), FLOATS.astype(dtype).astype(np.float32))
    assert dataset.changes == ()
    turned = load_dataset(save(tmp_path, images=FLOATS.astype(dtype).transpose(0, 2, 3, 1)))
    assert turned.sha256 == dataset.sha256


def test_hash_covers_float_precision(tmp_path: Path) -> None:
    near = FLOATS.copy()
    near[3, 1, 4, 4] = np.nextafter(near[3, 1, 4, 4], np.float32(0))
    dataset, other = (load_dataset(save(tmp_path, images=x)) for x in (FLOATS, near))
    assert dataset.sha256 != other.sha256
    rounded, also = dataset.in_8_bits(), other.in_8_bits()
    assert rounded.sha256 == also.sha256 != dataset.sha256
    assert rounded.changes == ("rounded 6 images from float32 to 8 bits",)
    assert rounded.in_8_bits() is rounded
    assert (rounded.images.numpy() == np.round(FLOATS * 255)).all()


def test_floats_slightly_out_of_range_are_clipped_and_counted(tmp_path: Path) -> None:
    images = FLOATS.copy()
    images[0, 0, 0, :3] = (-5e-7, 1 + 5e-7, 0)
    dataset = load_dataset(save(tmp_path, images=images))
    assert dataset.images[0, 0, 0, :3].tolist() == [0, 1, 0]
    assert dataset.changes == ("clipped 2 values outside [0, 1] by less than 1e-06",)
    levels = (IMAGES / 255).astype(np.float32)
    levels[0, 0, 0, 0] = 1 + 5e-7
    dataset = load_dataset(save(tmp_path, images=levels))
    assert (dataset.dtype, dataset.images[0, 0, 0, 0].item()) == ("uint8", 255)
    assert len(dataset.changes) == 1


def test_float64_values_rounded_to_float32_are_counted(tmp_path: Path) -> None:
    images = FLOATS.astype(np.float64)
    images[0, 0, 0, :2] += 1e-12
    dataset = load_dataset(save(tmp_path, images=images))
    assert dataset.changes == ("rounded 2 values from float64 to float32",)


def test_floats_are_resized_as_floats(tmp_path: Path) -> None:
    flat = np.full((6, 3, 48, 64), 0.3333, np.float32)
    dataset = load_dataset(save(tmp_path, images=flat))
    assert dataset.images.shape == (6, 3, 32, 32)
    assert (dataset.images - 0.3333).abs().max() < 1e-6
    assert dataset.changes == (
        "resized 6 images from 64x48 to 32x32, cropped to the square in the center",
    )


def test_image_with_too_many_pixels_is_rejected_before_decompression(tmp_path: Path) -> None:
    path = tmp_path / "large.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape in (("images", (1, 9000, 9000, 3)), ("labels", (1,))):
            size = int(np.prod(shape))
            header = np.lib.format.header_data_from_array_1_0(np.zeros(1, np.uint8))
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array_header_1_0(member, {**header, "shape": shape})
                for _ in range(0, size, 9000):
                    member.write(bytes(min(9000, size)))
    assert path.stat().st_size < 300_000
    data = path.read_bytes()
    tracemalloc.start()
    for refuse in (
        lambda: load_dataset(path),
        lambda: load_upload(data, "x.npz", size=32, max_images=10),
    ):
        with pytest.raises(DatasetError, match="at most 50000000 pixels, found 9000x9000"):
            refuse()
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_resized_image_bytes_are_limited(tmp_path: Path) -> None:
    path = save(tmp_path, images=IMAGES[:, :, :1, :1])
    with pytest.raises(DatasetError, match="at most 1000000 bytes of images, found 4078368"):
        load_upload(path.read_bytes(), "x", size=476, max_images=9, max_bytes=1_000_000)

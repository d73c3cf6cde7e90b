"""Every row of the table in docs/formats.md: a file as people have it is read correctly."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import CIFAR10, MNIST, SVHN

from robust.datasets import Dataset, DatasetError, load_dataset
from robust.datasets.registry import FORMS, Form, by_suffix, data_help, forms_list, markdown_table

ROOT = Path(__file__).resolve().parents[3]
RNG = np.random.default_rng(0)
ROWS = RNG.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
IMAGES = torch.from_numpy(ROWS).permute(0, 3, 1, 2)
LABELS = np.array([0, 1, 2, 0, 1, 2])
GRAY = ROWS[..., 0]


def same(dataset: Dataset, images: np.ndarray = ROWS, labels: object = LABELS) -> bool:
    expected = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return torch.equal(dataset.images, expected) and dataset.labels.tolist() == list(labels)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def class_folders(folder: Path) -> Path:
    for index, (row, label) in enumerate(zip(ROWS, LABELS, strict=True)):
        (folder / f"c{label}").mkdir(parents=True, exist_ok=True)
        (folder / f"c{label}" / f"{index}").write_bytes(png(row))
    return folder


def npz(folder: Path) -> Path:
    np.savez(folder / "a.npz", images=ROWS, labels=LABELS)
    return folder / "a.npz"


def pickled(folder: Path) -> Path:
    (folder / "a.pkl").write_bytes(pickle.dumps({"images": ROWS, "labels": LABELS}))
    return folder / "a.pkl"


def zip_of_folders(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        for file in sorted(class_folders(folder / "x").rglob("*")):
            archive.write(file, file.relative_to(folder))
    return folder / "a.zip"


def corruption(folder: Path) -> Path:
    np.save(folder / "fog.npy", ROWS)
    np.save(folder / "labels.npy", LABELS)
    return folder / "fog.npy"


def mnist_file(folder: Path) -> Path:
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(GRAY))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS.astype(np.uint8))))
    return folder / "t10k-images-idx3-ubyte"


def svhn(folder: Path) -> Path:
    labels = np.array([10, 1, 2, 10, 1, 2], np.uint8)[:, None]
    savemat(folder / "test_32x32.mat", {"X": ROWS.transpose(1, 2, 3, 0), "y": labels})
    return folder / "test_32x32.mat"


def table(rows: slice = slice(None)) -> pa.Table:
    """As `datasets` writes it: the image a struct, the class names in the schema."""
    features = {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    images = [{"bytes": png(row), "path": f"{i}.png"} for i, row in enumerate(ROWS[rows])]
    return pa.table({"image": images, "label": LABELS[rows]}).replace_schema_metadata(about)


def parquet(folder: Path) -> Path:
    pq.write_table(table(), folder / "a.parquet")
    return folder / "a.parquet"


def hub(folder: Path) -> Path:
    (folder / "data").mkdir()
    (folder / "README.md").write_text("# a dataset")
    for index, rows in enumerate((slice(0, 4), slice(4, 6))):
        pq.write_table(table(rows), folder / "data" / f"test-0000{index}-of-00002.parquet")
    pq.write_table(table(slice(0, 2)), folder / "data" / "train-00000-of-00001.parquet")
    return folder


EXAMPLES: dict[str, Callable[[Path], Path]] = {
    "NumPy archive": npz,
    "PyTorch or pickle file": pickled,
    "Zip of class folders": zip_of_folders,
    "Class folders": class_folders,
    "NumPy array, CIFAR-10-C": corruption,
    "CIFAR-10-C, CIFAR-10-P": lambda folder: corruption(folder).parent,
    "MNIST file": mnist_file,
    "MNIST folder": lambda folder: mnist_file(folder).parent,
    "SVHN": svhn,
    "Hugging Face parquet": parquet,
    "Hugging Face folder": hub,
}
ELSEWHERE = {"CIFAR-10", "CIFAR-100", "Handwritten digits"}  # test_named.py


@pytest.mark.parametrize(
    "form", [form for form in FORMS if form.title not in ELSEWHERE], ids=lambda form: form.title
)
def test_each_form_is_read(form: Form, tmp_path: Path) -> None:
    dataset = load_dataset(EXAMPLES[form.title](tmp_path), train=False)
    if form.title == "Class folders" or form.title.startswith("Zip"):
        order = [0, 3, 1, 4, 2, 5]
        assert same(dataset, ROWS[order], LABELS[order])
    else:
        images = np.repeat(GRAY[..., None], 3, 3) if "MNIST" in form.title else ROWS
        assert same(dataset, images)
    if "Hugging" in form.title:
        assert dataset.classes == ("cat", "dog", "eel")


def test_format_table_in_the_docs_matches_the_registry() -> None:
    assert markdown_table() in (ROOT / "docs" / "formats.md").read_text()
    assert {form.title for form in FORMS} == set(EXAMPLES) | ELSEWHERE


def test_help_and_errors_name_every_form(tmp_path: Path) -> None:
    for form in FORMS:
        for name in (*form.names, *form.suffixes):
            assert name in data_help()
        assert form.title in forms_list()
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(DatasetError) as caught:
        load_dataset(tmp_path / "a.csv")
    assert all(suffix in caught.value.expected for suffix in by_suffix())


def test_the_forms_are_listed_without_torch() -> None:
    code = "import sys, robust.datasets.registry as r; r.data_help(); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_corruption_severities_and_folders(tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", LABELS[:3])
    np.save(tmp_path / "fog.npy", ROWS)  # two severities of three images
    dataset = load_dataset(tmp_path / "fog.npy")
    assert same(dataset, labels=[0, 1, 2, 0, 1, 2])
    assert dataset.changes == ("repeated 3 labels 2 times, for 6 images",)
    np.save(tmp_path / "snow.npy", ROWS.reshape(3, 2, 32, 32, 3))
    both = load_dataset(tmp_path)
    assert same(both, np.concatenate([ROWS, ROWS]), [0, 1, 2, 0, 1, 2, 0, 0, 1, 1, 2, 2])
    assert both.changes == (
        "concatenated 2 files: fog, snow",
        "fog.npy: repeated 3 labels 2 times, for 6 images",
        "snow.npy: read 2 frames of each of 3 sequences as images",
    )
    (tmp_path / "labels.npy").unlink()
    with pytest.raises(DatasetError, match=r"snow.npy: expected labels.npy in the same folder"):
        load_dataset(tmp_path / "snow.npy")


def test_requested_split_of_an_mnist_folder(tmp_path: Path) -> None:
    folder = mnist_file(tmp_path).parent
    for file in list(folder.glob("t10k-*")):
        shutil.copy(file, file.with_name(file.name.replace("t10k", "train")))
    for train, read, other, how in (
        (True, "train", "t10k", "train=False"),
        (False, "t10k", "train", "--train or train=True"),
    ):
        (note,) = load_dataset(folder, train=train).changes
        assert note.startswith(f"read {read}-images-idx3-ubyte")
        assert f"not {other}-images-idx3-ubyte" in note
        assert note.endswith(f" ({how} reads that)")


def test_requested_split_of_a_hub_folder(tmp_path: Path) -> None:
    dataset = load_dataset(hub(tmp_path))
    assert same(dataset, ROWS[:2], LABELS[:2])
    assert dataset.changes == ("read its split train, not test (train=False reads that)",)
    for file in (tmp_path / "data").glob("train*"):
        file.unlink()
    with pytest.raises(DatasetError, match="expected a split train, found test"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("mnist_train.parquet", "mnist_test.parquet"),
        ("train_0.parquet", "test_0.parquet"),
        ("train2017.parquet", "eval2017.parquet"),
        ("a-Training.parquet", "a-Testing.parquet"),
        ("train/part.parquet", "dev/part.parquet"),
    ],
)
def test_the_split_may_be_anywhere_in_the_name(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, rows in zip(names, (slice(0, 2), slice(2, 6)), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(table(rows), tmp_path / name)
    assert same(load_dataset(tmp_path), ROWS[:2], LABELS[:2])
    assert same(load_dataset(tmp_path, train=False), ROWS[2:], LABELS[2:])
    pq.write_table(table(), tmp_path / "latest.parquet")  # not test
    with pytest.raises(DatasetError, match=r"every file or of none, found none in latest.parquet"):
        load_dataset(tmp_path)


def test_unclear_parts_of_a_hub_folder(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(table(), tmp_path / name)
    assert load_dataset(tmp_path).changes == ("concatenated 2 files: a.parquet, b.parquet",)
    pq.write_table(table(), tmp_path / "train-test.parquet")
    with pytest.raises(DatasetError, match="expected one split in the name of a file, found train"):
        load_dataset(tmp_path)
    tensorflow = tmp_path / "tfds"
    tensorflow.mkdir()
    for name in ("dataset_info.json", "mnist-test.tfrecord-00000-of-00001"):
        (tensorflow / name).write_text("{}")
    with pytest.raises(DatasetError, match=r"expected parquet or arrow files, .*mnist-test.tfrec"):
        load_dataset(tensorflow)


def test_labels_of_matlab_are_floats(tmp_path: Path) -> None:
    labels = np.array([10, 1, 2, 10, 1, 2], np.float64)[:, None]
    savemat(tmp_path / "a.mat", {"X": ROWS.transpose(1, 2, 3, 0), "y": labels})
    dataset = load_dataset(tmp_path / "a.mat")
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert dataset.changes == ("read 2 labels 10 as 0, as in SVHN",)


def mat(folder: Path, images: np.ndarray, labels: object, **more: object) -> Dataset:
    savemat(folder / "a.mat", {"X": images, "y": labels, **more})
    return load_dataset(folder / "a.mat")


def test_images_of_matlab_in_every_order(tmp_path: Path) -> None:
    many = RNG.integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)  # as many as pixels in a row
    labels = np.arange(32)[:, None] % 3
    for images in (many, many.transpose(1, 2, 3, 0), many.transpose(0, 3, 1, 2)):
        assert same(mat(tmp_path, images, labels), many, labels[:, 0])
    gray = np.repeat(GRAY[..., None], 3, 3)
    for images in (
        GRAY,
        GRAY.transpose(1, 2, 0),
        GRAY[:, None],
        GRAY.transpose(1, 2, 0)[:, :, None],
    ):
        assert same(mat(tmp_path, images, LABELS), gray)
    for images in (ROWS[0], ROWS[:1], ROWS[0][..., None]):
        assert same(mat(tmp_path, images, 2), ROWS[:1], [2])
    for images in (GRAY[0], GRAY[0][..., None]):
        assert same(mat(tmp_path, images, 2), gray[:1], [2])
    with pytest.raises(DatasetError, match=r"with another height than .*, found shape \(32, 32, 3"):
        mat(tmp_path, many[..., 0], labels)


def test_class_names_and_labels_from_1_in_matlab(tmp_path: Path) -> None:
    cells = np.array(["cat", "dog", "eel"], dtype=object)
    for classes in (cells, np.array(["cat", "dog", "eel"])):  # a cell array, and one of characters
        dataset = mat(tmp_path, ROWS, LABELS, classes=classes)
        assert (dataset.classes, dataset.changes) == (("cat", "dog", "eel"), ())
        assert same(dataset)
        dataset = mat(tmp_path, ROWS, LABELS + 1, classes=classes)
        assert dataset.classes == ("cat", "dog", "eel")
        assert dataset.changes == ("read labels 1 to 3 as 0 to 2",)
        assert same(dataset)
    dataset = mat(tmp_path, ROWS, LABELS, classes=np.arange(3))
    assert dataset.changes == ("did not use classes, which is not a list of text",)
    without_1 = mat(tmp_path, ROWS, np.where(LABELS == 0, 10, LABELS + 1))
    assert without_1.labels.tolist() == [0, 2, 3, 0, 2, 3]
    assert without_1.changes == ("read 2 labels 10 as 0, as in SVHN",)


def test_as_many_classes_as_imagenet_21k(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=ROWS[:1], labels=[21_840])
    assert len(load_dataset(tmp_path / "a.npz").classes) == 21_841


def test_save_to_disk_folder_is_read(tmp_path: Path) -> None:
    part = tmp_path / "test"
    part.mkdir()
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test"]}')
    for name in ("data-00000-of-00001", "cache-1c5a2ef7"):  # the second is left by `map`
        with pa.OSFile(str(part / f"{name}.arrow"), "wb") as file:
            with pa.ipc.new_stream(file, table().schema) as writer:
                writer.write_table(table())
    assert same(load_dataset(tmp_path, train=False))
    assert same(load_dataset(part))
    note = "skipped 1 cache-*.arrow of the datasets library"
    assert load_dataset(part).changes == (note,)


def test_invalid_parquet_and_missing_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DatasetError, match="complete parquet or arrow files"):
        load_dataset(path)
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), path)
    with pytest.raises(DatasetError, match="found text, label"):
        load_dataset(path)
    folder = tmp_path / "files"
    folder.mkdir()
    pq.write_table(table(), folder / "a.parquet")
    pq.write_table(pa.table({"text": ["a"]}), folder / "b.parquet")
    with pytest.raises(DatasetError, match="parquet or arrow files of one schema"):
        load_dataset(folder)
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "a.png"}], "label": [1]}), path)
    with pytest.raises(DatasetError, match="found a path in row 0"):
        load_dataset(path)
    pq.write_table(pa.table({"image": [b"hello"], "label": [1]}), path)
    with pytest.raises(DatasetError, match=r"a.parquet, row 0: expected a JPEG"):
        load_dataset(path)


def test_broken_idx_and_mat_files(tmp_path: Path) -> None:
    path = mnist_file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DatasetError, match=r"expected 6x32x32 values .*, found 6143"):
        load_dataset(path)
    path.write_bytes(whole)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8b not really")
    with pytest.raises(DatasetError, match="a complete gzip file t10k-labels-idx1"):
        load_dataset(path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        DatasetError, match="its labels in t10k-labels-idx1-ubyte, in the same folder"
    ):
        load_dataset(path)
    (tmp_path / "a.mat").write_bytes(bytes(200))
    with pytest.raises(DatasetError, match="a MATLAB file"):
        load_dataset(tmp_path / "a.mat")


def saved(folder: Path, value: object, how: str) -> Path:
    path = folder / ("a.pt" if how == "torch.save" else "a.pickle")
    if how == "torch.save":
        torch.save(value, path)
    else:
        path.write_bytes(pickle.dumps(value))
    return path


def torchvision_set(kind: type, **attributes: object) -> object:
    value = kind.__new__(kind)
    value.__dict__.update(root="data", transform=None, target_transform=None, **attributes)
    return value


@pytest.mark.parametrize("how", ["torch.save", "pickle.dump"])
@pytest.mark.parametrize(
    "value",
    [
        [(image, int(label)) for image, label in zip(IMAGES, LABELS, strict=True)],
        [(Image.fromarray(row), label) for row, label in zip(ROWS, LABELS, strict=True)],
        [{"image": Image.fromarray(r), "label": int(y)} for r, y in zip(ROWS, LABELS, strict=True)],
        TensorDataset(IMAGES, torch.from_numpy(LABELS)),
        Subset(TensorDataset(IMAGES.repeat(2, 1, 1, 1), torch.tensor([*LABELS] * 2)), range(6)),
        torchvision_set(CIFAR10, data=ROWS, targets=LABELS.tolist(), classes=["a", "b", "c"]),
        torchvision_set(SVHN, data=IMAGES.numpy(), labels=LABELS, split="test"),
        {"adv_complete": IMAGES, "labels": torch.eye(3)[torch.from_numpy(LABELS)]},
        {"images": IMAGES, "labels": [torch.eye(3)[label] for label in LABELS]},
        {"images": [(row / 255).astype(">f4") for row in ROWS], "labels": LABELS},  # big-endian
        {"img": IMAGES, "fine_label": LABELS, "coarse_label": LABELS * 0},  # CIFAR-100 on the hub
        {b"data": ROWS.transpose(0, 3, 1, 2).reshape(6, -1), b"labels": LABELS.tolist()},
    ],
    ids=range(12),
)
def test_every_kind_of_pickle_is_read(tmp_path: Path, value: object, how: str) -> None:
    if isinstance(value, Subset):
        value = Subset(value.dataset, list(value.indices))
    assert same(load_dataset(saved(tmp_path, value, how)))


def test_gray_and_boolean_and_unreadable_pickles(tmp_path: Path) -> None:
    gray = torchvision_set(MNIST, data=torch.from_numpy(GRAY), targets=torch.from_numpy(LABELS))
    dataset = load_dataset(saved(tmp_path, gray, "pickle.dump"))
    assert same(dataset, np.repeat(GRAY[..., None], 3, 3))
    value = {"images": IMAGES, "labels": [bool(label) for label in LABELS]}
    assert load_dataset(saved(tmp_path, value, "torch.save")).labels.tolist() == [0, 1, 1, 0, 1, 1]
    floats = (IMAGES[0] / 254).clamp(0, 1)
    dataset = load_dataset(saved(tmp_path, (floats, 2), "torch.save"))  # one image, one label
    assert torch.equal(dataset.images[0], floats)
    assert dataset.labels.tolist() == [2]
    path = saved(tmp_path, {"scores": IMAGES, "truth": LABELS}, "pickle.dump")
    with pytest.raises(DatasetError, match=r"images named images, .*found scores, truth"):
        load_dataset(path)
    path.write_bytes(b"(lp0\n.")
    with pytest.raises(DatasetError, match="protocol 2 or later"):
        load_dataset(path)


def test_single_cifar10_batch_file_is_read(tmp_path: Path) -> None:
    """Written by Python 2: byte strings for text and for the pixels."""
    pixels = ROWS.transpose(0, 3, 1, 2).tobytes()

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
        b"(K\x01K\x06M\x00\x0c\x86cnumpy\ndtype\n" + text(b"u1") + b"K\0K\x01\x87R"
        b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        b"\x89T" + struct.pack("<I", len(pixels)) + pixels + b"tb"
    )
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in LABELS.tolist()) + b"e"
    fields = text(b"data") + array + text(b"labels") + labels
    path = tmp_path / "test_batch"
    path.write_bytes(b"\x80\x02}(" + fields + b"u.")
    dataset = load_dataset(path)
    assert same(dataset)
    assert dataset.changes == ("read rows of 3072 values as images 3x32x32",)

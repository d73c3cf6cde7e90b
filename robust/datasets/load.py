"""One entry for every form of data, and one for uploads."""

import io
import re
from pathlib import Path

from robust.datasets.archive import open_archive
from robust.datasets.dataset import Dataset
from robust.datasets.errors import DatasetError
from robust.datasets.folders import read_folder, read_folder_zip
from robust.datasets.named import CIFAR10_FOLDER, read_cifar10, read_digits
from robust.datasets.npz import read_npz
from robust.datasets.torchfile import is_torch_legacy, read_torch_legacy, read_torch_zip


def load_dataset(source: str | Path, *, size: int = 32, train: bool = True) -> Dataset:
    """Load labelled images, as uint8 `(N, 3, size, size)`, of two classes or more.

    `source` is `digits`, `cifar10`, a folder (one of images per class, or `cifar-10-batches-py`), a
    zip of one, an `.npz` or a `.pt`; a folder named like a set is given as `./digits`. `train`
    chooses the part of `digits` and CIFAR-10 and is ignored otherwise. No pickle is trusted.
    Raises DatasetError, which names the source, what was expected and what was found.
    """
    if source == "digits":
        return read_digits(size=size, train=train)
    if source == "cifar10":
        return read_cifar10(None, size=size, train=train)
    path = Path(source)
    try:
        dataset = _read_path(path, size=size, train=train)
    except OSError as error:
        found = error.strerror or type(error).__name__
        raise DatasetError(path.name, expected="readable files", found=found) from error
    low, high = int(dataset.labels.min()), int(dataset.labels.max())
    if low == high:
        found = f"{len(dataset)} of class {low} only"
        raise DatasetError(dataset.name, expected="images of two classes or more", found=found)
    return dataset


def load_upload(
    data: bytes,
    filename_hint: str | None,
    *,
    size: int,
    max_images: int,
    max_bytes: int = 256 << 20,
) -> Dataset:
    """Load labelled images from the bytes of an `.npz` or a `.pt`, told apart by content.

    The hint only names the Dataset. `max_images` caps the images, `max_bytes` what the file
    declares to hold once inflated, before anything is. One class is enough. Raises DatasetError.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(filename_hint or "").name)[:64] or "upload"
    if is_torch_legacy(data[:32]):
        return read_torch_legacy(name, data, size=size, max_images=max_images)
    if data.startswith(b"PK\x03\x04"):
        # A list of tensors has a member for each, another for each label, and a few besides.
        members = 10_000 + 4 * max_images
        file = io.BytesIO(data)
        with open_archive(name, file, max_bytes=max_bytes, max_members=members) as archive:
            read = read_npz if "images.npy" in archive.members else read_torch_zip
            return read(archive, size=size, max_images=max_images)
    expected = "an npz with images and labels, or a file of torch.save"
    raise DatasetError(name, expected=expected, found=f"{len(data)} bytes of another kind")


def _read_path(path: Path, *, size: int, train: bool) -> Dataset:
    if path.is_dir():
        if path.resolve().name == CIFAR10_FOLDER:
            return read_cifar10(path.resolve().parent, size=size, train=train)
        if (path / CIFAR10_FOLDER).is_dir():
            return read_cifar10(path, size=size, train=train)
        return read_folder(path, size=size)
    if not path.exists():
        expected = "a file, a folder, 'cifar10' or 'digits'"
        raise DatasetError(str(path), expected=expected, found="no such file")
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        legacy = is_torch_legacy(file.read(32))
    if legacy and suffix in (".pt", ".pth"):
        return read_torch_legacy(path.name, path.read_bytes(), size=size)
    readers = {
        ".npz": read_npz,
        ".pt": read_torch_zip,
        ".pth": read_torch_zip,
        ".zip": read_folder_zip,
    }
    if suffix not in readers:
        expected = f"a name that ends in {', '.join(readers)}"
        raise DatasetError(path.name, expected=expected, found=suffix or "none of them")
    with open_archive(path.name, path) as archive:
        return readers[suffix](archive, size=size)

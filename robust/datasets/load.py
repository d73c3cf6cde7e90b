"""One entry for every form of data."""

from pathlib import Path

from robust.datasets.archive import open_archive
from robust.datasets.dataset import Dataset
from robust.datasets.errors import DatasetError
from robust.datasets.npz import read_npz


def load_dataset(source: str | Path, *, size: int = 32, train: bool = True) -> Dataset:
    """Load labelled images from `source`, as uint8 `(N, 3, size, size)`.

    Raises DatasetError, which names the source, what was expected and what was found.
    """
    path = Path(source)
    if not path.exists():
        raise DatasetError(str(source), expected="a file, a folder or a known name", found="none")
    if path.suffix.lower() == ".npz":
        with open_archive(path.name, path) as archive:
            return _more_than_one_class(read_npz(archive, size=size))
    raise DatasetError(path.name, expected="a name that ends in .npz", found=path.suffix)


def _more_than_one_class(dataset: Dataset) -> Dataset:
    if int(dataset.labels.min()) == int(dataset.labels.max()):
        found = f"{len(dataset)} of class {int(dataset.labels[0])} only"
        raise DatasetError(dataset.name, expected="images of two classes or more", found=found)
    return dataset

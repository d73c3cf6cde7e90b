"""The supported data formats, one entry each. Imports nothing heavy.

A new format is one module with a reader and one entry here: `--data` help, error messages and the
table in docs/formats.md are generated from the entries.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust.datasets.dataset import Dataset
    from robust.datasets.source import Source

    Reader = Callable[[Source], Dataset]


@dataclass(frozen=True, kw_only=True)
class Form:
    """One data format: how it is recognized, what it contains, and its reader."""

    title: str
    summary: str
    """What it contains, in Markdown for docs/formats.md."""
    reader: str
    """`module:function` in this package; the function takes a Source and returns a Dataset."""
    suffixes: tuple[str, ...] = ()
    """Endings of file names, in lower case."""
    names: tuple[str, ...] = ()
    """Names given in place of a path."""
    folders: tuple[str, ...] = ()
    """A folder is of this form if its name, or one of its files, matches one of these patterns."""
    upload: bool = False
    """Whether the service accepts it as an upload, recognized by content."""
    extra: str = ""
    """The optional dependencies that it needs, for `pip install 'robust[EXTRA]'`."""

    def load(self) -> Reader:
        """Import and return the reader."""
        module, function = self.reader.split(":")
        reader: Any = getattr(importlib.import_module(f"robust.datasets.{module}"), function)
        return reader  # type: ignore[no-any-return]


# If two formats recognize a folder, the first wins.
FORMS = (
    Form(
        title="NumPy archive",
        summary="arrays `images` and `labels`, optionally `classes` (text)",
        reader="npz:read_npz",
        suffixes=(".npz",),
        upload=True,
    ),
    Form(
        title="PyTorch or pickle file",
        summary="a dict, an object or a pair of images and labels, a list of pairs, a "
        "`TensorDataset`, a pickled torchvision dataset or `TaskDataset`; from `torch.save` or "
        "`pickle.dump`, read without running anything in it",
        reader="pickle_file:read_pickle_file",
        suffixes=(".pt", ".pth", ".pkl", ".pickle"),
        upload=True,
    ),
    Form(
        title="Zip of class folders",
        summary="one folder of images per class, itself in one folder or not",
        reader="folders:read_folder_zip",
        suffixes=(".zip",),
    ),
    Form(
        title="CIFAR-10",
        summary="the files of its Python version; `cifar10` downloads them once",
        reader="named:read_cifar10",
        names=("cifar10",),
        folders=("cifar-10-batches-py",),
    ),
    Form(
        title="CIFAR-100",
        summary="the files of its Python version, fine labels; `cifar100` downloads them once",
        reader="named:read_cifar100",
        names=("cifar100",),
        folders=("cifar-100-python",),
    ),
    Form(
        title="NumPy array, CIFAR-10-C",
        summary="images `(N, H, W, 3)` as `fog.npy`, with `labels.npy` in the same folder; labels "
        "repeat over the severities",
        reader="corruptions:read_npy",
        suffixes=(".npy",),
    ),
    Form(
        title="CIFAR-10-C, CIFAR-10-P",
        summary="every `.npy` of the folder, concatenated; the frames of CIFAR-10-P are images",
        reader="corruptions:read_corruptions",
        folders=("labels.npy",),
    ),
    Form(
        title="MNIST file",
        summary="images of 8 bits, with the file of their labels in the same folder",
        reader="idx:read_idx",
        suffixes=("-ubyte", "-ubyte.gz"),
    ),
    Form(
        title="MNIST folder",
        summary="the idx files of images and labels, `train` or `t10k`, plain or gzipped",
        reader="idx:read_idx_folder",
        folders=("*-ubyte", "*-ubyte.gz"),
    ),
    Form(
        title="SVHN",
        summary="`X` `(32, 32, 3, N)` and `y` as in `test_32x32.mat`; the label 10 is the digit 0",
        reader="matlab:read_mat",
        suffixes=(".mat",),
        extra="data",
    ),
    Form(
        title="Hugging Face parquet",
        summary="columns `image` (or `img`) and `label` (or another usual name)",
        reader="huggingface:read_huggingface",
        suffixes=(".parquet",),
        extra="data",
    ),
    Form(
        title="Hugging Face folder",
        summary="parquet files as on the hub, or what `save_to_disk` wrote; the part by file name",
        reader="huggingface:read_huggingface",
        folders=(
            "dataset_dict.json",
            "dataset_info.json",
            "*.parquet",
            "*/*.parquet",
            "*.arrow",
        ),
        extra="data",
    ),
    Form(
        title="Handwritten digits",
        summary="scikit-learn's, enlarged from 8x8 gray",
        reader="named:read_digits",
        names=("digits",),
        extra="demo",
    ),
    Form(
        title="Class folders",
        summary="one folder of images per class, in a folder `train`, `test` or `val` or not: "
        "JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, recognized by content",
        reader="folders:read_folder",
        folders=("*",),
    ),
)


def by_name() -> dict[str, Form]:
    """The named datasets, by name."""
    return {name: form for form in FORMS for name in form.names}


def by_suffix() -> dict[str, Form]:
    """The file formats, by suffix."""
    return {suffix: form for form in FORMS for suffix in form.suffixes}


def form_of_file(name: str) -> Form | None:
    """The format of a file by its name; None if the suffix is unknown."""
    lower = name.lower()
    found = [suffix for suffix in by_suffix() if lower.endswith(suffix)]
    return by_suffix()[max(found, key=len)] if found else None


def form_of_folder(path: Path) -> Form:
    """The format of a folder by its name or content; by default Class folders."""
    name = Path(path.resolve().name)
    return next(
        form
        for form in FORMS
        if any(
            name.match(pattern) or next(path.glob(pattern), None) is not None
            for pattern in form.folders
        )
    )


def data_help() -> str:
    """The help text of `--data`."""
    return (
        f"Labeled images: {', '.join(by_name())}, a file ({', '.join(by_suffix())}) or a folder; "
        "see docs/formats.md."
    )


def forms_list() -> str:
    """All formats, one per line, for the terminal."""
    given = [", ".join(_given(form)) for form in FORMS]
    width = max(map(len, given))
    return "\n".join(
        f"  {how:{width}}  {form.title}" for how, form in zip(given, FORMS, strict=True)
    )


def markdown_table() -> str:
    """The table of docs/formats.md."""
    rows = ["| form | given as | what it holds | upload |", "|---|---|---|---|"]
    for form in FORMS:
        given = ", ".join(_given(form, "`"))
        extra = f" (extra `{form.extra}`)" if form.extra else ""
        upload = "yes" if form.upload else "no"
        rows.append(f"| {form.title}{extra} | {given} | {form.summary} | {upload} |")
    return "\n".join(rows) + "\n"


def _given(form: Form, quote: str = "") -> list[str]:
    """What to pass to `--data` for a format."""
    names = [*form.names, *(f"*{suffix}" for suffix in form.suffixes)]
    folders = [pattern for pattern in form.folders if pattern != "*"]
    return [
        *(f"{quote}{name}{quote}" for name in names),
        *(f"a folder with {quote}{pattern}{quote}" for pattern in folders),
        *(["a folder"] if "*" in form.folders else []),
    ]


if __name__ == "__main__":
    import sys

    sys.stdout.write(markdown_table())

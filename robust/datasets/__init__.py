"""Labeled image sets: one loader for all formats, and one error for everything else.

Names are imported when first used, so that `--help` lists the formats without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robust.datasets.dataset import Dataset, check_labels, check_trainable
    from robust.datasets.errors import DatasetError
    from robust.datasets.load import load_dataset, load_upload
    from robust.datasets.registry import data_help
    from robust.datasets.split import stratified_split

_MODULES = {
    "Dataset": "dataset",
    "DatasetError": "errors",
    "check_labels": "dataset",
    "check_trainable": "dataset",
    "data_help": "registry",
    "load_dataset": "load",
    "load_upload": "load",
    "stratified_split": "split",
}
__all__ = [
    "Dataset",
    "DatasetError",
    "check_labels",
    "check_trainable",
    "data_help",
    "load_dataset",
    "load_upload",
    "stratified_split",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

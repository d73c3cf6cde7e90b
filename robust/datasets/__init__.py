"""Labelled image sets: one loader for every form, and one error for anything else."""

from robust.datasets.dataset import Dataset, check_labels
from robust.datasets.errors import DatasetError
from robust.datasets.load import load_dataset, load_upload
from robust.datasets.split import stratified_split

__all__ = [
    "Dataset",
    "DatasetError",
    "check_labels",
    "load_dataset",
    "load_upload",
    "stratified_split",
]

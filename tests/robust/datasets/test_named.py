import hashlib
import pickle
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from robust.datasets import DatasetError, load_dataset


def test_digits_split_is_fixed() -> None:
    train, test = load_dataset("digits"), load_dataset("digits", train=False)
    assert (len(train), len(test)) == (1500, 297)
    assert train.images.shape[1:] == (3, 32, 32)
    assert train.classes == tuple("0123456789")
    assert max(test.class_counts()) - min(test.class_counts()) <= 3
    assert train.sha256 == load_dataset("digits").sha256
    both = torch.cat([train.images, test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 1797
    # White ink on black, the full range, and equal channels.
    assert both.min() == 0
    assert both.max() == 255
    assert torch.equal(train.images[:, 0], train.images[:, 2])


def test_digits_use_the_whole_range() -> None:
    levels = load_dataset("digits", size=8).images.unique()
    assert levels.tolist() == [round(level * 255 / 16) for level in range(17)]


def test_digits_stay_recognizable() -> None:
    dataset = load_dataset("digits", size=8)
    nearest = load_dataset("digits", size=8, train=False)
    distance = torch.cdist(nearest.images.flatten(1).float(), dataset.images.flatten(1).float())
    guess = dataset.labels[distance.argmin(1)]
    assert (guess == nearest.labels).float().mean() > 0.97


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DatasetError, match=r"pip install 'robust\[demo\]'"):
        load_dataset("digits")


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two small batches in CIFAR-10's form, with their MD5 where torchvision looks for it."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    classes = [f"class {label}" for label in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    for name, value in (("data_batch_1", 1), ("test_batch", 2)):
        data = np.full((20, 3072), value, np.uint8)
        data[:, 1024:2048] = 50
        labels = [index % 10 for index in range(20)]
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
    lists = {"train_list": "data_batch_1", "test_list": "test_batch"}
    for attribute, name in lists.items():
        monkeypatch.setattr(CIFAR10, attribute, [[name, md5(folder / name)]])
    meta = {**CIFAR10.meta, "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return folder


def test_cifar10_folder_or_its_parent(cifar: Path) -> None:
    for source in (cifar, cifar.parent):
        train, test = load_dataset(source), load_dataset(source, train=False)
        assert train.images[0, :, 5, 5].tolist() == [1, 50, 1]
        assert test.images[0, :, 5, 5].tolist() == [2, 50, 2]
        assert train.classes[3] == "class 3"
        assert train.class_counts() == (2,) * 10
        assert train.name == "cifar10"


def test_cifar100_has_the_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    names = [f"class {label}" for label in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    for name, value in (("train", 1), ("test", 2)):
        data = np.full((200, 3072), value, np.uint8)
        fields = {"data": data, "fine_labels": [*range(100)] * 2, "coarse_labels": [0] * 200}
        (folder / name).write_bytes(pickle.dumps(fields))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5(folder / "meta")})
    for source in (folder, tmp_path):
        dataset = load_dataset(source, train=False)
        assert (dataset.images == 2).all()
        assert dataset.class_counts() == (2,) * 100
        assert (dataset.classes[99], dataset.name) == ("class 99", "cifar100")


def test_cifar10_from_the_cache(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cifar.parent / "robust").mkdir()
    cifar.rename(cifar.parent / "robust" / cifar.name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cifar.parent))
    assert len(load_dataset("cifar10")) == 20


def test_changed_cifar10_files_are_not_unpickled(cifar: Path) -> None:
    (cifar / "data_batch_1").write_bytes(pickle.dumps(print))
    with pytest.raises(DatasetError, match=r"cifar10: expected its files in .*missing or modified"):
        load_dataset(cifar)


def test_cifar10_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(*args: object, **options: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DatasetError, match=r"cifar10: expected its files in .*no download"):
        load_dataset("cifar10")

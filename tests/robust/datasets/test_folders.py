import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robust.datasets import DatasetError, load_dataset
from robust.datasets.archive import open_archive

COLOURS = {"cat/1.png": 10, "cat/2.PNG": 20, "dog/1.png": 30, "eel/x.webp": 40}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, value in COLOURS.items():
        path = tmp_path / "animals" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (value,) * 3).save(path, lossless=True)
    return tmp_path / "animals"


def zipped(folder: Path, prefix: str = "") -> Path:
    path = folder.parent / "animals.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, prefix + str(file.relative_to(folder)))
    return path


def refusal(path: Path, name: str | None = None) -> DatasetError:
    with pytest.raises(DatasetError) as caught:
        load_dataset(path)
    assert caught.value.source == (name or path.name)
    return caught.value


@pytest.mark.parametrize("form", ["folder", "zip", "zip of a folder"])
def test_class_folders_on_disk_and_zipped(folder: Path, form: str) -> None:
    source = folder if form == "folder" else zipped(folder, "top/" if "of" in form else "")
    dataset = load_dataset(source)
    assert dataset.classes == ("cat", "dog", "eel")
    assert dataset.labels.tolist() == [0, 0, 1, 2]
    assert dataset.images[:, 0, 0, 0].tolist() == [10, 20, 30, 40]
    assert dataset.images.shape == (4, 3, 32, 32)


def test_classes_that_are_numbers_are_in_number_order(tmp_path: Path) -> None:
    for label in range(11):
        (tmp_path / str(label)).mkdir()
        Image.new("L", (40, 20), label).save(tmp_path / str(label) / "a.png")
    dataset = load_dataset(tmp_path, size=8)
    assert dataset.classes == tuple(str(label) for label in range(11))
    for label, image in zip(dataset.labels.tolist(), dataset.images, strict=True):
        assert (image == label).all()


def test_other_files_are_skipped_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "cat" / ".DS_Store").write_text("")
    (folder / ".git").mkdir()
    (folder / "cat" / "notes.txt").write_text("")
    assert len(load_dataset(folder)) == 4
    assert "skipped 1 files" in caplog.text
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "a.png").write_text("")
    caplog.set_level(logging.WARNING)
    assert len(load_dataset(zipped(folder, "top/"))) == 4


def test_a_broken_image_is_named(folder: Path) -> None:
    (folder / "dog" / "2.png").write_bytes((folder / "dog" / "1.png").read_bytes()[:60])
    refusal(folder, "animals/dog/2.png")
    refusal(zipped(folder), "animals.zip/dog/2.png")


def test_the_tree_must_be_two_levels_deep(folder: Path, tmp_path: Path) -> None:
    image = (folder / "cat" / "1.png").read_bytes()
    (folder / "stray.png").write_bytes(image)
    assert refusal(folder).found == "stray.png"
    (folder / "stray.png").unlink()
    (folder / "cat" / "young").mkdir()
    (folder / "cat" / "young" / "1.png").write_bytes(image)
    assert refusal(folder).found == "cat/young/1.png"


def test_nothing_and_one_class(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").found == "no images"
    (folder / "fox").mkdir()
    assert refusal(folder).found == "no image in fox"
    one = tmp_path / "one"
    (one / "cat").mkdir(parents=True)
    Image.new("L", (4, 4)).save(one / "cat" / "1.png")
    assert refusal(one).found == "1 of class 0 only"
    with zipfile.ZipFile(tmp_path / "none.zip", "w"):
        pass
    assert refusal(tmp_path / "none.zip").found == "no images"


@pytest.mark.parametrize("name", ["../x/a.png", "/x/a.png", "x/../../a.png", "x\\a.png", "."])
def test_zips_that_point_elsewhere_are_refused(folder: Path, name: str) -> None:
    path = zipped(folder)
    before = sorted(folder.parent.rglob("*"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, (folder / "cat" / "1.png").read_bytes())
    assert refusal(path).expected == "plain relative names"
    assert sorted(folder.parent.rglob("*")) == before


def test_zip_bombs_are_refused_by_their_declared_size(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("cat/1.png", "w", force_zip64=True) as member:
            for _ in range(257):
                member.write(bytes(1 << 20))
    assert path.stat().st_size < 400_000
    assert refusal(path).found == f"{257 << 20} bytes"
    with (
        pytest.raises(DatasetError, match="at most 1000 bytes uncompressed"),
        open_archive("bomb.zip", path, max_bytes=1000),
    ):
        pass
    with (
        pytest.raises(DatasetError, match="at most 0 members"),
        open_archive("bomb.zip", path, max_members=0),
    ):
        pass


def test_a_member_that_is_larger_than_it_says(folder: Path) -> None:
    path = folder.parent / "x.npz"
    np.savez_compressed(path, images=np.zeros((2, 3, 64, 64), np.uint8), labels=np.arange(2))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + 24  # the directory's uncompressed size
    data[at : at + 4] = (200).to_bytes(4, "little")
    path.write_bytes(data)
    refusal(path)


def test_a_zip_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 not really")
    assert "damaged" in refusal(tmp_path / "a.zip").found


def test_sizes_are_fitted(folder: Path) -> None:
    Image.new("RGB", (100, 60), (7, 7, 7)).save(folder / "dog" / "1.png")
    image = load_dataset(folder, size=24).images[2]
    assert torch.equal(image, torch.full((3, 24, 24), 7, dtype=torch.uint8))


@pytest.mark.parametrize("readme", ["README.txt", "top/README.txt"])
def test_a_text_beside_the_classes_in_a_zip_is_skipped(folder: Path, readme: str) -> None:
    path = zipped(folder, "top/")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(readme, "what this is")
    assert load_dataset(path).classes == ("cat", "dog", "eel")


def test_class_folders_may_be_links(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("cat", "dog"):
        (linked / name).symlink_to(folder / name)
    dataset = load_dataset(linked)
    assert (dataset.classes, dataset.labels.tolist()) == (("cat", "dog"), [0, 0, 1])


def test_a_link_to_a_folder_above_is_refused(folder: Path) -> None:
    (folder / "cat" / "round").symlink_to(folder)
    assert "cat/round/cat" in refusal(folder).found

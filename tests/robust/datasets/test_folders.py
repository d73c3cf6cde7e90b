import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robust.datasets import DatasetError, check_trainable, load_dataset
from robust.datasets.archive import open_archive

COLORS = {"cat/1.png": 10, "cat/2.PNG": 20, "dog/1.png": 30, "eel/x.webp": 40}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, value in COLORS.items():
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


def test_numeric_classes_are_sorted_as_numbers(tmp_path: Path) -> None:
    for label in range(11):
        (tmp_path / str(label)).mkdir()
        Image.new("L", (40, 20), label).save(tmp_path / str(label) / "a.png")
    dataset = load_dataset(tmp_path, size=8)
    assert dataset.classes == tuple(str(label) for label in range(11))
    assert dataset.changes[0] == (
        "sorted the classes as numbers: label 2 is 2; torchvision's ImageFolder sorts them as "
        "text, where it is 10"
    )
    for label, image in zip(dataset.labels.tolist(), dataset.images, strict=True):
        assert (image == label).all()


def test_equal_numbers_have_a_fixed_order(tmp_path: Path) -> None:
    for name in ("1", "01", "001", "02"):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / name / "a.png")
    dataset = load_dataset(tmp_path, size=4)
    assert dataset.classes == ("001", "01", "1", "02")
    assert dataset.changes[0].startswith("sorted the classes as numbers: label 2 is 1; ")
    for name in ("1", "001"):
        shutil.rmtree(tmp_path / name)
    assert load_dataset(tmp_path, size=4).changes == ()


def test_other_files_are_skipped_and_noted(folder: Path) -> None:
    (folder / "cat" / ".DS_Store").write_text("")
    (folder / ".git").mkdir()
    (folder / "cat" / "notes.txt").write_text("")
    (folder / "cat" / "gone.png").symlink_to(folder / "nowhere.png")
    dataset = load_dataset(folder)
    assert len(dataset) == 4
    assert dataset.changes == (
        "skipped 1 hidden file: cat/.DS_Store",
        "skipped 1 file that is not an image: cat/notes.txt",
        "skipped 1 broken link: cat/gone.png",
    )
    (folder / "cat" / "gone.png").unlink()
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "a.png").write_text("")
    dataset = load_dataset(zipped(folder, "top/"))
    assert len(dataset) == 4
    assert dataset.changes[0] == ("skipped 2 hidden files: top/__MACOSX/a.png, top/cat/.DS_Store")


@pytest.mark.parametrize(
    "name", ["a.jfif", "a.bmp", "a.tif", "a.gif", "a.ppm", "a.dat", "without", "b.PNG"]
)
def test_images_are_recognized_by_content(folder: Path, name: str) -> None:
    kinds = {".jfif": "JPEG", ".bmp": "BMP", ".tif": "TIFF", ".gif": "GIF", ".ppm": "PPM"}
    path = folder / "dog" / name
    Image.new("RGB", (32, 32), (30, 30, 30)).save(path, kinds.get(path.suffix, "BMP"))
    for source in (folder, zipped(folder)):
        dataset = load_dataset(source)
        assert dataset.labels.tolist() == [0, 0, 1, 1, 2]
        assert (dataset.images[2:4] == 30).all()
        assert dataset.changes == ()


def test_file_with_an_image_suffix_must_be_a_readable_image(folder: Path) -> None:
    (folder / "dog" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    assert refusal(folder, "animals/dog/phone.heic").found == "a HEIC"


def test_sixteen_bit_rotated_tiff_and_animation(folder: Path) -> None:
    values = np.full((32, 32), 257 * 7, np.uint16)
    values[:16] = 257 * 9
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(values).save(folder / "dog" / "a.tif", exif=exif)
    red, blue = (Image.new("RGB", (32, 32), color) for color in ("red", "blue"))
    red.save(folder / "dog" / "b.gif", save_all=True, append_images=[blue])
    dataset = load_dataset(folder)
    assert dataset.images[3, :, 0, 0].tolist() == [7, 7, 7]
    assert dataset.images[3, :, 31, 31].tolist() == [9, 9, 9]
    assert dataset.images[4, :, 0, 0].tolist() == [255, 0, 0]
    assert dataset.changes == (
        "used the first of several frames of 1 file",
        "reduced 1 image to 8 bits per channel",
    )


def test_transparent_images_and_those_of_16_bits_are_counted(folder: Path) -> None:
    opaque = Image.new("RGBA", (32, 32), (1, 2, 3, 255))
    half = Image.new("LA", (32, 32), (0, 255))
    half.putpixel((0, 31), (0, 51))
    palette = Image.new("P", (32, 32), 1)
    opaque.save(folder / "dog" / "a.png")
    half.save(folder / "dog" / "b.png")
    palette.save(folder / "dog" / "c.gif", transparency=1)
    Image.fromarray(np.full((32, 32), 1000, np.uint16)).save(folder / "dog" / "d.png")
    dataset = load_dataset(folder)
    assert dataset.images[4, :, 31, 0].tolist() == [204] * 3
    assert dataset.changes == (
        "reduced 1 image to 8 bits per channel",
        "put 2 images with transparency on white",
    )


def test_a_broken_image_is_named(folder: Path) -> None:
    (folder / "dog" / "2.png").write_bytes((folder / "dog" / "1.png").read_bytes()[:60])
    refusal(folder, "animals/dog/2.png")
    refusal(zipped(folder), "animals.zip/dog/2.png")


def test_five_broken_images_are_named(folder: Path) -> None:
    for index in range(3):
        (folder / "dog" / f"{index}.gif").write_bytes(b"GIF89a")
    found = refusal(folder)
    assert found.expected == "readable images"
    assert found.found.startswith("dog/0.gif with 6 bytes of GIF that do not decode; dog/1.gif")
    assert not found.found.endswith("...")
    for index in range(3, 9):
        (folder / "dog" / f"{index}.gif").write_bytes(b"")
    found = refusal(folder)
    assert found.found.count(".gif") == 5
    assert found.found.endswith("dog/4.gif with no bytes; ...")
    for index in range(8):
        (folder / "dog" / f"{index}.gif").unlink()
    found = refusal(folder, "animals/dog/8.gif")
    assert found.expected == "a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM image"


def test_a_file_that_may_not_be_read_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = zipped(folder)

    def denied(path: Any, *_: Any) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("robust.datasets.folders._read_file", denied)
    error = refusal(folder, str(folder / "cat" / "1.png"))
    assert (error.expected, error.found) == ("a readable file", "permission denied")
    monkeypatch.setattr(zipfile, "ZipFile", denied)
    assert refusal(packed, str(packed)).found == "permission denied"


def test_images_must_be_exactly_one_folder_deep(folder: Path, tmp_path: Path) -> None:
    image = (folder / "cat" / "1.png").read_bytes()
    (folder / "stray.png").write_bytes(image)
    assert refusal(folder).found == "stray.png"
    (folder / "stray.png").unlink()
    (folder / "cat" / "young").mkdir()
    (folder / "cat" / "young" / "1.png").write_bytes(image)
    assert refusal(folder).found == "cat/young/1.png"


def test_requested_split_is_read(folder: Path, tmp_path: Path) -> None:
    for part, classes in (("train", ("cat", "dog")), ("val", ("dog", "eel"))):
        for name in classes:
            shutil.copytree(folder / name, tmp_path / "parts" / part / name)
    for train, classes, part in ((True, ("cat", "dog"), "train"), (False, ("dog", "eel"), "val")):
        dataset = load_dataset(tmp_path / "parts", train=train)
        assert dataset.classes == classes
        assert dataset.changes == (f"read its folder {part}",)
        for top in ("", "parts/"):
            packed = load_dataset(zipped(tmp_path / "parts", top), train=train)
            assert packed.classes == classes
            assert packed.changes == (f"read its folder {part}",)
    shutil.rmtree(tmp_path / "parts" / "train")
    assert refusal(tmp_path / "parts").expected == "a folder train"
    assert refusal(zipped(tmp_path / "parts")).expected == "a folder train"


def test_empty_folder_and_single_class(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").found == "no images"
    (folder / "fox").mkdir()
    assert refusal(folder).found == "no image in fox"
    for top in ("", "top/"):  # with an entry for the folder, and with one for a file in it
        assert refusal(zipped(folder, top)).found == "no image in fox"
    (folder / "fox" / "notes.txt").write_text("")
    with zipfile.ZipFile(tmp_path / "files.zip", "w") as archive:
        for file in folder.rglob("*.*"):
            archive.write(file, f"test/{file.relative_to(folder)}")
    with pytest.raises(DatasetError, match=r"files.zip: .* found no image in fox"):
        load_dataset(tmp_path / "files.zip", train=False)
    one = tmp_path / "one"
    (one / "cat").mkdir(parents=True)
    Image.new("L", (4, 4)).save(one / "cat" / "1.png")
    dataset = load_dataset(one)
    assert (dataset.classes, len(dataset)) == (("cat",), 1)
    with pytest.raises(DatasetError, match="two classes or more, found 1 of class 0 only"):
        check_trainable(dataset)
    with zipfile.ZipFile(tmp_path / "none.zip", "w"):
        pass
    assert refusal(tmp_path / "none.zip").found == "no images"


@pytest.mark.parametrize("name", ["../x/a.png", "/x/a.png", "x/../../a.png", "x\\a.png", "."])
def test_zips_with_unsafe_paths_are_rejected(folder: Path, name: str) -> None:
    path = zipped(folder)
    before = sorted(folder.parent.rglob("*"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, (folder / "cat" / "1.png").read_bytes())
    assert refusal(path).expected == "relative member names"
    assert sorted(folder.parent.rglob("*")) == before


def test_zip_bombs_are_rejected_by_declared_size(tmp_path: Path) -> None:
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


def test_member_larger_than_declared_is_rejected(folder: Path) -> None:
    path = folder.parent / "x.npz"
    np.savez_compressed(path, images=np.zeros((2, 3, 64, 64), np.uint8), labels=np.arange(2))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + 24  # the directory's uncompressed size
    data[at : at + 4] = (200).to_bytes(4, "little")
    path.write_bytes(data)
    refusal(path)


def test_member_without_a_name_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "")
    data = path.read_bytes()
    at = data.index(b"PK\x01\x02")
    data = (
        data[:at]
        + data[at : at + 46].replace(b"\1\0\0\0\0\0", b"\0\0\0\0\0\0", 1)
        + data[at + 47 :]
    )
    path.write_bytes(data[:-10] + (46).to_bytes(4, "little") + data[-6:])
    assert refusal(path).found == "a member without a name"


def test_invalid_zip_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 not really")
    assert "damaged" in refusal(tmp_path / "a.zip").found


def test_images_are_resized(folder: Path) -> None:
    Image.new("RGB", (100, 60), (7, 7, 7)).save(folder / "dog" / "1.png")
    dataset = load_dataset(folder, size=24)
    assert torch.equal(dataset.images[2], torch.full((3, 24, 24), 7, dtype=torch.uint8))
    assert dataset.changes == (
        "resized 3 images from 32x32 to 24x24",
        "resized 1 image from 100x60 to 24x24, cropped to the square in the center",
    )
    for side in (50, 51):
        Image.new("RGB", (side, side)).save(folder / "dog" / f"{side}.png")
    assert (
        load_dataset(folder, size=24)
        .changes[0]
        .startswith("resized 6 images of 4 sizes, 32x32 to 100x60, to 24x24")
    )


@pytest.mark.parametrize("readme", ["README.txt", "top/README.txt"])
def test_text_file_beside_the_class_folders_in_a_zip_is_skipped(folder: Path, readme: str) -> None:
    path = zipped(folder, "top/")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(readme, "what this is")
    assert load_dataset(path).classes == ("cat", "dog", "eel")


def test_class_folders_may_be_symlinks(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("cat", "dog"):
        (linked / name).symlink_to(folder / name)
    dataset = load_dataset(linked)
    assert (dataset.classes, dataset.labels.tolist()) == (("cat", "dog"), [0, 0, 1])


def test_symlink_to_a_parent_folder_is_rejected(folder: Path) -> None:
    (folder / "cat" / "round").symlink_to(folder)
    assert "cat/round/cat" in refusal(folder).found

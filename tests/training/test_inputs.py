from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from robust.datasets import Dataset, DatasetError
from training.folder_layout import check_layout
from training.inputs import load_images, with_threat_model
from training.recipes import gpu, quick


def images(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (
            ("train/cat/1.png", "train/dog/1.png", "val/cat/2.png", "val/dog/2.png"),
            "found train/, val/; use --data {t}/train --val {t}/val",
        ),
        (
            tuple(f"{split}/{k}/1.png" for split in ("train", "valid", "test") for k in "ab"),
            "found test/, train/, valid/; use --data {t}/train --val {t}/valid, and keep {t}/test "
            "for robust evaluate --data",
        ),
        (
            ("Train/a/1.png", "Train/b/1.png", "test/a/2.png", "test/b/2.png"),
            "found Train/, test/; use --data {t}/Train, and keep {t}/test",
        ),
        (
            ("images/cat/1.jpg", "images/dog/1.jpg"),
            "found images/cat/1.jpg; use --data {t}/images",
        ),
        (
            ("images/cat/1.jfif", "images/dog/1.jfif"),
            "found images/cat/1.jfif; use --data {t}/images",
        ),
        (
            ("set/images/cat/1.jpg", "set/images/dog/1.jpg"),
            "found set/images/cat/1.jpg; use --data {t}/set/images",
        ),
        (
            ("images/annotations/1.tga", "images/cat/1.jpg", "images/dog/1.jpg"),
            "found images/cat/1.jpg; use --data {t}/images",
        ),
    ],
)
def test_intended_folder_is_suggested(tmp_path: Path, names: tuple[str, ...], found: str) -> None:
    images(tmp_path, *names)
    with pytest.raises(DatasetError) as caught:
        load_images(str(tmp_path), size=8)
    assert found.format(t=tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ("cat/1.png", "dog/1.png"),
        ("train/1.png", "bus/1.png", "val/1.png"),  # vehicles
        ("a/x/1.png", "b/x/1.png"),  # two folders, each around one
        ("images/1.png",),
        (),
    ],
)
def test_other_folders_are_passed_to_the_reader(tmp_path: Path, names: tuple[str, ...]) -> None:
    images(tmp_path, *names)
    check_layout(tmp_path)
    check_layout(tmp_path / "none")


def test_class_names_are_given_in_the_order_of_the_labels(tmp_path: Path) -> None:
    data = {
        "images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        "labels": torch.tensor([0, 1] * 2),
    }
    torch.save(data, tmp_path / "a.pt")
    source = str(tmp_path / "a.pt")
    assert load_images(source, size=8).classes == ("0", "1")
    assert load_images(source, size=8, classes=("cat", "dog", "eel")).classes == (
        "cat",
        "dog",
        "eel",
    )
    torch.save({**data, "labels": data["labels"] + 1}, tmp_path / "a.pt")
    with pytest.raises(DatasetError, match="labels from 0 to 1, found labels from 1 to 2"):
        load_images(source, size=8, classes=("cat", "dog"))


def test_changed_eps_scales_steps_given_in_pixels() -> None:
    recipe = gpu()
    assert with_threat_model(recipe, None, None) == recipe
    half = with_threat_model(recipe, None, 4 / 255)
    assert (half.norm, half.eps) == ("linf", 4 / 255)
    assert half.phases[1].parts[0].alpha == pytest.approx(4 / 255)
    assert half.phases[2] == recipe.phases[2]  # its steps follow eps anyway
    round_ball = with_threat_model(recipe, "l2", None)
    assert (round_ball.norm, round_ball.eps) == ("l2", 0.5)
    assert round_ball.phases[1].parts[0].alpha == pytest.approx(0.5)
    assert with_threat_model(quick(), "l2", 1.0).eps == 1.0
    with pytest.raises(ValueError, match=r"eps: expected an linf eps in \[0, 1\]"):
        with_threat_model(quick(), None, 2.0)


def test_class_names_are_matched_in_any_order(colors: Dataset, tmp_path: Path) -> None:
    images(tmp_path, "b/1.png", "a/1.png", "a/2.png")
    dataset = load_images(str(tmp_path), size=8, classes=("b", "a"))
    assert dataset.labels.tolist() == [1, 1, 0]
    with pytest.raises(DatasetError, match="does not have b"):
        load_images(str(tmp_path), size=8, classes=("a", "c"))
    assert replace(colors, name="x").classes == colors.classes

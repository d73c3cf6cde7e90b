import io
import sys
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision import transforms

from robust.datasets import Dataset, DatasetError, load_dataset
from robust.datasets.image_list import ImageList

RNG = np.random.default_rng(0)
IMAGES = torch.from_numpy(RNG.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


class TaskDataset:
    def __init__(self, transform: object = None) -> None:
        self.ids: list[int] = []
        self.imgs: list[Image.Image] = []
        self.labels: list[object] = []
        self.transform = transform


TaskDataset.__module__ = "__main__"


def pil_images() -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in IMAGES]


def task(**attributes: object) -> TaskDataset:
    dataset = TaskDataset()
    defaults = {"ids": [7, 900, 3, 3, 0, 12], "imgs": pil_images(), "labels": LABELS.tolist()}
    for name, value in {**defaults, **attributes}.items():
        setattr(dataset, name, value)
    return dataset


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def save(value: object, **options: object) -> Path:
        path = tmp_path / "train.pt"
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["__main__"], "TaskDataset", TaskDataset, raising=False)
            torch.save(value, path, **options)
        return path

    return save


def refusal(path: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        load_dataset(path)
    assert str(caught.value).startswith(f"{path.name}: expected ")
    return caught.value.found


def same(dataset: Dataset) -> bool:
    return torch.equal(dataset.images, IMAGES) and torch.equal(dataset.labels, LABELS)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_task_dataset_of_a_missing_class_is_read(save, protocol: int, zipped: bool) -> None:
    path = save(task(), pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert not hasattr(sys.modules["__main__"], "TaskDataset")
    dataset = load_dataset(path)
    assert same(dataset)
    assert dataset.classes == ("0", "1", "2")
    assert dataset.name == "train.pt"


def test_every_mode_of_image_becomes_rgb(save) -> None:
    color = pil_images()
    modes = ["RGB", "L", "RGBA", "P", "1", "CMYK"]
    images = [image.convert(mode) for image, mode in zip(color, modes, strict=True)]
    loaded = load_dataset(save(task(imgs=images))).images
    for image, result in zip(images, loaded, strict=True):
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(result, expected), image.mode


def test_images_read_from_files_and_transparent_palettes(save) -> None:
    buffer = io.BytesIO()
    palette = Image.new("P", (32, 32))
    palette.putpalette([255, 0, 0])
    palette.save(buffer, "PNG", transparency=0, dpi=(72, 72))
    images = [*pil_images()[:5], Image.open(buffer)]
    assert (load_dataset(save(task(imgs=images))).images[5] == 255).all()


def test_other_sizes_are_resized(save) -> None:
    images = [*pil_images()[:5], Image.new("L", (50, 40), 9)]
    dataset = load_dataset(save(task(imgs=images)))
    assert torch.equal(dataset.images[:5], IMAGES[:5])
    assert (dataset.images[5] == 9).all()
    assert dataset.changes == (
        "resized 1 image from 50x40 to 32x32, cropped to the square in the center",
    )


@pytest.mark.parametrize(
    "labels",
    [
        LABELS,
        LABELS.numpy(),
        list(LABELS.numpy()),
        list(LABELS.numpy().astype(np.uint8)),
        list(LABELS),
        tuple(LABELS.tolist()),
    ],
    ids=["tensor", "array", "int64 scalars", "uint8 scalars", "0-d tensors", "tuple"],
)
def test_labels_of_every_form(save, labels: object) -> None:
    assert same(load_dataset(save(task(labels=labels))))


@pytest.mark.parametrize("zipped", [True, False])
def test_boolean_and_unsigned_tensors_are_labels(save, zipped: bool) -> None:
    for labels in (LABELS > 0, LABELS.to(torch.uint16), LABELS.to(torch.uint64)):
        value = {"images": IMAGES, "labels": labels, "mask": torch.ones(6, dtype=torch.bool)}
        dataset = load_dataset(save(value, _use_new_zipfile_serialization=zipped))
        assert dataset.labels.tolist() == labels.tolist()
        assert torch.equal(dataset.images, IMAGES)
    hot = torch.nn.functional.one_hot(LABELS)
    for labels in (hot.bool(), hot.to(torch.uint16)):
        value = {"images": IMAGES, "labels": labels}
        assert same(load_dataset(save(value, _use_new_zipfile_serialization=zipped)))
    path = save((IMAGES.to(torch.uint16), LABELS), _use_new_zipfile_serialization=zipped)
    assert refusal(path) == "torch.uint16"


def test_paths_and_devices_of_an_object_are_not_built(save) -> None:
    value = task(root=Path("data"), windows=PureWindowsPath("c:/data"), device=torch.device("cpu"))
    for protocol in (2, 4):
        assert same(load_dataset(save(value, pickle_protocol=protocol)))
    assert refusal(save(task(labels=[Path("data")] * 6))) == "a label of type pathlib.PosixPath"


def test_transform_is_not_built(save) -> None:
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomApply(torch.nn.ModuleList([transforms.ColorJitter(0.1)])),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )
    with pytest.raises(
        DatasetError, match=r"torch.nn.modules.container.ModuleList, which is not allowed"
    ):
        load_dataset(save(task(transform=transform)))
    transform.transforms.pop(2)
    assert same(load_dataset(save(task(transform=transform))))


@pytest.mark.parametrize(
    "value",
    [
        {"images": IMAGES, "labels": LABELS},
        {"data": IMAGES.permute(0, 2, 3, 1), "targets": LABELS.tolist()},
        {"images": IMAGES.permute(0, 2, 3, 1).contiguous().numpy(), "labels": LABELS.numpy()},
        {"images": IMAGES / 255, "labels": LABELS.to(torch.int32)},
        {"images": pil_images(), "labels": LABELS},
        {"images": list(IMAGES), "labels": LABELS},
        {"images": list(IMAGES.numpy()), "labels": LABELS},
        (IMAGES, LABELS),
        [IMAGES.double() / 255, LABELS[:, None]],
        TensorDataset(IMAGES, LABELS),
        {"images": torch.nn.Parameter(IMAGES / 255), "labels": LABELS},
        {"images": torch.cat([IMAGES, IMAGES])[:6], "labels": torch.stack([LABELS] * 2, 1)[:, 0]},
    ],
    ids=range(12),
)
@pytest.mark.parametrize("zipped", [True, False])
def test_every_other_layout_is_read(save, value: object, zipped: bool) -> None:
    assert same(load_dataset(save(value, _use_new_zipfile_serialization=zipped)))


def test_class_names_are_kept(save) -> None:
    value = {"images": IMAGES, "labels": LABELS, "classes": ["cat", "dog", "eel"]}
    assert load_dataset(save(value)).classes == ("cat", "dog", "eel")
    assert refusal(save({**value, "classes": ["cat"]})) == "1 class names and a label 2"
    numbered = {**value, "classes": {"dog": 1, "eel": 2, "cat": 0}}
    assert load_dataset(save(numbered)).classes == ("cat", "dog", "eel")
    for classes in ({"cat": 0, "dog": 1, "eel": 1}, {"cat": [0]}, 3, [1, 2, 3]):
        dataset = load_dataset(save({**value, "classes": classes}))
        assert dataset.classes == ("0", "1", "2")
        assert dataset.changes == ("did not use classes, which is not a list of text",)


def test_repeated_image_is_read_once(save, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Image.Image] = []
    add_image = ImageList.add_image

    def counted(images: ImageList, image: Image.Image) -> None:
        read.append(image)
        add_image(images, image)

    monkeypatch.setattr(ImageList, "add_image", counted)
    image = pil_images()[0]
    images = load_dataset(save(task(imgs=[image] * 6))).images
    assert torch.equal(images, IMAGES[:1].expand(6, -1, -1, -1))
    assert len(read) == 1


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"images": IMAGES, "labels": LABELS[:4]}, "shape (4,)"),
        ({"images": IMAGES / 200, "labels": LABELS}, "values from 0.0 to 1.275"),
        ({"images": IMAGES}, "images"),
        ([IMAGES], "a list of 1"),
        (IMAGES, "a torch._utils._rebuild_tensor_v2"),
        (TensorDataset(IMAGES), "a tuple of 1"),
        ({"images": "all", "labels": LABELS}, "a str of 3"),
        ({"images": [], "labels": []}, "none"),
        ({"images": [3, 4], "labels": [0, 1]}, "a int"),
        ({"images": [IMAGES[0], IMAGES[1, :1]], "labels": [0, 1]}, "several"),
        (task(labels=[0, 1]), "shape (2,)"),
        (task(labels=list("abcdef")), "a label of type str"),
        (task(labels=[0, 1, 2, 0, 1, None]), "a label of type NoneType"),
        (task(labels=[0, 1, 2, 0, 1, 10**400]), "one beyond 53 bits"),
        (task(labels=[0, 1, 2, 0, 1, -1]), "labels from -1 to 2"),
        (task(labels=[0, 1, 2, 0, 1, 0.5]), "fractions, NaN or infinity"),
        (task(imgs=[Image.new("F", (32, 32))] * 6), "mode 'F'"),
        ({"images": IMAGES, "labels": np.array([0, None] * 3)}, "an object array"),
        ({"images": IMAGES.to(torch.complex64), "labels": LABELS}, "another kind"),
        ({"images": IMAGES.to_sparse(), "labels": LABELS}, "the name torch._utils._rebuild_sparse"),
    ],
)
def test_bad_data(save, value: object, found: str) -> None:
    assert refusal(save(value)).startswith(found)


def test_files_cut_short(save) -> None:
    small = {"images": IMAGES[:, :, :4, :4].clone(), "labels": LABELS}
    for zipped in (True, False):
        path = save(small, _use_new_zipfile_serialization=zipped)
        data = path.read_bytes()
        for length in range(0, len(data), 61):
            path.write_bytes(data[:length])
            assert refusal(path)


def test_big_endian_files_are_refused(save) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "byteorder", "big")
        path = save({"images": IMAGES, "labels": LABELS})
    assert refusal(path) == "another byte order"

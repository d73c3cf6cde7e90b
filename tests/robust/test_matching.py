import pytest
import torch

from robust.datasets import Dataset, DatasetError
from robust.matching import first_images, match_classes

CLASSES = ("cat", "dog", "frog", "ship")


def dataset(classes: tuple[str, ...], labels: list[int]) -> Dataset:
    images = torch.arange(len(labels)).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).to(torch.uint8)
    return Dataset(images=images, labels=torch.tensor(labels), classes=classes, name="folder")


def test_same_names_are_accepted() -> None:
    data = dataset(CLASSES, [0, 3])
    assert match_classes(data, CLASSES) is data


def test_names_in_another_order_are_mapped() -> None:
    matched = match_classes(dataset(("ship", "frog", "dog", "cat"), [0, 1, 2, 3, 0]), CLASSES)
    assert matched.labels.tolist() == [3, 2, 1, 0, 3]
    assert matched.classes == CLASSES


def test_subset_of_the_names_is_mapped() -> None:
    assert match_classes(dataset(("dog", "ship"), [0, 1, 1]), CLASSES).labels.tolist() == [1, 3, 3]


def test_unnamed_labels_are_used_unchanged() -> None:
    assert match_classes(dataset(("0", "1", "2"), [2, 0]), CLASSES).labels.tolist() == [2, 0]
    assert match_classes(dataset(CLASSES, [3, 1]), ("0", "1", "2", "3")).labels.tolist() == [3, 1]


def test_labels_used_as_numbers_are_reported() -> None:
    told = match_classes(dataset(("0", "1"), [1, 0]), CLASSES).changes
    assert told == ("read labels as numbers of the model's classes: 0 is cat, 1 is dog",)
    told = match_classes(dataset(CLASSES, [3, 1]), ("0", "1", "2", "3")).changes
    assert told == (
        "read labels as numbers of the model's classes: cat is 0, dog is 1, frog is 2, ship is 3",
    )
    assert match_classes(dataset(("ship", "cat"), [0, 1]), CLASSES).changes == ()
    (told,) = match_classes(dataset(("0", "1", "2"), [2, 1]), CLASSES).changes
    assert told.endswith("class 0 has no images (do the labels begin at 1?)")


def test_numeric_names_are_matched_as_names() -> None:
    digits = tuple(str(k) for k in range(10))
    assert match_classes(dataset(("3", "5"), [0, 1, 1]), digits).labels.tolist() == [3, 5, 5]
    with pytest.raises(DatasetError, match="does not have 10"):
        match_classes(dataset(tuple(str(k) for k in range(1, 11)), [0, 9]), digits)


def test_numbers_are_compared_by_value() -> None:
    digits = tuple(str(k) for k in range(12))
    padded = tuple(f"{k:05d}" for k in range(12))
    matched = match_classes(dataset(padded, [0, 11, 2]), digits)
    assert (matched.labels.tolist(), matched.classes) == ([0, 11, 2], digits)
    (note,) = matched.changes
    assert note.startswith("matched class names as numbers: 00000 is 0, 00001 is 1, ")
    assert match_classes(dataset(padded[4:7], [0, 2]), digits).labels.tolist() == [4, 6]
    assert match_classes(dataset(("10", "9"), [0, 1]), padded).labels.tolist() == [10, 9]
    (note,) = match_classes(dataset(("00", "01"), [1, 0]), CLASSES).changes
    assert note == "read labels as numbers of the model's classes: 00 is cat, 01 is dog"
    with pytest.raises(DatasetError, match="does not have 01"):
        match_classes(dataset(("01", "1"), [0, 1]), digits)  # two classes, not one


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (("cat", "wolf"), [0, 1], "does not have wolf"),
        (("a", "b"), [0, 1], "expected the model's classes cat, dog, frog, ship"),
        ((*CLASSES, "wolf"), [0, 4], "does not have wolf"),
        (("0", "1", "2", "3", "4"), [0, 4], "labels from 0 to 3"),
    ],
)
def test_other_classes_are_refused(
    classes: tuple[str, ...], labels: list[int], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        match_classes(dataset(classes, labels), CLASSES)


@pytest.mark.parametrize("names", [("cat", "dog"), ("cat",), tuple("abcdefghijk")])
def test_names_are_rejected_if_the_models_outputs_have_none(names: tuple[str, ...]) -> None:
    unnamed = tuple(str(k) for k in range(10))
    with pytest.raises(DatasetError) as raised:
        match_classes(dataset(names, [0, 0]), unnamed)
    assert str(raised.value) == (
        "folder: expected the names of the model's 10 outputs (--classes, or classes in Python), "
        f"as it has none, found {len(names)} classes, {', '.join(names[:10])}"
        + (", ..." if len(names) > 10 else "")
    )
    assert match_classes(dataset(("0", "1"), [1, 0]), unnamed).labels.tolist() == [1, 0]
    named = (*"bcdefghi", "dog", "cat")
    assert match_classes(dataset(("cat", "dog"), [0, 1]), named).labels.tolist() == [9, 8]


def test_first_images() -> None:
    mixed = dataset(("a", "b"), [0, 1, 0, 1, 1, 0])
    assert first_images(mixed, 3).images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert len(first_images(mixed, 100)) == 6


def test_first_images_of_sorted_data_cover_every_class() -> None:
    data = dataset(("a", "b", "c"), [0] * 10 + [1] * 10 + [2] * 10)
    some = first_images(data, 6)
    assert some.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert first_images(data, 30).images.equal(data.images)


def test_unnamed_labels_fit_a_model_with_a_duplicate_class_name() -> None:
    crane = ("crane", "cat", "crane")
    assert match_classes(dataset(("0", "1", "2"), [2, 0]), crane).labels.tolist() == [2, 0]

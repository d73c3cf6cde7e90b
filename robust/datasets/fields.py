"""Finds the images, labels and class names among the names in a file."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from robust.datasets.source import TEST, TRAIN, Source

IMAGES = (
    *("images", "imgs", "image", "img", "data", "x", "inputs"),
    *("adv_complete", "adv_images", "adversarial_images", "adversarial", "adv", "x_adv"),
)
LABELS = ("labels", "targets", "label", "target", "y", "y_true", "fine_labels", "fine_label")
CLASSES = ("classes", "class_names", "label_names", "fine_label_names")
EXPECTED = f"images named {', '.join(IMAGES)} (or x_test, ...) and labels named {', '.join(LABELS)}"


def image_and_label_names(
    source: Source, names: Iterable[str], *, labels_elsewhere: bool = False
) -> tuple[str, str | None]:
    """The name of the images and that of the labels among `names`, ignoring case.

    Of `x_train` and `x_test` it takes the one for the requested split, and the labels of the same
    split; names without a split go with either. A file with only a test split is read in any case,
    but training images never stand in for test images. With `labels_elsewhere` the labels may be
    missing (None). Raises DatasetError, which lists the names, if one is missing or ambiguous.
    """
    found = list(names)
    shown = ", ".join(name[:40] for name in found[:12]) or "no names"
    order = (*TRAIN, *TEST) if source.train else (*TEST, *TRAIN)
    present = [split for split in order if _has_split(found, split)]
    if present and present[0] in TRAIN and not source.train:
        raise source.error(f"images and labels of the split {' or '.join(TEST)}", shown)
    split = present[0] if present else ""
    images, labels = _matches(found, IMAGES, split), _matches(found, LABELS, split)
    if not images or (not labels and not labels_elsewhere):
        raise source.error(EXPECTED, shown)
    for several in (images, labels):
        if len(several) > 1:
            raise source.error(f"one of {' and '.join(several)}", f"both, among {shown}")
    return images[0], labels[0] if labels else None


def split_notes(source: Source, names: Iterable[str], images: str) -> list[str]:
    """A note if `images` are of one split and `names` have images of the other, too."""
    is_train = {
        name: split in TRAIN
        for name in names
        for split in (*TRAIN, *TEST)
        if _without_split(name.lower(), split) in IMAGES
    }
    others = [name for name, train in is_train.items() if train != is_train.get(images, train)]
    return [source.split_note(images, ", ".join(others))] if others else []


def class_name_field(names: Iterable[str]) -> str | None:
    """The name of the class names among `names`; None if there is none."""
    return next((name for name in names if name.lower() in CLASSES), None)


def unused_classes(name: str) -> str:
    """The entry of `Dataset.changes` for class names in another form."""
    return f"did not use {name}, which is not a list of text"


def _has_split(names: list[str], split: str) -> bool:
    """Whether images or labels of `split` are among `names`."""
    return any(_without_split(name.lower(), split) in (*IMAGES, *LABELS) for name in names)


def _matches(names: list[str], known: Collection[str], split: str) -> list[str]:
    """The known names without a split, and those of `split`."""
    return [
        name
        for name in names
        if name.lower() in known or (split and _without_split(name.lower(), split) in known)
    ]


def _without_split(name: str, split: str) -> str:
    """`x` for `x_test` and `test_x`; the empty string for names without the split."""
    if name.endswith(f"_{split}"):
        return name.removesuffix(f"_{split}")
    return name.removeprefix(f"{split}_") if name.startswith(f"{split}_") else ""

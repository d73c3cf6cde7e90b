"""Finds the images, labels and class names among the names in a file."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from robust.datasets.source import Source

IMAGES = (
    *("images", "imgs", "image", "img", "data", "x", "inputs"),
    *("adv_complete", "adv_images", "adversarial_images", "adversarial", "adv", "x_adv"),
)
LABELS = ("labels", "targets", "label", "target", "y", "y_true", "fine_labels")
CLASSES = ("classes", "class_names", "label_names", "fine_label_names")
EXPECTED = f"images named {', '.join(IMAGES)} (or x_test, ...) and labels named {', '.join(LABELS)}"


def image_and_label_names(
    source: Source, names: Iterable[str], *, labels_elsewhere: bool = False
) -> tuple[str, str | None]:
    """The name of the images and that of the labels among `names`, ignoring case.

    Of `x_train` and `x_test` it takes the one for the requested split. With `labels_elsewhere` the
    labels may be missing (None). Raises DatasetError, which lists the names, if one is missing or
    ambiguous.
    """
    found = list(names)
    images = _matches(found, IMAGES, source.train)
    labels = _matches(found, LABELS, source.train)
    shown = ", ".join(name[:40] for name in found[:12]) or "no names"
    if not images or (not labels and not labels_elsewhere):
        raise source.error(EXPECTED, shown)
    for several in (images, labels):
        if len(several) > 1:
            raise source.error(f"one of {' and '.join(several)}", f"both, among {shown}")
    return images[0], labels[0] if labels else None


def class_name_field(names: Iterable[str]) -> str | None:
    """The name of the class names among `names`; None if there is none."""
    return next((name for name in names if name.lower() in CLASSES), None)


def _matches(names: list[str], known: Collection[str], train: bool) -> list[str]:
    """The known names without a split, and those of the requested split or else of the other."""
    plain = [name for name in names if name.lower() in known]
    train_names, test_names = ("train",), ("test", "val", "valid", "validation")
    for split in (*train_names, *test_names) if train else (*test_names, *train_names):
        found = [name for name in names if _without_split(name.lower(), split) in known]
        if found:
            return plain + found
    return plain


def _without_split(name: str, split: str) -> str:
    """`x` for `x_test` and `test_x`; the empty string for names without the split."""
    if name.endswith(f"_{split}"):
        return name.removesuffix(f"_{split}")
    return name.removeprefix(f"{split}_") if name.startswith(f"{split}_") else ""

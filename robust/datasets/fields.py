"""Which of the names in a file are the images, which the labels, and which the class names."""

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
    """The name of the images and that of the labels among `names`, whatever their case.

    Of names for both parts, as `x_train` and `x_test`, those of the wanted part are taken. Raises
    DatasetError, with the names that were found and those that are taken, when one is missing or
    two could be meant. With `labels_elsewhere` the labels may be missing (None).
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
    """The name of the class names among `names`; None where there is none."""
    return next((name for name in names if name.lower() in CLASSES), None)


def _matches(names: list[str], known: Collection[str], train: bool) -> list[str]:
    plain = [name for name in names if name.lower() in known]
    wanted = ("train",) if train else ("test", "val", "valid", "validation")
    other = ("test", "val", "valid", "validation") if train else ("train",)
    for parts in (wanted, other):
        for part in parts:
            found = [name for name in names if _of_part(name.lower(), part) in known]
            if found:
                return plain + found
    return plain


def _of_part(name: str, part: str) -> str:
    """`x_test` and `test_x` without their part; the empty string for other names."""
    if name.endswith(f"_{part}"):
        return name.removesuffix(f"_{part}")
    return name.removeprefix(f"{part}_") if name.startswith(f"{part}_") else ""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robust.datasets import Dataset, DatasetError, check_labels, stratified_split


def dataset(**changes: object) -> Dataset:
    images = torch.arange(5 * 12, dtype=torch.uint8).view(5, 3, 2, 2)
    labels = torch.tensor([0, 1, 1, 2, 1])
    return Dataset(
        **{"images": images, "labels": labels, "classes": ("a", "b", "c", "d"), "name": "n"}
        | changes
    )


def test_length_counts_subset_and_limit() -> None:
    whole = dataset()
    assert len(whole) == 5
    assert whole.class_counts() == (1, 3, 1, 0)
    part = whole.subset([4, 0])
    assert part.labels.tolist() == [1, 0]
    assert torch.equal(part.images, whole.images[[4, 0]])
    assert (part.classes, part.name) == (whole.classes, "n")
    assert torch.equal(whole.subset(torch.tensor([3])).images, whole.images[3:4])
    assert whole.limit(2).labels.tolist() == [0, 1]
    assert len(whole.limit(99)) == 5
    assert len(whole.subset([])) == 0


def test_hash_depends_on_content_only() -> None:
    whole = dataset()
    assert len(whole.sha256) == 64
    assert whole.sha256 == dataset(name="other", classes=("w", "x", "y", "z")).sha256
    images = whole.images.clone()
    images[4, 2, 1, 1] += 1
    others = [
        dataset(images=images),
        dataset(labels=torch.tensor([0, 1, 1, 2, 2])),
        dataset(images=whole.images.view(5, 3, 4, 1)),
        whole.limit(4),
    ]
    assert len({d.sha256 for d in [whole, *others]}) == 5
    turned = whole.images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    assert dataset(images=turned).sha256 == whole.sha256


@pytest.mark.parametrize(
    "changes",
    [
        {"images": torch.zeros(5, 3, 2, 2, dtype=torch.float64)},
        {"images": torch.zeros(5, 1, 2, 2, dtype=torch.uint8)},
        {"images": torch.zeros(4, 3, 2, 2, dtype=torch.uint8)},
        {"labels": torch.zeros(5)},
        {"labels": torch.zeros(5, 1, dtype=torch.int64)},
        {"labels": torch.tensor([0, 1, 2, 3, 4])},
        {"labels": torch.tensor([0, 1, 2, 3, -1])},
        {"classes": ("a", "b")},
    ],
)
def test_inconsistent_datasets_are_rejected(changes: dict[str, object]) -> None:
    with pytest.raises(DatasetError, match="n: expected"):
        dataset(**changes)


def test_labels_must_fit_the_model() -> None:
    check_labels(dataset(), 3)
    check_labels(dataset().subset([]), 1)
    with pytest.raises(
        DatasetError, match="n: expected labels from 0 to 1, found labels from 0 to"
    ):
        check_labels(dataset(), 2)


LABELS = st.lists(st.integers(0, 5), min_size=2, max_size=80)


@given(labels=LABELS, part=st.floats(0.01, 0.99), seed=st.integers(0, 2**31))
def test_a_split_is_disjoint_complete_exact_and_stratified(
    labels: list[int], part: float, seed: int
) -> None:
    targets = torch.tensor(labels)
    counts = targets.bincount()
    count = max(1, math.floor(part * len(labels)))
    if count > len(labels) - int((counts > 1).sum()):
        with pytest.raises(ValueError, match="hold out"):
            stratified_split(targets, count, seed=seed)
        return
    kept, held_out = stratified_split(targets, count, seed=seed)
    assert sorted(kept.tolist() + held_out.tolist()) == list(range(len(labels)))
    assert len(held_out) == count
    kept_counts = targets[kept].bincount(minlength=len(counts))
    assert (kept_counts[counts > 1] > 0).all()
    if count <= len(labels) - int((counts > 0).sum()):
        assert (kept_counts[counts > 0] > 0).all()
    again = stratified_split(targets, count, seed=seed)
    assert torch.equal(held_out, again[1])


def test_a_split_is_proportional_and_seeded() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    _, held_out = stratified_split(labels, 0.1, seed=0)
    assert labels[held_out].bincount().tolist() == [6, 3, 1]
    # Shares 5.4, 2.7 and 0.9: the two images left after 5, 2, 0 go to 0.9 and 0.7.
    _, held_out = stratified_split(labels, 9, seed=0)
    assert labels[held_out].bincount().tolist() == [5, 3, 1]
    assert not torch.equal(held_out, stratified_split(labels, 9, seed=1)[1])


@pytest.mark.parametrize("held_out", [0, 0.0, 5, 1.0, -1])
def test_both_parts_of_a_split_need_an_image(held_out: float) -> None:
    with pytest.raises(ValueError, match="expected to hold out"):
        stratified_split(torch.tensor([0, 1, 0, 1, 0]), held_out, seed=0)

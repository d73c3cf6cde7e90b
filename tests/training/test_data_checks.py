import pytest
import torch

from training.data_checks import (
    ClassCount,
    balanced_weights,
    class_warnings,
    count_classes,
    describe_counts,
    held_out_warning,
    shared_images,
)


def counts(**sizes: tuple[int, int]) -> tuple[ClassCount, ...]:
    return tuple(
        ClassCount(name=name.lstrip("_"), train=train, held_out=held)
        for name, (train, held) in sizes.items()
    )


def test_images_are_counted_per_class() -> None:
    found = count_classes(("a", "b", "c"), torch.tensor([0, 0, 2]), torch.tensor([2]))
    assert found == counts(a=(2, 0), b=(0, 0), c=(1, 1))
    line = describe_counts(found)
    assert line == "images per class, training + held out: a 2 + 0, b 0 + 0, c 1 + 1"
    many = tuple(ClassCount(name=f"k{k}", train=k, held_out=0) for k in range(1, 31))
    assert describe_counts(many) == "images per class: 1 (k1) to 30 (k30), median 16"


def test_balanced_classes_give_no_warning() -> None:
    assert class_warnings(counts(a=(90, 10), b=(50, 5))) == []


def test_labels_starting_at_1_leave_a_class_without_images() -> None:
    (message,) = class_warnings(counts(_0=(0, 0), _1=(90, 10), _2=(90, 10)))
    assert message.startswith("class 0 without images (do the labels begin at 1?)")
    (message,) = class_warnings(counts(a=(0, 0), b=(90, 10), c=(90, 10), d=(0, 0)))
    assert message.startswith("2 classes (a, d) without images: ")


def test_a_class_of_one_image_is_named() -> None:
    messages = class_warnings(counts(common=(391, 8), rare=(1, 0)))
    assert len(messages) == 2
    assert messages[0].startswith("class rare (1 image) without held-out images")
    assert messages[1] == (
        "uneven classes: common has 391 images to train on, 391 times as many as rare (1); "
        "--set class_weights=balanced helps"
    )


@pytest.mark.parametrize(("large", "warned"), [(99, False), (100, True)])
def test_largest_class_ten_times_the_smallest_is_imbalanced(large: int, warned: bool) -> None:
    classes = counts(a=(large, 5), b=(10, 5))
    assert bool(class_warnings(classes)) == warned
    if warned:
        (message,) = class_warnings(classes, class_weights="balanced")
        assert message.endswith("10 times as many as b (10)")


def test_class_only_in_the_held_out_set_is_named() -> None:
    (message,) = class_warnings(counts(a=(90, 10), b=(0, 3)))
    assert message == "class b without training images, only held out"


def test_few_held_out_images_are_reported_with_their_interval() -> None:
    message = held_out_warning(14, validation=False)
    assert message is not None
    assert message.startswith("only 14 images held out: a measured accuracy of 50% may be anything")
    assert "from 27 to 73%" in message
    assert message.endswith("provide more with --val PATH or --set held_out=0.2")
    message = held_out_warning(99, validation=True)
    assert message is not None
    assert message.endswith("provide more with --val")  # held_out has no effect then
    assert held_out_warning(100, validation=False) is None


def test_images_in_both_sets_are_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 8, 8), generator=generator, dtype=torch.uint8)
    others = images.clone()[[1, 3, 3, 5]]
    others[3, 0, 0, 0] ^= 1
    assert shared_images(images, others) == 3


def test_balanced_weights_give_classes_equal_weight() -> None:
    weights = balanced_weights(counts(a=(6, 0), b=(0, 4), c=(2, 0)))
    assert weights.tolist() == pytest.approx([8 / 12, 0, 8 / 4])
    assert (weights * torch.tensor([6.0, 0.0, 2.0])).sum().item() == pytest.approx(8)

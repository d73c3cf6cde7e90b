import torch

from robust.attacks.targets import nth_likeliest


def test_targets_are_the_likeliest_other_classes_in_order() -> None:
    logits = torch.tensor([[5.0, 1.0, 3.0, 2.0]]).expand(3, 4)
    y = torch.tensor([0, 0, 2])
    found = [nth_likeliest(logits, y, torch.full((3,), n)).tolist() for n in range(3)]
    assert found == [[2, 2, 0], [3, 3, 3], [1, 1, 1]]

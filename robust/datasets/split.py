"""A seeded, stratified hold-out."""

import torch
from torch import Tensor


def stratified_split(labels: Tensor, held_out: int | float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices so that each class is held out in proportion.

    Labels int64 (N,); `held_out` is a count, or a share in (0, 1). Returns the sorted indices int64
    of the kept and of the held-out images: disjoint, complete, the same for a seed. The held-out
    count is exact (largest remainder), but every class keeps at least one image. Raises ValueError
    unless both parts get an image.
    """
    n = len(labels)
    wanted = round(held_out * n) if isinstance(held_out, float) else held_out
    if not 0 < wanted < n:
        raise ValueError(f"expected to hold out 1 to {n - 1} of {n} images, got {held_out}")
    counts = labels.bincount()
    exact = counts.double() * wanted / n
    quota = torch.minimum(exact.floor().long(), (counts - 1).clamp_min(0))
    remainders = (exact - quota).argsort(descending=True, stable=True).tolist()
    while int(quota.sum()) < wanted:
        open_classes = [k for k in remainders if quota[k] < counts[k] - 1]
        if not open_classes:
            break
        for k in open_classes[: wanted - int(quota.sum())]:
            quota[k] += 1
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    held = torch.zeros(n, dtype=torch.bool)
    for k, count in enumerate(quota.tolist()):
        held[order[labels[order] == k][:count]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()

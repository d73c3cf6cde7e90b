"""A seeded, stratified split into kept and held-out images."""

import torch
from torch import Tensor


def stratified_split(labels: Tensor, held_out: int | float, *, seed: int) -> tuple[Tensor, Tensor]:
    """The indices of the kept and of the held-out images, each class in proportion.

    Labels int64 (N,); `held_out` is a count, or a fraction in (0, 1). Returns two sorted int64
    tensors that depend only on labels and seed. The held-out count is exact, by largest remainders.
    Every class keeps at least one image, unless the count can only be reached by holding out
    classes with a single image. Raises ValueError if the count can't be reached, or if a part
    would be empty.
    """
    n = len(labels)
    wanted = round(held_out * n) if isinstance(held_out, float) else held_out
    if not 0 < wanted < n:
        raise ValueError(f"expected to hold out 1 to {n - 1} of {n} images, got {held_out}")
    counts = labels.bincount()
    limit = (counts - 1).clamp_min(0)
    if wanted > int(limit.sum()):
        limit = torch.where(counts == 1, 1, limit)
    if wanted > int(limit.sum()):
        most = int(limit.sum())
        raise ValueError(f"expected to hold out at most {most} of {n} images, got {held_out}")
    share = counts * wanted  # in n-ths of an image, so that remainders are exact
    quota = share // n
    by_remainder = (share - quota * n).argsort(descending=True, stable=True).tolist()
    while int(quota.sum()) < wanted:
        open_classes = [k for k in by_remainder if quota[k] < limit[k]]
        for k in open_classes[: wanted - int(quota.sum())]:
            quota[k] += 1
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    held = torch.zeros(n, dtype=torch.bool)
    for k, count in enumerate(quota.tolist()):
        held[order[labels[order] == k][:count]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()

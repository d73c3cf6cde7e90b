"""Warm-up passes before a GPU serves, here on the CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from app.engine.model_reloader import warm_kernels
from app.engine.served_model import bucket

CPU = torch.device("cpu")


class Linear:
    """Two logits; writes down how many images came, and fails with `error` past `room`."""

    def __init__(self, room: int = 1000, error: Callable[[], Exception] = MemoryError) -> None:
        self.room, self.error = room, error
        self.passes: list[int] = []
        self.gradients = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.passes.append(len(x))
        self.gradients += x.requires_grad
        if len(x) > self.room:
            raise self.error()
        mean = x.flatten(1).mean(dim=1)
        return torch.stack([mean, -mean], dim=1)


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory.")


def test_passes_are_padded_to_a_few_batch_sizes() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 16, 17, 48, 64)] == [1, 2, 4, 4, 8, 16, 32, 64, 64]


@pytest.mark.parametrize(("most", "largest"), [(1, 1), (48, 64), (64, 64)])
def test_warm_up_runs_every_batch_size_and_a_gradient(most: int, largest: int) -> None:
    model = Linear()
    warm_kernels(model, 8, device=CPU, most=most)
    assert model.gradients == 1
    assert {bucket(n) for n in range(1, most + 1)} <= set(model.passes)
    assert max(model.passes[1:]) == largest


def test_batch_sizes_beyond_the_memory_are_skipped() -> None:
    model = Linear(room=9, error=out_of_memory)
    warm_kernels(model, 8, device=CPU, most=64)
    assert model.passes[-2:] == [8, 16]


@pytest.mark.parametrize(("room", "error"), [(0, out_of_memory), (9, lambda: RuntimeError("no"))])
def test_model_that_cannot_run_at_all_is_rejected(
    room: int, error: Callable[[], Exception]
) -> None:
    with pytest.raises(RuntimeError):
        warm_kernels(Linear(room, error), 8, device=CPU, most=64)

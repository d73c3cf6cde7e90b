"""On one of several ranks: gradients and statistics of a shared batch, against those of a whole.

Prints one JSON object: by phase and precision the relative difference of the gradient, of the
running statistics and of the loss, and the bytes handed to all-reduces; the threads left by the
process group; and an error of rank 0.
"""

import json
import os
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.distributed import SINGLE, World, init_distributed
from robust.threat_model import Norm, ThreatModel
from tests.support import small
from training.awp import perturbed
from training.distributed import Collectives
from training.objective import adversarial_batches, objective
from training.recipe import AdversarialPart, Phase

BATCH = 15  # not a multiple of the world
CPU = torch.device("cpu")

part = AdversarialPart
PHASES: dict[str, tuple[Norm, Phase]] = {
    "awp": ("linf", Phase(name="awp", epochs=1, awp=0.01)),
    "split": (
        "linf",
        Phase(
            name="split",
            epochs=1,
            split=True,
            # The second has one image, which all world but one go without.
            parts=(
                part(kind="clean", share=0.1),
                part(kind="n-fgsm", share=0.07),
                part(kind="pgd", steps=2, share=0.83),
            ),
        ),
    ),
    "trades": (
        "l2",
        Phase(name="trades", epochs=1, loss="trades", parts=(part(kind="pgd", steps=2),)),
    ),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    data = small.colors()
    x, labels = data.images[:BATCH].to(dtype) / 255, data.labels[:BATCH]
    return x, F.one_hot(labels, 4).to(dtype)


def train(collectives: Collectives, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """The last gradient and loss, and the statistics then: of one step, in float64 of three."""
    norm, phase = PHASES[name]
    model = collectives.with_global_norms(network().to(dtype)).train()
    shard = collectives.shard(BATCH)
    x, targets = (shard.of(whole) for whole in batch(dtype))
    value = torch.zeros(())
    for seed in range(3 if dtype == torch.float64 else 1):
        batches = adversarial_batches(
            model,
            x,
            targets,
            phase=phase,
            threat_model=ThreatModel(norm=norm, eps=8 / 255 if norm == "linf" else 1.0),
            generator=torch.Generator().manual_seed(seed),
            shard=shard,
        )
        loss_of = partial(
            lambda images: (
                shard.weight * objective(model, images, targets, phase=phase, label_smoothing=0.1)
            ),
            batches,
        )
        model.zero_grad()
        with perturbed(model, loss_of, gamma=phase.awp, all_reduce_sum=collectives.all_reduce_sum):
            loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
        value = collectives.add_gradients(model, loss)
        with torch.no_grad():  # torch.optim would import the compiler, which takes as long as torch
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad  # type: ignore[operator]
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return gradient, torch.cat([b.flatten() for b in model.buffers()]), value.item()


def local(collectives: Collectives) -> dict[str, float]:
    """With norms of its own: how far the statistics are from the mean over the shares."""
    model = network().train()
    x, targets = batch(torch.float32)
    shard = collectives.shard(BATCH)
    loss = shard.weight * F.cross_entropy(model(shard.of(x)), shard.of(targets))
    loss.backward()
    collectives.add_gradients(model, loss)
    means = []
    for rank in range(collectives.world.size):
        other = network().train()
        other(x[rank :: collectives.world.size])
        means.append(torch.cat([b.flatten() for b in other.buffers()]))
    own = torch.cat([b.flatten() for b in model.buffers()])
    return {"statistics": far(own, torch.stack(means).mean(dim=0)), "bytes": collectives.bytes}


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def failure(world: World) -> str:
    """What an exception of rank 0 that can't be pickled is raised as."""

    class Local(Exception):
        pass

    def fail() -> None:
        raise Local("the disk is full")

    try:
        world.on_rank0(fail)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


torch.set_num_threads(1)
before = threads()
with init_distributed(CPU) as (world, _):
    found: dict[str, dict[str, float] | str] = {"local": local(Collectives(world))}
    for name in PHASES:
        for dtype in (torch.float32, torch.float64)[: 1 + (name != "awp")]:
            collectives = Collectives(world)
            shared, whole = train(collectives, name, dtype), train(Collectives(SINGLE), name, dtype)
            found[f"{name} {str(dtype)[-2:]}"] = {
                "gradient": far(shared[0], whole[0]),
                "statistics": far(shared[1], whole[1]),
                "loss": abs(shared[2] - whole[2]),
                "bytes": collectives.bytes,
            }
    collectives = Collectives(world)
    found["stop"] = {"asked": collectives.any(world.rank == 1), "not asked": collectives.any(False)}
    found["failure"] = failure(world)
latest = time.monotonic() + 10
while threads() > before and time.monotonic() < latest:  # the system may take a moment to end them
    time.sleep(0.01)
found["threads"] = {"left": threads() - before}  # those of the group could abort the exit
print(json.dumps(found))  # noqa: T201

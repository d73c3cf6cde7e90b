"""Compares sequences of attacks with AutoAttack: what they find, and in how many passes.

    python benchmarks/audit.py --data cifar10 --sequence pma-10,malt,square-check

Trains small networks with single-step, PGD and TRADES adversarial training; the shipped model is
not among them. Every candidate then attacks every correctly classified image, so that the cost of
any sequence can be computed afterwards: each stage counts only the images that no earlier stage
fooled. A pass is a forward or a backward pass of one image. Networks and results are cached in
`--folder`; delete it after you change the networks or the attacks. The table is in
`docs/attacks.md`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robust
from robust.attack_registry import REGISTRY
from robust.attacks import pgd, resolve_attack
from robust.attacks.run import run_algorithm
from robust.datasets import Dataset, load_dataset
from robust.tables import table
from robust.threat_model import ThreatModel, parse_eps

TRAINED_ON, BATCH = 10_000, 100
SIZE = 16  # pixels: half of CIFAR-10's
STEPS, TRADES_BETA = 3, 6.0
AUTOATTACK = REGISTRY["autoattack"].stages
# Attacks with their budget and, after a slash, the number of target classes.
CANDIDATES = (
    *("pgd-margin-10", "pma-10", "pma-20", "pma-50", "apgd-ce-20", "malt-20", "malt-50", "malt"),
    *("malt/1", "apgd-t-50/3", "fab-t-20/3", "square-check"),
)

Train = Callable[[nn.Module, Tensor, Tensor, ThreatModel], Tensor]


class Block(nn.Module):
    """A residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def plain(classes: int) -> nn.Module:
    """A network of three convolutions."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 12, 2), (12, 24, 1), (24, 48, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, classes))


def residual(classes: int) -> nn.Module:
    """A network of two residual blocks."""
    enter = [nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU()]
    blocks = [Block(12, 24, 1), Block(24, 48, 2)]
    leave = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, classes)]
    return nn.Sequential(*enter, *blocks, *leave)


def clean_loss(model: nn.Module, x: Tensor, y: Tensor, ball: ThreatModel) -> Tensor:
    return F.cross_entropy(model(x), y)


def single_step_loss(model: nn.Module, x: Tensor, y: Tensor, ball: ThreatModel) -> Tensor:
    """The loss after one step from a random point. Source: Wong et al. 2020, arXiv:2001.03994."""
    adversarial = pgd(model, x, y, alpha=1.25 * ball.eps, steps=1, threat_model=ball)
    return F.cross_entropy(model(adversarial.x_adv), y)


def pgd_loss(model: nn.Module, x: Tensor, y: Tensor, ball: ThreatModel) -> Tensor:
    adversarial = pgd(model, x, y, alpha=ball.eps / 2, steps=STEPS, threat_model=ball)
    return F.cross_entropy(model(adversarial.x_adv), y)


def trades_loss(model: nn.Module, x: Tensor, y: Tensor, ball: ThreatModel) -> Tensor:
    """Source: Zhang et al. 2019, arXiv:1901.08573."""
    model.eval()
    expected = model(x).detach().log_softmax(dim=1)
    x_adv = (x + 0.001 * torch.randn_like(x)).clamp(0, 1)
    for _ in range(STEPS):
        x_adv.requires_grad_()
        loss = _divergence(model(x_adv).log_softmax(dim=1), expected)
        (gradient,) = torch.autograd.grad(loss, x_adv)
        moved = x_adv.detach() + ball.eps / 2 * gradient.sign()
        x_adv = torch.clamp(moved, x - ball.eps, x + ball.eps).clamp(0, 1)
    model.train()
    logits = model(x)
    robust = _divergence(model(x_adv).log_softmax(dim=1), logits.log_softmax(dim=1))
    return F.cross_entropy(logits, y) + TRADES_BETA * robust


def _divergence(found: Tensor, expected: Tensor) -> Tensor:
    return F.kl_div(found, expected, reduction="batchmean", log_target=True)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network to attack."""

    name: str
    network: Callable[[int], nn.Module]
    loss: Train
    epochs: int
    eps: str
    data: str = ""  # name of a dataset; empty: the one on the command line

    def train(self, x: Tensor, y: Tensor) -> nn.Module:
        torch.manual_seed(0)
        model = self.network(int(y.max()) + 1).train()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=5e-4)
        ball = ThreatModel(eps=parse_eps(self.eps))
        total = self.epochs * (len(x) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=total)
        for epoch in range(self.epochs):
            loss_of = clean_loss if epoch < self.epochs / 4 else self.loss
            for rows in torch.randperm(len(x))[: len(x) // BATCH * BATCH].view(-1, BATCH):
                flipped = x[rows] if self.data else _flipped(x[rows])
                optimizer.zero_grad()
                loss_of(model, flipped, y[rows], ball).backward()
                optimizer.step()
                schedule.step()
        return model.eval().requires_grad_(False)


def _flipped(x: Tensor) -> Tensor:
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)


SUBJECTS = (
    Subject(name="CNN, single step", network=plain, loss=single_step_loss, epochs=4, eps="8/255"),
    Subject(name="CNN, PGD", network=plain, loss=pgd_loss, epochs=4, eps="8/255"),
    Subject(name="CNN, TRADES", network=plain, loss=trades_loss, epochs=4, eps="8/255"),
    Subject(name="ResNet, PGD", network=residual, loss=pgd_loss, epochs=4, eps="8/255"),
    Subject(
        name="digits, PGD", network=plain, loss=pgd_loss, epochs=20, eps="40/255", data="digits"
    ),
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The results of one attack on the correctly classified images of a network."""

    fooled: Tensor  # bool (N,)
    passes: Tensor  # int64 (N,)


def attack(name: str, model: nn.Module, x: Tensor, y: Tensor, ball: ThreatModel) -> Measured:
    base, _, targets = name.partition("/")
    settings = resolve_attack(base, ball)
    algorithm = settings.algorithm()
    if targets:
        field = "targets" if settings.name == "malt" else "runs"
        algorithm = replace(algorithm, **{field: int(targets)})
    found = run_algorithm(model, algorithm, x, y, threat_model=ball, batch_size=256)
    return Measured(fooled=found.success, passes=found.forwards + found.backwards)


def in_turn(stages: Sequence[str], measured: dict[str, Measured]) -> list[tuple[int, int, int]]:
    """Images attacked, images fooled and passes of each stage."""
    fooled = torch.zeros_like(measured[stages[0]].fooled)
    rows = []
    for stage in stages:
        found, left = measured[stage], ~fooled
        rows.append(
            (int(left.sum()), int((found.fooled & left).sum()), int(found.passes[left].sum()))
        )
        fooled |= found.fooled
    return rows


def union(stages: Sequence[str], measured: dict[str, Measured]) -> Tensor:
    return torch.stack([measured[stage].fooled for stage in stages]).any(dim=0)


def cache(folder: Path, subject: Subject, dataset: Dataset, n: int, stage: str = "") -> Path:
    """The file of a network's weights or, with a stage, of its results.

    Its name depends on the images too: the first `n` are attacked, and others are trained on.
    """
    values = subject.name, subject.eps, dataset.sha256, SIZE, n, stage, robust.__version__
    name = "".join(c if c.isalnum() else "-" for c in subject.name)
    return folder / f"{name} {hashlib.sha256(repr(values).encode()).hexdigest()[:16]}.pt"


def measure(subject: Subject, data: str, n: int, folder: Path) -> dict[str, Measured]:
    """The results of every attack on a network, which is trained unless it is cached."""
    dataset = load_dataset(subject.data or data, size=SIZE).in_8_bits()
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    x, y = dataset.images[order].float() / 255, dataset.labels[order]
    weights = cache(folder, subject, dataset, n)
    if weights.exists():
        model = subject.network(int(y.max()) + 1).eval().requires_grad_(False)
        model.load_state_dict(torch.load(weights, weights_only=True))
    else:
        model = subject.train(x[n:][:TRAINED_ON], y[n:][:TRAINED_ON])
        torch.save(model.state_dict(), weights)
    x, y = x[:n], y[:n]
    correct = torch.cat([model(part).argmax(dim=1) for part in x.split(BATCH)]) == y
    x, y, ball = x[correct], y[correct], ThreatModel(eps=parse_eps(subject.eps))
    click.echo(f"{subject.name}: {len(x)} of {n} correct", err=True)
    measured: dict[str, Measured] = {}
    left = torch.ones_like(y, dtype=torch.bool)  # images that AutoAttack has not fooled
    for stage in dict.fromkeys((*AUTOATTACK, *CANDIDATES)):
        # Square's 5,000 queries cost by far the most, and only AutoAttack needs them.
        rows = left if stage == "square" else torch.ones_like(left)
        cached = cache(folder, subject, dataset, n, stage)
        if not cached.exists():
            found = attack(stage, model, x[rows], y[rows], ball)
            torch.save((found.fooled, found.passes), cached)
        fooled, passes = torch.load(cached, weights_only=True)
        every = torch.zeros_like(left), torch.zeros_like(y)
        every[0][rows], every[1][rows] = fooled, passes
        measured[stage] = Measured(fooled=every[0], passes=every[1])
        if stage in AUTOATTACK:
            left &= ~every[0]
        click.echo(f"  {stage}: {int(fooled.sum())} {int(passes.sum())}", err=True)
    return measured


@click.command(help=__doc__.splitlines()[0])
@click.option("--data", required=True, help="Images to train on and to attack, such as cifar10.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/audit"))
@click.option("--n", default=150, help="Images to attack; they are not trained on.")
@click.option("--only", multiple=True, help="Name of a network; repeat for more.")
@click.option("--threads", default=1)
@click.option("--sequence", multiple=True, help="Comma-separated stages; repeat for more.")
def main(
    data: str, folder: Path, n: int, only: tuple[str, ...], threads: int, sequence: tuple[str, ...]
) -> None:
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [subject for subject in SUBJECTS if not only or subject.name in only]
    everything = {subject.name: measure(subject, data, n, folder) for subject in chosen}
    header = (
        "network",
        "correct",
        "robust to AutoAttack",
        "its passes",
        "misses",
        "adds",
        "share of passes",
    )
    for stages in [line.split(",") for line in sequence]:
        rows = []
        for name, measured in everything.items():
            theirs, ours = union(AUTOATTACK, measured), union(stages, measured)
            cost = sum(passes for _, _, passes in in_turn(AUTOATTACK, measured))
            spent = in_turn(stages, measured)
            rows.append(
                [
                    name,
                    str(len(theirs)),
                    str(int((~theirs).sum())),
                    str(cost),
                    str(int((theirs & ~ours).sum())),
                    str(int((ours & ~theirs).sum())),
                    f"{sum(passes for _, _, passes in spent) / cost:.3f}",
                ]
            )
        click.echo(f"\n{' '.join(stages)}\n\n{table(header, rows, 'markdown')}")


if __name__ == "__main__":
    main()

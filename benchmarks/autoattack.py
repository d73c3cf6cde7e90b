"""Compares robust.attacks with the reference implementation of AutoAttack on one model.

    python benchmarks/autoattack.py --reference /path/to/auto-attack

The reference (https://github.com/fra31/auto-attack) is not on the package index: clone it. Without
`--checkpoint` a small network is trained first, in seconds. `docs/autoattack.md` has the results.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.attack_registry import REGISTRY
from robust.attacks import fgsm, resolve_attack
from robust.attacks.algorithm import Algorithm
from robust.attacks.apgd import APGD, TargetedAPGD, random_surface
from robust.attacks.fab import FAB, hyperplane
from robust.attacks.frozen import frozen
from robust.attacks.noise import image_keys
from robust.attacks.rows import Rows
from robust.attacks.search import search
from robust.attacks.square import Square
from robust.choices import Norm
from robust.datasets import Dataset, load_dataset
from robust.geometry import distance, lengths
from robust.threat_model import ThreatModel, format_eps, parse_eps

REFERENCE_COMMIT = "a39220048b3c9f2cca9a4d3a54604793c68eca7e"
NAMES: dict[Norm, str] = {"linf": "Linf", "l2": "L2"}
SHOWN_STEPS = (1, 2, 10, 22, 41, 70, 100)
SAME = 1e-5  # pixel units: iterates closer than this count as the same
PARTS = ("projections", "squares", "apgd", "fab", "chance", "square", "autoattack")

Table = list[dict[str, Any]]


class SmallNet(nn.Module):
    """Three convolutions: small enough for a full AutoAttack in minutes on one core."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(12, 24, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(128, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits


def train(x: Tensor, y: Tensor, threat_model: ThreatModel, epochs: int) -> SmallNet:
    """A network trained on batches that are half FGSM and half clean."""
    torch.manual_seed(0)
    model = SmallNet(int(y.max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-2, total_steps=epochs * (len(x) // 50)
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: len(x) // 50 * 50].view(-1, 50):
            images, labels = x[rows].clone(), y[rows]
            images[:25] = fgsm(model, images[:25], labels[:25], threat_model=threat_model).x_adv
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


# (a) The parts


def projections(reference: Any) -> Table:
    """Compares the steps to a hyperplane within the pixel range, and how far they fall short."""
    generator = torch.Generator().manual_seed(0)
    table = []
    for norm, project in (("linf", reference.projection_linf), ("l2", reference.projection_l2)):
        for kind, reach in (("near", 0.02), ("cut by the box", 0.7), ("out of reach", 1.5)):
            n, shape = 256, (3, 32, 32)
            x = torch.rand(n, *shape, generator=generator)
            w = torch.randn(n, *shape, generator=generator)
            w[:, 0, :4] = 0  # pixels without influence
            room = torch.where(w > 0, 1 - x, x)
            gap = reach * (w.abs() * room).flatten(1).sum(dim=1)
            offset = (w * x).flatten(1).sum(dim=1)
            theirs = project(x.flatten(1), w.flatten(1), offset + gap).view_as(x)
            ours = hyperplane(w, norm)(x, gap)
            size = lengths(ours, norm).flatten()
            table.append(
                {
                    "norm": norm,
                    "hyperplane": kind,
                    "n": n,
                    "largest difference": (ours - theirs).abs().max().item(),
                    "length ours / theirs": (size / lengths(theirs, norm).flatten()).max().item(),
                    "shortfall, ours": _shortfall(w, ours, gap, reach),
                    "shortfall, theirs": _shortfall(w, theirs, gap, reach),
                }
            )
    return table


def _shortfall(w: Tensor, step: Tensor, gap: Tensor, reach: float) -> float:
    """The largest fraction of the reachable gap by which a step misses the hyperplane."""
    want = gap.double() / max(reach, 1)
    reached = (w.double() * step.double()).flatten(1).sum(dim=1)
    return float(((want - reached).abs() / want).max())


def square_sides(reference: Any) -> Table:
    """Compares the sides of the squares over 5000 queries of a model that is never fooled.

    Takes the tallest change within each interval, as a square may change nothing.
    """
    table = []
    bounds = (0, 10, 50, 200, 500, 1000, 2000, 4000, 5000)
    for side in (8, 32, 56):
        x, y = torch.full((1, 3, side, side), 0.5), torch.zeros(1, dtype=torch.int64)
        tall: dict[str, list[int]] = {}
        for who in ("ours", "theirs"):
            start: list[Tensor] = []
            heights: list[int] = []

            def model(images: Tensor, start: list[Tensor] = start, to: Any = heights) -> Tensor:
                if not start or len(to) == 0:
                    start[:] = [images.clone()]
                rows = ((images - start[0]).abs() > 1e-6).any(dim=1).any(dim=2)[0]
                to.append(int(rows.sum()))
                return torch.tensor([[1.0, 0.0]]).expand(len(images), 2).clone()

            if who == "ours":
                algorithm = Square(norm="linf", steps=5000)
                list(search(model, algorithm, x, y, eps=torch.tensor([0.1])))
            else:
                attack = reference.SquareAttack(
                    model, eps=0.1, n_queries=5000, resc_schedule=False, device="cpu", seed=0
                )
                attack.init_hyperparam(x)
                attack.attack_single_run(x, y)
            queried = heights[1:]
            assert len(queried) == 5000, (who, len(queried))
            # Intervals are those of the reference: 10 < query <= 50 and so on, counted from 0.
            edges = [0, *(b + 1 for b in bounds[1:-1]), 5000]
            tall[who] = [max(queried[a:b]) for a, b in pairwise(edges)]
        row: dict[str, Any] = {"image side": side, "same": tall["ours"] == tall["theirs"]}
        table.append(row | tall)
    return table


class Recorder:
    """Wraps an algorithm and records every scored iterate."""

    def __init__(self, algorithm: Algorithm[Any]) -> None:
        self._algorithm = algorithm
        self.seen: list[dict[str, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._algorithm, name)

    def advance(
        self, rows: Rows[Any], logits: Tensor, loss: Tensor, gradient: Tensor | None
    ) -> Tensor:
        columns = {"image": rows.image, "x_adv": rows.x_adv, "loss": loss} | vars(rows.state)
        names = ("image", "iteration", "x_adv", "landed", "loss")
        self.seen.append({name: columns[name].clone() for name in names if name in columns})
        return self._algorithm.advance(rows, logits, loss, gradient)


def run_recorded(
    model: nn.Module, algorithm: Algorithm[Any], x: Tensor, y: Tensor, eps: float
) -> Any:
    """The rows that an algorithm scored, and the distances it reached, in the order of images."""
    recorder = Recorder(algorithm)
    sizes = torch.full((len(x),), eps)
    parts = list(search(model, recorder, x, y, eps=sizes, seed=0))  # type: ignore[arg-type]
    order = torch.cat([part.index for part in parts]).argsort()
    away = torch.cat([part.result.distance for part in parts])[order]
    return recorder.seen, away


def apgd_trajectories(
    reference: Any, model: nn.Module, x: Tensor, y: Tensor, norm: Norm, eps: float
) -> Table:
    """Compares the iterates from the same start, step by step.

    The control compares the reference with itself from a start that differs by a rounding error:
    in float32, trajectories diverge wherever a gradient is close to changing its sign.
    """
    table = []
    for loss in ("ce", "dlr", "dlr-targeted"):
        targeted = loss == "dlr-targeted"
        settings: dict[str, Any] = {"norm": norm, "steps": 100, "early_stop": False}
        algorithm = TargetedAPGD(**settings) if targeted else APGD(loss_name=loss, **settings)
        seen, _ = run_recorded(model, algorithm, x, y, eps)
        ours = [rows["x_adv"][rows["image"].argsort()] for rows in seen]
        best = torch.stack([rows["loss"] for rows in seen]).amax(dim=0)
        start = ours[0]
        theirs, their_best = reference_apgd(reference, model, x, y, norm, eps, loss, start)
        control, control_best = reference_apgd(
            reference, model, x, y, norm, eps, loss, nudged(start)
        )
        for step in SHOWN_STEPS:
            table.append(
                {
                    "norm": norm,
                    "loss": loss,
                    "step": step,
                    "same iterate": _share_same(ours[step], theirs[step]),
                    "control": _share_same(control[step], theirs[step]),
                    "median difference": _apart(ours[step], theirs[step]).median().item(),
                }
            )
        table[-1] |= {
            "best loss": best.mean().item(),
            "best loss, theirs": their_best.mean().item(),
            "best loss, control": control_best.mean().item(),
        }
    return table


def nudged(x: Tensor) -> Tensor:
    """`x` moved by a rounding error, the same one in every run."""
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    return (x + (noise - 0.5) * 1.2e-7).clamp(0, 1)


def reference_apgd(
    reference: Any,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: Norm,
    eps: float,
    loss: str,
    start: Tensor,
) -> tuple[list[Tensor], Tensor]:
    inputs: list[Tensor] = []

    def recorded(images: Tensor) -> Tensor:
        inputs.append(images.detach().clone())
        logits: Tensor = model(images)
        return logits

    settings: dict[str, Any] = {"n_iter": 100, "norm": NAMES[norm], "eps": eps, "device": "cpu"}
    if loss == "dlr-targeted":
        attack = reference.APGDAttack_targeted(recorded, **settings)
        attack.y_target = model(x).detach().sort(dim=1)[1][:, -2]
    else:
        attack = reference.APGDAttack(recorded, loss=loss, **settings)
    attack.init_hyperparam(x)
    _, _, best, _ = attack.attack_single_run(x, y, x_init=start)
    return inputs, best


def fab_trajectories(
    reference: Any, model: nn.Module, x: Tensor, y: Tensor, norm: Norm, eps: float
) -> Table:
    """Compares the end of each step, and the closest adversarial image for the first target."""
    huge = 1.0 if norm == "linf" else 1e3
    seen, nearest = run_recorded(model, FAB(norm=norm, steps=100, early_stop=False), x, y, huge)
    ours = torch.zeros(101, *x.shape)
    for rows in seen:
        landed = rows["landed"]
        ours[rows["iteration"][landed], rows["image"][landed]] = rows["x_adv"][landed]
    theirs, their_nearest = reference_fab(reference, model, x, y, norm)
    control, control_nearest = reference_fab(reference, model, nudged(x), y, norm)
    table: Table = [
        {
            "norm": norm,
            "step": step,
            "same iterate": _share_same(ours[step], theirs[step - 1]),
            "control": _share_same(control[step - 1], theirs[step - 1]),
            "median difference": _apart(ours[step], theirs[step - 1]).median().item(),
        }
        for step in SHOWN_STEPS
    ]
    found = (nearest > 0) & (their_nearest > 0) & (control_nearest > 0)
    share = nearest[found] / their_nearest[found]
    table[-1] |= {
        "found": int((nearest > 0).sum()),
        "found, theirs": int((their_nearest > 0).sum()),
        "distance, ours / theirs": share.median().item(),
        "largest": share.max().item(),
        "largest, control": (control_nearest[found] / their_nearest[found]).max().item(),
        "within eps": int(((nearest > 0) & (nearest <= eps)).sum()),
        "within eps, theirs": int(((their_nearest > 0) & (their_nearest <= eps)).sum()),
    }
    return table


def reference_fab(
    reference: Any, model: nn.Module, x: Tensor, y: Tensor, norm: Norm
) -> tuple[list[Tensor], Tensor]:
    inputs: list[Tensor] = []

    def recorded(images: Tensor) -> Tensor:
        inputs.append(images.detach().clone())
        logits: Tensor = model(images)
        return logits

    attack = reference.FABAttack_PT(
        recorded, norm=NAMES[norm], n_iter=100, targeted=True, device="cpu"
    )
    attack.target_class = 2  # the second likeliest class
    found = attack.attack_single_run(x, y, is_targeted=True)
    return inputs[3::2], distance(found, x, norm)


def square_success(
    reference: Any,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: Norm,
    eps: float,
    *,
    queries: int,
    seeds: int,
) -> Table:
    """Compares the images fooled within a number of queries, averaged over seeds."""
    marks = [mark for mark in (10, 50, 200, 500, 1000, 2000, 5000) if mark <= queries]
    counts: dict[str, list[list[int]]] = {"ours": [], "theirs": []}
    for seed in range(seeds):
        settings = resolve_attack(
            "square", ThreatModel(norm=norm, eps=eps), steps=queries, seed=seed
        )
        result = settings.run(model, x, y, early_stop=True)
        used = torch.where(result.success, result.forwards, 10**9)
        counts["ours"].append([int((used <= mark + 1).sum()) for mark in marks])
        torch.manual_seed(seed)
        attack = reference.SquareAttack(
            model,
            norm=NAMES[norm],
            eps=eps,
            n_queries=queries,
            resc_schedule=False,
            device="cpu",
            seed=seed,
        )
        attack.init_hyperparam(x)
        spent, x_adv = attack.attack_single_run(x, y)
        fooled = model(x_adv).argmax(dim=1) != y
        used = torch.where(fooled, spent, 1e9)
        counts["theirs"].append([int((used <= mark + 1).sum()) for mark in marks])
    table = []
    for who, rows in counts.items():
        means = torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist()
        name = f"{who}, mean of {seeds} seeds"
        table.append({"norm": norm, "of": len(x), "fooled": name} | dict(_at(marks, means)))
    return table


def _at(marks: list[int], values: list[float]) -> Iterator[tuple[str, float]]:
    for mark, value in zip(marks, values, strict=True):
        yield f"within {mark}", round(value, 1)


def _apart(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().flatten(1).amax(dim=1)


def _share_same(a: Tensor, b: Tensor) -> float:
    return float((_apart(a, b) < SAME).float().mean())


# (b) The whole protocol


def whole_protocol(
    reference: Any,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: Norm,
    eps: float,
    *,
    queries: int,
    batch_size: int,
    seed: int,
) -> Table:
    """Compares the images that are robust after each stage of AutoAttack, and its seconds.

    The reference's APGD starts where ours does, so that only Square is random.
    """
    threat_model = ThreatModel(norm=norm, eps=eps)
    ours, theirs = _predictions(model, x, batch_size) == y, _predictions(model, x, batch_size) == y
    table: Table = [{"norm": norm, "stage": "clean", "n": len(x)} | _compare(ours, theirs)]
    auto = reference.AutoAttack(
        model, norm=NAMES[norm], eps=eps, seed=seed, verbose=False, device="cpu"
    )
    auto.square.n_queries = queries
    for attack in (auto.apgd, auto.apgd_targeted):
        use_our_starts(attack, norm, eps, seed)
    for stage in REGISTRY["autoattack"].stages:
        steps = queries if stage == "square" else None
        settings = resolve_attack(stage, threat_model, steps=steps, seed=seed)
        begin = time.perf_counter()
        left = ours.nonzero().squeeze(1)
        if len(left):
            result = settings.run(
                model, x[left], y[left], early_stop=True, batch_size=min(batch_size, len(left))
            )
            # Verified by another pass, and by the distance.
            confirmed = _predictions(model, result.x_adv, batch_size) != y[left]
            confirmed &= distance(result.x_adv, x[left], norm) <= eps + 1e-6
            ours[left] = ~confirmed
        seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        left = theirs.nonzero().squeeze(1)
        if len(left):
            auto.attacks_to_run = [stage]
            x_adv = auto.run_standard_evaluation(x[left], y[left], bs=batch_size)
            theirs[left] = _predictions(model, x_adv, batch_size) == y[left]
        row: dict[str, Any] = {"norm": norm, "stage": stage, "n": len(x)} | _compare(ours, theirs)
        row["seconds, ours"] = round(seconds, 1)
        row["seconds, theirs"] = round(time.perf_counter() - begin, 1)
        table.append(row)
    return table


def use_our_starts(attack: Any, norm: Norm, eps: float, seed: int) -> None:
    """Make each run of the reference's APGD start at the same point as ours."""
    perturb, single, runs = attack.perturb, attack.attack_single_run, [0]

    def perturb_anew(*args: Any, **kwargs: Any) -> Any:
        runs[0] = 0
        return perturb(*args, **kwargs)

    def run_from_our_start(x: Tensor, y: Tensor) -> Any:
        sizes = torch.full((len(x), 1, 1, 1), eps)
        keys, stream = image_keys(x, seed), torch.full_like(y, runs[0])
        runs[0] += 1
        return single(x, y, x_init=random_surface(x, keys, stream, norm=norm, eps=sizes))

    attack.perturb, attack.attack_single_run = perturb_anew, run_from_our_start


def chance(
    reference: Any, model: nn.Module, x: Tensor, y: Tensor, norm: Norm, eps: float, *, seeds: int
) -> Table:
    """Compares the images robust to each APGD, with each tool's own random starts, over seeds."""
    table = []
    for stage in ("apgd-ce", "apgd-t"):
        counts: dict[str, list[int]] = {"ours": [], "theirs": []}
        for seed in range(seeds):
            settings = resolve_attack(stage, ThreatModel(norm=norm, eps=eps), seed=seed)
            result = settings.run(model, x, y, early_stop=True)
            counts["ours"].append(int((~result.success).sum()))
            auto = reference.AutoAttack(
                model, norm=NAMES[norm], eps=eps, seed=seed, verbose=False, device="cpu"
            )
            auto.attacks_to_run = [stage]
            x_adv = auto.run_standard_evaluation(x, y, bs=len(x))
            counts["theirs"].append(int((_predictions(model, x_adv, len(x)) == y).sum()))
        row: dict[str, Any] = {"norm": norm, "attack": stage, "of": len(x)}
        for who, robust in counts.items():
            row |= {who: sum(robust) / seeds, f"{who}, seed by seed": robust}
        table.append(row)
    return table


def _compare(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    return {
        "ours": round(ours.float().mean().item(), 4),
        "theirs": round(theirs.float().mean().item(), 4),
        "robust only in ours": int((ours & ~theirs).sum()),
        "only in theirs": int((theirs & ~ours).sum()),
    }


def _predictions(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part).argmax(dim=1) for part in x.split(batch_size)])


# The command


def check_commit(path: Path) -> None:
    """Raise ClickException unless the checkout is at REFERENCE_COMMIT."""
    git = ["git", "-C", str(path), "rev-parse", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True)
    found = done.stdout.strip() or done.stderr.strip()
    if found != REFERENCE_COMMIT:
        raise click.ClickException(
            f"expected a checkout of fra31/auto-attack at {REFERENCE_COMMIT} in {path}, got {found}"
        )


def load_reference(path: Path) -> SimpleNamespace:
    """The classes and functions of the reference. Raises ClickException for another commit."""
    check_commit(path)
    where = {
        "AutoAttack": "autoattack",
        "APGDAttack": "autoattack.autopgd_base",
        "APGDAttack_targeted": "autoattack.autopgd_base",
        "FABAttack_PT": "autoattack.fab_pt",
        "SquareAttack": "autoattack.square",
        "projection_linf": "autoattack.fab_projections",
        "projection_l2": "autoattack.fab_projections",
    }
    own = sys.path.pop(0)  # this script has the same name as the reference's package
    sys.path.insert(0, str(path.resolve()))
    try:
        return SimpleNamespace(
            **{name: getattr(import_module(module), name) for name, module in where.items()}
        )
    finally:
        sys.path[0] = own


def show(title: str, table: Table) -> None:
    """Print a table as Markdown, with columns in the order of their first appearance."""
    names = list(dict.fromkeys(name for row in table for name in row))
    click.echo(f"\n### {title}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in table:
        click.echo(f"| {' | '.join(_cell(row.get(name, '')) for name in names)} |")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@click.command(help=__doc__)
@click.option("--reference", type=click.Path(exists=True, file_okay=False, path_type=Path),
              required=True, help="A checkout of fra31/auto-attack.")  # fmt: skip
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Model to attack instead.")
@click.option("--data", default="digits", show_default=True, help="Images, as for robust train.")
@click.option("--size", default=16, show_default=True, help="Width and height of the images.")
@click.option("--limit", default=500, show_default=True, help="Images attacked.")
@click.option(
    "--traced", default=200, show_default=True, help="Images whose iterates are compared."
)
@click.option("--norm", "norms", type=click.Choice(list(NAMES)), multiple=True,
              default=tuple(NAMES), show_default=True)  # fmt: skip
@click.option("--eps-linf", default="0.15", show_default=True, help="Pixel units, or 8/255.")
@click.option("--eps-l2", default="2", show_default=True, help="Pixel units.")
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, default=PARTS,
              show_default=True, help="What to compare; repeat for more.")  # fmt: skip
@click.option(
    "--epochs", default=20, show_default=True, help="Epochs of training the small network."
)
@click.option("--queries", default=5000, show_default=True, help="Queries of Square.")
@click.option("--seeds", default=5, show_default=True, help="Number of seeds.")
@click.option("--seed", default=0, show_default=True)
@click.option("--batch-size", default=250, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--json", "to", type=click.Path(path_type=Path), help="Write the tables here.")
def main(
    reference: Path,
    checkpoint: Path | None,
    data: str,
    size: int,
    limit: int,
    traced: int,
    norms: tuple[Norm, ...],
    eps_linf: str,
    eps_l2: str,
    parts: tuple[str, ...],
    epochs: int,
    queries: int,
    seeds: int,
    seed: int,
    batch_size: int,
    threads: int,
    to: Path | None,
) -> None:
    torch.set_num_threads(threads)
    sizes: dict[Norm, float] = {"linf": parse_eps(eps_linf), "l2": parse_eps(eps_l2)}
    tables: dict[str, Table] = {}

    def record(title: str, table: Table) -> None:
        tables.setdefault(title, []).extend(table)
        show(title, table)

    modules = load_reference(reference)
    if "projections" in parts:
        record("Steps to a hyperplane", projections(modules))
    if "squares" in parts:
        record("Sides of Square's squares", square_sides(modules))
    for norm in norms if set(parts) - {"projections", "squares"} else ():
        eps = sizes[norm]
        dataset = load_dataset(data, size=size).in_8_bits()
        model, x, y = _model_and_images(checkpoint, dataset, limit, norm, eps, epochs)
        with frozen(model, x.device):
            correct = _predictions(model, x, batch_size) == y
            attacked = x[correct], y[correct]
            traced_images = x[correct][:traced], y[correct][:traced]
            click.echo(
                f"\n{norm}, eps {format_eps(eps)}: {len(attacked[0])} of {len(x)} are correct"
            )
            if "apgd" in parts:
                found = apgd_trajectories(modules, model, *traced_images, norm, eps)
                record("APGD's trajectories", found)
            if "fab" in parts:
                found = fab_trajectories(modules, model, *traced_images, norm, eps)
                record("FAB-T's trajectories", found)
            if "chance" in parts:
                found = chance(modules, model, *attacked, norm, eps, seeds=seeds)
                record("APGD from each tool's own starts", found)
            if "square" in parts:
                found = square_success(
                    modules, model, *attacked, norm, eps, queries=queries, seeds=seeds
                )
                record("Square's successes", found)
            if "autoattack" in parts:
                found = whole_protocol(
                    modules, model, x, y, norm, eps, queries=queries, batch_size=batch_size,
                    seed=seed,
                )  # fmt: skip
                record("Standard AutoAttack", found)
    if to is not None:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        about = {"reference": REFERENCE_COMMIT, "command": sys.argv[1:], "versions": versions}
        to.write_text(json.dumps(about | {"tables": tables}, indent=1) + "\n")


def _model_and_images(
    checkpoint: Path | None, dataset: Dataset, limit: int, norm: Norm, eps: float, epochs: int
) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, and `limit` images that it was not trained on."""
    images, labels = dataset.images.float() / 255, dataset.labels
    if checkpoint is not None:
        from robust.checkpoint import load_checkpoint

        return load_checkpoint(checkpoint).classifier.eval(), images[:limit], labels[:limit]
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:10_000]
    images, labels = images[chosen], labels[chosen]
    begin = time.perf_counter()
    threat_model = ThreatModel(norm=norm, eps=eps)
    model = train(images[limit:], labels[limit:], threat_model, epochs)
    click.echo(f"\ntrained for {norm} in {time.perf_counter() - begin:.0f} s")
    return model, images[:limit], labels[:limit]


if __name__ == "__main__":
    main()

"""Measures what each technique of the training pipeline gains and costs, by short trainings.

    python -m benchmarks.ablation --data train.npz --json ablation.jsonl
    python -m benchmarks.ablation --table ablation.jsonl

Each run is `training.run.train` with the recipe `base` and one change: ResNet-18, 10,000 of the
training images, 3 clean and then 5 adversarial epochs. It is scored on 2,000 other training images,
the same for all runs; test images are never used. Each finished run is one line of the JSON file
and is not repeated, so a stopped command continues when started again (delete the lines of what you
changed). All runs with the first seed come before those with the second.

Seconds exclude scoring. On the CPU they are processor time (use one thread: OMP_NUM_THREADS=1),
which other load on the machine changes little; on a GPU they are wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where it is not installed

from robust.attacks import resolve_attack
from robust.checkpoint import load_checkpoint
from robust.classifier import resolve_device
from robust.datasets import Dataset, load_dataset, stratified_split
from robust.environment import device_in_words, versions
from robust.evaluation import evaluate, wilson_interval
from robust.threat_model import ThreatModel
from training.monitor import Progress
from training.recipe import AdversarialPart, Augmentation, Phase, Recipe
from training.recipes import classic
from training.run import train

CLEAN_EPOCHS, ADVERSARIAL_EPOCHS = 3, 5
ATTACKS = ("fgsm", "pgd-20")


def base() -> Recipe:
    """Two phases with N-FGSM and, as in the recipe `cpu`, every technique that costs no time."""
    return Recipe(
        name="base",
        arch="resnet18",
        optimizer="adamw",
        weight_decay=0.05,
        zero_init_residual=True,
        ema_decay=0.98,  # a window of 50 of the 600 steps
        held_out=0.01,
        select="last",  # held-out images are too few to select, and a collapse should show
        phases=(
            Phase(name="clean", epochs=CLEAN_EPOCHS, learning_rate=2e-3, warmup=0.1),
            Phase(
                name="adversarial",
                epochs=ADVERSARIAL_EPOCHS,
                learning_rate=1.4e-3,
                parts=(AdversarialPart(kind="n-fgsm"),),
            ),
        ),
    )


def clean_phase(**changes: Any) -> Recipe:
    recipe = base()
    return replace(recipe, phases=(replace(recipe.phases[0], **changes), recipe.phases[1]))


def adversarial_phase(**changes: Any) -> Recipe:
    recipe = base()
    return replace(recipe, phases=(recipe.phases[0], replace(recipe.phases[1], **changes)))


def attack(kind: Any, steps: int = 1, **changes: Any) -> Recipe:
    return adversarial_phase(parts=(AdversarialPart(kind=kind, steps=steps),), **changes)


def augmented(**changes: Any) -> Recipe:
    """`base` with another augmentation in both phases."""
    recipe = base()
    phases = [
        replace(phase, augmentation=replace(Augmentation(), **changes)) for phase in recipe.phases
    ]
    return replace(recipe, phases=tuple(phases))


def one_phase(epochs: int) -> Recipe:
    """`base` with only the adversarial phase."""
    recipe = base()
    return replace(recipe, phases=(replace(recipe.phases[1], epochs=epochs, warmup=0.1),))


def clean_only() -> Recipe:
    recipe = base()
    epochs = CLEAN_EPOCHS + ADVERSARIAL_EPOCHS
    return replace(recipe, phases=(replace(recipe.phases[0], epochs=epochs),))


def sgd() -> Recipe:
    recipe = replace(base(), optimizer="sgd", weight_decay=5e-4)
    clean, adversarial = recipe.phases
    phases = replace(clean, learning_rate=0.1), replace(adversarial, learning_rate=0.1)
    return replace(recipe, phases=phases)


def scaled_classic() -> Recipe:
    """The recipe `classic` in as many epochs as `base`, two thirds of them clean."""
    recipe, total = classic(), CLEAN_EPOCHS + ADVERSARIAL_EPOCHS
    clean, adversarial = recipe.phases
    first = round(total * clean.epochs / recipe.epochs)
    phases = replace(clean, epochs=first), replace(adversarial, epochs=total - first)
    return replace(
        recipe, arch="resnet18", phases=phases, held_out=0.01, select="last", ema_decay=0.98
    )


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the table: its title and its recipe."""

    what: str
    recipe: Callable[[], Recipe]


HALF_CLEAN = (
    AdversarialPart(kind="clean", share=0.5),
    AdversarialPart(kind="n-fgsm", share=0.5),
)

# Run in this order, the most important first.
LINES: dict[str, Line] = {
    "base": Line(what="base: 3 clean, 5 N-FGSM epochs", recipe=base),
    "clean-only": Line(what="8 clean epochs", recipe=clean_only),
    "one-phase": Line(what="one phase: 8 N-FGSM epochs", recipe=lambda: one_phase(8)),
    "one-phase-passes": Line(
        what="one phase with as many passes: 7 N-FGSM epochs", recipe=lambda: one_phase(7)
    ),
    "fgsm": Line(what="FGSM, no start", recipe=lambda: attack("fgsm")),
    "fgsm-rs": Line(what="FGSM from a random start", recipe=lambda: attack("fgsm-rs")),
    "pgd-3": Line(what="PGD-3", recipe=lambda: attack("pgd", 3)),
    "trades-3": Line(what="TRADES, 3 steps", recipe=lambda: attack("pgd", 3, loss="trades")),
    "classic": Line(what="`classic` in 5 + 3 epochs", recipe=scaled_classic),
    "no-ema": Line(what="no averaged weights", recipe=lambda: replace(base(), ema_decay=0.0)),
    "no-label-smoothing": Line(
        what="no label smoothing", recipe=lambda: replace(base(), label_smoothing=0.0)
    ),
    "awp": Line(
        what="AWP 0.005 in the last half", recipe=lambda: adversarial_phase(awp=5e-3, awp_from=0.5)
    ),
    "mixup": Line(
        what="mixup 0.2 in the clean phase",
        recipe=lambda: clean_phase(augmentation=Augmentation(mixup=0.2)),
    ),
    "cutout": Line(what="cutout of 8 pixels", recipe=lambda: augmented(cutout=8)),
    "sgd": Line(what="SGD 0.1, Nesterov, instead of AdamW", recipe=sgd),
    "no-clipping": Line(
        what="no gradient clipping", recipe=lambda: replace(base(), gradient_clip=0.0)
    ),
    "half-clean": Line(
        what="half clean, half N-FGSM images",
        recipe=lambda: adversarial_phase(parts=HALF_CLEAN, split=True),
    ),
    "no-crop-flip": Line(
        what="no crop and no flip", recipe=lambda: augmented(crop_padding=0, flip=0.0)
    ),
    "rotation": Line(what="rotation by 10 degrees", recipe=lambda: augmented(rotation=10.0)),
    "jitter": Line(what="color jitter 0.1", recipe=lambda: augmented(jitter=0.1)),
    "teacher": Line(
        what="averaged model as teacher, 0.5", recipe=lambda: adversarial_phase(teacher=0.5)
    ),
    "silu": Line(what="SiLU instead of ReLU", recipe=lambda: replace(base(), activation="silu")),
    "no-zero-init": Line(
        what="residual branches not initialized to zero",
        recipe=lambda: replace(base(), zero_init_residual=False),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run."""

    name: str
    seed: int
    data: str
    images: int
    scored: int
    device: str

    @property
    def key(self) -> dict[str, Any]:
        """The values that identify a finished run."""
        return {"name": self.name, "seed": self.seed, "images": self.images, "n": self.scored}


def split(job: Job) -> tuple[Dataset, Dataset]:
    """The training images and the scored images, which are the same for every run."""
    dataset = load_dataset(job.data, size=LINES[job.name].recipe().input_size)
    chosen, _ = stratified_split(dataset.labels, len(dataset) - job.images - job.scored, seed=0)
    dataset = dataset.subset(chosen)
    kept, scored = stratified_split(dataset.labels, job.scored, seed=1)
    return dataset.subset(kept), dataset.subset(scored)


def run(job: Job) -> dict[str, Any]:
    """Train and score; returns the line for the JSON file."""
    recipe, device = LINES[job.name].recipe(), resolve_device(job.device)
    images, scored = split(job)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    spent, began, rows = 0.0, clock(), []

    def observe(progress: Progress) -> None:
        nonlocal spent, began
        now = clock()
        if progress.row is None:
            spent += now - began
        else:
            rows.append(progress.row)
        began = now  # the time before was spent on a step, or on scoring

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.pt"
        train(recipe, images, out=out, device=device, seed=job.seed, observe=observe)
        checkpoint = load_checkpoint(out)
    threat_model = ThreatModel(norm=recipe.norm, eps=recipe.eps)
    result = evaluate(
        checkpoint.classifier.to(device),
        scored.images,
        scored.labels,
        num_classes=len(scored.classes),
        attacks=[resolve_attack(name, threat_model) for name in ATTACKS],
        device=device,
        batch_size=250,
    )
    return {
        **job.key,
        "correct": {item.label: item.correct for item in result.accuracies},
        "seconds": round(spent, 1),
        "recipe": recipe.to_dict(),
        "passes": sum(phase.epochs * phase.passes for phase in recipe.phases),
        "kept_epoch": checkpoint.sidecar.recipe["kept_epoch"],
        "epochs": rows,
        "data_sha256": images.sha256,
        "device": device_in_words(device),
        "versions": versions(),
    }


def finished(path: Path) -> list[dict[str, Any]]:
    """The rows of the JSON file, without a line that was cut short by a kill."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def add(path: Path, row: dict[str, Any]) -> None:
    """Append a line, on a new line even if the last one was cut short."""
    cut = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(row) + "\n")


def results(jobs: list[Job], workers: int) -> Iterator[dict[str, Any]]:
    if workers == 1:
        yield from map(run, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, job) for job in jobs]):
            yield future.result()


def in_words(row: dict[str, Any]) -> str:
    shares = " ".join(
        f"{name} {100 * correct / row['n']:5.2f}" for name, correct in row["correct"].items()
    )
    return f"{row['name']:20} seed {row['seed']}  {shares}  {row['seconds']:6.1f} s"


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: means over seeds, 95% intervals for the n of one run, change from base.

    Raises SystemExit unless all runs have the same images and as many scored ones.
    """
    sizes = {(row["images"], row["n"], row["data_sha256"][:8]) for row in rows}
    if len(sizes) > 1:
        raise SystemExit(
            "expected one number of training images, of scored images and one dataset for all "
            f"rows, got {', '.join(map(str, sorted(sizes)))}"
        )
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:  # the latest of the same name and seed
        runs.setdefault(row["name"], {})[row["seed"]] = row
    head = "what|seeds|clean %|FGSM %|PGD-20 %|95%|change from base|sd|seconds|passes".split("|")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in [name for name in LINES if name in runs]:
        lines.append(_line(LINES[name].what, list(runs[name].values()), runs.get("base", {})))
    return "\n".join(lines)


def _line(what: str, rows: list[dict[str, Any]], base: dict[int, dict[str, Any]]) -> str:
    n, labels = rows[0]["n"], ("clean", *ATTACKS)
    clean, fgsm, pgd = (100 * mean(row["correct"][label] for row in rows) / n for label in labels)
    low, high = wilson_interval(round(pgd / 100 * n), n)
    changes = [
        100 * (row["correct"]["pgd-20"] - base[row["seed"]]["correct"]["pgd-20"]) / n
        for row in rows
        if row["seed"] in base
    ]
    change = f"{mean(changes):+.1f}" if changes else ""
    spread = f"{stdev(changes):.1f}" if len(changes) > 1 else ""
    seconds = mean(row["seconds"] for row in rows)
    cells = [what, str(len(rows)), f"{clean:.1f}", f"{fgsm:.1f}", f"{pgd:.1f}"]
    cells += [f"{100 * low:.1f} to {100 * high:.1f}", change, spread]
    cells += [f"{seconds:.0f}", f"{rows[0]['passes']:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="train.npz", help="training images, in any format")
    parser.add_argument("--json", type=Path, default=Path("ablation.jsonl"), help="results")
    parser.add_argument("--table", type=Path, help="print the table of such a file and exit")
    parser.add_argument("--only", nargs="+", choices=LINES, default=list(LINES), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--scored", type=int, default=2_000, help="scored images")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="runs in parallel")
    args = parser.parse_args()
    if args.table:
        click.echo(table(finished(args.table)))
        return
    sizes = {"data": args.data, "images": args.images, "scored": args.scored}
    jobs = [
        Job(name=name, seed=seed, device=args.device, **sizes)
        for seed in args.seeds
        for name in args.only
    ]
    done = finished(args.json)
    jobs = [job for job in jobs if not any(job.key.items() <= row.items() for row in done)]
    click.echo(f"{len(jobs)} runs to do; {len(done)} lines in {args.json}")
    for row in results(jobs, args.jobs):
        add(args.json, row)
        click.echo(in_words(row))


if __name__ == "__main__":
    main()

"""Compares our evaluation with other tools: how fast it is, and how much it finds.

    python benchmarks/evaluation.py --data test.npz --reference CHECKOUT_OF_AUTO_ATTACK

Every tool runs in its own process, peers in a separate environment, with the same images, labels,
eps, steps and batch size. The tools take turns on one part of the images after the other, in
another order for each part. The adversarial images of the peers are scored here in float32; ours
are scored by the evaluation itself. The time of a peer is that of its attack alone, ours that of
the whole evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where it is not installed

from benchmarks.environments import peer_environment
from robust.checkpoint import load_checkpoint
from robust.classifier import resolve_device
from robust.datasets import load_dataset
from robust.environment import device_in_words, versions
from robust.evaluation import wilson_interval
from robust.files import write_json
from robust.threat_model import parse_eps

HERE = Path(__file__).resolve().parent
MAX_OTHER_LOAD = 0.05  # cores that other processes may use before they disturb the times
PEERS = ("torchattacks", "foolbox", "art")


class OtherLoad:
    """Measures how many cores other processes keep busy, without this one and its children."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._busy, self._own = _busy_seconds(), _own_seconds()

    def cores(self) -> float | None:
        """Mean number of busy cores so far; None if the system does not say."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        spent = busy - self._busy - (_own_seconds() - self._own)
        return max(0.0, spent / max(time.monotonic() - self._begin, 1e-9))

    def __str__(self) -> str:
        cores = self.cores()
        if cores is None:
            return "the load of other processes is unknown on this system"
        return f"other processes used {cores:.2f} cores"


def _busy_seconds() -> float | None:
    """CPU seconds of all processes since boot, including those stolen by the host."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, words)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """CPU seconds of this process and its children, including running ones."""
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                own += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own


@dataclass
class Tool:
    """A tool's process, with its times and results."""

    name: str
    process: subprocess.Popen[str]
    seconds: list[float] = field(default_factory=list)
    correct: list[int] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)

    def request(self, **what: Any) -> dict[str, Any]:
        """The tool's response to a request. Raises SystemExit if its process ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended without a response")
        response: dict[str, Any] = json.loads(line)
        return response


@contextmanager
def started(name: str, python: Path, arguments: list[str]) -> Iterator[Tool]:
    # Idle threads must not spin while another tool runs.
    quiet = os.environ | {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "0"}
    process = subprocess.Popen(
        [str(python), str(HERE / "evaluation_worker.py"), name, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if name != "robust" else None,
        text=True,
        env=quiet,
    )
    try:
        yield Tool(name, process)
    finally:
        process.kill()
        process.wait()


def warm_up(tools: list[Tool], images: int, **what: Any) -> None:
    """Run two steps of each tool on one batch, for imports and what is set up per batch size."""
    rows = (0, min(what["batch"], images))
    for tool in tools:
        tool.request(**what | {"rows": rows, "attack": "pgd-2", "steps": 2})


def take_turns(tools: list[Tool], parts: list[tuple[int, int]], judge: Judge, **what: Any) -> None:
    """Run each tool on each part; the order rotates from part to part."""
    for turn, rows in enumerate(parts):
        for k in range(len(tools)):
            tool = tools[(turn + k) % len(tools)]
            answer = tool.request(rows=rows, **what)
            correct = answer.get("correct")
            if correct is None:
                correct = judge.count_robust(np.load(answer["file"]), rows, what["eps"])
            tool.seconds.append(answer["seconds"])
            tool.correct.append(correct)
            tool.answers.append(answer)
            click.echo(
                f"{what['attack']} {rows[0]}-{rows[1]} {tool.name}: "
                f"{answer['seconds']:.1f} s, {correct} robust",
                err=True,
            )


class Judge:
    """Scores adversarial images with the checkpoint itself, in float32."""

    def __init__(self, checkpoint: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.model = load_checkpoint(checkpoint).classifier
        self.x, self.y = images.float() / 255, labels

    def count_robust(self, x_adv: np.ndarray, rows: tuple[int, int], eps: float) -> int:
        """The number of images that are correct clean and not fooled within eps."""
        x, y = self.x[slice(*rows)], self.y[slice(*rows)]
        found = torch.from_numpy(x_adv)
        away = (found - x).abs().flatten(1).amax(dim=1)
        inside = (found >= 0).flatten(1).all(dim=1) & (found <= 1).flatten(1).all(dim=1)
        with torch.no_grad():
            predicted = torch.cat([self.model(part).argmax(dim=1) for part in found.split(100)])
            clean = torch.cat([self.model(part).argmax(dim=1) for part in x.split(100)])
        fooled = (predicted != y) & (away <= eps + 1e-6) & inside
        return int(((clean == y) & ~fooled).sum())


def table(tools: list[Tool], n: int) -> list[dict[str, Any]]:
    ours = tools[0]
    rows = []
    for tool in tools:
        ratios = [theirs / own for theirs, own in zip(tool.seconds, ours.seconds, strict=True)]
        correct = sum(tool.correct)
        rows.append(
            {
                "tool": tool.name,
                "seconds": sum(tool.seconds),
                "images_per_second": n / sum(tool.seconds),
                "accuracy": correct / n,
                "correct": correct,
                "n": n,
                "interval": wilson_interval(correct, n),
                "ratio_median": median(ratios),
                "ratio_least": min(ratios),
                "ratio_most": max(ratios),
            }
        )
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    click.echo(f"\n{title}\n")
    click.echo("| tool | accuracy % | correct | seconds | images/s | time, ours = 1 |")
    click.echo("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        spread = f"{row['ratio_median']:.2f} ({row['ratio_least']:.2f} to {row['ratio_most']:.2f})"
        click.echo(
            f"| {row['tool']} | {100 * row['accuracy']:.2f} | {row['correct']}/{row['n']} | "
            f"{row['seconds']:.1f} | {row['images_per_second']:.1f} | {spread} |"
        )


def parts_of(n: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(n, start + size)) for start in range(0, n, size)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="labeled images, as robust evaluate takes")
    parser.add_argument("--checkpoint", type=Path, default=Path("models/robust_model.pt"))
    parser.add_argument("--weak", type=Path, help="an undefended checkpoint, for its cost")
    parser.add_argument(
        "--reference", help="a checkout of AutoAttack, github.com/fra31/auto-attack"
    )
    parser.add_argument("--peers", type=Path, default=HERE.parent / "build" / "peers")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--eps", default="8/255")
    parser.add_argument("--n", type=int, default=1024, help="images under PGD-20")
    parser.add_argument("--part", type=int, default=256, help="images per turn")
    parser.add_argument("--n-autoattack", type=int, default=100)
    parser.add_argument("--part-autoattack", type=int, default=50)
    parser.add_argument("--scaling", type=int, nargs="*", default=[128, 256, 512, 1024])
    parser.add_argument(
        "--limit",
        type=int,
        nargs="*",
        default=[1, 8, 64],
        help="image counts to compare with passes alone",
    )
    parser.add_argument("--attack-limit", default="pgd-20", help="attack of --limit")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = resolve_device(arguments.device)
    loaded = load_checkpoint(arguments.checkpoint)
    size = loaded.classifier.architecture.input_size
    data = load_dataset(arguments.data, size=size).in_8_bits()
    # A random order, as the data may be sorted by class.
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    most = max([arguments.n, arguments.n_autoattack, *arguments.scaling, *arguments.limit])
    images, labels = data.images[order[:most]], data.labels[order[:most]]
    eps = parse_eps(arguments.eps)
    judge = Judge(arguments.checkpoint, images, labels)
    what: dict[str, Any] = {
        "eps": eps,
        "alpha": eps / 4,
        "steps": 20,
        "classes": len(loaded.sidecar.classes),
        "batch": arguments.batch,
        "precision": arguments.precision,
        "reference": arguments.reference,
    }
    report: dict[str, Any] = {"versions": versions(), "device": device_in_words(device)}
    others = OtherLoad()
    peers = Path()
    if arguments.n or (arguments.reference and arguments.n_autoattack):
        peers = peer_environment(arguments.peers, HERE / "peers.txt")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        file = Path(folder) / "images.npz"
        np.savez(file, images=images.numpy(), labels=labels.numpy())

        def start(name: str, checkpoint: Path) -> Tool:
            python = Path(sys.executable) if name == "robust" else peers
            given = [str(checkpoint), str(file), str(device), folder]
            return stack.enter_context(started(name, python, given))

        ours = start("robust", arguments.checkpoint)
        warm_up([ours], most, **what)
        if arguments.n:
            tools = [ours, *(start(name, arguments.checkpoint) for name in PEERS)]
            warm_up(tools, arguments.part, **what)
            take_turns(tools, parts_of(arguments.n, arguments.part), judge, attack="pgd-20", **what)
            report["pgd-20"] = table(tools, arguments.n)
            show(f"PGD-20, {data.name}, Linf {arguments.eps}", report["pgd-20"])
            for tool in tools[1:]:
                tool.process.kill()
        report["limit"] = limits(ours, arguments.limit, {**what, "attack": arguments.attack_limit})
        report["scaling"] = scaling(ours, arguments.scaling, "the checkpoint", what)
        if arguments.weak:
            weak = start("robust", arguments.weak)
            warm_up([weak], most, **what)
            report["weak"] = scaling(weak, arguments.scaling[-1:], "an undefended checkpoint", what)
        if arguments.reference and arguments.n_autoattack:
            ours.seconds, ours.correct, ours.answers = [], [], []
            tools = [ours, start("autoattack", arguments.checkpoint)]
            warm_up(tools, arguments.part_autoattack, **what)
            parts = parts_of(arguments.n_autoattack, arguments.part_autoattack)
            take_turns(tools, parts, judge, attack="autoattack", **what)
            report["autoattack"] = table(tools, arguments.n_autoattack)
            report["autoattack_stages"] = [answer["stages"] for answer in ours.answers]
            show(f"AutoAttack standard, {data.name}, Linf {arguments.eps}", report["autoattack"])
    click.echo(f"\n{report['device']}, batches of {arguments.batch}, {report['versions']}")
    report["other_work"] = others.cores()
    report["undisturbed"] = (
        report["other_work"] is not None and report["other_work"] < MAX_OTHER_LOAD
    )
    if not report["undisturbed"]:
        click.echo(f"Times may be disturbed: {others}. Compare only ratios.")
    if arguments.json:
        write_json(arguments.json.resolve(), report)


def limits(tool: Tool, sizes: list[int], what: dict[str, Any]) -> list[dict[str, Any]]:
    """Compares the time of an evaluation with that of its passes alone."""
    found = []
    for n in sizes:
        answer = tool.request(rows=(0, n), **what)
        alone = {"attack": "rates", "batch": min(n, what["batch"])}
        rates = tool.request(**what | alone | {"precision": answer["precision"]})
        plain = n + answer["forwards"] - answer["backwards"]  # forward passes without gradient
        limit = answer["backwards"] * rates["gradient"] + plain * rates["forward"]
        passes = n + answer["passes"]
        row = {"n": n, "seconds": answer["seconds"], "limit": limit, "passes": passes}
        found.append(row | {"ratio": answer["seconds"] / limit, "precision": answer["precision"]})
    if found:
        click.echo(f"\n{what['attack']} compared with its passes alone\n")
        click.echo("| n | seconds | passes | passes alone | ratio | precision |")
        click.echo("| --- | --- | --- | --- | --- | --- |")
    for row in found:
        click.echo(
            f"| {row['n']} | {row['seconds']:.2f} | {row['passes']} | {row['limit']:.2f} | "
            f"{row['ratio']:.2f} | {row['precision']} |"
        )
    return found


def scaling(tool: Tool, sizes: list[int], name: str, what: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds for increasing n, which should be proportional to it."""
    found = []
    for n in sizes:
        answer = tool.request(rows=(0, n), attack="pgd-20", **what)
        found.append({"n": n, "seconds": answer["seconds"], "passes": answer["passes"]})
    if found:
        click.echo(f"\nPGD-20 of {name}, n: seconds (passes an image)\n")
        cells = [f"{f['n']}: {f['seconds']:.1f} ({f['passes'] / f['n']:.1f})" for f in found]
        click.echo(", ".join(cells))
    return found


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise click.ClickException(str(error)) from error

"""Measures one network behind each server in turn, and alone."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import httpx

from benchmarks.serving.load import form, generate, predict, small_png
from benchmarks.serving.servers import KINDS, START_SECONDS, Kind, Server, Settings, started
from robust.checkpoint import load_checkpoint

HERE = Path(__file__).resolve().parent
BATCHES = (1, 8, 16, 32, 64)
SETTLE_SECONDS = 0.5


class Bench:
    """The measurements of one network on this machine."""

    def __init__(self, arguments: argparse.Namespace, stem: str, weights: Path, folder: Path):
        self.arguments, self.stem, self.weights, self.folder = arguments, stem, weights, folder
        checkpoint = load_checkpoint(weights)
        self.image = small_png(checkpoint.classifier.architecture.input_size)
        self.body = folder / "body"
        self.body.write_bytes(form(self.image))
        self.best: dict[str, dict[int, Settings]] = {}  # by server and clients
        self.loads: list[dict[str, Any]] = []
        self.limits: list[dict[str, Any]] = []

    def check_agreement(self) -> None:
        """Raise ValueError unless all servers predict the same class for the image."""
        seen = {}
        for name in self.arguments.servers:
            with self.started(KINDS[name], KINDS[name].settings[0]) as server:
                seen[name] = class_in(predict(server.url, self.image))
        if len(set(seen.values())) > 1:
            raise ValueError(f"expected one class from all servers, got {seen}")

    def started(self, kind: Kind, settings: Settings) -> AbstractContextManager[Server]:
        python = self.arguments.peers / "bin" / "python"
        name = "ROBUST_PRECISION" if kind.name == "robust" else "SERVING_PRECISION"
        settings = settings | {name: self.arguments.precision}
        return started(kind, python, self.weights, self.image, settings)

    def tune(self, kind: Kind) -> None:
        """Find the settings with the highest throughput for each number of clients."""
        best: dict[int, tuple[float, Settings]] = {}
        tried = kind.settings if self.arguments.tune and len(kind.settings) > 1 else ()
        for settings in tried:
            for row in self.load(kind, settings, self.arguments.clients, self.arguments.tune):
                self.say("tuning", row)
                if row["throughput"] >= best.get(row["clients"], (0.0, settings))[0]:
                    best[row["clients"]] = row["throughput"], settings
        self.best[kind.name] = {
            n: best[n][1] if n in best else kind.settings[0] for n in self.arguments.clients
        }

    def turn(self, number: int) -> None:
        """Measure each server and the limit once; the order rotates from turn to turn."""
        names = ["limit", *self.arguments.servers]
        for k in range(len(names)):
            name = names[(number + k) % len(names)]
            if name == "limit":
                self.measure_limit(number)
                continue
            best = self.best[name]
            for settings in KINDS[name].settings:
                clients = [n for n in best if best[n] == settings]
                if clients:
                    self.measure(KINDS[name], settings, clients, number)

    def measure(self, kind: Kind, settings: Settings, clients: list[int], turn: int) -> None:
        for row in self.load(kind, settings, clients, self.arguments.seconds):
            self.say(f"turn {turn + 1}", row)
            self.loads.append({"stem": self.stem, "turn": turn, **row})

    def load(
        self, kind: Kind, settings: Settings, clients: list[int], seconds: float
    ) -> list[dict[str, Any]]:
        """The loads of a fresh server with each number of clients."""
        rows = []
        with self.started(kind, settings) as server:
            generate(server.url, self.body, clients=max(clients), seconds=self.arguments.warm)
            for n in sorted(clients):
                settle(server, self.image)
                before = server.cpu_seconds()
                load = generate(server.url, self.body, clients=n, seconds=seconds)
                spent = server.cpu_seconds() - before
                row = {
                    "server": kind.name,
                    "settings": settings,
                    "ready_seconds": server.ready_seconds,
                    "throughput": load.throughput,
                    "errors": load.errors(),
                    "cpu_ms": 1000 * spent / max(1, load.requests),
                    "memory_bytes": server.memory_bytes(),
                }
                rows.append(asdict(load) | row)
        return rows

    def measure_limit(self, turn: int) -> None:
        """Measure the forward pass alone, in its own process."""
        arguments = self.arguments
        given = [str(self.weights), str(self.folder), arguments.precision, str(arguments.limit)]
        done = subprocess.run(
            [sys.executable, str(HERE / "limit.py"), *given, *map(str, BATCHES)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        limit = {"stem": self.stem, "turn": turn, **json.loads(done.stdout.splitlines()[-1])}
        rates = {
            (name, batch): result["images_per_second"]
            for name, batches in limit["runtimes"].items()
            for batch, result in batches.items()
        }
        name, batch = max(rates, key=lambda key: rates[key])
        limit |= {"runtime": name, "batch": int(batch), "images_per_second": rates[name, batch]}
        alone = (batches["1"]["p50_ms"] for batches in limit["runtimes"].values())
        limit["p50_ms"] = min(alone)
        self.limits.append(limit)
        click.echo(
            f"{self.stem} turn {turn + 1} limit: {limit['images_per_second']:.1f} images/s, "
            f"{name} at batch {batch}; one image {limit['p50_ms']:.2f} ms",
            err=True,
        )

    def say(self, when: str, row: dict[str, Any]) -> None:
        settings = [f"{k.removeprefix('SERVING_')}={v}" for k, v in row["settings"].items()]
        about = " ".join([self.stem, when, row["server"], *settings, f"{row['clients']} clients"])
        found = f"{row['throughput']:.1f} requests/s, p50 {row['p50_ms']:.1f} ms {row['errors']}"
        click.echo(f"{about}: {found}", err=True)


def settle(server: Server, image: bytes) -> None:
    """Wait until the server has finished requests of earlier clients.

    Raises httpx.HTTPError if it refuses a single request for longer than START_SECONDS.
    """
    latest, answers = time.monotonic() + START_SECONDS, 0
    while answers < 2:
        try:
            predict(server.url, image, seconds=START_SECONDS)
            answers += 1
        except httpx.HTTPStatusError:
            if time.monotonic() > latest:
                raise
            time.sleep(SETTLE_SECONDS)
    time.sleep(SETTLE_SECONDS)


def class_in(answer: Any) -> int:
    """The index of the likeliest class in the response of any server."""
    if isinstance(answer, list):  # from BentoML
        (answer,) = answer
    return int(answer["results"][0]["index"] if "results" in answer else answer["index"])

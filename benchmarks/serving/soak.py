"""Measures the memory of our service under sustained load, and its start."""

from __future__ import annotations

import threading
from statistics import median
from typing import Any

import click

from benchmarks.serving.bench import Bench
from benchmarks.serving.load import generate
from benchmarks.serving.servers import KINDS, Server

CLIENTS = 256
SAMPLE_SECONDS = 1.0


def soak(bench: Bench) -> dict[str, Any]:
    """Load our service with 256 clients and track its memory; also measures a single client."""
    bench.measure_limit(0)
    with bench.started(KINDS["robust"], {}) as server:
        at_start = server.resident_bytes()
        single = generate(server.url, bench.body, clients=1, seconds=bench.arguments.seconds)
        sizes: list[int] = []
        done = threading.Event()
        watch = threading.Thread(target=_watch, args=(server, sizes, done))
        watch.start()
        try:
            load = generate(server.url, bench.body, clients=CLIENTS, seconds=bench.arguments.soak)
        finally:
            done.set()
            watch.join()
    fifth = len(sizes) // 5
    found = {
        "stem": bench.stem,
        "ready_seconds": server.ready_seconds,
        "bytes_at_start": at_start,
        "bytes_most": max(sizes),
        # Not the first, in which buffers for batches of every size are allocated.
        "bytes_second_fifth": median(sizes[fifth : 2 * fifth] or sizes),
        "bytes_last_fifth": median(sizes[-fifth:]),
        "bytes_each_second": sizes,
        "clients": CLIENTS,
        "seconds": load.seconds,
        "throughput": load.throughput,
        "statuses": load.statuses,
        "errors": load.errors(),
        "p50_ms_one_client": single.p50_ms,
        "p50_ms_forward": bench.limits[0]["p50_ms"],
    }
    _show(found)
    return found


def _watch(server: Server, sizes: list[int], done: threading.Event) -> None:
    while not done.wait(SAMPLE_SECONDS):
        sizes.append(server.resident_bytes())
    sizes.append(server.resident_bytes())


def _show(found: dict[str, Any]) -> None:
    growth = found["bytes_last_fifth"] - found["bytes_second_fifth"]
    over = found["p50_ms_one_client"] - found["p50_ms_forward"]
    click.echo(f"\nrobust serve, {found['stem']} stem\n")
    click.echo("| what | found |")
    click.echo("| --- | --- |")
    for what, value in (
        ("from the start to the first response", f"{found['ready_seconds']:.1f} s"),
        ("memory then", f"{found['bytes_at_start'] / 1e6:.0f} MB"),
        (f"most memory with {CLIENTS} clients", f"{found['bytes_most'] / 1e6:.0f} MB"),
        ("growth from the second to the last fifth of the time", f"{growth / 1e6:+.1f} MB"),
        (
            f"responses in {found['seconds']:.0f} s",
            f"{found['statuses'].get(200, 0)}, {found['throughput']:.0f} per second",
        ),
        ("other than 200", found["errors"] or "none"),
        ("p50 of one client", f"{found['p50_ms_one_client']:.1f} ms, {over:+.1f} to the forward"),
    ):
        click.echo(f"| {what} | {value} |")

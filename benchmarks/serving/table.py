"""Computes medians and ratios from loads and limits, and prints them as a table."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

import click

# For our service: stem, clients, metric, target, and whether it is a minimum or a maximum.
TARGETS = (
    ("cifar", 16, "throughput", 230, "at least"),
    ("cifar", 16, "to_limit", 0.85, "at least"),
    ("cifar", 16, "to_litserve", 3.5, "at least"),
    ("cifar", 1, "ms_over_forward", 2.5, "at most"),
    ("imagenet", 16, "to_limit", 0.45, "at least"),
)
WORDS = {
    "throughput": "requests per second",
    "to_limit": "throughput relative to the limit",
    "to_litserve": "throughput relative to LitServe",
    "ms_over_forward": "p50 over the forward alone, in ms",
}


def summarize(loads: list[dict[str, Any]], limits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each stem, number of clients and server, with spreads over the turns."""
    by_turn = {
        (load["stem"], load["turn"], load["clients"], load["server"]): load for load in loads
    }
    limit_of = {(limit["stem"], limit["turn"]): limit for limit in limits}
    rows = []
    for stem, clients, server in dict.fromkeys((s, c, name) for s, _, c, name in by_turn):
        own = [
            load
            for (s, _, c, name), load in by_turn.items()
            if (s, c, name) == (stem, clients, server)
        ]
        to_limit, to_litserve, over = [], [], []
        for load in own:
            limit = limit_of[stem, load["turn"]]
            to_limit.append(load["throughput"] / limit["images_per_second"])
            over.append(load["p50_ms"] - limit["p50_ms"])
            peer = by_turn.get((stem, load["turn"], clients, "litserve"))
            if peer and peer["throughput"]:
                to_litserve.append(load["throughput"] / peer["throughput"])
        rows.append(
            {
                "stem": stem,
                "clients": clients,
                "server": server,
                "n": len(own),
                "throughput": spread(load["throughput"] for load in own),
                "to_limit": spread(to_limit),
                "to_litserve": spread(to_litserve),
                "p50_ms": spread(load["p50_ms"] for load in own),
                "p99_ms": spread(load["p99_ms"] for load in own),
                "ms_over_forward": spread(over),
                "cpu_ms": spread(load["cpu_ms"] for load in own),
                "memory_bytes": spread(load["memory_bytes"] for load in own),
                "errors": "; ".join(load["errors"] for load in own if load["errors"]),
            }
        )
    return rows


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Median, minimum and maximum; None for no values."""
    found = list(values)
    return {"median": median(found), "least": min(found), "most": max(found)} if found else None


def check_targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measured targets of our service: value, target and whether it is met."""
    found = []
    for stem, clients, figure, target, bound in TARGETS:
        for row in rows:
            if (row["stem"], row["clients"], row["server"]) != (stem, clients, "robust"):
                continue
            if row[figure] is None:
                continue
            value = row[figure]["median"]
            met = value >= target if bound == "at least" else value <= target
            about = {"stem": stem, "clients": clients, "figure": figure, "bound": bound}
            found.append(about | {"target": target, "value": value, "met": met})
    return found


def print_table(report: dict[str, Any]) -> None:
    """Print the report as Markdown."""
    versions = f"Runtimes {report['runtimes']}; peers {report['versions_of_peers']}"
    click.echo(f"\n{report['machine']}")
    click.echo(f"{versions}; {report['load_generator']}")
    click.echo(
        f"{report['turns']} turns, {report['seconds']:g} s a load. The load generator shares the "
        f"{report['processors']} processors with the server.\n"
    )
    for stem, limits in _by_stem(report["limits"]).items():
        best = spread(limit["images_per_second"] for limit in limits)
        alone = spread(limit["p50_ms"] for limit in limits)
        ways = ", ".join(
            sorted({f"{limit['runtime']} at batch {limit['batch']}" for limit in limits})
        )
        missing = sorted({name for limit in limits for name in limit["missing"]})
        click.echo(
            f"The limit with the {stem} stem: {in_words(best, '.0f')} images/s, {ways}; one image "
            f"{in_words(alone, '.2f')} ms."
            + (
                f" Not installed or not in {report['precision']}: {', '.join(missing)}."
                if missing
                else ""
            )
        )
    click.echo(
        "\n| stem | clients | server | requests/s | of the limit | times LitServe | p50 ms "
        "| p99 ms | CPU ms a request | MB | not 200 |"
    )
    click.echo("| --- " * 11 + "|")
    for row in sorted(report["summary"], key=lambda row: (row["stem"], row["clients"])):
        memory = row["memory_bytes"]["median"] / 1e6
        cells = [
            row["stem"],
            str(row["clients"]),
            row["server"],
            in_words(row["throughput"], ".0f"),
            in_words(row["to_limit"], ".2f"),
            in_words(row["to_litserve"], ".2f"),
            in_words(row["p50_ms"], ".1f"),
            in_words(row["p99_ms"], ".0f"),
            in_words(row["cpu_ms"], ".2f"),
            f"{memory:.0f}",
            row["errors"] or "-",
        ]
        click.echo(f"| {' | '.join(cells)} |")
    click.echo("")
    for target in report["targets"]:
        click.echo(
            f"{target['stem']} stem, {target['clients']} clients, {WORDS[target['figure']]}: "
            f"{target['value']:.2f}, target {target['bound']} {target['target']:g}: "
            f"{'met' if target['met'] else 'not met'}"
        )


def in_words(figure: dict[str, float] | None, form: str) -> str:
    """`12 (11-13)`: median, minimum and maximum."""
    if figure is None:
        return "-"
    middle, least, most = (format(figure[name], form) for name in ("median", "least", "most"))
    return f"{middle} ({least}-{most})"


def _by_stem(limits: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    stems = dict.fromkeys(limit["stem"] for limit in limits)
    return {stem: [limit for limit in limits if limit["stem"] == stem] for stem in stems}

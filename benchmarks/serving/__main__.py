"""Compares the throughput of our service with that of peers and with the machine's limit.

    python benchmarks/serving --json serving.json
    python benchmarks/serving --precision bf16 --json serving-bf16.json
    python benchmarks/serving --soak 300

Measures the same network in one precision behind `robust serve`, behind the peers (with torch), and
as the limit the forward pass alone, in the fastest runtime at its best batch size in its own
process. They take turns, in another order each turn. Each server is started, warmed up,
loaded by wrk with one small PNG, and stopped before the next one starts. The best settings of each
peer are first determined for each number of clients. Printed are medians over the turns and, in
parentheses, minimum and maximum; ratios are computed within a turn. The load generator shares the
processors with the servers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also where it is not installed

from app.engine.cpu_limits import available_processors
from benchmarks.environments import peer_environment
from benchmarks.inference import hardware
from benchmarks.serving.bench import Bench
from benchmarks.serving.limit import PRECISIONS
from benchmarks.serving.load import version_of_wrk
from benchmarks.serving.servers import KINDS
from benchmarks.serving.soak import soak
from benchmarks.serving.table import check_targets, print_table, summarize
from robust.checkpoint import load_checkpoint, save_checkpoint
from robust.classifier import STEMS, Classifier
from robust.files import write_json
from robust.sidecar import Sidecar

HERE = Path(__file__).resolve().parent


def weights_for(stem: str, checkpoint: Path, folder: Path) -> Path:
    """The checkpoint if it has that stem, else random weights, which are as fast."""
    loaded = load_checkpoint(checkpoint)
    if loaded.classifier.architecture.stem == stem:
        return checkpoint
    architecture = replace(loaded.classifier.architecture, stem=stem)
    torch.manual_seed(0)
    classifier = Classifier(architecture).eval()
    path = folder / f"{stem}.pt"
    save_checkpoint(
        path, classifier, Sidecar(architecture=architecture, classes=loaded.sidecar.classes)
    )
    return path


def header(arguments: argparse.Namespace) -> dict[str, Any]:
    """The conditions of the measurement."""
    peers = {}
    if set(arguments.servers) - {"robust"} and not arguments.soak:
        python = peer_environment(arguments.peers, HERE / "peers.txt")
        peers = installed(python, ("fastapi", "litserve", "bentoml", "torch"))
    return {
        "machine": hardware(torch.device("cpu")),
        "processors": available_processors(),
        "load_generator": version_of_wrk(),
        "runtimes": installed(Path(sys.executable), ("onnxruntime", "openvino")),
        "versions_of_peers": peers,
        "precision": arguments.precision,
        "seconds": arguments.seconds,
        "turns": arguments.turns,
        "clients": arguments.clients,
    }


def installed(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """The versions of the packages in an environment, without missing ones."""
    code = (
        "import json, sys; from importlib.metadata import distributions; "
        "print(json.dumps({d.name: d.version for d in distributions() if d.name in sys.argv}))"
    )
    done = subprocess.run(
        [str(python), "-c", code, *packages], check=True, capture_output=True, text=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("models/robust_model.pt"))
    parser.add_argument("--peers", type=Path, default=HERE.parents[1] / "build" / "serving-peers")
    parser.add_argument("--servers", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--stem", nargs="+", choices=STEMS, default=list(STEMS))
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of the servers and of the limit",
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--seconds", type=float, default=10, help="seconds per load")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--warm", type=float, default=3, help="seconds of load before the first measurement"
    )
    parser.add_argument(
        "--tune", type=float, default=3, help="seconds per load in tuning; 0: no tuning"
    )
    parser.add_argument(
        "--limit", type=float, default=2, help="seconds per batch size of the forward pass alone"
    )
    parser.add_argument("--soak", type=float, help="instead load our service for this many seconds")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report = header(arguments) | {"loads": [], "limits": []}
    with tempfile.TemporaryDirectory() as folder:
        for stem in arguments.stem:
            weights = weights_for(stem, arguments.checkpoint.resolve(), Path(folder))
            bench = Bench(arguments, stem, weights, Path(folder))
            if arguments.soak:
                report.setdefault("soak", []).append(soak(bench))
                continue
            bench.check_agreement()
            for name in arguments.servers:
                bench.tune(KINDS[name])
            loads, limits = report["loads"], report["limits"]
            for number in range(arguments.turns):
                bench.turn(number)
                report |= {"loads": loads + bench.loads, "limits": limits + bench.limits}
                write(report, arguments.json)
    if not arguments.soak:
        report["summary"] = summarize(report["loads"], report["limits"])
        report["targets"] = check_targets(report["summary"])
        print_table(report)
    write(report, arguments.json)


def write(report: dict[str, Any], path: Path | None) -> None:
    """Write the results so far, if a path is given."""
    if path:
        write_json(path.resolve(), report)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, httpx.HTTPError) as error:
        sys.exit(f"Error: {error}")

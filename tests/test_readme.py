"""The README's commands are run, and their answers compared with those printed there."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"
# What differs from call to call.
VOLATILE = {"id", "seconds", "created", "finished", "loaded", "request_id", "instance"}


@dataclass(frozen=True, kw_only=True)
class Example:
    """A block of commands, how it is to be tried, and the answer printed below it."""

    commands: str
    kind: str  # `make`, `curl`, `robust`, `torchrun`, or why it is not run
    answer: str | None

    def __str__(self) -> str:
        return self.commands.splitlines()[0][:60]


def examples() -> list[Example]:
    found = []
    pattern = (
        r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?```sh\n(?P<commands>.*?)```\n"
        r"(?:\n```(?:json|text)\n(?P<answer>.*?)```)?"
    )
    for match in re.finditer(pattern, README, re.DOTALL):
        commands = match["commands"].strip()
        words = ("make", "curl", "robust", "torchrun")
        kind = next(word for word in words if f"{word} " in commands)
        found.append(Example(commands=commands, kind=match["why"] or kind, answer=match["answer"]))
    return found


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ours = Path(sys.prefix) == ROOT / ".venv" and (ROOT / ".venv" / ".ready").exists()
    command = ["make", "serve", f"PORT={port}"]
    if not ours:  # another environment: `make serve` would set up a second one
        command = [str(Path(sys.executable).with_name("robust")), "serve", "--port", str(port)]
    environment = {**os.environ, "ROBUST_DATASETS": str(ROOT / "examples")}
    server = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert server.stdout is not None
    try:
        printed = ""
        for line in server.stdout:
            printed += line
            if "curl" in line:
                break
        assert f"http://127.0.0.1:{port}" in printed
        assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.stdout.read()
        server.stdout.close()
        server.wait(30)


def run(commands: str, *, folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if "robust train" in commands:  # two threads, beside another test, mostly wait for each other
        environment["OMP_NUM_THREADS"] = "1"
    finished = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def same(printed: Any, came: Any, path: str = "") -> None:
    """Compare leaf by leaf: `…` ends a shortened text or list, numbers agree to 0.02."""
    if isinstance(printed, dict):
        assert isinstance(came, dict), path
        shortened = "…" in printed
        names = set(printed) - {"…"}
        assert names <= set(came) if shortened else names == set(came), path
        for name in names - VOLATILE:
            same(printed[name], came[name], f"{path}.{name}")
    elif isinstance(printed, list):
        if printed and printed[-1] == "…":
            printed, came = printed[:-1], came[: len(printed) - 1]
        assert len(printed) == len(came), path
        for k, (left, right) in enumerate(zip(printed, came, strict=True)):
            same(left, right, f"{path}[{k}]")
    elif isinstance(printed, str) and "…" in printed:
        assert came.startswith(printed.split("…")[0]), path
    elif isinstance(printed, float):
        assert came == pytest.approx(printed, abs=0.02), path
    else:
        assert printed == came, path


@pytest.mark.parametrize("example", [e for e in examples() if e.kind == "curl"], ids=str)
def test_curl_lines_give_the_printed_answer(example: Example, address: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    came = run(example.commands.replace(ADDRESS, address), folder=tmp_path)
    if example.answer is not None:
        same(json.loads(example.answer), json.loads(came))


@pytest.mark.timeout(900)  # one of them trains, which a busy machine makes slow
@pytest.mark.parametrize("example", [e for e in examples() if e.kind == "robust"], ids=str)
def test_terminal_lines_run(example: Example, tmp_path: Path) -> None:
    for folder in ("examples", "models"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("runs"))
    came = run(example.commands, folder=tmp_path)
    if example.answer is not None:
        expected, got = (_without_seconds(text) for text in (example.answer, came))
        assert got == expected


def _without_seconds(text: str) -> list[list[str]]:
    """Words of each line, the timings left out: the last column and `N s`."""
    text = re.sub(r"\b\d+\.\d+( s on .*)?$", "", text.strip(), flags=re.MULTILINE)
    return [line.split() for line in text.splitlines()]


def test_every_block_is_run_or_says_why_not() -> None:
    kinds = [example.kind for example in examples()]
    assert kinds.count("curl") >= 6
    assert kinds.count("robust") >= 4
    assert README.count("```sh\n") == len(kinds)


def test_the_readme_opens_with_the_two_commands() -> None:
    first = examples()[:2]
    assert [example.commands for example in first] == ["make serve", "make test"]


def test_every_endpoint_has_a_curl_line() -> None:
    for route in ("/predict", "/attack", "/evaluate", "/model", "/livez", "/readyz", "/metrics"):
        assert re.search(rf"curl [^\n]*{re.escape(ADDRESS + route)}", README), route


def test_every_setting_is_in_the_readme_with_its_default() -> None:
    for name, field in Settings.model_fields.items():
        row = re.search(rf"^\| `ROBUST_{name.upper()}` \|([^|]*)\|", README, re.MULTILINE)
        assert row, name
        if isinstance(field.default, int | float) and not name.startswith("max_eps"):
            assert float(row[1].strip().strip("`")) == field.default, name


def test_the_results_are_those_of_the_sidecar() -> None:
    sidecar = json.loads((ROOT / "models" / "robust_model.json").read_text())
    recorded = [row for row in sidecar["evaluation"] if row.get("data") == "test.npz"]
    assert {row["attack"] for row in recorded} >= {"clean", "fgsm", "pgd-20"}
    for page in (README, (ROOT / "models" / "README.md").read_text()):
        for row in recorded:
            assert f"{100 * row['accuracy']:.2f}" in page, row["attack"]


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target

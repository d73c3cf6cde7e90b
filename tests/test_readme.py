"""The README's commands are run and their output compared with the README."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import httpx
import pytest

import robust_cli
from tests.support.copies import copy_for_commands
from tests.support.waiting import until

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


@dataclass(frozen=True, kw_only=True)
class Example:
    """A block of commands, how it is run, and the text printed below it."""

    commands: str
    kind: str  # `make`, `curl`, `robust`, or why it is not run
    printed: str | None

    def __str__(self) -> str:
        return self.commands.splitlines()[0][:60]


def examples() -> list[Example]:
    found = []
    pattern = (
        r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?```sh\n(?P<commands>.*?)```\n"
        r"(?:\n```text\n(?P<printed>.*?)```)?"
    )
    for match in re.finditer(pattern, README, re.DOTALL):
        commands = match["commands"].strip()
        kind = next(word for word in ("make", "curl", "docker", "robust") if f"{word} " in commands)
        found.append(
            Example(commands=commands, kind=match["why"] or kind, printed=match["printed"])
        )
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with what the README's commands read."""
    for name in ("examples", "models"):
        copy_for_commands(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    ours = Path(sys.prefix) == ROOT / ".venv" and (ROOT / ".venv" / ".ready").exists()
    command = ["make", "serve", "PORT=0", "ARGS="]  # those of `make test` are not its own
    if not ours:  # another environment: `make serve` would set up a second one
        command = [str(Path(sys.executable).with_name("robust")), "serve", "--port", "0"]
    server = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "ROBUST_DEADLINE_SECONDS": "280"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert server.stdout is not None
    try:
        printed = ""
        for line in server.stdout:
            printed += line
            if "curl" in line:
                break
        found = re.search(r"http://127\.0\.0\.1:\d+", printed)
        assert found is not None, printed
        assert httpx.get(f"{found[0]}/readyz", timeout=120).status_code == 200
        yield found[0]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.stdout.read()
        server.stdout.close()
        server.wait(280)


def run(command: list[str], folder: Path) -> str:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    finished = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=900, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def run_shell(commands: str, folder: Path) -> str:
    return run(["bash", "-euo", "pipefail", "-c", commands], folder)


def test_curl_commands_get_responses(address: str, folder: Path) -> None:
    (lines,) = (e.commands.splitlines() for e in examples() if e.kind == "curl")
    predicted, attacked, evaluated = (
        json.loads(run_shell(line.replace(ADDRESS, address), folder)) for line in lines
    )
    assert predicted["results"][0]["label"] == "horse"
    # The picture at the top of the README, and its caption.
    assert [result["after"]["label"] for result in attacked["results"]] == ["horse", "horse"]
    job = f"{address}/evaluate/{evaluated['id']}"  # done by now, unless the machine is slow
    until(lambda: httpx.get(job, timeout=120).json()["state"] == "done")
    assert httpx.get(job, timeout=120).json()["evaluation"]["n"] == 5


# Whole it takes minutes.
TRAIN_IN_SMALL = (
    "--set clean.epochs=1 --set adversarial.epochs=1 --set batch_size=256 --set held_out=0.02 "
    "--input-size 16"
)


@pytest.mark.timeout(900)  # one of them trains, which a busy machine makes slow
@pytest.mark.parametrize("example", [e for e in examples() if e.kind == "robust"], ids=str)
def test_terminal_commands_print_what_is_shown(
    example: Example,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The installed command runs one of them, and this process the others: torch is loaded here."""
    commands = example.commands
    if "robust train" in commands:
        commands = f"{commands} {TRAIN_IN_SMALL}"
    if commands.startswith("robust predict"):
        came = run_shell(commands, folder)
    else:
        monkeypatch.chdir(folder)
        for line in commands.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "robust"
            assert robust_cli.run(arguments) == 0
        came = capsys.readouterr().out
    if example.printed is not None:
        assert_alike(came, example.printed)


def assert_alike(came: str, shown: str) -> None:
    """The same words, and about the same numbers: another processor's kernels round otherwise."""
    found, expected = _without_seconds(came), _without_seconds(shown)
    assert [len(line) for line in found] == [len(line) for line in expected], came
    for one, other in zip(chain(*found), chain(*expected), strict=True):
        if re.fullmatch(r"\d+\.\d+%?", other):
            near = pytest.approx(float(other.rstrip("%")), abs=0.5 if "%" in other else 0.05)
            assert float(one.rstrip("%")) == near
        else:
            assert one == other


def _without_seconds(text: str) -> list[list[str]]:
    """Words of each line without the timings: the last column, `N s on DEVICE`, `N s inside`."""
    text = re.sub(r"^[\d.]+ s inside the model; .*", "", text.strip(), flags=re.MULTILINE).strip()
    text = re.sub(r"\b\d+\.\d+( s on .*)?$", "", text.strip(), flags=re.MULTILINE)
    return [line.split() for line in text.splitlines()]


def test_the_python_block_prints_the_table(folder: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    printed = run([sys.executable, "-W", "error", "-c", block], folder)
    assert re.search(r"^pgd-20 +linf +8/255 ", printed, re.MULTILINE)
    assert len(block.splitlines()) <= 12


def test_every_block_is_run_or_states_why_not() -> None:
    kinds = [example.kind for example in examples()]
    assert kinds.count("robust") >= 4
    assert "docker" not in kinds  # no engine here: it has to say so
    assert README.count("```sh\n") == len(kinds)


def test_readme_is_short_and_starts_with_two_commands() -> None:
    first = examples()[:2]
    assert [example.commands for example in first] == ["make serve", "make test"]
    assert len(README.splitlines()) <= 180


def table_cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_results_match_the_sidecar() -> None:
    sidecar = json.loads((ROOT / "models" / "robust_model.json").read_text())
    recorded = [row for row in sidecar["evaluation"] if row.get("data") == "test.npz"]
    assert {row["attack"] for row in recorded} >= {"clean", "fgsm", "pgd-20"}
    card = (ROOT / "models" / "README.md").read_text()
    card_rows = [table_cells(line) for line in card.splitlines() if line.startswith("|")]
    header, _, shipped = [
        table_cells(line) for line in README.splitlines() if line.startswith("|")
    ][:3]
    for row in recorded:
        attack, norm = row["attack"].partition("x")[0], row.get("norm", "")
        shown = f"{100 * row['accuracy']:.2f}"
        assert any(
            attack in cells[0] and norm in cells[1] and cells[2] == shown
            for cells in card_rows
            if len(cells) > 2
        ), row["attack"]
        if row["n"] == 5000 and norm in ("", "linf"):
            assert shipped[[name.lower() for name in header].index(attack)] == shown


def test_links_are_not_broken() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target

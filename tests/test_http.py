"""The examples of docs/http.md are run against the shipped model."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.settings import Settings
from robust.sidecar import parse_sidecar
from tests.app.conftest import write_checkpoint
from tests.support.serving import serving, until

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "http.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


LINES = [line for block in blocks("sh") for line in block.strip().splitlines()]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    checkpoint, compare = ROOT / "models" / "robust_model.pt", tmp_path_factory.mktemp("plain")
    classes = parse_sidecar(checkpoint.with_suffix(".json").read_bytes()).classes
    write_checkpoint(compare / "plain_model.pt", classes=classes)
    settings = Settings(
        checkpoint=checkpoint,
        compare=str(compare / "plain_model.pt"),
        threads=1,
        device="cpu",
        deadline_seconds=280,
    )
    with serving(settings) as running:
        yield running.url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_curl_lines(address: str, folder: Path) -> None:
    script = "\n".join(
        f"echo '>>>'; {line}" if line.startswith("curl") else line for line in LINES
    ).replace(ADDRESS, address)
    output = run(["bash", "-euo", "pipefail", "-c", script], folder)
    _, *answers = output.split(">>>\n")
    curls = [line for line in LINES if line.startswith("curl")]
    for line, text in zip(curls, answers, strict=True):
        answer: Any = None
        if "%{http_code}" in line:
            assert text == "415\n"
        elif re.search(r" (-o|>) ", line):
            assert text == ""
        else:
            answer = json.loads(text)
            assert not {"error", "title"} & set(answer) or answer.get("error", 0) is None, line
        if "top_k=1" in line:
            assert [item["image"] for item in answer["results"]] == [0, 1]
            assert answer["results"][0]["label"] == "horse"
        if "wait=30" in line:  # done by now, unless the machine is slow
            job = f"{address}/evaluate/{answer['id']}"
            until(lambda job=job: httpx.get(job, timeout=120).json()["state"] == "done")
        if "compare=true" in line:
            assert answer["compare"]["model"] == "plain_model.pt"
        if "DELETE" in line:
            assert answer["attacks"][0]["steps"] == 5
        if "infer" in line:
            assert answer["outputs"][0]["name"] == "label"
    assert "event: done" in (folder / "events.txt").read_text()
    assert (folder / "adversarial.png").read_bytes().startswith(b"\x89PNG")
    assert "robust_requests_total" in (folder / "metrics.txt").read_text()


def test_the_python_blocks(address: str, folder: Path) -> None:
    script = "\n".join(blocks("python")).replace(ADDRESS, address)
    printed = run([sys.executable, "-W", "error", "-c", script], folder)
    expected = [
        r"horse 0\.\d+ \['horse', '\w+'\]",
        r"\w+ 0\.\d+ \['\w+', '\w+'\]",
        r"fgsm horse \w+ (True|False) 8",
        r"pgd-5 horse \w+ (True|False) 8",
        r"served:   horse -> \w+ \w+",
        r"standard: \w+ -> \w+",
        r"its image, shown to the served model: \w+",
        r"((queued|running)\n)*done",
        r"\{'clean': [\d.]+, 'fgsm': [\d.]+, 'pgd-5': [\d.]+\}",
        r"422 eps \w+",
        r"\{'probabilities': \[1, 10\], 'index': \[1\], 'label': \[1\]\}",
    ]
    assert re.fullmatch("\n".join(expected) + "\n", printed), printed
    assert (folder / "pgd-5.png").read_bytes().startswith(b"\x89PNG")


def test_links_and_settings_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    for variable in re.findall(r"ROBUST_(\w+)", PAGE):
        assert variable.lower() in Settings.model_fields, variable


def test_every_route_is_shown() -> None:
    for route in ("/predict", "/attack", "/evaluate", "/model", "/livez", "/readyz", "/metrics"):
        assert re.search(rf"curl [^\n]*{re.escape(ADDRESS + route)}", PAGE), route

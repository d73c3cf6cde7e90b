"""One registry: what it says is true, and an attack added to it appears everywhere."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn

from robust.attack_registry import (
    DEFAULT_ATTACKS,
    REGISTRY,
    AttackEntry,
    default_budgets,
    markdown_table,
    names,
    takers,
)
from robust.attacks import resolve_attack
from robust.threat_model import ThreatModel

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ATTACKS = ROOT / "robust" / "attacks"
# What calls a model, or reads the registry: the mathematics must do without.
ENGINE = {"api", "best_runs", "frozen", "passes", "run", "schedule", "scoring", "search"}
MATHS = {
    "algorithm",
    "losses",
    "targets",
    *(entry.algorithm.split(":")[0] for entry in REGISTRY.values() if entry.algorithm),
}

entries = pytest.mark.parametrize("entry", REGISTRY.values(), ids=REGISTRY)


@entries
def test_every_entry_is_an_algorithm_or_a_list_of_stages(entry: AttackEntry) -> None:
    assert bool(entry.algorithm) != bool(entry.stages)
    attack = resolve_attack(entry.name, ThreatModel())
    assert [stage.label for stage in attack.stages] == list(entry.stages or [attack.label])
    for stage in attack.stages:
        assert stage.algorithm().norm == "linf"
    assert attack.cost >= 1
    assert attack.label.startswith(entry.name)
    assert attack.steps == entry.budget
    assert re.fullmatch(r"[a-z][a-z-]*", entry.name)  # a number after it would be its budget
    assert len(entry.described) <= 100


@entries
def test_only_accepted_settings_change_an_attack(entry: AttackEntry) -> None:
    usual = resolve_attack(entry.name, ThreatModel())
    for parameter, value in {"alpha": 0.5, "steps": 7, "restarts": 3}.items():
        asked = resolve_attack(entry.name, ThreatModel(), **{parameter: value})  # type: ignore[arg-type]
        takes = parameter in entry.parameters
        assert getattr(asked, parameter) == (value if takes else getattr(usual, parameter))
        assert usual.takes(parameter) == takes


@entries
def test_the_seed_matters_only_with_a_random_start(
    entry: AttackEntry, curved: nn.Module, images: Tensor
) -> None:
    queried: set[bytes] = set()

    def model(x: Tensor) -> Tensor:
        queried.update(image.numpy().tobytes() for image in x.detach())
        logits: Tensor = curved(x)
        return logits

    stages, y = ("pgd-2",) if entry.stages else None, curved(images).argmax(dim=1)
    counts = []
    for seed in (0, 1):
        attack = resolve_attack(entry.name, ThreatModel(), steps=2, stages=stages, seed=seed)
        attack.run(model, images, y)
        counts.append(len(queried))
    assert (counts[1] > counts[0]) == entry.random_start


def test_stages_are_data() -> None:
    attack = resolve_attack("autoattack", ThreatModel(), stages=("pgd-5", "square-10"), seed=4)
    assert [stage.label for stage in attack.stages] == ["pgd-5", "square-10"]
    assert {stage.seed for stage in attack.stages} == {4}
    assert attack.cost == 1 + 11 + 11
    with pytest.raises(ValueError, match="an attack of several stages, got pgd"):
        resolve_attack("pgd", ThreatModel(), stages=("fgsm",))


def test_names_as_text() -> None:
    assert names(lambda entry: entry.name in ("pgd", "square", "fgsm")) == "fgsm, pgd and square"
    assert names(lambda entry: entry.name == "pgd") == "pgd"
    assert takers("alpha") == "pgd and pgd-margin"
    assert default_budgets().startswith("20 for pgd, ")
    assert set(DEFAULT_ATTACKS) <= set(REGISTRY)


def test_attack_table_in_the_docs_is_up_to_date() -> None:
    """Printed by ``python -m robust.attack_registry``."""
    assert any(markdown_table() in page.read_text() for page in PAGES)


def imported(path: Path) -> set[str]:
    """Modules of `robust.attacks` that `path` imports when it runs."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    return {
        node.module.removeprefix("robust.attacks.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and id(node) not in typing_only and node.module
    }


@pytest.mark.parametrize("name", sorted(MATHS))
def test_attack_math_does_not_import_the_engine(name: str) -> None:
    assert not imported(ATTACKS / f"{name}.py") & (ENGINE | {"settings", "robust.attack_registry"})


def test_schedule_and_registry_need_no_torch() -> None:
    for path in (ATTACKS / "schedule.py", ROOT / "robust" / "attack_registry.py"):
        tree = ast.parse(path.read_text())
        modules = {n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)}
        assert not (modules | imported(path)) & {"torch", "numpy"}


ADDED = """
import sys
from starlette.testclient import TestClient
import robust_cli
from app.application import create_app
from app.settings import Settings

checkpoint, data, report = sys.argv[1:]
assert robust_cli.run(["attack", "--help"]) == 0
limits = TestClient(create_app(Settings(checkpoint=checkpoint, device="cpu"))).get("/limits").json()
(choice,) = [item for item in limits["attacks"] if item["name"] == "uniform"]
assert (choice["title"], choice["unit"], choice["uses_gradient"]) == ("UNIFORM", "queries", False)
assert (choice["steps"], choice["cost"]) == (100, 101)
options = ["--attack", "uniform-7", "--curve", "0", "--device", "cpu", "--json", report]
sys.exit(robust_cli.run(["evaluate", "--checkpoint", checkpoint, "--data", data, *options]))
"""


def test_documented_example_attack_appears_everywhere(
    tmp_path: Path, checkpoint_path: Path
) -> None:
    (patch,) = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    changed = re.findall(r"^(?:\+(?!\+\+ )|-(?!-- ))", patch, re.MULTILINE)
    assert len(changed) < 40
    for package in ("app", "robust", "training"):
        shutil.copytree(ROOT / package, tmp_path / package)
    shutil.copy(ROOT / "robust_cli.py", tmp_path)
    subprocess.run(["git", "apply", "-C1"], input=patch, text=True, cwd=tmp_path, check=True)
    data, report = tmp_path / "data.npz", tmp_path / "report.json"
    np.savez(data, images=np.zeros((2, 32, 32, 3), np.uint8), labels=np.array([0, 1]))
    done = subprocess.run(
        [sys.executable, "-c", ADDED, checkpoint_path, data, report],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"uniform +uniform noise in the ball \(100 queries\)", done.stdout)
    results = {row["attack"]: row for row in json.loads(report.read_text())["results"]}
    assert results["uniform-7"]["n"] == 2
    assert results["uniform-7"]["backwards"] == 0

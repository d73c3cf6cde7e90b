"""Which room of the service may import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import app

ROOT = Path(app.__file__).parent
# Each may import itself and what stands below it; those of one line don't import each other.
FLOORS = (
    {"errors", "settings", "configuration", "metrics", "logs", "tracing"},
    {"engine", "decoding"},
    {"jobs"},
    {"service"},
    {"http", "playground"},
    {"application"},
    {"server"},
    {"commands"},
)
LOWEST = FLOORS[0]


def room(module: str) -> str:
    return module.split(".")[1]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module == "app" else [node.module]


def test_imports_only_lead_downwards() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    arrows = {
        (room(".".join(["app", *path.relative_to(ROOT).with_suffix("").parts])), room(name))
        for path in ROOT.rglob("*.py")
        if path.parent != ROOT or path.stem != "__init__"
        for name in imported(path)
        if name.startswith("app.")
    }
    assert {name for arrow in arrows for name in arrow} == floor.keys()
    wrong = [
        (above, below)
        for above, below in arrows
        if above != below and floor[below] >= floor[above] and not {above, below} <= LOWEST
    ]
    assert wrong == []

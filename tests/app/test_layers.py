"""Which package of the service may import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import app

ROOT = Path(app.__file__).parent
# Lowest first. A package may import itself and lower layers, but no other of its own layer.
LAYERS = (
    {"errors", "settings", "configuration", "metrics", "logs", "tracing"},
    {"engine", "decoding"},
    {"jobs"},
    {"service"},
    {"http", "playground"},
    {"application"},
    {"server"},
    {"commands"},
)
LOWEST = LAYERS[0]


def package_of(module: str) -> str:
    return module.split(".")[1]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module == "app" else [node.module]


def test_imports_point_only_downward() -> None:
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    edges = {
        (
            package_of(".".join(["app", *path.relative_to(ROOT).with_suffix("").parts])),
            package_of(name),
        )
        for path in ROOT.rglob("*.py")
        if path.parent != ROOT or path.stem != "__init__"
        for name in imported(path)
        if name.startswith("app.")
    }
    assert {name for edge in edges for name in edge} == layer.keys()
    wrong = [
        (importer, target)
        for importer, target in edges
        if importer != target
        and layer[target] >= layer[importer]
        and not {importer, target} <= LOWEST
    ]
    assert wrong == []

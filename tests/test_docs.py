"""Every page: commands run or state why not, links work, and the site builds."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.copies import copy_for_commands

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Pages whose commands a test of their own runs.
ELSEWHERE = {
    "http.md": "tests/test_http.py",
    "your-own-model.md": "tests/robust/test_model_pages.py",
}
BLOCK = re.compile(r"(?P<why><!-- not run: [^>]+ -->\n\s*)?```sh\n(?P<commands>.*?)```", re.DOTALL)


def commands() -> list[Any]:
    """The blocks that are to be run, each with its page."""
    found = []
    for page in sorted(DOCS.glob("*.md")):
        if page.name in ELSEWHERE:
            continue
        for number, match in enumerate(BLOCK.finditer(page.read_text())):
            if match["why"] is None:
                name = f"{page.name}-{number}"
                found.append(pytest.param(match["commands"].strip(), id=name))
    return found


@pytest.mark.parametrize("block", commands())
def test_documented_command_runs(block: str, tmp_path: Path) -> None:
    lines = block.replace("\\\n", " ").splitlines()
    assert all(re.match(r"robust |#|$", line) for line in lines), "say `<!-- not run: why -->`"
    for folder in ("examples", "models"):
        copy_for_commands(ROOT / folder, tmp_path / folder)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, done.stderr


def test_named_tests_exist() -> None:
    for page, test in ELSEWHERE.items():
        assert page in (ROOT / test).read_text()


# The site


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs")
def test_site_has_no_dead_links(tmp_path: Path) -> None:
    """`--strict` turns every warning into an error: links, anchors, pages outside the menu."""
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    reference = (tmp_path / "reference" / "attacks.html").read_text()
    assert 'id="robust.attacks.api.pgd"' in reference
    assert "Madry" in reference  # docstrings, and not only names
    for page in tmp_path.rglob("*.html"):  # it reads without a network
        assert not re.findall(r'<(?:script|link)[^>]*(?:src|href)="https?://', page.read_text())


def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "site" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs")
@pytest.mark.parametrize(
    ("markdown", "source", "page", "expected"),
    [
        ("[a](docs/http.md#x)", "README.md", "index.md", "[a](http.md#x)"),
        ("![a](docs/curve.png)", "README.md", "index.md", "![a](curve.png)"),
        ("[a](../README.md)", "models/README.md", "model-card.md", "[a](index.md)"),
        ("[a](../app/settings.py)", "docs/http.md", "http.md", "a (`app/settings.py`)"),
        ("`[a](nowhere.md)`", "README.md", "index.md", "`[a](nowhere.md)`"),
        ("[a](https://example.org/)", "README.md", "index.md", "[a](https://example.org/)"),
    ],
)
def test_links_point_into_the_site(markdown: str, source: str, page: str, expected: str) -> None:
    assert hooks().rewrite(markdown, source, page) == expected


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs")
def test_broken_link_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    hooks().rewrite("[a](gone.md)", "README.md", "index.md")
    assert "README.md links to gone.md" in caplog.text


# The reference


def reference() -> list[str]:
    pages = sorted((DOCS / "reference").glob("*.md"))
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]


def source_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def undocumented(module: str) -> list[str]:
    """Public functions, classes and methods that are defined in a module without a docstring."""
    tree = ast.parse(source_of(module).read_text())
    missing = [] if ast.get_docstring(tree) else [module]
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if not isinstance(node, definitions) or node.name.startswith("_"):
            continue
        inner = node.body if isinstance(node, ast.ClassDef) else []
        for item in (node, *inner):
            if isinstance(item, definitions) and not item.name.startswith("_"):
                if ast.get_docstring(item) is None:
                    missing.append(f"{module}.{item.name}")
    return missing


def exported(module: str) -> set[str]:
    """The modules that the public names of a package come from."""
    tree = ast.parse(source_of(module).read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {node.module for node in imports if node.module and node.module.startswith(module)}


@pytest.mark.parametrize("module", reference())
def test_every_public_name_has_a_docstring(module: str) -> None:
    modules = {module, *exported(module)}
    assert [name for item in sorted(modules) for name in undocumented(item)] == []


def test_where_to_add_table_names_existing_files() -> None:
    text = (DOCS / "architecture.md").read_text()
    table = text.partition("## Where do I add")[2]
    paths = re.findall(r"`((?:app|robust|training|docs)/[\w./-]+)`", table)
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []


# For whoever forks it


def test_workflow_runs_the_tests_on_linux() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    job = workflow["jobs"]["test"]
    assert job["runs-on"].startswith("ubuntu")
    assert job["steps"][-1]["run"] == "make test"


def test_pre_commit_hooks_match_make() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"  # nothing is downloaded
    tools = {hook["entry"].split()[0] for hook in repository["hooks"]}
    assert tools == {".venv/bin/ruff", ".venv/bin/mypy"}
    makefile = (ROOT / "Makefile").read_text()
    for tool in tools:
        assert f"$(BIN)/{tool.removeprefix('.venv/bin/')}" in makefile

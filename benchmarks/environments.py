"""Separate environments for the tools that benchmarks compare with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click


def peer_environment(folder: Path, requirements: Path) -> Path:
    """The Python of an environment with the `requirements`, which is created if necessary."""
    python = folder / "bin" / "python"
    wanted = requirements.read_text()
    mark = folder / requirements.name
    if not mark.exists() or mark.read_text() != wanted:
        click.echo(f"installing the peers in {folder}; this takes minutes", err=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(requirements)], check=True)
        mark.write_text(wanted)
    return python

"""Environments of their own for what is measured against."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click


def environment_of_peers(folder: Path, requirements: Path) -> Path:
    """The Python of an environment with the `requirements`, made when it is not there."""
    python = folder / "bin" / "python"
    wanted = requirements.read_text()
    mark = folder / requirements.name
    if not mark.exists() or mark.read_text() != wanted:
        click.echo(f"setting up the peers in {folder}: minutes", err=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(requirements)], check=True)
        mark.write_text(wanted)
    return python

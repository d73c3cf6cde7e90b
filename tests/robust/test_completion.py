"""Shells complete commands and options."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from robust_cli import run


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_call_robust(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_ROBUST_COMPLETE={shell}_complete" in script
    assert " robust" in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_and_options() -> None:
    commands = """
        eval "$(robust completion bash)"
        ask() {
            COMPREPLY=(); COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _robust_completion robust
        }
        ask robust e; echo "${COMPREPLY[@]}"
        ask robust report --ev; echo "${COMPREPLY[@]}"
        ask robust completion z; echo "${COMPREPLY[@]}"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", commands],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["evaluate export", "--evaluation", "zsh"]


def test_unsupported_shell_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", "tcsh"]) == 2
    assert "'bash', 'zsh', 'fish'" in capsys.readouterr().err

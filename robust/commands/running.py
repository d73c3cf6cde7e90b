"""Runs commands: exit status and error messages."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

USER_ERROR = 2
INTERRUPTED = 130  # as in shells: 128 plus the number of SIGINT


def main(command: click.Command, *, name: str) -> NoReturn:
    """Run `command` with this process's arguments and exit.

    The exit status is 0 on success, 1 if some images can't be read or the reader closed the pipe,
    2 for a user error, 130 for Ctrl-C.
    """
    # OpenMP reads this when torch is loaded. By default its idle threads spin for milliseconds, so
    # two processes on the same cores slow each other down. With a short spin, each of two float32
    # ResNet-50 trainings on two cores does 74 images/s instead of 13; a single one is 3% slower.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    sys.exit(run_command(command, sys.argv[1:], name=name))


def run_command(command: click.Command, arguments: Sequence[str], *, name: str) -> int:
    """Run `command`, called `name` by its user, and return its exit status.

    A user error (a wrong option, a broken file, a full disk) is one line on standard error.
    Anything else is a bug in this project and keeps its traceback.
    """
    try:
        result: Any = command.main(list(arguments), prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        click.echo(f"{name}: {error.format_message()}", err=True)
        return USER_ERROR
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader closed the pipe, as `head` does. Python would fail again in its flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if "--traceback" in arguments or not _is_user_error(error):
            raise
        line = "".join(char if char.isprintable() else " " for char in _message(error))
        click.echo(f"{name}: {line}", err=True)
        return USER_ERROR
    return result if isinstance(result, int) else 0


def _is_user_error(error: Exception) -> bool:
    # By name, because torch is not imported here.
    return not isinstance(error, RuntimeError) or type(error).__name__ == "OutOfMemoryError"


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror.lower()}"
    if isinstance(error, MemoryError | RuntimeError):
        return "expected enough memory, found too little; try a smaller batch"
    return str(error) or type(error).__name__

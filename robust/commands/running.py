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
    """Run `command` with this process's arguments and exit: 0 when done, 130 for Ctrl-C.

    2 is for user errors.
    """
    # Read by OpenMP when torch is loaded. Its idle threads spin for milliseconds by default: two
    # processes on the same cores take them from each other. With a short spin each of two float32
    # ResNet-50 trainings on two cores does 74 images/s instead of 13; alone it costs 3%.
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
        # The reader closed the pipe, like `head`. Python would fail again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if "--traceback" in arguments or not _is_users(error):
            raise
        line = "".join(char if char.isprintable() else " " for char in _in_words(error))
        click.echo(f"{name}: {line}", err=True)
        return USER_ERROR
    return result if isinstance(result, int) else 0


def _is_users(error: Exception) -> bool:
    # Recognized by name: torch is not imported here.
    return not isinstance(error, RuntimeError) or type(error).__name__ == "OutOfMemoryError"


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror.lower()}"
    if isinstance(error, MemoryError | RuntimeError):
        return "expected enough memory, found too little; try a smaller batch"
    return str(error) or type(error).__name__

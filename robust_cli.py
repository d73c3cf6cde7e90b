"""The command ``robust``: the sub-commands of every package, and how it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

import app.commands
import robust.commands
import training.commands
from robust.commands.completion import completion

USER_ERROR = 2
INTERRUPTED = 130  # as shells say it: 128 and the number of SIGINT


class _InOrder(click.Group):
    """Lists commands in the order one meets them, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The first sentence of each whole, on two lines where it takes them."""
        rows = [(name, item.get_short_help_str(limit=200)) for name, item in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from robust.environment import project_version

        click.echo(f"robust {project_version()}")
        ctx.exit()


@click.group(
    cls=_InOrder,
    commands=[
        *training.commands.commands,
        *robust.commands.commands,
        *app.commands.commands,
        completion,
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
@click.option(
    "--traceback",
    is_flag=True,
    expose_value=False,
    help="Show where in the code an error came from.",
)
def cli() -> None:
    """A robust image classifier you can train, attack, measure and serve."""


def main() -> None:
    """Run the command line and exit: 0 when done, 2 for what the user can mend, 130 for Ctrl-C."""
    # Read by OpenMP when torch is loaded. Its idle threads spin for milliseconds by default: two
    # processes on the same cores take them from each other. With a short spin each of two float32
    # ResNet-50 trainings on two cores does 74 images/s instead of 13; alone it costs 3%.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status.

    What a user can mend (a wrong option, a broken file, a full disk) is one line on standard
    error. Anything else is a defect of this project and keeps its traceback.
    """
    try:
        result: Any = cli.main(list(arguments), prog_name="robust", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        click.echo(f"robust: {error.format_message()}", err=True)
        return USER_ERROR
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away, as `head` does. Python would fail once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if "--traceback" in arguments or not _is_users(error):
            raise
        line = "".join(char if char.isprintable() else " " for char in _in_words(error))
        click.echo(f"robust: {line}", err=True)
        return USER_ERROR
    return result if isinstance(result, int) else 0


def _is_users(error: Exception) -> bool:
    # Told by its name: torch is not imported here.
    return not isinstance(error, RuntimeError) or type(error).__name__ == "OutOfMemoryError"


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror.lower()}"
    if isinstance(error, MemoryError | RuntimeError):
        return "expected enough memory, found too little; try a smaller batch"
    return str(error) or type(error).__name__


if __name__ == "__main__":
    main()

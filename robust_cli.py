"""The command ``robust``: the sub-commands of all packages."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import click

import app.commands
import robust.commands
import training.commands
from robust.commands import running
from robust.commands.completion import completion


def _in_ascii(kind: Any) -> Any:
    """A number type that accepts only ASCII digits, without underscores."""
    strict, convert = copy(kind), kind.convert

    def checked(value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and (not value.isascii() or "_" in value):
            strict.fail(f"{value!r} is not a number in digits 0 to 9.", param, ctx)
        return convert(value, param, ctx)

    strict.convert = checked
    return strict


def _read_numbers_in_ascii(command: click.Command) -> None:
    for param in command.params:
        if isinstance(param.type, click.types.IntParamType | click.types.FloatParamType):
            param.type = _in_ascii(param.type)
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        _read_numbers_in_ascii(inner)


class _InOrder(click.Group):
    """Lists commands in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Shows each command's whole first sentence, wrapped if needed."""
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


_read_numbers_in_ascii(cli)


def main() -> None:
    """Run the command line and exit."""
    running.main(cli, name="robust")


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status."""
    return running.run_command(cli, arguments, name="robust")


if __name__ == "__main__":
    main()

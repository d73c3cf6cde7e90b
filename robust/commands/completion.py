"""``robust completion``: shell completion of commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

PROGRAM, VARIABLE = "robust", "_ROBUST_COMPLETE"
SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the shell completion script for robust's commands and options.

    Load it in your shell's startup file. Examples:

    \b
        echo 'eval "$(robust completion bash)"' >> ~/.bashrc
        echo 'eval "$(robust completion zsh)"' >> ~/.zshrc
        robust completion fish > ~/.config/fish/completions/robust.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    # Not `script.source()`, which runs bash to check its version even on a machine without bash.
    script = kind(ctx.find_root().command, {}, PROGRAM, VARIABLE)
    click.echo(script.source_template % script.source_vars())

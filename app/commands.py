"""The commands ``robust serve`` and ``robust migrate``. They import torch only when they run."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Any

import click

from app.errors import ServeError
from robust.commands.options import describing_options

BACKLOG = 2048


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0: any free port.",
)
@click.option(
    "--model",
    "--checkpoint",
    "checkpoint",
    type=click.Path(path_type=Path),
    metavar="MODEL",
    help="Model to serve, as for robust evaluate.  [default: $ROBUST_CHECKPOINT or "
    "models/robust_model.pt]",
)
@describing_options
@click.option("--root-path", help="Path prefix of the service behind a proxy.  [default: none]")
@click.option(
    "--device",
    metavar="NAME",
    help="auto, cpu, cuda, cuda:N, mps or xpu.  [default: $ROBUST_DEVICE or auto]",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    help="auto: bf16 if it agrees and is faster.  [default: $ROBUST_PRECISION or auto]",
)
def serve(host: str, port: int, **given: Any) -> None:
    """Serve a model over HTTP until SIGTERM or Ctrl-C.

    If the checkpoint file is replaced, the service loads the new one without a restart; SIGHUP
    makes it check immediately. Options override the environment variables of the same name, such
    as ROBUST_ARCH; other settings, such as ROBUST_MAX_STEPS, have only a variable. Examples:

    \b
        robust serve --checkpoint models/digits.pt --port 9000
        robust serve --model theirs.pth --mean cifar10 --std cifar10 --classes names.txt
    """
    # First, so that a port in use is reported before the model is loaded.
    with listen(host, port) as listener:
        from app.server import run

        run(listener, **given)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ServeError, which says what is wrong with the address."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except socket.gaierror:
        raise ServeError(f"{host}: expected an IP address or a known host name") from None
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: f"port {port} is in use; choose another with --port",
            errno.EACCES: f"this user may not use port {port}; choose one above 1023",
            errno.EADDRNOTAVAIL: f"{host} is not an address of this machine",
        }
        reason = reasons.get(error.errno or 0, error.strerror or str(error))
        raise ServeError(f"can't listen on {host}:{port}: {reason}") from None


@click.command()
@click.option("--to", type=click.IntRange(1), help="Version of the tables.  [default: the newest]")
def migrate(to: int | None) -> None:
    """Upgrade the tables in $ROBUST_DATABASE_URL, or downgrade them.

    `robust serve` upgrades them automatically. Before starting an older release, stop all
    replicas and downgrade the tables to its version. Example:

        robust migrate --to 1
    """
    from app.server import read_settings

    url = read_settings().database_url
    if url is None:
        raise ServeError("ROBUST_DATABASE_URL: expected postgresql://..., found none")
    try:
        import psycopg

        from app.jobs.migrate import migrate as run
        from app.jobs.postgres_schema import VERSION, SchemaError
    except ModuleNotFoundError:
        raise ServeError("needs the extra postgres: pip install 'robust[postgres]'") from None
    try:
        have, want = run(url.get_secret_value(), to or VERSION)
    except SchemaError as error:
        raise ServeError(str(error)) from None
    except psycopg.Error as error:
        text = error.diag.message_primary or str(error)
        raise ServeError(f"PostgreSQL: {' '.join(text.split())}") from None
    click.echo(f"version {want}" if have == want else f"version {have} -> {want}")


commands: list[click.Command] = [serve, migrate]

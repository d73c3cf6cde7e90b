"""The command that serves a checkpoint. Nothing here imports torch before it runs."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import click

BACKLOG = 2048


class ServeError(click.ClickException):
    """Why the service can't start, in one line."""

    exit_code = 2


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Weights to serve.  [default: $ROBUST_CHECKPOINT or models/robust_model.pt]",
)
@click.option("--device", help="auto, cpu or cuda.  [default: $ROBUST_DEVICE or auto]")
def serve(host: str, port: int, checkpoint: Path | None, device: str | None) -> None:
    """Serve a checkpoint over HTTP until SIGTERM or Ctrl-C.

    A new checkpoint in the same place is taken over without a restart, at once after SIGHUP.
    Everything else is set by environment variables, ROBUST_MAX_STEPS and others. Example:

        robust serve --checkpoint models/digits.pt --port 9000
    """
    # First of all, so that a port in use is told before seconds go into loading.
    with listen(host, port) as listener:
        from app.server import run

        run(listener, checkpoint=checkpoint, device=device)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ServeError saying what is wrong with the address."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except socket.gaierror:
        raise ServeError(f"{host}: expected an address or a host's name, found none") from None
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: f"port {port} is in use; choose another with --port",
            errno.EACCES: f"port {port} needs rights that this user lacks; choose one above 1023",
            errno.EADDRNOTAVAIL: f"{host} is no address of this machine",
        }
        reason = reasons.get(error.errno or 0, error.strerror or str(error))
        raise ServeError(f"can't listen on {host}:{port}: {reason}") from None


commands: list[click.Command] = [serve]

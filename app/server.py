"""Runs the service in this process: from a listening socket to a clean end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import uvicorn
from pydantic import ValidationError

from app import logs
from app.application import create_app
from app.commands import ServeError
from app.memory import settle
from app.parameters import describe
from app.protocol import patient_for
from app.service import Service
from app.settings import Settings

# Longer than proxies and clients keep theirs: who closes first never resets a request on its way.
KEEP_ALIVE_SECONDS = 75
EXAMPLE = Path("examples/cat.jpg")


def run(
    listener: socket.socket, *, checkpoint: Path | None = None, device: str | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests in hand.

    Raises CheckpointError for a checkpoint that can't be used, ValueError for a device that is
    not there, ServeError for a setting that makes no sense.
    """
    settings = read_settings(checkpoint=checkpoint, device=device)
    logs.configure(settings)
    app = create_app(settings)
    service: Service = app.state.service
    service.models.load()
    config = uvicorn.Config(
        app,
        http=patient_for(settings.upload_seconds),
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=1,  # after `Service.drain` has waited
    )
    # uvloop's where it is installed: it takes less of the processors that the forward needs.
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(_Server(config), service, listener))


def read_settings(*, checkpoint: Path | None = None, device: str | None = None) -> Settings:
    """The settings of the environment, or those given. Raises ServeError in one line."""
    given: dict[str, Any] = {"checkpoint": checkpoint, "device": device}
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(str(part) for part in first["loc"]).upper()
        expected = first["msg"].removeprefix("Input should be ")
        got = describe(first["input"])
        raise ServeError(f"ROBUST_{name}: expected {expected}, got {got}") from None


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would close at once, and end by the signal, not with 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(server: _Server, service: Service, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_stop() -> None:
        (hurry if stop.is_set() else stop).set()  # asked twice: wait for nobody

    loop.add_signal_handler(signal.SIGTERM, on_stop)
    loop.add_signal_handler(signal.SIGINT, on_stop)
    loop.add_signal_handler(signal.SIGHUP, service.models.ask)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        settle()
        _announce(listener, service.settings.checkpoint)
    await _first(serving, stop.wait())
    if not serving.done():
        await _first(service.drain(), hurry.wait())
        server.should_exit = True
    await serving


async def _first(*waits: Coroutine[Any, Any, object] | asyncio.Task[None]) -> None:
    """Wait until one of them ends, and cancel those that were begun for this."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, wait in zip(tasks, waits, strict=True):
        if task is not wait:
            task.cancel()


def _announce(listener: socket.socket, checkpoint: Path) -> None:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    address = f"http://{host}:{port}"
    photo = EXAMPLE if EXAMPLE.is_file() else Path("photo.jpg")
    click.echo(f"Serving {checkpoint} on {address} (documentation at {address}/docs). Try:")
    click.echo(f"  curl -F file=@{photo} {address}/predict")

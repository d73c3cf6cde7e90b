"""Runs the service in this process: from a listening socket to a clean end."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from threading import Timer
from typing import Any

import click
import uvicorn
from pydantic import ValidationError

from app import logs
from app.application import create_app
from app.engine.gc_tuning import freeze_objects
from app.errors import ServeError
from app.http.connection import OpenConnections, connection_class
from app.http.parameters import describe
from app.http.trust import LOOPBACK_HOSTS, trusted_addresses
from app.service import Service
from app.settings import Settings
from robust.loading.given import shown

# Longer than proxies and clients keep idle connections, so that the service never closes first.
KEEP_ALIVE_SECONDS = 75
EXAMPLE = Path("examples/cat.jpg")
MAX_DESCRIPTORS = 2**16
SPARE_DESCRIPTORS = 256
# Of the grace time, when the process exits whatever it is at: freeing its memory takes the rest.
EXIT_SHARE = 0.9
EXIT_SECONDS = 1.0  # the least, for a shorter grace time


def run(listener: socket.socket, **given: Any) -> None:
    """Serve until SIGTERM or SIGINT, then finish the open requests.

    `given` are settings that go before those of the environment. Raises CheckpointError for a
    checkpoint that can't be used, ValueError for a device that is not there or does not compute
    what the CPU does, ServeError for a setting that makes no sense.
    """
    settings = read_settings(**given)
    if not settings.allowed_hosts and ip_address(listener.getsockname()[0]).is_loopback:
        settings = settings.model_copy(update={"allowed_hosts": LOOPBACK_HOSTS})
    logs.configure(settings)
    app = create_app(settings)
    service: Service = app.state.service
    service.load()
    config = uvicorn.Config(
        app,
        http=connection_class(settings.upload_seconds, _connections(settings)),
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # ours has the prefix too
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=1,  # after `Service.drain` has waited
    )
    # uvloop's where it is installed: it takes less of the processors that the forward needs.
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(_Server(config), service, listener))
    # All is stored and closed. Python would free the memory piece by piece, for up to a second.
    sys.stdout.flush()
    os._exit(0)


def _connections(settings: Settings) -> OpenConnections:
    """As many as there may be file descriptors, less those that files and workers need."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(most if most != resource.RLIM_INFINITY else MAX_DESCRIPTORS, MAX_DESCRIPTORS)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    proxies = trusted_addresses(settings.trusted_proxies)
    spare = min(SPARE_DESCRIPTORS, most // 2)
    return OpenConnections(most - spare, share=settings.client_share, proxies=proxies)


def read_settings(**given: Any) -> Settings:
    """The settings of the environment, or those given. Raises ServeError in one line."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(str(part) for part in first["loc"]).upper()
        expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
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
        if not stop.is_set():
            _exit_after(max(EXIT_SHARE * service.settings.grace_seconds, EXIT_SECONDS))
        (hurry if stop.is_set() else stop).set()  # asked twice: wait for nobody

    loop.add_signal_handler(signal.SIGTERM, on_stop)
    loop.add_signal_handler(signal.SIGINT, on_stop)
    loop.add_signal_handler(signal.SIGHUP, service.models.ask)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        freeze_objects()
        _announce(listener, service.settings.checkpoint)
    await _first(serving, stop.wait())
    if not serving.done():
        await _first(service.drain(), hurry.wait())
        await service.abort_requests()
        server.should_exit = True
    await serving


def _exit_after(seconds: float) -> None:
    """Exit with 0 after that time, whatever a thread or the device is still working on."""
    timer = Timer(seconds, os._exit, (0,))
    timer.daemon = True
    timer.start()


async def _first(*waits: Coroutine[Any, Any, object] | asyncio.Task[None]) -> None:
    """Wait until one of them ends, and cancel the others that were started here."""
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
    click.echo(f"Serving {shown(checkpoint)} on {address} (documentation at {address}/docs). Try:")
    click.echo(f"  curl -F file=@{photo} {address}/predict")

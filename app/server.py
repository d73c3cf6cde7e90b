"""Runs the service in this process, from a listening socket to a clean exit."""

from __future__ import annotations

import asyncio
import gc
import logging
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
from app.settings import Settings, unknown_variables
from robust.loading.given import shown

logger = logging.getLogger(__name__)

# Longer than proxies and clients keep idle connections, so that the service never closes first.
KEEP_ALIVE_SECONDS = 75
EXAMPLE = Path("examples/horse.jpg")
MAX_DESCRIPTORS = 2**16
SPARE_DESCRIPTORS = 256
# After this share of the grace time the process exits, whatever is still running. The rest is for
# the system to free its memory.
EXIT_SHARE = 0.9
EXIT_SECONDS = 1.0  # the minimum, for a short grace time
_SECRET = ("API_KEYS", "ADMIN_KEYS", "DATABASE_URL", "TRACES")  # a URL may have a password


def run(listener: socket.socket, **given: Any) -> None:
    """Serve until SIGTERM or SIGINT, then finish the open requests.

    `given` are settings that override the environment. Raises CheckpointError for an unusable
    checkpoint, ValueError for a device that is missing or disagrees with the CPU, and ServeError
    for an invalid setting.
    """
    settings = read_settings(**given)
    if not settings.allowed_hosts and ip_address(listener.getsockname()[0]).is_loopback:
        settings = settings.model_copy(update={"allowed_hosts": LOOPBACK_HOSTS})
    logs.configure(settings)
    for message in unknown_variables(os.environ):
        logger.warning("%s", message)
    app = create_app(settings)
    service: Service = app.state.service
    gc.freeze()  # loading collects garbage several times, and need not scan what was imported
    service.load()
    config = uvicorn.Config(
        app,
        http=connection_class(settings.upload_seconds, _connections(settings)),
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # ProxyMiddleware handles them, and the path prefix too
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=1,  # `Service.drain` has waited before
    )
    # uvloop's event loop, if installed: it leaves more of the CPU to the model.
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(_Server(config), service, listener))
    # Everything is stored and closed. A normal exit would take up to a second to free memory.
    sys.stdout.flush()
    os._exit(0)


def _connections(settings: Settings) -> OpenConnections:
    """A limit on connections: the file descriptors that files and workers leave.

    Raises the process's own limit on file descriptors as far as it may.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(most if most != resource.RLIM_INFINITY else MAX_DESCRIPTORS, MAX_DESCRIPTORS)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    proxies = trusted_addresses(settings.trusted_proxies)
    spare = min(SPARE_DESCRIPTORS, most // 2)
    return OpenConnections(most - spare, share=settings.client_share, proxies=proxies)


def read_settings(**given: Any) -> Settings:
    """The settings from `given`, else from the environment. Raises ServeError."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(str(part) for part in first["loc"]).upper()
        expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        value = first["input"]
        hide = name in _SECRET or not isinstance(value, str)
        got = describe(value) if hide else repr(value[:100])
        raise ServeError(f"ROBUST_{name}: expected {expected}, got {got}") from None


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, which close at once and exit by the signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(server: _Server, service: Service, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def on_stop() -> None:
        if stop.is_set():
            stop_now.set()  # a second signal: don't wait for open requests
            return
        stop.set()
        _exit_after(max(EXIT_SHARE * service.settings.grace_seconds, EXIT_SECONDS))

    loop.add_signal_handler(signal.SIGTERM, on_stop)
    loop.add_signal_handler(signal.SIGINT, on_stop)
    loop.add_signal_handler(signal.SIGHUP, service.models.reload)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        freeze_objects()
        _announce(listener, service.settings.checkpoint)
    await _first(serving, stop.wait())
    if not serving.done():
        await _first(service.drain(), stop_now.wait())
        await service.abort_requests()
        server.should_exit = True
    await serving


def _exit_after(seconds: float) -> None:
    """Exit with status 0 after that time, even if a thread or the device is still busy."""
    timer = Timer(seconds, os._exit, (0,))
    timer.daemon = True
    timer.start()


async def _first(*waits: Coroutine[Any, Any, object] | asyncio.Task[None]) -> None:
    """Wait until one of `waits` ends, and cancel the other coroutines; tasks continue."""
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

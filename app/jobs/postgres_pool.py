"""Connections to PostgreSQL: a pool that reconnects on its own, timeouts and notifications."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from prometheus_client import Gauge
from psycopg import AsyncConnection, Error, OperationalError, ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool

from app.jobs.postgres_schema import FIND_VERSION, LOCK, SCHEMA, VERSION, SchemaError, script
from app.jobs.store import Unreachable

logger = logging.getLogger(__name__)

CHANNEL = "robust_evaluations"
RETRY_SECONDS = 2.0
# Timeouts: a request gets 503 after at most 3 seconds, whatever the server does.
WAIT_SECONDS = 2.0  # for a connection from the pool
CHECK_SECONDS = 0.8  # for the health check of an idle connection
QUERY_SECONDS = 2.5  # for the response to a query
SPARE_SECONDS = 0.2
BULK_SECONDS = 20.0  # for a query with images or a journal, or that waits for another replica


class Connection(AsyncConnection[DictRow]):
    """A connection that is closed if the server does not respond for `limit` seconds.

    Cancelling the call would not work: psycopg asks the server to cancel, and waits for that.
    """

    limit = QUERY_SECONDS

    async def wait(self, *arguments: Any, **options: Any) -> Any:
        """Wait for a response of the server."""
        watch = asyncio.create_task(self._watch(self.limit))
        try:
            return await super().wait(*arguments, **options)
        finally:
            watch.cancel()

    async def _watch(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await asyncio.sleep(SPARE_SECONDS)  # for a response that came while the event loop was busy
        self._close_socket()

    def _close_socket(self) -> None:
        """Close the socket, which ends the wait with an error."""
        with suppress(OSError), socket.socket(fileno=os.dup(self.pgconn.socket)) as other:
            other.shutdown(socket.SHUT_RDWR)


class Database:
    """A pool of connections to the schema `robust`.

    While the server is down, calls raise StoreError, the metric `up` is 0, and the pool tries to
    reconnect. Raises ValueError for a malformed URL.
    """

    def __init__(self, url: str, up: Gauge) -> None:
        try:
            given = conninfo_to_dict(url).get("options") or ""
        except ProgrammingError as error:
            raise ValueError(
                f"ROBUST_DATABASE_URL: expected postgresql://USER:PASSWORD@HOST/DATABASE: {error}"
            ) from None
        self._url, self._up = url, up
        self._options: dict[str, Any] = {
            "row_factory": dict_row,
            "application_name": "robust",
            "connect_timeout": 3,
            # The server cleans up after a replica that died or closed its connection.
            "options": f"{given} -c search_path={SCHEMA} -c statement_timeout=30s"
            " -c lock_timeout=10s -c idle_in_transaction_session_timeout=30s",
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
        }
        self.pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            url,
            connection_class=Connection,
            kwargs=self._options,
            min_size=1,
            max_size=8,
            open=False,
            timeout=WAIT_SECONDS,
            reconnect_timeout=RETRY_SECONDS,
            check=_check,
            name="robust",
        )
        self._prepared = False  # whether the tables have this release's version
        self._was_prepared = False  # if so, this process does not migrate them again

    async def open(self) -> None:
        """Start to connect, without waiting."""
        await self.pool.open(wait=False)

    async def close(self) -> None:
        """Close all connections."""
        await self.pool.close()

    @asynccontextmanager
    async def connection(self, *, limit: float = QUERY_SECONDS) -> AsyncIterator[Connection]:
        """A transaction in which every query takes at most `limit` seconds. Raises StoreError."""
        if not self._prepared:
            raise Unreachable(
                "PostgreSQL has not been reached yet, or its tables have another version"
            )
        async with self._reporting(), self.pool.connection() as connection:
            connection.limit = limit
            yield connection

    async def prepare(self) -> None:
        """Create or upgrade the tables, and check that they have this release's version.

        Raises StoreError. If the tables have another version, `connection` raises too, until a
        later call succeeds; if the server can't be reached, `connection` finds that out itself.
        """
        async with self._reporting(), self.pool.connection() as connection:
            try:
                await self._prepare(connection)
            except SchemaError:
                self._prepared = False
                raise
        self._prepared = self._was_prepared = True
        self._up.set(1)

    async def _prepare(self, connection: Connection) -> None:
        if not self._was_prepared:
            connection.limit = BULK_SECONDS
            await connection.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
            await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        have = await _version(connection)
        if have != VERSION and self._was_prepared:
            raise SchemaError(
                f"the tables now have version {have}; this release works with {VERSION}"
            )
        if have != VERSION:
            await connection.execute(script(have, VERSION))
            logger.info("migrated the PostgreSQL tables from version %d to %d", have, VERSION)

    async def listen(self, notify: Callable[[str], None]) -> None:
        """Call `notify` with the id of each changed job, until cancelled. Raises StoreError."""
        async with (
            self._reporting(),
            await AsyncConnection.connect(
                self._url, autocommit=True, **self._options
            ) as connection,
        ):
            await connection.execute(f"LISTEN {CHANNEL}")
            async for notification in connection.notifies():
                notify(notification.payload)

    @asynccontextmanager
    async def _reporting(self) -> AsyncIterator[None]:
        """Turn PostgreSQL's errors into Unreachable, and update the metric `up`."""
        try:
            yield
        except (Error, OSError, SchemaError) as error:
            if isinstance(error, OperationalError | OSError | SchemaError):
                self._up.set(0)
            text = " ".join(str(error).split()) or type(error).__name__
            raise Unreachable(f"PostgreSQL: {text}") from error
        if self._prepared:  # not for a query that began before `prepare` failed
            self._up.set(1)


async def retry(what: str, attempt: Callable[[], Any]) -> None:
    """Repeat `attempt` until cancelled; a failure that repeats is logged once."""
    logged = ""
    while True:
        try:
            await attempt()
            logged = ""
        except Exception as error:
            if str(error) != logged:
                logged = str(error)
                logger.error("%s: %s; trying again", what, logged)
        await asyncio.sleep(RETRY_SECONDS)


async def _check(connection: Connection) -> None:
    """Raise unless the server responds quickly."""
    connection.limit = CHECK_SECONDS
    await AsyncConnectionPool.check_connection(connection)
    connection.limit = QUERY_SECONDS


async def _version(connection: Connection) -> int:
    """The version of the tables; 0 if there are none."""
    found = await connection.execute("SELECT to_regclass('robust_version') AS found")
    row = await found.fetchone()
    if row is None or row["found"] is None:
        return 0
    row = await (await connection.execute(FIND_VERSION)).fetchone()
    assert row is not None
    version: int = row["version"]
    return version

"""The connection to PostgreSQL: a pool that comes back by itself, tables, and notifications."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from procrastinate import App, PsycopgConnector
from procrastinate.exceptions import ProcrastinateException
from psycopg import AsyncConnection, Error, ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool

from app.store import StoreError

logger = logging.getLogger(__name__)

VERSION = 1
SCHEMA = "robust"  # all that is ours, and the queue's tables, away from whatever else is there
CHANNEL = "robust_evaluations"
RETRY_SECONDS = 2.0
WAIT_SECONDS = 3.0  # for a connection, before a request is answered with 503
LOCK = 0x726F62757374  # of PostgreSQL's advisory locks: who adds a job, or makes the tables

Connection = AsyncConnection[DictRow]

_TABLES = """
CREATE TABLE robust_version (version int NOT NULL);
CREATE TABLE evaluations (
    id text PRIMARY KEY,
    digest text NOT NULL,
    key text,
    model text NOT NULL,
    about json NOT NULL,
    state text NOT NULL DEFAULT 'queued',
    bytes bigint NOT NULL,
    created timestamptz NOT NULL DEFAULT clock_timestamp(),
    changed timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished timestamptz,
    result json,
    error text,
    journal bytea,
    run bigint,
    lost int NOT NULL DEFAULT 0,
    version bigint NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX evaluations_digest ON evaluations (digest)
    WHERE key IS NULL AND state IN ('queued', 'running', 'done');
CREATE UNIQUE INDEX evaluations_key ON evaluations (key)
    WHERE key IS NOT NULL AND state IN ('queued', 'running', 'done');
CREATE TABLE images (
    evaluation text NOT NULL REFERENCES evaluations ON DELETE CASCADE,
    part int NOT NULL,
    content bytea NOT NULL,
    PRIMARY KEY (evaluation, part)
);
ALTER TABLE images ALTER content SET STORAGE EXTERNAL;
CREATE TABLE replicas (id text PRIMARY KEY, model text NOT NULL, seen timestamptz NOT NULL);
"""


class Database:
    """A pool of connections that see the schema `robust`, and the queue `app` on it.

    It may be down, at the start or later: what needs it raises StoreError then, and it is tried
    again. Raises ValueError for an address that is none.
    """

    def __init__(self, url: str) -> None:
        try:
            given = conninfo_to_dict(url).get("options") or ""
        except ProgrammingError as error:
            raise ValueError(
                f"ROBUST_DATABASE_URL: expected postgresql://USER:PASSWORD@HOST/DATABASE: {error}"
            ) from None
        self._url = url
        self._options: dict[str, Any] = {
            "row_factory": dict_row,
            "application_name": "robust",
            "connect_timeout": 5,
            # A replica whose machine is gone holds nothing up for long, nor does a silent server.
            "options": f"{given} -c search_path={SCHEMA} -c idle_in_transaction_session_timeout=30s"
            " -c lock_timeout=10s",
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
        }
        self.pool = AsyncConnectionPool(
            url,
            kwargs=self._options,
            min_size=1,
            max_size=8,
            open=False,
            timeout=WAIT_SECONDS,
            reconnect_timeout=RETRY_SECONDS,
            check=AsyncConnectionPool.check_connection,
            name="robust",
        )
        self.app = App(connector=PsycopgConnector())
        self._prepared = False

    async def open(self) -> None:
        """Begin to connect."""
        await self.pool.open(wait=False)
        await self.app.open_async(self.pool)

    async def close(self) -> None:
        """Give all connections back."""
        await self.pool.close()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A transaction. Raises StoreError where there is none to be had or it fails."""
        if not self._prepared:
            raise StoreError("PostgreSQL has not been reached yet")
        async with _explained(), self.pool.connection() as connection:
            yield connection  # type: ignore[misc]  # the pool's type knows nothing of row_factory

    async def prepare(self) -> None:
        """Make the tables, once. Raises StoreError."""
        if self._prepared:
            return
        async with _explained(), self.pool.connection() as connection:
            await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
            await connection.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
            found = await connection.execute(
                "SELECT to_regclass(%s) AS found", (f"{SCHEMA}.robust_version",)
            )
            if (await found.fetchone())["found"] is None:  # type: ignore[index,call-overload]
                await connection.execute(self.app.schema_manager.get_schema())
                await connection.execute(_TABLES)
                await connection.execute("INSERT INTO robust_version VALUES (%s)", (VERSION,))
            row = await (await connection.execute("SELECT version FROM robust_version")).fetchone()
            if row["version"] != VERSION:  # type: ignore[index,call-overload]
                raise StoreError(f"the tables in PostgreSQL are not of version {VERSION}")
        self._prepared = True

    async def listen(self, tell: Callable[[str], None]) -> None:
        """Call `tell` with the id of each job that changes, until cancelled. Raises StoreError."""
        async with (
            _explained(),
            await AsyncConnection.connect(
                self._url, autocommit=True, **self._options
            ) as connection,
        ):
            await connection.execute(f"LISTEN {CHANNEL}")
            async for notification in connection.notifies():
                tell(notification.payload)


async def retry(what: str, attempt: Callable[[], Any]) -> None:
    """Do it again and again, until cancelled; a failure is logged once, until it is another."""
    said = ""
    while True:
        try:
            await attempt()
            said = ""
        except Exception as error:
            if str(error) != said:
                said = str(error)
                logger.error("%s: %s; trying again", what, said)
        await asyncio.sleep(RETRY_SECONDS)


@asynccontextmanager
async def _explained() -> AsyncIterator[None]:
    try:
        yield
    except (Error, OSError) as error:
        raise StoreError(f"PostgreSQL: {_words(error)}") from error
    except ProcrastinateException as error:
        raise StoreError(f"PostgreSQL: {_words(error.__cause__ or error)}") from error


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

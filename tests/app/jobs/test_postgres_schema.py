"""The PostgreSQL schema: created once, upgraded and downgraded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result

from app.commands import migrate
from app.jobs.postgres_pool import Database
from app.jobs.postgres_schema import VERSION, SchemaError, script
from app.metrics import Metrics
from benchmarks.private_postgres import PrivatePostgres, why_not

FIRST_RELEASE = Path(__file__).with_name("tables_0_1.sql")  # made by pg_dump --schema-only
JOB = """
INSERT INTO evaluations (id, digest, model, about, state, bytes, run, lost)
VALUES ('a', 'd', 'm', '{"dataset": "x"}', 'running', 10, 7, 2);
INSERT INTO images VALUES ('a', 0, 'pixels');
INSERT INTO procrastinate_jobs (id, queue_name, task_name, status) OVERRIDING SYSTEM VALUE
VALUES (7, 'm', 'evaluate', 'doing');
"""
COLUMNS = """
SELECT table_name, column_name, data_type, is_nullable, column_default
FROM information_schema.columns WHERE table_schema = 'robust'
ORDER BY table_name, column_name
"""
INDEXES = "SELECT indexdef FROM pg_indexes WHERE schemaname = 'robust' ORDER BY indexdef"
CONSTRAINTS = """
SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = 'robust'::regnamespace ORDER BY conname
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[PrivatePostgres]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with PrivatePostgres() as postgres:
        yield postgres


def run(url: str, text: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True, options="-c search_path=robust") as db:
        cursor = db.execute(text)  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []


def shape(url: str) -> list[list[tuple[Any, ...]]]:
    return [run(url, text) for text in (COLUMNS, INDEXES, CONSTRAINTS)]


async def prepare(*urls: str) -> None:
    """Make the tables as that many replicas that start at once."""
    databases = [Database(url, Metrics().store_up) for url in urls]
    for database in databases:
        await database.open()
    try:
        await asyncio.gather(*(database.prepare() for database in databases))
    finally:
        for database in databases:
            await database.close()


def test_replicas_starting_together_create_the_tables_once(postgres: PrivatePostgres) -> None:
    url = postgres.database()
    logged = len(postgres.log())  # by other tests
    asyncio.run(prepare(url, url, url, url))
    assert run(url, "SELECT version FROM robust_version") == [(VERSION,)]
    assert "ERROR" not in postgres.log()[logged:]


def downgrade(url: str, monkeypatch: pytest.MonkeyPatch, to: int = 1) -> Result:
    """What `robust migrate --to 1` says."""
    monkeypatch.setenv("ROBUST_DATABASE_URL", url)
    return CliRunner().invoke(migrate, ["--to", str(to)])


def test_upgrade_from_the_first_release_and_downgrade(
    postgres: PrivatePostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.database()
    run(url, FIRST_RELEASE.read_text())
    run(url, "INSERT INTO robust_version VALUES (1)" + ";" + JOB)
    before = shape(url)
    asyncio.run(prepare(url))
    assert shape(url) != before
    assert run(url, "SELECT version FROM robust_version") == [(VERSION,)]
    # What a replica ran is queued, and nobody is said to have been lost.
    assert run(url, "SELECT state, run, lost_by FROM evaluations") == [("queued", 7, [])]
    assert run(url, "SELECT content FROM images") == [(b"pixels",)]
    run(url, """UPDATE evaluations SET about = '{"dataset": "x", "owner": "me"}'""")
    assert downgrade(url, monkeypatch).output == f"version {VERSION} -> 1\n"
    assert shape(url) == before
    assert run(url, "SELECT version FROM robust_version") == [(1,)]
    # The first release queues an evaluation without a task by itself, and knows no owners.
    assert run(url, "SELECT state, lost, about::text FROM evaluations") == [
        ("queued", 0, '{"dataset": "x"}')
    ]
    assert run(url, "SELECT count(*) FROM procrastinate_jobs") == [(0,)]
    assert run(url, "SELECT content FROM images") == [(b"pixels",)]


def test_upgraded_schema_equals_a_new_one(postgres: PrivatePostgres) -> None:
    old, new = postgres.database(), postgres.database()
    run(old, FIRST_RELEASE.read_text())
    run(old, "INSERT INTO robust_version VALUES (1)")
    asyncio.run(prepare(old, new))
    upgraded = [[row for row in rows if "procrastinate" not in str(row)] for rows in shape(old)]
    assert upgraded == shape(new)


def test_downgrade_past_the_creating_release_is_rejected(
    postgres: PrivatePostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.database()
    asyncio.run(prepare(url))
    refused = downgrade(url, monkeypatch)
    assert refused.exit_code == 2
    assert "not created as version 1" in refused.output
    assert downgrade(url, monkeypatch, to=VERSION).output == f"version {VERSION}\n"
    assert run(url, "SELECT version FROM robust_version") == [(VERSION,)]


@pytest.mark.parametrize(("have", "want"), [(VERSION + 1, VERSION), (1, 0), (1, VERSION + 1)])
def test_unknown_schema_versions_are_rejected(have: int, want: int) -> None:
    with pytest.raises(SchemaError, match=r"version"):
        script(have, want)

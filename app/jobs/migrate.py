"""Upgrades or downgrades the tables in PostgreSQL."""

from __future__ import annotations

import psycopg

from app.jobs.postgres_schema import FIND_VERSION, LOCK, SCHEMA, VERSION, script


def migrate(url: str, want: int = VERSION) -> tuple[int, int]:
    """Migrate the tables to version `want`; returns the version before (0: none) and after.

    Raises SchemaError for an unknown version and psycopg.Error if PostgreSQL refuses; the tables
    are then unchanged.
    """
    with psycopg.connect(url, options=f"-c search_path={SCHEMA}", connect_timeout=5) as db:
        db.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
        db.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        found = db.execute("SELECT to_regclass('robust_version')").fetchone()
        have = 0
        if found is not None and found[0] is not None:
            row = db.execute(FIND_VERSION).fetchone()
            assert row is not None
            have = row[0]
        if have != want:
            db.execute(script(have, want))
    return have, want

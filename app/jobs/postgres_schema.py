"""The tables in PostgreSQL, and the migrations between releases."""

from __future__ import annotations

from dataclasses import dataclass

SCHEMA = "robust"  # PostgreSQL schema of all our tables
LOCK = 0x726F62757374  # advisory lock for creating tables and for adding a job


class SchemaError(ValueError):
    """The tables can't be migrated to that version; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """SQL to upgrade the tables from the previous version to this one, and to downgrade them."""

    up: str
    down: str


_FIRST = """
CREATE TABLE robust_version (version int NOT NULL);
INSERT INTO robust_version VALUES (1);
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

# Version 1 used procrastinate's tables for its queue. They stay, empty, for a downgrade.
_OWN_QUEUE = """
ALTER TABLE evaluations ADD replica text, ADD lost_by text[] NOT NULL DEFAULT '{}', DROP lost;
UPDATE evaluations SET run = coalesce(run, 0);
UPDATE evaluations SET state = 'queued' WHERE state = 'running';
ALTER TABLE evaluations ALTER run SET DEFAULT 0, ALTER run SET NOT NULL;
ALTER TABLE images ALTER CONSTRAINT images_evaluation_fkey DEFERRABLE INITIALLY DEFERRED;
DO $$ BEGIN
    IF to_regclass('procrastinate_jobs') IS NOT NULL THEN
        DELETE FROM procrastinate_jobs;
        DELETE FROM procrastinate_workers;
    END IF;
END $$;
UPDATE robust_version SET version = 2;
"""
_OWN_QUEUE_BACK = """
DO $$ BEGIN
    IF to_regclass('procrastinate_jobs') IS NULL THEN
        RAISE EXCEPTION 'these tables were not created as version 1, so its service can''t use '
            'them; DROP SCHEMA robust CASCADE lets it create its own, without the evaluations';
    END IF;
END $$;
ALTER TABLE images ALTER CONSTRAINT images_evaluation_fkey NOT DEFERRABLE;
ALTER TABLE evaluations ALTER run DROP DEFAULT, ALTER run DROP NOT NULL;
UPDATE evaluations SET state = 'queued' WHERE state = 'running';
UPDATE evaluations SET about = (about::jsonb - 'owner' - 'dtype')::json;
ALTER TABLE evaluations DROP replica, DROP lost_by, ADD lost int NOT NULL DEFAULT 0;
UPDATE robust_version SET version = 1;
"""
STEPS = (
    Step(up=_FIRST, down=""),
    Step(up=_OWN_QUEUE, down=_OWN_QUEUE_BACK),
)
VERSION = len(STEPS)  # version of the tables in this release
FIND_VERSION = "SELECT version FROM robust_version"


def script(have: int, want: int) -> str:
    """SQL that migrates from version `have` (0: none) to version `want`. Raises SchemaError."""
    if not 0 <= have <= VERSION:
        raise SchemaError(
            f"the tables in PostgreSQL have version {have}; this release knows 1 to {VERSION}"
        )
    if not 1 <= want <= VERSION:
        raise SchemaError(f"expected a version from 1 to {VERSION}, got {want}")
    ups = [step.up for step in STEPS[have:want]]
    downs = [step.down for step in reversed(STEPS[want:have])]
    return "".join(ups + downs)

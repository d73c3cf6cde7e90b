"""Maintenance by every replica: sends its heartbeat, requeues lost jobs, removes old ones."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from app.jobs.postgres_pool import CHANNEL, Connection, Database
from app.jobs.store import MAX_FINISHED, MAX_LOST, StoreError
from app.settings import Settings

logger = logging.getLogger(__name__)

EXPIRED = "coalesce(finished < now() - make_interval(secs => %(expiry)s), false)"
HEARTBEAT = """
INSERT INTO replicas VALUES (%(id)s, %(model)s, now())
ON CONFLICT (id) DO UPDATE SET model = %(model)s, seen = now()
"""

# A replica that sends its heartbeat again was not lost, even if others assumed so.
_NOT_LOST = """
UPDATE evaluations SET lost_by = array_remove(lost_by, %(id)s) WHERE %(id)s = ANY (lost_by)
"""
_SURPLUS = """
DELETE FROM evaluations WHERE id IN (
    SELECT id FROM evaluations WHERE finished IS NOT NULL ORDER BY finished DESC OFFSET %(most)s)
"""
_REQUEUE = f"""
WITH lost AS (
    UPDATE evaluations SET state = 'queued', lost_by = lost_by || coalesce(replica, ''),
        replica = NULL, changed = now(), version = version + 1
    WHERE state = 'running' AND NOT EXISTS (
        SELECT 1 FROM replicas WHERE replicas.id = evaluations.replica
        AND seen > now() - make_interval(secs => %(lost)s))
    RETURNING id)
SELECT id, pg_notify('{CHANNEL}', id) FROM lost
"""
_FAIL = f"""
WITH failed AS (
    UPDATE evaluations SET state = 'failed', error = %(error)s, finished = now(), changed = now(),
        version = version + 1, journal = NULL, bytes = coalesce(octet_length(result::text), 0)
    WHERE {{condition}} RETURNING id),
gone AS (DELETE FROM images WHERE evaluation IN (SELECT id FROM failed))
SELECT pg_notify('{CHANNEL}', id) FROM failed
"""
# Jobs that have been queued for a long time for a model that no replica serves.
_UNSERVED = """
state = 'queued' AND changed < now() - make_interval(secs => 3 * %(lost)s) AND NOT EXISTS (
    SELECT 1 FROM replicas WHERE replicas.model = evaluations.model
    AND seen > now() - make_interval(secs => 3 * %(lost)s))
"""
_FATAL = "state IN ('queued', 'running') AND cardinality(lost_by) >= %(most_lost)s"


class Maintenance:
    """Maintenance that each replica runs every few seconds, also at the same time.

    A replica declares others lost only after it has sent its own heartbeat without a gap for the
    whole timeout: after an outage of PostgreSQL, all replicas seem silent.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        serving: Callable[[], tuple[str, str] | None],
    ) -> None:
        self._database, self._serving = database, serving
        self._lost = settings.lost_seconds
        # Own heartbeats on the monotonic clock: the first since the last gap, and the latest.
        self._first: float | None = None
        self._latest = 0.0
        self.limits: dict[str, Any] = {"expiry": settings.job_expiry_seconds}  # for EXPIRED
        self.counts: dict[str, int] = {}  # of jobs, by state

    async def once(self) -> None:
        """Run the maintenance once. Raises StoreError."""
        try:
            await self._database.prepare()
            async with self._database.connection() as db:
                await self._send_heartbeat(db)
        except StoreError:
            self._first = None
            raise
        async with self._database.connection() as db:
            if self._may_declare_lost():
                await self._requeue_lost_jobs(db)
            await self._remove_old(db)
        await asyncio.sleep(max(self._lost / 4 - 2, 0))

    async def remove_replica(self, replica: str) -> None:
        """Remove a replica that has stopped serving."""
        with suppress(StoreError):
            async with self._database.connection() as db:
                await db.execute("DELETE FROM replicas WHERE id = %s", (replica,))

    async def _send_heartbeat(self, db: Connection) -> None:
        if (serving := self._serving()) is None:
            self._first = None
            return
        replica, model = serving
        await db.execute(HEARTBEAT, {"id": replica, "model": model})
        await db.execute(_NOT_LOST, {"id": replica})
        now = time.monotonic()
        if self._first is None or now - self._latest > self._lost:
            self._first = now
        self._latest = now

    def _may_declare_lost(self) -> bool:
        return self._first is not None and time.monotonic() - self._first >= self._lost

    async def _requeue_lost_jobs(self, db: Connection) -> None:
        """Requeue the jobs of lost replicas, and fail jobs that no replica can run."""
        found = await db.execute(_REQUEUE, {"lost": self._lost})
        for row in await found.fetchall():
            logger.warning("requeued evaluation %s, because its replica was lost", row["id"])
        error = "The model it was started with is no longer served."
        await db.execute(_FAIL.format(condition=_UNSERVED), {"error": error, "lost": self._lost})
        error = f"{MAX_LOST} replicas were lost while running it, without progress in between."
        await db.execute(_FAIL.format(condition=_FATAL), {"error": error, "most_lost": MAX_LOST})

    async def _remove_old(self, db: Connection) -> None:
        await db.execute("DELETE FROM replicas WHERE seen < now() - interval '1 hour'")
        await db.execute(f"DELETE FROM evaluations WHERE {EXPIRED}", self.limits)
        await db.execute(_SURPLUS, {"most": MAX_FINISHED})
        found = await db.execute("SELECT state, count(*) AS n FROM evaluations GROUP BY state")
        self.counts = {row["state"]: row["n"] for row in await found.fetchall()}

"""What every replica does for the jobs of all: it says that it lives, and mends what was lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from procrastinate.exceptions import ProcrastinateException
from procrastinate.jobs import Status

from app.metrics import Metrics
from app.postgres import CHANNEL, Database
from app.settings import Settings
from app.store import MAX_FINISHED, StoreError

logger = logging.getLogger(__name__)

MAX_LOST = 3  # runs that may be lost, one after the other, without anything finished
EXPIRED = "coalesce(finished < now() - make_interval(secs => %(expiry)s), false)"

_SEEN = """
INSERT INTO replicas VALUES (%(id)s, %(model)s, now())
ON CONFLICT (id) DO UPDATE SET model = %(model)s, seen = now()
"""
_SURPLUS = """
DELETE FROM evaluations WHERE id IN (
    SELECT id FROM evaluations WHERE finished IS NOT NULL ORDER BY finished DESC OFFSET %(most)s)
"""
_FAIL = f"""
WITH failed AS (
    UPDATE evaluations SET state = 'failed', error = %(error)s, finished = now(), changed = now(),
        version = version + 1, journal = NULL, bytes = coalesce(octet_length(result::text), 0)
    WHERE {{condition}} RETURNING id),
gone AS (DELETE FROM images WHERE evaluation IN (SELECT id FROM failed))
SELECT pg_notify('{CHANNEL}', id) FROM failed
"""
# Queued for long, for a model that no replica serves.
_UNSERVED = """
state = 'queued' AND changed < now() - make_interval(secs => 3 * %(lost)s) AND NOT EXISTS (
    SELECT 1 FROM replicas WHERE replicas.model = evaluations.model
    AND seen > now() - make_interval(secs => 3 * %(lost)s))
"""
_DEADLY = "state IN ('queued', 'running') AND lost >= %(most_lost)s"
_ORPHANS = """
SELECT id, run FROM evaluations WHERE state IN ('queued', 'running') AND NOT EXISTS (
    SELECT 1 FROM procrastinate_jobs
    WHERE procrastinate_jobs.id = run AND status IN ('todo', 'doing'))
"""


class Upkeep:
    """Done every few seconds by each replica; it does no harm if several do it at once."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        metrics: Metrics,
        *,
        requeue: Callable[[str, int], Awaitable[None]],
        serving: Callable[[], tuple[str, str]],
    ) -> None:
        self._database, self._metrics = database, metrics
        self._requeue, self._serving = requeue, serving
        self._lost = settings.lost_seconds
        self.limits: dict[str, Any] = {"expiry": settings.job_expiry_seconds}
        self.counts: dict[str, int] = {}  # of jobs, by state

    async def once(self) -> None:
        """Do it once. Raises StoreError."""
        try:
            await self._database.prepare()
            await self._tidy()
            await self._take_up_what_was_lost()
        except StoreError:
            self._metrics.store_up.set(0)
            raise
        self._metrics.store_up.set(1)
        await asyncio.sleep(max(self._lost / 4 - 2, 0))

    async def leave(self, replica: str) -> None:
        """This replica serves no more."""
        with suppress(StoreError):
            async with self._database.connection() as db:
                await db.execute("DELETE FROM replicas WHERE id = %s", (replica,))

    async def _tidy(self) -> None:
        replica, model = self._serving()
        async with self._database.connection() as db:
            await db.execute(_SEEN, {"id": replica, "model": model})
            await db.execute("DELETE FROM replicas WHERE seen < now() - interval '1 hour'")
            await db.execute(f"DELETE FROM evaluations WHERE {EXPIRED}", self.limits)
            await db.execute(_SURPLUS, {"most": MAX_FINISHED})
            error = "The model it was begun with is no longer served."
            await db.execute(
                _FAIL.format(condition=_UNSERVED), {"error": error, "lost": self._lost}
            )
            error = f"It was begun {MAX_LOST} times, and each time the replica was lost."
            await db.execute(
                _FAIL.format(condition=_DEADLY), {"error": error, "most_lost": MAX_LOST}
            )
            found = await db.execute("SELECT state, count(*) AS n FROM evaluations GROUP BY state")
            self.counts = {row["state"]: row["n"] for row in await found.fetchall()}

    async def _take_up_what_was_lost(self) -> None:
        """Drop the tasks of replicas that are silent; queue anew the jobs that have no task."""
        queue = self._database.app.job_manager
        try:
            stalled = await queue.get_stalled_jobs(seconds_since_heartbeat=self._lost)
        except ProcrastinateException as error:
            raise StoreError(f"PostgreSQL: {error.__cause__ or error}") from error
        for task in stalled:
            assert task.id is not None
            with suppress(ProcrastinateException):  # another replica was quicker
                await queue.finish_job_by_id_async(task.id, Status.FAILED, delete_job=True)
        async with self._database.connection() as db:
            found = await db.execute(_ORPHANS)
            orphans = await found.fetchall()
        for row in orphans:
            await self._requeue(row["id"], row["run"])

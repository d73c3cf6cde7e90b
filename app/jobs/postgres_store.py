"""The jobs of all replicas, in PostgreSQL: any replica handles any job, and resumes lost ones.

Each run of a job has a number. A replica that takes the job over increments it, and from then on
writes of the old run are discarded.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from psycopg.types.json import Json

from app.engine.model_reloader import ModelReloader
from app.jobs.job import Job, JobState
from app.jobs.local_store import check_room
from app.jobs.postgres_maintenance import EXPIRED, HEARTBEAT, Upkeep
from app.jobs.postgres_pool import (
    BULK_SECONDS,
    RETRY_SECONDS,
    Connection,
    Database,
    retry,
)
from app.jobs.postgres_rows import (
    ACTIVE,
    COLUMNS,
    TELL,
    check_hold,
    describe_set,
    end,
    find_same,
    keep_journal,
    to_dataset,
    to_job,
    to_parts,
)
from app.jobs.postgres_schema import LOCK
from app.jobs.scratch import remove_abandoned, scratch_folder
from app.jobs.store import Changes, Lost, Run, StoreError
from app.metrics import Metrics
from app.settings import Settings
from robust.datasets import Dataset

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0  # between polls of the queue, in case a notification is lost

_CLAIM = f"""
UPDATE evaluations SET state = 'running', replica = %(id)s, run = run + 1, changed = now(),
    version = version + 1
WHERE id = (
    SELECT id FROM evaluations WHERE state = 'queued' AND model = %(model)s
    ORDER BY created LIMIT 1 FOR UPDATE SKIP LOCKED)
RETURNING {COLUMNS}
"""
_RELEASE = """
UPDATE evaluations SET state = 'queued', replica = NULL, changed = now(), version = version + 1
WHERE id = %s AND run = %s AND state = 'running' RETURNING id
"""


class SharedStore:
    """A `JobStore` for any number of replicas. Jobs expire by PostgreSQL's clock."""

    alone = False
    show_seconds = 0.5  # with the half second of an evaluation, at least every second
    journal_seconds: float | None = 10.0

    def __init__(
        self, url: str, settings: Settings, models: ModelReloader, metrics: Metrics
    ) -> None:
        self.changes = Changes()
        self._settings, self._models = settings, models
        self._database = Database(url, metrics.store_up)
        self._upkeep = Upkeep(self._database, settings, serving=self._serving)
        self._run: Run | None = None
        self._replica = uuid.uuid4().hex
        self._news = asyncio.Event()  # some job has changed
        self._tasks: set[asyncio.Task[None]] = set()
        self._worker: asyncio.Task[None] | None = None

    def count(self, state: JobState) -> int:
        """See `JobStore`."""
        return self._upkeep.counts.get(state, 0)

    async def start(self, run: Run) -> None:
        """See `JobStore`. PostgreSQL may be down."""
        self._run = run
        await asyncio.to_thread(remove_abandoned)
        await self._database.open()
        try:
            await self._database.prepare()
        except StoreError as error:
            logger.error("evaluations can't start yet: %s", error)
        self._worker = asyncio.create_task(retry("the queue", self._work))
        self._tasks = {
            asyncio.create_task(retry("upkeep", self._upkeep.once)),
            asyncio.create_task(retry("news", lambda: self._database.listen(self._tell))),
        }

    def _serving(self) -> tuple[str, str]:
        """This replica and the model it serves."""
        return self._replica, self._models.current.sha256

    def _tell(self, id: str) -> None:
        self.changes.tell(id)
        self._news.set()

    async def _work(self) -> None:
        """Run queued jobs, one after another. Raises StoreError."""
        while True:
            self._news.clear()
            if job := await self._claim():
                await self._run_claimed(job)
            else:
                await self._wait_for_news()

    async def _wait_for_news(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_SECONDS):
                await self._news.wait()

    async def _claim(self) -> Job | None:
        """Claim the next job for this replica."""
        replica, model = self._serving()
        async with self._database.connection() as db:
            found = await db.execute(_CLAIM, {"id": replica, "model": model})
            row = await found.fetchone()
            if row is None:
                return None
            await db.execute(HEARTBEAT, {"id": replica, "model": model})
            await db.execute(TELL, (row["id"],))
        return to_job(row)

    async def _run_claimed(self, job: Job) -> None:
        """Run `job` until it ends or another replica takes it over, even during an outage."""
        assert self._run is not None
        task = asyncio.ensure_future(self._run(job))
        task.add_done_callback(lambda _: self._news.set())
        try:
            while not task.done() and not await self._is_lost(job):
                self._news.clear()
                await self._wait_for_news()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()):
            logger.error("evaluation %s was interrupted: %s", job.id, error)
            await asyncio.sleep(RETRY_SECONDS)
            await self._persist(lambda: self._release(job))

    async def _is_lost(self, job: Job) -> bool:
        try:
            async with self._database.connection() as db:
                await check_hold(db, job)
        except Lost:
            return True
        except StoreError:
            return False
        return False

    async def _release(self, job: Job) -> None:
        """Queue `job` again, if it is still this run's."""
        async with self._database.connection() as db:
            found = await db.execute(_RELEASE, (job.id, job.run))
            if await found.fetchone():
                await db.execute(TELL, (job.id,))

    async def _persist(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Repeat the operation until PostgreSQL can be reached. Raises Lost."""
        said = False
        while True:
            try:
                await attempt()
                return
            except Lost:
                raise
            except StoreError as error:
                if not said:
                    logger.warning("%s; trying again", error)
                said = True
                await asyncio.sleep(RETRY_SECONDS)

    async def add(self, job: Job, dataset: Dataset) -> Job:
        """See `JobStore`. The job and its images are added together, or not at all."""
        parts = to_parts(dataset)
        about = {**job.about(), **describe_set(dataset), "parts": len(parts)}
        async with self._database.connection() as db:
            if same := await self._same_or_room(db, job):
                return same
            # The images first: others wait for the lock, but not for the upload.
            db.limit = BULK_SECONDS
            for part, content in enumerate(parts):
                await db.execute("INSERT INTO images VALUES (%s, %s, %b)", (job.id, part, content))
            await db.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
            if same := await self._same_or_room(db, job):
                await db.execute("DELETE FROM images WHERE evaluation = %s", (job.id,))
                return same
            found = await db.execute(
                "INSERT INTO evaluations (id, digest, key, model, about, bytes)"
                " VALUES (%s, %s, %s, %s, %s, %s) RETURNING created",
                (job.id, job.digest, job.key, job.model, Json(about), job.bytes),
            )
            row = await found.fetchone()
            assert row is not None
            job.created = row["created"]
            await db.execute(TELL, (job.id,))
        return job

    async def _same_or_room(self, db: Connection, job: Job) -> Job | None:
        """The same job, if there is one. Raises Full, TooLarge or KeyUsed."""
        await db.execute(f"DELETE FROM evaluations WHERE {EXPIRED}", self._upkeep.limits)
        if same := await find_same(db, job):
            return same
        found = await db.execute(
            f"SELECT count(*) FILTER (WHERE {ACTIVE}) AS active,"
            " coalesce(sum(bytes), 0)::bigint AS held FROM evaluations"
        )
        row = await found.fetchone()
        assert row is not None
        check_room(job, active=row["active"], held=row["held"], settings=self._settings)
        return None

    async def get(self, id: str) -> Job | None:
        """See `JobStore`."""
        async with self._database.connection() as db:
            found = await db.execute(
                f"SELECT {COLUMNS} FROM evaluations WHERE id = %(id)s AND NOT ({EXPIRED})",
                {**self._upkeep.limits, "id": id},
            )
            row = await found.fetchone()
        return None if row is None else to_job(row)

    async def all(self, owner: str | None = None) -> list[Job]:
        """See `JobStore`."""
        async with self._database.connection() as db:
            found = await db.execute(
                f"SELECT {COLUMNS} FROM evaluations WHERE NOT ({EXPIRED})"
                " AND (%(owner)s::text IS NULL OR about->>'owner' = %(owner)s)"
                " ORDER BY created DESC",
                {**self._upkeep.limits, "owner": owner},
            )
            return [to_job(row) for row in await found.fetchall()]

    async def cancel(self, id: str) -> None:
        """See `JobStore`. The replica that runs it is notified."""
        async with self._database.connection() as db:
            found = await db.execute(
                f"SELECT 1 FROM evaluations WHERE id = %s AND {ACTIVE} FOR UPDATE", (id,)
            )
            if await found.fetchone():
                await end(db, id, "cancelled", None, None)

    async def forget(self, id: str) -> None:
        """See `JobStore`."""
        async with self._database.connection() as db:
            await db.execute(f"DELETE FROM evaluations WHERE id = %s AND NOT {ACTIVE}", (id,))
            await db.execute(TELL, (id,))

    async def images(self, job: Job) -> Dataset:
        """See `JobStore`."""
        async with self._database.connection(limit=BULK_SECONDS) as db:
            found = await db.execute("SELECT about FROM evaluations WHERE id = %s", (job.id,))
            row = await found.fetchone()
            if row is None:
                raise Lost("the evaluation is gone")
            about = row["about"]
            content = bytearray()
            for part in range(about["parts"]):
                found = await db.execute(
                    "SELECT content FROM images WHERE evaluation = %s AND part = %s",
                    (job.id, part),
                    binary=True,
                )
                if row := await found.fetchone():
                    content += row["content"]
        return await asyncio.to_thread(to_dataset, about, content)

    @asynccontextmanager
    async def journal(self, job: Job) -> AsyncIterator[Path | None]:
        """See `JobStore`: a file of this run, which starts with what the last one has kept."""
        async with self._database.connection(limit=BULK_SECONDS) as db:
            found = await db.execute(
                "SELECT journal FROM evaluations WHERE id = %s", (job.id,), binary=True
            )
            row = await found.fetchone()
        with scratch_folder() as folder:
            path = folder / "journal"
            if row is not None and row["journal"] is not None:
                await asyncio.to_thread(path.write_bytes, row["journal"])
            yield path

    async def show(self, job: Job, result: dict[str, Any] | None, journal: bytes | None) -> None:
        """See `JobStore`."""
        async with self._database.connection(limit=BULK_SECONDS) as db:
            await check_hold(db, job)
            if result is not None:
                await db.execute(
                    "UPDATE evaluations SET result = %s, version = version + 1 WHERE id = %s",
                    (Json(result), job.id),
                )
                await db.execute(TELL, (job.id,))
            if journal is not None:
                await keep_journal(db, job, journal)

    async def finish(
        self,
        job: Job,
        state: JobState,
        result: dict[str, Any] | None = None,
        error: str | None = None,
    ) -> None:
        """See `JobStore`. Waits for a PostgreSQL that is down."""

        async def attempt() -> None:
            async with self._database.connection() as db:
                await check_hold(db, job)
                await end(db, job.id, state, result, error)

        await self._persist(attempt)

    async def put_back(self, job: Job, journal: bytes | None) -> None:
        """See `JobStore`. A job that was cancelled or taken over is left alone."""
        try:
            async with self._database.connection(limit=BULK_SECONDS) as db:
                await check_hold(db, job)
                if journal is not None:
                    await keep_journal(db, job, journal)
                await db.execute(_RELEASE, (job.id, job.run))
                await db.execute(TELL, (job.id,))
        except Lost:
            pass
        except StoreError as error:  # some replica's upkeep will find it
            logger.warning("evaluation %s could not be handed over: %s", job.id, error)

    async def hand_over(self) -> None:
        """See `JobStore`."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait({self._worker})

    async def stop(self) -> None:
        """See `JobStore`."""
        await self.hand_over()

    async def close(self) -> None:
        """See `JobStore`."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._upkeep.leave(self._replica)
        await self._database.close()

"""The jobs of all replicas, in PostgreSQL: any replica can show, run and resume any job.

Each run of a job has a number. A replica that takes over a job increments it, and from then on
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

from app.engine.engine import Engine
from app.engine.model_reloader import ModelReloader
from app.errors import EngineStopped
from app.jobs.job import Job, JobState
from app.jobs.local_store import check_room
from app.jobs.postgres_maintenance import EXPIRED, HEARTBEAT, Maintenance
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
    NOTIFY,
    check_owned,
    describe_dataset,
    end,
    find_same,
    store_journal,
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
        self,
        url: str,
        settings: Settings,
        engine: Engine,
        models: ModelReloader,
        metrics: Metrics,
    ) -> None:
        self.changes = Changes()
        self._settings, self._engine, self._models = settings, engine, models
        self._database = Database(url, metrics.store_up)
        self._maintenance = Maintenance(self._database, settings, serving=self._serving)
        self._run: Run | None = None
        self._replica = uuid.uuid4().hex
        self._any_change = asyncio.Event()  # set when any job changes
        self._tasks: set[asyncio.Task[None]] = set()
        self._worker: asyncio.Task[None] | None = None

    def count(self, state: JobState) -> int:
        """See `JobStore`."""
        return self._maintenance.counts.get(state, 0)

    async def start(self, run: Run) -> None:
        """See `JobStore`. PostgreSQL may be down: jobs run once it can be reached."""
        self._run = run
        await asyncio.to_thread(remove_abandoned)
        await self._database.open()
        try:
            await self._database.prepare()
        except StoreError as error:
            logger.error("evaluations can't start yet: %s", error)
        self._worker = asyncio.create_task(retry("the queue", self._work))
        self._tasks = {
            asyncio.create_task(retry("the maintenance", self._maintenance.once)),
            asyncio.create_task(
                retry("the notifications", lambda: self._database.listen(self._notify))
            ),
        }

    def _serving(self) -> tuple[str, str] | None:
        """This replica's id, and the SHA-256 of its model; None if its device failed."""
        return (self._replica, self._models.current.sha256) if self._engine.alive else None

    def _notify(self, id: str) -> None:
        self.changes.notify(id)
        self._any_change.set()

    async def _work(self) -> None:
        """Run queued jobs, one after another. Raises StoreError."""
        while True:
            self._any_change.clear()
            if job := await self._claim():
                await self._run_claimed(job)
            else:
                await self._wait_for_change()

    async def _wait_for_change(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_SECONDS):
                await self._any_change.wait()

    async def _claim(self) -> Job | None:
        """Claim the next queued job of the served model; None if there is none."""
        if (serving := self._serving()) is None:
            return None
        replica, model = serving
        async with self._database.connection() as db:
            found = await db.execute(_CLAIM, {"id": replica, "model": model})
            row = await found.fetchone()
            if row is None:
                return None
            await db.execute(HEARTBEAT, {"id": replica, "model": model})
            await db.execute(NOTIFY, (row["id"],))
        return to_job(row)

    async def _run_claimed(self, job: Job) -> None:
        """Run `job` until it ends, or another replica takes it over. An outage does not stop it."""
        assert self._run is not None
        task = asyncio.ensure_future(self._run(job))
        task.add_done_callback(lambda _: self._any_change.set())
        try:
            while not task.done() and not await self._is_lost(job):
                self._any_change.clear()
                await self._wait_for_change()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()):
            logger.error("evaluation %s was interrupted: %s", job.id, error)
            await asyncio.sleep(RETRY_SECONDS)
            if not isinstance(error, EngineStopped):  # else it counts as lost with this replica
                await self._persist(lambda: self._release(job))

    async def _is_lost(self, job: Job) -> bool:
        try:
            async with self._database.connection() as db:
                await check_owned(db, job)
        except Lost:
            return True
        except StoreError:
            return False
        return False

    async def _release(self, job: Job) -> None:
        """Queue `job` again, if this run still owns it."""
        async with self._database.connection() as db:
            found = await db.execute(_RELEASE, (job.id, job.run))
            if await found.fetchone():
                await db.execute(NOTIFY, (job.id,))

    async def _persist(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Repeat the operation until PostgreSQL can be reached. Raises Lost."""
        logged = False
        while True:
            try:
                await attempt()
                return
            except Lost:
                raise
            except StoreError as error:
                if not logged:
                    logger.warning("%s; trying again", error)
                logged = True
                await asyncio.sleep(RETRY_SECONDS)

    async def add(self, job: Job, dataset: Dataset) -> Job:
        """See `JobStore`. The job and its images are added together, or not at all."""
        parts = to_parts(dataset)
        about = {**job.about(), **describe_dataset(dataset), "parts": len(parts)}
        async with self._database.connection() as db:
            if same := await self._find_same_or_check_room(db, job):
                return same
            # The images before the lock, so that other replicas don't wait for their upload.
            db.limit = BULK_SECONDS
            for part, content in enumerate(parts):
                await db.execute("INSERT INTO images VALUES (%s, %s, %b)", (job.id, part, content))
            await db.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
            if same := await self._find_same_or_check_room(db, job):
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
            await db.execute(NOTIFY, (job.id,))
        return job

    async def _find_same_or_check_room(self, db: Connection, job: Job) -> Job | None:
        """The existing job that is the same, if any. Raises Full, TooLarge or KeyUsed."""
        await db.execute(f"DELETE FROM evaluations WHERE {EXPIRED}", self._maintenance.limits)
        if same := await find_same(db, job):
            return same
        found = await db.execute(
            f"SELECT count(*) FILTER (WHERE {ACTIVE}) AS active,"
            " coalesce(sum(bytes), 0)::bigint AS bytes FROM evaluations"
        )
        row = await found.fetchone()
        assert row is not None
        check_room(job, active=row["active"], stored_bytes=row["bytes"], settings=self._settings)
        return None

    async def get(self, id: str) -> Job | None:
        """See `JobStore`."""
        async with self._database.connection() as db:
            found = await db.execute(
                f"SELECT {COLUMNS} FROM evaluations WHERE id = %(id)s AND NOT ({EXPIRED})",
                {**self._maintenance.limits, "id": id},
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
                {**self._maintenance.limits, "owner": owner},
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
            await db.execute(NOTIFY, (id,))

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
        """See `JobStore`: a file of this run, which starts with the journal stored by the last."""
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
            await check_owned(db, job)
            if result is not None:
                await db.execute(
                    "UPDATE evaluations SET result = %s, version = version + 1 WHERE id = %s",
                    (Json(result), job.id),
                )
                await db.execute(NOTIFY, (job.id,))
            if journal is not None:
                await store_journal(db, job, journal)

    async def finish(
        self,
        job: Job,
        state: JobState,
        result: dict[str, Any] | None = None,
        error: str | None = None,
    ) -> None:
        """See `JobStore`. If PostgreSQL is down, waits for it."""

        async def attempt() -> None:
            async with self._database.connection() as db:
                await check_owned(db, job)
                await end(db, job.id, state, result, error)

        await self._persist(attempt)

    async def put_back(self, job: Job, journal: bytes | None) -> None:
        """See `JobStore`. A job that was cancelled or taken over is left alone."""
        try:
            async with self._database.connection(limit=BULK_SECONDS) as db:
                await check_owned(db, job)
                if journal is not None:
                    await store_journal(db, job, journal)
                await db.execute(_RELEASE, (job.id, job.run))
                await db.execute(NOTIFY, (job.id,))
        except Lost:
            pass
        except StoreError as error:  # the maintenance of some replica requeues it later
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
        await self._maintenance.remove_replica(self._replica)
        await self._database.close()

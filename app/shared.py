"""The jobs of all replicas, in PostgreSQL: each answers for any, and a lost one's go on elsewhere.

The queue is that of procrastinate. A run of a job is a task of it, and its number the token of the
run: whoever takes a job over gives it a new one, and what the old run writes from then on is lost.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from procrastinate import JobContext
from psycopg.types.json import Json

from app.job import Job
from app.local import check_room
from app.metrics import Metrics
from app.models import Models
from app.postgres import CHANNEL, LOCK, Connection, Database, retry
from app.schemas import JobState
from app.settings import Settings
from app.store import Changes, Damaged, KeyUsed, Lost, Run, StoreError
from app.upkeep import EXPIRED, Upkeep
from robust.datasets import Dataset

logger = logging.getLogger(__name__)

TASK = "evaluate"
PART_BYTES = 4 * 2**20
POLL_SECONDS = 2.0  # where a notification went astray

_COLUMNS = "id, about, state, bytes, created, finished, result, error, run, version"
_ACTIVE = "state IN ('queued', 'running')"
_OF_THE_SET = ("shape", "classes", "sha256", "parts")
_TELL = f"SELECT pg_notify('{CHANNEL}', %s)"


class SharedStore:
    """A `JobStore` for any number of replicas. Jobs expire by PostgreSQL's clock."""

    alone = False
    show_seconds = 1.0
    journal_seconds: float | None = 10.0

    def __init__(self, url: str, settings: Settings, models: Models, metrics: Metrics) -> None:
        self.changes = Changes()
        self._settings, self._models = settings, models
        self._database = Database(url)
        self._upkeep = Upkeep(
            self._database, settings, metrics, requeue=self._requeue, serving=self._serving
        )
        self._run: Run | None = None
        self._replica = uuid.uuid4().hex
        self._queues: list[str] = []  # that of the model in service
        self._tasks: set[asyncio.Task[None]] = set()
        self._worker: asyncio.Task[None] | None = None
        self._database.app.task(name=TASK, pass_context=True)(self._begin)

    def count(self, state: JobState) -> int:
        """See `JobStore`."""
        return self._upkeep.counts.get(state, 0)

    async def start(self, run: Run) -> None:
        """See `JobStore`. PostgreSQL may be down."""
        self._run = run
        self._serving()
        await self._database.open()
        try:
            await self._database.prepare()
        except StoreError as error:
            logger.error("evaluations have to wait: %s", error)
        self._worker = asyncio.create_task(retry("the queue", self._work))
        self._tasks = {
            asyncio.create_task(retry("upkeep", self._upkeep.once)),
            asyncio.create_task(retry("news", lambda: self._database.listen(self.changes.tell))),
        }

    def _serving(self) -> tuple[str, str]:
        """This replica and the model it serves."""
        model = self._models.current.sha256
        self._queues[:] = [_queue(model)]
        return self._replica, model

    async def _work(self) -> None:
        await self._database.prepare()
        lost = self._settings.lost_seconds
        await self._database.app.run_worker_async(
            queues=self._queues,
            concurrency=1,
            fetch_job_polling_interval=POLL_SECONDS,
            abort_job_polling_interval=POLL_SECONDS,
            shutdown_graceful_timeout=0,  # what is cut short is put back
            delete_jobs="always",  # the evaluation is what is kept
            install_signal_handlers=False,
            update_heartbeat_interval=lost / 4,
            stalled_worker_timeout=lost,
        )

    async def _begin(self, context: JobContext, *, id: str) -> None:
        """A task of the queue: one run of an evaluation."""
        assert self._run is not None
        async with self._database.connection() as db:
            found = await db.execute(
                "UPDATE evaluations SET state = 'running', changed = now(), version = version + 1"
                f" WHERE id = %s AND run = %s AND state = 'queued' RETURNING {_COLUMNS}",
                (id, context.job.id),
            )
            row = await found.fetchone()
            await db.execute(_TELL, (id,))
        if row is not None:
            await self._run(_job(row))

    async def add(self, job: Job, dataset: Dataset) -> Job:
        """See `JobStore`. The job, its images and its task come to be together, or not at all."""
        async with self._database.connection() as db:
            await db.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
            await db.execute(f"DELETE FROM evaluations WHERE {EXPIRED}", self._upkeep.limits)
            if same := await _same(db, job):
                return same
            found = await db.execute(
                f"SELECT count(*) FILTER (WHERE {_ACTIVE}) AS active,"
                " coalesce(sum(bytes), 0)::bigint AS held FROM evaluations"
            )
            row = await found.fetchone()
            assert row is not None
            check_room(job, active=row["active"], held=row["held"], settings=self._settings)
            parts = _parts(dataset)
            about = {
                **job.about(),
                "shape": list(dataset.images.shape),
                "classes": list(dataset.classes),
                "sha256": dataset.sha256,
                "parts": len(parts),
            }
            found = await db.execute(
                "INSERT INTO evaluations (id, digest, key, model, about, bytes)"
                " VALUES (%s, %s, %s, %s, %s, %s) RETURNING created",
                (job.id, job.digest, job.key, job.model, Json(about), job.bytes),
            )
            row = await found.fetchone()
            assert row is not None
            job.created = row["created"]
            for part, content in enumerate(parts):
                await db.execute("INSERT INTO images VALUES (%s, %s, %b)", (job.id, part, content))
            await self._enqueue(db, job.id, job.model)
        return job

    async def _enqueue(self, db: Connection, id: str, model: str) -> None:
        task = self._database.app.configure_task(TASK, queue=_queue(model), connection=db)
        run = await task.defer_async(id=id)
        await db.execute(
            "UPDATE evaluations SET state = 'queued', run = %s, changed = now(),"
            " version = version + 1 WHERE id = %s",
            (run, id),
        )
        await db.execute(_TELL, (id,))

    async def get(self, id: str) -> Job | None:
        """See `JobStore`."""
        async with self._database.connection() as db:
            found = await db.execute(
                f"SELECT {_COLUMNS} FROM evaluations WHERE id = %(id)s AND NOT ({EXPIRED})",
                {**self._upkeep.limits, "id": id},
            )
            row = await found.fetchone()
        return None if row is None else _job(row)

    async def all(self) -> list[Job]:
        """See `JobStore`."""
        async with self._database.connection() as db:
            found = await db.execute(
                f"SELECT {_COLUMNS} FROM evaluations WHERE NOT ({EXPIRED}) ORDER BY created DESC",
                self._upkeep.limits,
            )
            return [_job(row) for row in await found.fetchall()]

    async def cancel(self, id: str) -> None:
        """See `JobStore`. Whoever runs it is told by the queue."""
        async with self._database.connection() as db:
            found = await db.execute(
                f"SELECT run FROM evaluations WHERE id = %s AND {_ACTIVE} FOR UPDATE", (id,)
            )
            row = await found.fetchone()
            if row is None:
                return
            await _end(db, id, "cancelled", None, None)
            await self._database.app.job_manager.cancel_job_by_id_async(
                row["run"], abort=True, delete_job=True, connection=db
            )

    async def forget(self, id: str) -> None:
        """See `JobStore`."""
        async with self._database.connection() as db:
            await db.execute(f"DELETE FROM evaluations WHERE id = %s AND NOT {_ACTIVE}", (id,))
            await db.execute(_TELL, (id,))

    async def images(self, job: Job) -> Dataset:
        """See `JobStore`."""
        async with self._database.connection() as db:
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
        return await asyncio.to_thread(_dataset, about, content)

    @asynccontextmanager
    async def journal(self, job: Job) -> AsyncIterator[Path | None]:
        """See `JobStore`: a file of this run, which begins with what the last one has kept."""
        async with self._database.connection() as db:
            found = await db.execute(
                "SELECT journal FROM evaluations WHERE id = %s", (job.id,), binary=True
            )
            row = await found.fetchone()
        with tempfile.TemporaryDirectory(prefix="robust-") as folder:
            path = Path(folder) / "journal"
            if row is not None and row["journal"] is not None:
                await asyncio.to_thread(path.write_bytes, row["journal"])
            yield path

    async def show(self, job: Job, result: dict[str, Any] | None, journal: bytes | None) -> None:
        """See `JobStore`."""
        async with self._database.connection() as db:
            await _check_hold(db, job)
            if result is not None:
                await db.execute(
                    "UPDATE evaluations SET result = %s, version = version + 1 WHERE id = %s",
                    (Json(result), job.id),
                )
                await db.execute(_TELL, (job.id,))
            if journal is not None:
                await _keep(db, job, journal)

    async def finish(
        self,
        job: Job,
        state: JobState,
        result: dict[str, Any] | None = None,
        error: str | None = None,
    ) -> None:
        """See `JobStore`."""
        async with self._database.connection() as db:
            await _check_hold(db, job)
            await _end(db, job.id, state, result, error)

    async def put_back(self, job: Job, journal: bytes | None) -> None:
        """See `JobStore`. What was cancelled or taken over is left alone."""
        try:
            async with self._database.connection() as db:
                await _check_hold(db, job)
                if journal is not None:
                    await _keep(db, job, journal)
                await self._enqueue(db, job.id, job.model)
        except Lost:
            pass
        except StoreError as error:  # the upkeep of some replica will find it
            logger.warning("evaluation %s could not be handed over: %s", job.id, error)

    async def _requeue(self, id: str, run: int) -> None:
        """Queue a job anew whose run was lost, unless somebody has done so."""
        async with self._database.connection() as db:
            found = await db.execute(
                f"SELECT model FROM evaluations WHERE id = %s AND run = %s AND {_ACTIVE}"
                " FOR UPDATE",
                (id, run),
            )
            row = await found.fetchone()
            if row is None:
                return
            logger.warning("evaluation %s goes on: the replica that ran it was lost", id)
            await db.execute("UPDATE evaluations SET lost = lost + 1 WHERE id = %s", (id,))
            await self._enqueue(db, id, row["model"])

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


def _queue(model: str) -> str:
    """The queue of a model's evaluations; a name that PostgreSQL can notify of."""
    return model[:32]


async def _same(db: Connection, job: Job) -> Job | None:
    condition = "digest = %s AND key IS NULL" if job.key is None else "key = %s"
    found = await db.execute(
        f"SELECT {_COLUMNS}, digest FROM evaluations WHERE {condition}"
        f" AND state IN ('queued', 'running', 'done')",
        (job.digest if job.key is None else job.key,),
    )
    row = await found.fetchone()
    if row is not None and row["digest"] != job.digest:
        raise KeyUsed("the key names another evaluation")
    return None if row is None else _job(row)


async def _check_hold(db: Connection, job: Job) -> None:
    """Raise Lost unless `job` is in the hands of its run, where it stays for the transaction."""
    found = await db.execute(
        f"SELECT 1 FROM evaluations WHERE id = %s AND run = %s AND {_ACTIVE} FOR UPDATE",
        (job.id, job.run),
    )
    if await found.fetchone() is None:
        raise Lost("it was cancelled, or another replica has taken it over")


async def _keep(db: Connection, job: Job, journal: bytes) -> None:
    """Keep what is finished; a job that comes on is not one that takes its replica down."""
    await db.execute(
        "UPDATE evaluations SET journal = %b, lost = 0 WHERE id = %s", (journal, job.id)
    )


async def _end(
    db: Connection, id: str, state: JobState, result: dict[str, Any] | None, error: str | None
) -> None:
    await db.execute(
        "UPDATE evaluations SET state = %s, result = coalesce(%s, result), error = %s,"
        " finished = now(), changed = now(), version = version + 1, journal = NULL WHERE id = %s",
        (state, None if result is None else Json(result), error, id),
    )
    await db.execute(
        "UPDATE evaluations SET bytes = coalesce(octet_length(result::text), 0) WHERE id = %s",
        (id,),
    )
    await db.execute("DELETE FROM images WHERE evaluation = %s", (id,))
    await db.execute(_TELL, (id,))


def _job(row: dict[str, Any]) -> Job:
    about = row["about"]
    job = Job.from_about(
        row["id"],
        {name: value for name, value in about.items() if name not in _OF_THE_SET},
    )
    job.state, job.bytes, job.run, job.version = (
        row["state"],
        row["bytes"],
        row["run"],
        row["version"],
    )
    job.created, job.finished = row["created"], row["finished"]
    job.result, job.error = row["result"], row["error"]
    return job


def _parts(dataset: Dataset) -> list[memoryview]:
    """The bytes of the labels and then of the images, in pieces that PostgreSQL takes."""
    labels = dataset.labels.contiguous().numpy().data.cast("B")
    images = dataset.images.contiguous().numpy().data.cast("B")
    return [
        values[start : start + PART_BYTES]
        for values in (labels, images)
        for start in range(0, len(values), PART_BYTES)
    ]


def _dataset(about: dict[str, Any], content: bytearray) -> Dataset:
    n, *shape = about["shape"]
    try:
        labels = torch.frombuffer(content, dtype=torch.int64, count=n)
        images = torch.frombuffer(content, dtype=torch.uint8, offset=8 * n).reshape(n, *shape)
        dataset = Dataset(
            images=images,
            labels=labels,
            classes=tuple(about["classes"]),
            name=about["dataset"],
        )
    except (ValueError, RuntimeError) as error:
        raise Damaged(f"expected {n} images: {error}") from error
    if dataset.sha256 != about["sha256"]:
        raise Damaged("the images are not what they were")
    return dataset

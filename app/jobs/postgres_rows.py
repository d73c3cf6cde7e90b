"""Jobs and their images as rows in PostgreSQL, and operations on them within a transaction."""

from __future__ import annotations

from typing import Any

import torch
from psycopg.types.json import Json

from app.jobs.job import Job, JobState
from app.jobs.postgres_pool import CHANNEL, Connection
from app.jobs.store import Damaged, KeyUsed, Lost
from robust.datasets import Dataset
from robust.datasets.dataset import DTYPES

PART_BYTES = 4 * 2**20
COLUMNS = "id, about, state, bytes, created, finished, result, error, run, version"
ACTIVE = "state IN ('queued', 'running')"
NOTIFY = f"SELECT pg_notify('{CHANNEL}', %s)"
DATASET_FIELDS = ("shape", "dtype", "classes", "sha256", "parts")  # in `about`


async def find_same(db: Connection, job: Job) -> Job | None:
    """The existing job that is the same as `job`, if any. Raises KeyUsed."""
    condition = "digest = %s AND key IS NULL" if job.key is None else "key = %s"
    found = await db.execute(
        f"SELECT {COLUMNS}, digest FROM evaluations WHERE {condition}"
        f" AND state IN ('queued', 'running', 'done')",
        (job.digest if job.key is None else job.key,),
    )
    row = await found.fetchone()
    if row is not None and row["digest"] != job.digest:
        raise KeyUsed("the key names another evaluation")
    return None if row is None else to_job(row)


async def check_owned(db: Connection, job: Job) -> None:
    """Raise Lost unless this run still owns `job`. Locks its row until the transaction ends."""
    found = await db.execute(
        "SELECT 1 FROM evaluations WHERE id = %s AND run = %s AND state = 'running' FOR UPDATE",
        (job.id, job.run),
    )
    if await found.fetchone() is None:
        raise Lost("it was cancelled, or another replica has taken it over")


async def store_journal(db: Connection, job: Job, journal: bytes) -> None:
    """Store the journal; as that is progress, forget the replicas that were lost running it."""
    await db.execute(
        "UPDATE evaluations SET journal = %b, lost_by = '{}' WHERE id = %s", (journal, job.id)
    )


async def end(
    db: Connection, id: str, state: JobState, result: dict[str, Any] | None, error: str | None
) -> None:
    """End a job, and remove what only an active job needs: its journal and images."""
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
    await db.execute(NOTIFY, (id,))


def to_job(row: dict[str, Any]) -> Job:
    """The job in a row with COLUMNS."""
    about = row["about"]
    job = Job.from_about(
        row["id"],
        {name: value for name, value in about.items() if name not in DATASET_FIELDS},
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


def to_parts(dataset: Dataset) -> list[memoryview]:
    """The bytes of the labels and then of the images, in parts of at most PART_BYTES."""
    labels = dataset.labels.contiguous().numpy().data.cast("B")
    images = dataset.images.contiguous().numpy().data.cast("B")
    return [
        values[start : start + PART_BYTES]
        for values in (labels, images)
        for start in range(0, len(values), PART_BYTES)
    ]


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """What `to_dataset` needs to know of a dataset, as JSON values."""
    return {
        "shape": list(dataset.images.shape),
        "dtype": dataset.dtype,
        "classes": list(dataset.classes),
        "sha256": dataset.sha256,
    }


def to_dataset(about: dict[str, Any], content: bytearray) -> Dataset:
    """The dataset of a job, from its description and all parts together. Raises Damaged."""
    n, *shape = about["shape"]
    try:
        labels = torch.frombuffer(content, dtype=torch.int64, count=n)
        # Version 1 of the tables has no dtype: all its sets are uint8.
        dtype = DTYPES[about.get("dtype", "uint8")]
        images = torch.frombuffer(content, dtype=dtype, offset=8 * n).reshape(n, *shape)
        dataset = Dataset(
            images=images,
            labels=labels,
            classes=tuple(about["classes"]),
            name=about["dataset"],
        )
    except (ValueError, RuntimeError) as error:
        raise Damaged(f"expected {n} images: {error}") from error
    if dataset.sha256 != about["sha256"]:
        raise Damaged("the images have changed")
    return dataset

"""Submits and watches evaluation jobs, and runs them on the device one at a time."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from app.engine.engine import Engine
from app.engine.model_reloader import ModelReloader
from app.engine.queue import Kind
from app.engine.served_model import ServedModel
from app.engine.session import Session
from app.errors import (
    BodyTooLarge,
    Cancelled,
    EngineStopped,
    FieldError,
    InvalidParameters,
    NotFound,
    NotReady,
    Overloaded,
)
from app.jobs.job import STATES, Job, bytes_for, digest_of, scoped_key
from app.jobs.local_store import LocalStore
from app.jobs.progress import Progress, as_json
from app.jobs.store import Damaged, Full, JobStore, KeyUsed, Lost, StoreError, TooLarge, Unreachable
from app.metrics import Metrics
from app.settings import Settings
from robust.attacks import AttackSettings
from robust.datasets import Dataset
from robust.evaluation import Evaluation, evaluate_batches
from robust.evaluation.precision import Precision

logger = logging.getLogger(__name__)

POLL_SECONDS = 5.0  # between reads of a watched job, in case a notification is lost
STOP_SECONDS = 5.0  # for the device to finish a step
_ID = re.compile("[0-9a-f]{32}")

_KEY_USED = FieldError(
    field="Idempotency-Key",
    expected="a key that was not used for another evaluation",
    got="the key of another evaluation",
)


class Jobs:
    """The evaluations that clients can see here, whichever replica runs them."""

    def __init__(
        self, engine: Engine, models: ModelReloader, settings: Settings, metrics: Metrics
    ) -> None:
        self._engine, self._models, self._metrics = engine, models, metrics
        self._batch_size = settings.evaluation_batch
        self._weights_key = settings.key
        self._store = _store_for(settings, engine, models, metrics)
        for state in STATES:
            metrics.jobs.labels(state).set_function(partial(self._store.count, state))
        self._admitted: dict[str, ServedModel] = {}  # the model that each job was admitted with
        self.ending = False

    async def start(self) -> None:
        """Restore stored jobs and start running them."""
        await self._store.start(self._run)

    async def submit(
        self,
        model: ServedModel,
        dataset: Dataset,
        attacks: Sequence[AttackSettings],
        *,
        curve: int = 0,
        key: str | None = None,
        owner: str | None = None,
    ) -> Job:
        """Queue an evaluation of `model`, or return an earlier identical one.

        An owner's evaluations of the same model, images and settings are one job, unless their
        keys differ. Only requests with this `owner`, or with None, see the job.

        Raises Overloaded or BodyTooLarge if there is no room, NotReady if the job can't be stored,
        EngineStopped if it can't run, and InvalidParameters if the key was used for another
        evaluation.
        """
        self._engine.check_alive()
        # Chosen now: a replica that continues the job must use the same precision.
        precision: Precision = "bf16" if model.search.bf16 else "fp32"
        # The same file is another model with another normalization, activation or key.
        identity = f"{model.sha256} {self._weights_key} {model.sidecar.architecture}"
        digest = await asyncio.to_thread(
            digest_of, identity, dataset, attacks, curve, precision, owner
        )
        job = Job(
            id=uuid.uuid4().hex,
            model=model.sha256,
            dataset=dataset.name,
            images=len(dataset),
            attacks=tuple(attacks),
            created=datetime.now(UTC),
            curve=curve,
            precision=precision,
            digest=digest,
            key=scoped_key(key, owner),
            owner=owner,
            bytes=bytes_for(dataset, attacks, curve),
        )
        if self._store.alone:
            self._admitted[job.id] = model
        found = None
        try:
            with _reachable("There is no room to store the evaluation."):
                found = await self._store.add(job, dataset)
        except Full as full:
            self._metrics.rejected.labels(full.reason).inc()
            raise Overloaded(str(full), retry_after=await self._retry_after()) from None
        except TooLarge as error:
            raise BodyTooLarge(error.limit, of="images and journal") from None
        except KeyUsed:
            raise InvalidParameters([_KEY_USED]) from None
        finally:
            if found is not job:
                self._admitted.pop(job.id, None)
        return found

    async def _retry_after(self) -> int:
        queued = [job.cost for job in await self.all() if job.state == "queued"]
        return self._engine.retry_after(Kind.EVALUATE, ahead=sum(queued))

    async def all(self, owner: str | None = None) -> list[Job]:
        """All jobs, or those of `owner`, newest first.

        Like the other methods, raises NotReady if the store can't be reached.
        """
        with _reachable():
            return await self._store.all(owner)

    async def get(self, id: str, owner: str | None = None) -> Job:
        """The job with that id. Raises NotFound, also if it has another owner than `owner`."""
        job = None
        if _ID.fullmatch(id):  # PostgreSQL can't even look up some other texts
            with _reachable():
                job = await self._store.get(id)
        if job is None or (owner is not None and job.owner != owner):
            raise NotFound("There is no evaluation with this id, or it has expired.")
        return job

    async def delete(self, id: str) -> Job:
        """Stop a job at its next step, or remove a finished one. Raises NotFound."""
        job = await self.get(id)
        with _reachable():
            if not job.active:
                await self._store.forget(id)
                return job
            await self._store.cancel(id)
            self._admitted.pop(id, None)
            return await self._store.get(id) or job

    async def watch(self, job: Job) -> AsyncIterator[Job]:
        """Yield `job` now and after each change, until it ends or the service stops."""
        seen = None
        while True:
            changed, ending = self._store.changes.next(job.id), self.ending
            with suppress(StoreError):  # a store that is down comes back
                found = await self._store.get(job.id)
                if found is None:
                    return
                job = found
            if job.version != seen or ending:
                seen, last = job.version, ending or not job.active
                yield job  # it may end meanwhile
                if last:
                    return
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await changed.wait()

    async def ended(self, job: Job, seconds: float) -> Job:
        """Wait until `job` ends or the time is up; returns its latest state."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async for item in self.watch(job):
                    job = item
        return job

    async def hand_over(self) -> None:
        """Hand the running evaluation over to another replica, if there is one."""
        await self._store.hand_over()

    async def stop(self) -> None:
        """Stop the running job and all watchers; the next service continues stored jobs."""
        self.ending = True
        await self._store.stop()
        self._store.changes.notify_all()

    async def close(self) -> None:
        """Close the store. Call after `stop`, when the engine has stopped."""
        await self._store.close()

    async def _run(self, job: Job) -> None:
        """Run the evaluation `job`. If cancelled, queue it again. Raises EngineStopped."""
        try:
            await self._evaluate(job)
        except Lost as error:
            logger.info("stopped running evaluation %s: %s", job.id, error)
        finally:
            self._admitted.pop(job.id, None)

    async def _evaluate(self, job: Job) -> None:
        model = self._model_of(job)
        if model is None:
            error = "The model it was started with is no longer served."
            await self._store.finish(job, "failed", error=error)
            return
        try:
            dataset = await self._store.images(job)
        except Damaged as damaged:
            logger.error("evaluation %s can't continue: %s", job.id, damaged)
            error = "Its images were lost while the service was down."
            await self._store.finish(job, "failed", error=error)
            return
        async with self._store.journal(job) as journal:
            await self._on_device(job, model, dataset, journal)

    def _model_of(self, job: Job) -> ServedModel | None:
        if admitted := self._admitted.get(job.id):
            return admitted
        current = self._models.current
        return current if current.sha256 == job.model else None

    async def _on_device(
        self, job: Job, model: ServedModel, dataset: Dataset, journal: Path | None
    ) -> None:
        progress = Progress(journal, every=self._store.journal_seconds, shown=job.result)
        work = _evaluation(
            job,
            model,
            dataset,
            journal,
            progress.show,
            batch_size=self._batch_size or (64 if model.device.type == "cuda" else 16),
        )
        task = asyncio.create_task(
            self._engine.run(Kind.EVALUATE, model, progress.tracked(work), cost=job.cost)
        )
        report = asyncio.create_task(self._report(job, progress))
        try:
            await asyncio.wait({task, report}, return_when=asyncio.FIRST_COMPLETED)
            if report.done():
                report.result()
            evaluation = task.result()
        except (asyncio.CancelledError, Cancelled):
            task.cancel()
            report.cancel()
            await self._store.put_back(job, await progress.last_journal(STOP_SECONDS))
            raise
        except (StoreError, EngineStopped):  # another process can continue it
            raise
        except Exception:
            logger.exception("evaluation %s failed", job.id)
            error = "The evaluation failed; the service's log says why."
            await self._store.finish(job, "failed", progress.result, error)
        else:
            await self._store.finish(job, "done", as_json(evaluation))
        finally:
            task.cancel()
            report.cancel()

    async def _report(self, job: Job, progress: Progress) -> None:
        """Show the result so far, until cancelled. Raises Lost if another replica owns the job.

        An unreachable store is logged once, and the evaluation continues.
        """
        reachable = True
        while True:
            await progress.changed()
            try:
                await self._store.show(job, progress.result, progress.take_journal())
                reachable = True
            except Lost:
                raise
            except StoreError as error:
                if reachable:
                    logger.warning(
                        "evaluation %s continues, but its progress can't be stored: %s",
                        job.id,
                        error,
                    )
                reachable = False
            await asyncio.sleep(self._store.show_seconds)


def _store_for(
    settings: Settings, engine: Engine, models: ModelReloader, metrics: Metrics
) -> JobStore:
    if settings.database_url is None:
        try:
            return LocalStore(settings)
        except StoreError as error:
            raise StoreError(f"ROBUST_JOBS: {error}") from error
    try:
        from app.jobs.postgres_store import SharedStore
    except ModuleNotFoundError as error:
        raise ValueError(
            "ROBUST_DATABASE_URL needs the extra postgres: pip install 'robust[postgres]'"
        ) from error
    url = settings.database_url.get_secret_value()
    return SharedStore(url, settings, engine, models, metrics)


def _evaluation(
    job: Job,
    model: ServedModel,
    dataset: Dataset,
    journal: Path | None,
    show: Callable[[Evaluation], None],
    *,
    batch_size: int,
) -> Callable[[Session], Evaluation]:
    """A function that runs `job` on the device, and calls `show` with each result so far."""

    def work(session: Session) -> Evaluation:
        for evaluation in evaluate_batches(
            session.exact,
            dataset.images,
            dataset.labels,
            num_classes=len(model.classes),
            attacks=job.attacks,
            device=session.device,
            batch_size=batch_size,
            fast=session,
            bf16=session.bf16,
            watch=session.pause,
            curve=job.curve,
            precision=job.precision,
            journal=journal,
            model_id=model.sha256,
            architecture=model.sidecar.architecture,
        ):
            evaluation = _with_reason(evaluation, model)
            show(evaluation)
        return evaluation

    return work


def _with_reason(evaluation: Evaluation, model: ServedModel) -> Evaluation:
    """`evaluation` with the reason for its precision, if this service chose that precision."""
    if evaluation.precision != str(model.search):
        return evaluation  # another replica chose
    return replace(evaluation, precision_reason=model.search.reason)


@contextmanager
def _reachable(detail: str = "The evaluations can't be read now.") -> Iterator[None]:
    """Turn errors of the store into NotReady, with `detail` unless the store is unreachable."""
    try:
        yield
    except (Full, TooLarge, KeyUsed):
        raise
    except Unreachable as error:
        logger.error("%s", error)
        raise NotReady("The database of evaluations can't be reached now; try again.") from error
    except StoreError as error:
        logger.error("%s", error)
        raise NotReady(detail) from error

"""Evaluation jobs: asked for, watched, and run on the device one after the other."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from app.engine import Engine, Session
from app.errors import (
    BodyTooLarge,
    Cancelled,
    FieldError,
    InvalidParameters,
    NotFound,
    NotReady,
    Overloaded,
)
from app.job import STATES, Job, bytes_for, digest_of
from app.local import LocalStore
from app.metrics import Metrics
from app.model import ServedModel
from app.models import Models
from app.progress import Progress, as_json
from app.queue import Kind
from app.settings import Settings
from app.store import Damaged, Full, JobStore, KeyUsed, Lost, StoreError, TooLarge
from robust.attacks import AttackSettings
from robust.datasets import Dataset
from robust.evaluation import Evaluation, evaluate_batches
from robust.evaluation.precision import Precision, searches_in_bf16
from robust.inference import MANY, at_least

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0  # between looks at a watched job whose changes another replica tells of
STOP_SECONDS = 5.0  # that the device gets to come to the end of a step

_KEY_USED = FieldError(
    field="Idempotency-Key",
    expected="a key that was not used for another evaluation",
    got="one that was",
)


class Jobs:
    """The evaluations that this service answers for, whoever runs them."""

    def __init__(
        self, engine: Engine, models: Models, settings: Settings, metrics: Metrics
    ) -> None:
        self._engine, self._models, self._metrics = engine, models, metrics
        self._batch_size = settings.evaluation_batch
        self._store = _store_for(settings, models, metrics)
        for state in STATES:
            metrics.jobs.labels(state).set_function(partial(self._store.count, state))
        self._admitted: dict[str, ServedModel] = {}  # what a job of this service was admitted with
        self.ending = False

    async def start(self) -> None:
        """Take up what is kept: results to ask for, and work to go on with."""
        await self._store.start(self._run)

    async def submit(
        self,
        model: ServedModel,
        dataset: Dataset,
        attacks: Sequence[AttackSettings],
        *,
        curve: int = 0,
        key: str | None = None,
    ) -> Job:
        """Queue an evaluation of `model`, or find the one that was asked for before.

        The same model, images and settings are one job, unless `key` says that it is another.
        Raises Overloaded or BodyTooLarge where there is no room, NotReady where it can't be kept,
        InvalidParameters for a key that was used for something else.
        """
        # Settled now: whichever replica goes on with it must do so in the same precision.
        precision: Precision = "bf16" if searches_in_bf16("auto", model.device) else "fp32"
        digest = await asyncio.to_thread(
            digest_of, model.sha256, dataset, attacks, curve, precision
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
            key=key,
            bytes=bytes_for(dataset, attacks, curve),
        )
        if self._store.alone:
            self._admitted[job.id] = model
        found = None
        try:
            with _reachable("There is no room to keep the evaluation."):
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

    async def all(self) -> list[Job]:
        """Every job, the newest first. Raises NotReady, as `get` and `delete` do."""
        with _reachable():
            return await self._store.all()

    async def get(self, id: str) -> Job:
        """The job of that id. Raises NotFound."""
        with _reachable():
            job = await self._store.get(id)
        if job is None:
            raise NotFound("There is no evaluation of this id, or it has expired.")
        return job

    async def delete(self, id: str) -> Job:
        """Stop a job at its next step, or forget one that has ended. Raises NotFound."""
        job = await self.get(id)
        with _reachable():
            if not job.active:
                await self._store.forget(id)
                return job
            await self._store.cancel(id)
            self._admitted.pop(id, None)
            return await self._store.get(id) or job

    async def watch(self, job: Job) -> AsyncIterator[Job]:
        """`job` now and after each change, the last time when it has ended or the service does."""
        seen = None
        while True:
            changed, ending = self._store.changes.next(job.id), self.ending
            with suppress(StoreError):  # a store that is down comes back; there is nothing to tell
                found = await self._store.get(job.id)
                if found is None:
                    return
                job = found
            if job.version != seen or ending:
                seen, last = job.version, ending or not job.active
                yield job  # which may end meanwhile
                if last:
                    return
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await changed.wait()

    async def ended(self, job: Job, seconds: float) -> Job:
        """Wait until `job` ends, at most so long; how it is then."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async for item in self.watch(job):
                    job = item
        return job

    async def hand_over(self) -> None:
        """Let another replica go on with what this one runs, where there is another."""
        await self._store.hand_over()

    async def stop(self) -> None:
        """Stop what runs and tell whoever watches; what is kept goes on with the next service."""
        self.ending = True
        await self._store.stop()
        self._store.changes.tell_all()

    async def close(self) -> None:
        """Let go of what keeps the jobs. Call after `stop`, when the engine has stopped."""
        await self._store.close()

    async def _run(self, job: Job) -> None:
        """Do the evaluation `job`. Cancelled, it leaves it to the store to go on elsewhere."""
        try:
            await self._evaluate(job)
        except Lost as error:
            logger.info("evaluation %s is no longer done here: %s", job.id, error)
        finally:
            self._admitted.pop(job.id, None)

    async def _evaluate(self, job: Job) -> None:
        model = self._model_of(job)
        if model is None:
            error = "The model it was begun with is no longer served."
            await self._store.finish(job, "failed", error=error)
            return
        try:
            dataset = await self._store.images(job)
        except Damaged as damaged:
            logger.error("evaluation %s can't go on: %s", job.id, damaged)
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
        progress = Progress(journal, every=self._store.journal_seconds)
        work = _evaluation(
            job,
            model,
            dataset,
            journal,
            progress.show,
            batch_size=self._batch_size,
        )
        task = asyncio.create_task(
            self._engine.run(Kind.EVALUATE, model, progress.framed(work), cost=job.cost)
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
        except StoreError:
            raise
        except Exception:
            logger.exception("evaluation %s failed", job.id)
            error = "The evaluation failed; the log of the service says why."
            await self._store.finish(job, "failed", progress.result, error)
        else:
            await self._store.finish(job, "done", as_json(evaluation))
        finally:
            task.cancel()
            report.cancel()

    async def _report(self, job: Job, progress: Progress) -> None:
        """Show what comes out, until cancelled. Raises Lost when the job is another's by now."""
        while True:
            await progress.changed()
            try:
                await self._store.show(job, progress.result, progress.take_journal())
            except Lost:
                raise
            except StoreError as error:
                logger.warning("evaluation %s: %s", job.id, error)
            await asyncio.sleep(self._store.show_seconds)


def _store_for(settings: Settings, models: Models, metrics: Metrics) -> JobStore:
    if settings.database_url is None:
        return LocalStore(settings)
    try:
        from app.shared import SharedStore
    except ModuleNotFoundError as error:
        raise ValueError(
            "ROBUST_DATABASE_URL needs the extra postgres: pip install 'robust[postgres]'"
        ) from error
    return SharedStore(settings.database_url.get_secret_value(), settings, models, metrics)


def _evaluation(
    job: Job,
    model: ServedModel,
    dataset: Dataset,
    journal: Path | None,
    show: Callable[[Evaluation], None],
    *,
    batch_size: int,
) -> Callable[[Session], Evaluation]:
    """The work of `job` on the device."""

    def work(session: Session) -> Evaluation:
        for evaluation in evaluate_batches(
            at_least(MANY, session.exact),
            dataset.images,
            dataset.labels,
            num_classes=len(model.classes),
            attacks=job.attacks,
            device=session.device,
            batch_size=batch_size,
            fast=at_least(MANY, session),
            watch=session.pause,
            curve=job.curve,
            precision=job.precision,
            journal=journal,
            model_id=model.sha256,
        ):
            show(evaluation)
        return evaluation

    return work


@contextmanager
def _reachable(otherwise: str = "The evaluations can't be looked up now.") -> Iterator[None]:
    """Turn a store that can't be used into an answer."""
    try:
        yield
    except (Full, TooLarge, KeyUsed):
        raise
    except StoreError as error:
        logger.error("%s", error)
        raise NotReady(otherwise) from error

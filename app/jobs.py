"""Evaluation jobs: admitted by number, run one after the other, kept until they expire."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from app.engine import Engine, Session
from app.errors import Cancelled, FieldError, InvalidParameters, NotFound, NotReady, Overloaded
from app.metrics import Metrics
from app.model import ServedModel
from app.queue import Kind
from app.schemas import JobState
from app.settings import Settings
from app.store import JobStore, Kept, StoreError
from robust.attacks import AttackSettings
from robust.datasets import Dataset
from robust.evaluation import Evaluation, evaluate_batches
from robust.inference import MANY, at_least
from robust.threat_model import ThreatModel

logger = logging.getLogger(__name__)

ACTIVE: tuple[JobState, ...] = ("queued", "running")
MAX_FINISHED = 1000  # results are small, but neither memory nor disk is endless


@dataclass(eq=False, kw_only=True)
class Job:
    """An evaluation and what is known of it. Changed on the event loop only."""

    id: str
    model: str  # SHA-256
    dataset: str
    images: int
    attacks: tuple[AttackSettings, ...]
    created: datetime
    curve: int = 0  # images of the accuracy-against-eps curve
    digest: str = ""  # of all that decides the result
    key: str | None = None  # the client's own name for it
    state: JobState = "queued"
    result: dict[str, Any] | None = None  # the evaluation so far, as JSON values
    error: str | None = None
    finished: datetime | None = None
    expires: float | None = None  # on the monotonic clock
    stopped: bool = False  # by the end of the service; it goes on with the next one
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def active(self) -> bool:
        """Whether there is more to come."""
        return self.state in ACTIVE

    def update(self, state: JobState, evaluation: Evaluation | None = None) -> None:
        """Take over what is new and wake whoever watches."""
        self.state = state
        if evaluation is not None:
            self.result = {**evaluation.to_dict(), "done": evaluation.done}
        self.wake()

    def wake(self) -> None:
        """Let whoever watches look again."""
        self.changed.set()
        self.changed = asyncio.Event()

    def about(self) -> dict[str, Any]:
        """All that outlives the service, as JSON values."""
        return {
            "model": self.model,
            "dataset": self.dataset,
            "images": self.images,
            "attacks": [_attack_to_dict(attack) for attack in self.attacks],
            "created": self.created.isoformat(),
            "curve": self.curve,
            "digest": self.digest,
            "key": self.key,
            "state": self.state,
            "result": self.result if not self.active else None,
            "error": self.error,
            "finished": None if self.finished is None else self.finished.isoformat(),
        }

    @classmethod
    def from_kept(cls, kept: Kept) -> Job:
        """The job as it was left. Raises KeyError, TypeError or ValueError for what is none."""
        about = {name: value for name, value in kept.about.items() if name != "version"}
        about["attacks"] = tuple(map(_attack_from_dict, about["attacks"]))
        about["created"] = datetime.fromisoformat(about["created"])
        if about["finished"] is not None:
            about["finished"] = datetime.fromisoformat(about["finished"])
        return cls(id=kept.id, **about)


class Jobs:
    """The evaluations of one service: in memory, and on disk where there is a folder for them."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self._engine, self._settings, self._metrics = engine, settings, metrics
        self._jobs: dict[str, Job] = {}
        self._store = None if settings.jobs is None else JobStore(settings.jobs)

    async def restore(self, model: ServedModel) -> None:
        """Take up what the store has: results to ask for, and work to go on with."""
        if self._store is None:
            return
        self._store.sweep()
        for kept in self._store.all():
            try:
                job = Job.from_kept(kept)
            except (KeyError, TypeError, ValueError) as error:
                logger.error("evaluation %s can't be read and is forgotten: %r", kept.id, error)
                self._store.forget(kept.id)
                continue
            self._jobs[job.id] = job
            if job.active:
                await self._resume(job, model)
            else:
                job.expires = self._expiry(job)
        self._expire()

    async def _resume(self, job: Job, model: ServedModel) -> None:
        assert self._store is not None
        job.state = "queued"
        if job.model != model.sha256:
            self._fail(job, "The model it was begun with is no longer served.")
            return
        try:
            dataset = await asyncio.to_thread(self._store.get, job.id)
        except StoreError as error:
            logger.error("evaluation %s can't go on: %s", job.id, error)
            self._fail(job, "Its images were lost while the service was down.")
            return
        job.task = asyncio.create_task(self._run(job, model, dataset))

    def check_room(self) -> None:
        """Raise Overloaded when one more would be too many."""
        if sum(job.active for job in self._jobs.values()) >= self._settings.max_jobs:
            self._metrics.rejected.labels("jobs").inc()
            raise Overloaded(
                f"{self._settings.max_jobs} evaluations are queued or running.",
                retry_after=self._engine.retry_after(Kind.EVALUATE),
            )

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
        Raises Overloaded, NotReady where it can't be kept, InvalidParameters for a key that was
        used for something else.
        """
        self._expire()
        digest = await asyncio.to_thread(_digest, model, dataset, attacks, curve)
        if same := self._same(digest, key):
            return same
        self.check_room()
        job = Job(
            id=uuid.uuid4().hex,
            model=model.sha256,
            dataset=dataset.name,
            images=len(dataset),
            attacks=tuple(attacks),
            created=datetime.now(UTC),
            curve=curve,
            digest=digest,
            key=key,
        )
        self._jobs[job.id] = job  # counted from here on, while its images are written
        if self._store is not None:
            try:
                await asyncio.to_thread(self._store.put, job.id, dataset)
                self._store.save(job.id, job.created.timestamp(), job.about())
            except BaseException as error:
                del self._jobs[job.id]
                self._store.release(job.id)
                if isinstance(error, StoreError):
                    logger.error("%s", error)
                    raise NotReady("There is no room to keep the evaluation.") from error
                raise
        job.task = asyncio.create_task(self._run(job, model, dataset))
        self._count()
        return job

    def _same(self, digest: str, key: str | None) -> Job | None:
        for job in self._jobs.values():
            if job.state in ("failed", "cancelled") or job.stopped or job.key != key:
                continue
            if job.digest == digest:
                return job
            if key is not None:
                raise InvalidParameters(
                    [
                        FieldError(
                            field="Idempotency-Key",
                            expected="a key that was not used for another evaluation",
                            got="one that was",
                        )
                    ]
                )
        return None

    def all(self) -> list[Job]:
        """Every job, the newest first."""
        self._expire()
        return sorted(self._jobs.values(), key=lambda job: job.created, reverse=True)

    def get(self, id: str) -> Job:
        """The job of that id. Raises NotFound."""
        self._expire()
        if id not in self._jobs:
            raise NotFound("There is no evaluation of this id, or it has expired.")
        return self._jobs[id]

    def delete(self, id: str) -> Job:
        """Stop a job at its next step, or forget one that has ended. Raises NotFound."""
        job = self.get(id)
        if job.active:
            self._cancel(job)
        else:
            self._forget(job)
            self._count()
        return job

    def cancel_all(self) -> None:
        """Stop what is queued or running; what is on disk goes on with the next service."""
        for job in self._jobs.values():
            if not job.active or job.stopped:
                continue
            if self._store is None:
                self._cancel(job)
            else:
                job.stopped = True
                if job.task is not None:
                    job.task.cancel()
                job.wake()

    async def close(self) -> None:
        """Let go of the folder. Call after `cancel_all`, when the engine has stopped."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._store is not None:
            self._store.close()

    def _cancel(self, job: Job) -> None:
        if job.task is not None:
            job.task.cancel()
        self._finish(job, "cancelled")

    async def _run(self, job: Job, model: ServedModel, dataset: Dataset) -> None:
        loop = asyncio.get_running_loop()

        def show(state: JobState, evaluation: Evaluation | None = None) -> None:
            if job.active and not job.stopped:
                job.update(state, evaluation)
                self._count()

        def work(session: Session) -> Evaluation:
            loop.call_soon_threadsafe(show, "running")
            for evaluation in evaluate_batches(
                at_least(MANY, session.exact),
                dataset.images,
                dataset.labels,
                num_classes=len(model.classes),
                attacks=job.attacks,
                device=session.device,
                batch_size=self._settings.evaluation_batch,
                fast=at_least(MANY, session),
                watch=session.pause,
                curve=job.curve,
                journal=None if self._store is None else self._store.journal(job.id),
                model_id=model.sha256,
            ):
                loop.call_soon_threadsafe(show, "running", evaluation)
            return evaluation

        cost = len(dataset) * (1 + sum(attack.cost for attack in job.attacks))
        try:
            evaluation = await self._engine.run(Kind.EVALUATE, model, work, cost=cost)
        except Cancelled:
            self._finish(job, "cancelled")
        except Exception:
            if job.stopped:
                return
            logger.exception("evaluation %s failed", job.id)
            self._fail(job, "The evaluation failed; the log of the service says why.")
        else:
            self._finish(job, "done", evaluation)

    def _fail(self, job: Job, reason: str) -> None:
        job.error = reason
        self._finish(job, "failed")

    def _finish(self, job: Job, state: JobState, evaluation: Evaluation | None = None) -> None:
        if not job.active or job.stopped:
            return
        job.finished = datetime.now(UTC)
        job.expires = self._expiry(job)
        job.update(state, evaluation)
        self._count()
        if self._store is not None:
            try:
                self._store.save(job.id, job.created.timestamp(), job.about())
            except StoreError as error:
                # Not lost: the journal has every image, and the next service ends the job anew.
                logger.error("%s", error)
            else:
                self._store.release(job.id)

    def _expiry(self, job: Job) -> float:
        """When a finished job is forgotten, never later than after the whole time from now."""
        assert job.finished is not None
        whole = self._settings.job_expiry_seconds
        passed = (datetime.now(UTC) - job.finished).total_seconds()
        return time.monotonic() + min(max(whole - passed, 0.0), whole)

    def _expire(self) -> None:
        now = time.monotonic()
        ended = [job for job in self._jobs.values() if job.expires is not None]
        surplus = {job.id for job in ended[: max(len(ended) - MAX_FINISHED, 0)]}
        for job in ended:
            assert job.expires is not None
            if job.expires <= now or job.id in surplus:
                self._forget(job)
        self._count()

    def _forget(self, job: Job) -> None:
        del self._jobs[job.id]
        if self._store is not None:
            self._store.forget(job.id)

    def _count(self) -> None:
        states = [job.state for job in self._jobs.values()]
        for state in (*ACTIVE, "done", "failed", "cancelled"):
            self._metrics.jobs.labels(state).set(states.count(state))


def _digest(
    model: ServedModel, dataset: Dataset, attacks: Sequence[AttackSettings], curve: int
) -> str:
    """SHA-256 of all that decides the result of an evaluation."""
    settings = [_attack_to_dict(attack) for attack in attacks]
    decisive = [model.sha256, dataset.sha256, settings, curve]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _attack_to_dict(attack: AttackSettings) -> dict[str, Any]:
    return {**vars(attack), "threat_model": vars(attack.threat_model)}


def _attack_from_dict(values: dict[str, Any]) -> AttackSettings:
    return AttackSettings(**{**values, "threat_model": ThreatModel(**values["threat_model"])})


async def watch(job: Job) -> AsyncIterator[Job]:
    """`job` now and after each change, the last time when it has ended or the service does."""
    while True:
        changed, last = job.changed, job.stopped or not job.active
        yield job  # which may end meanwhile
        if last:
            return
        await changed.wait()


async def ended(job: Job, seconds: float) -> bool:
    """Wait until `job` ends, at most so long; whether it did."""
    try:
        async with asyncio.timeout(seconds):
            async for _ in watch(job):
                pass
    except TimeoutError:
        return False
    return not job.active

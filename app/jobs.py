"""Evaluation jobs: admitted by number, run one after the other, kept until they expire."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from app.engine import Engine, Session
from app.errors import Cancelled, NotFound, Overloaded
from app.metrics import Metrics
from app.model import ServedModel
from app.queue import Kind
from app.schemas import JobState
from app.settings import Settings
from robust.attacks import AttackSettings
from robust.datasets import Dataset
from robust.evaluation import Evaluation, evaluate_batches

logger = logging.getLogger(__name__)

ACTIVE: tuple[JobState, ...] = ("queued", "running")
MAX_FINISHED = 1000  # results are small, but the memory is not endless


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
    state: JobState = "queued"
    evaluation: Evaluation | None = None
    error: str | None = None
    finished: datetime | None = None
    expires: float | None = None  # on the monotonic clock
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def active(self) -> bool:
        """Whether there is more to come."""
        return self.state in ACTIVE

    def update(self, state: JobState, evaluation: Evaluation | None = None) -> None:
        """Take over what is new and wake whoever watches."""
        self.state = state
        self.evaluation = evaluation or self.evaluation
        self.changed.set()
        self.changed = asyncio.Event()


class Jobs:
    """The evaluations of one service, in memory."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self._engine, self._settings, self._metrics = engine, settings, metrics
        self._jobs: dict[str, Job] = {}

    def check_room(self) -> None:
        """Raise Overloaded when one more would be too many."""
        if sum(job.active for job in self._jobs.values()) >= self._settings.max_jobs:
            self._metrics.rejected.labels("jobs").inc()
            raise Overloaded(
                f"{self._settings.max_jobs} evaluations are queued or running.",
                retry_after=self._engine.retry_after(Kind.EVALUATE),
            )

    def submit(
        self,
        model: ServedModel,
        dataset: Dataset,
        attacks: Sequence[AttackSettings],
        *,
        curve: int = 0,
    ) -> Job:
        """Queue an evaluation of `model`. Raises Overloaded."""
        self._expire()
        self.check_room()
        job = Job(
            id=uuid.uuid4().hex,
            model=model.sha256,
            dataset=dataset.name,
            images=len(dataset),
            attacks=tuple(attacks),
            curve=curve,
            created=datetime.now(UTC),
        )
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._run(job, model, dataset))
        self._count()
        return job

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
            del self._jobs[id]
            self._count()
        return job

    def cancel_all(self) -> None:
        """Stop what is queued or running."""
        for job in self._jobs.values():
            if job.active:
                self._cancel(job)

    def _cancel(self, job: Job) -> None:
        assert job.task is not None
        job.task.cancel()
        self._finish(job, "cancelled")

    async def _run(self, job: Job, model: ServedModel, dataset: Dataset) -> None:
        loop = asyncio.get_running_loop()

        def show(state: JobState, evaluation: Evaluation | None = None) -> None:
            if job.active:
                job.update(state, evaluation)
                self._count()

        def work(session: Session) -> Evaluation:
            loop.call_soon_threadsafe(show, "running")
            for evaluation in evaluate_batches(
                session.exact,
                dataset.images,
                dataset.labels,
                num_classes=len(model.classes),
                attacks=job.attacks,
                device=session.device,
                fast=session,
                curve=job.curve,
            ):
                loop.call_soon_threadsafe(show, "running", evaluation)
            return evaluation

        cost = len(dataset) * (1 + sum(attack.cost for attack in job.attacks))
        try:
            evaluation = await self._engine.run(Kind.EVALUATE, model, work, cost=cost)
        except Cancelled:
            self._finish(job, "cancelled")
        except Exception:
            logger.exception("evaluation %s failed", job.id)
            job.error = "The evaluation failed; the log of the service says why."
            self._finish(job, "failed")
        else:
            self._finish(job, "done", evaluation)

    def _finish(self, job: Job, state: JobState, evaluation: Evaluation | None = None) -> None:
        if not job.active:
            return
        job.finished = datetime.now(UTC)
        job.expires = time.monotonic() + self._settings.job_expiry_seconds
        job.update(state, evaluation)
        self._count()

    def _expire(self) -> None:
        now = time.monotonic()
        ended = [job for job in self._jobs.values() if job.expires is not None]
        surplus = {job.id for job in ended[: max(len(ended) - MAX_FINISHED, 0)]}
        for job in ended:
            assert job.expires is not None
            if job.expires <= now or job.id in surplus:
                del self._jobs[job.id]
        self._count()

    def _count(self) -> None:
        states = [job.state for job in self._jobs.values()]
        for state in (*ACTIVE, "done", "failed", "cancelled"):
            self._metrics.jobs.labels(state).set(states.count(state))


async def watch(job: Job) -> AsyncIterator[Job]:
    """`job` now and after each change, the last time when it has ended."""
    while True:
        changed, last = job.changed, not job.active
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
    return True

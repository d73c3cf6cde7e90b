"""The model in service, and taking over a new checkpoint without dropping a request."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import torch

from app.engine import Engine, Session
from app.errors import NotReady
from app.memory import give_back, resettle
from app.metrics import Metrics
from app.model import ServedModel, bucket, load_model
from app.queue import Kind
from app.runtime import Plan, examples, plan_for
from robust.attacks import Model
from robust.checkpoint import CheckpointError, sidecar_path
from robust.environment import device_in_words
from robust.inference import FEW
from robust.memory import is_out_of_memory
from robust.prediction import predict

logger = logging.getLogger(__name__)

Signature = tuple[tuple[int, int, int] | None, ...]


class Models:
    """Holds the model that new work is admitted with; work in hand keeps the one it began with."""

    def __init__(
        self, path: Path, *, device: torch.device, metrics: Metrics, threads: int = 0
    ) -> None:
        self._path, self._device, self._metrics = path, device, metrics
        self._threads = threads
        self._current: ServedModel | None = None
        self._seen: Signature = ()
        self._asked = asyncio.Event()

    @property
    def loaded(self) -> bool:
        """Whether there is a model."""
        return self._current is not None

    @property
    def current(self) -> ServedModel:
        """The model in service. Raises NotReady before there is one."""
        if self._current is None:
            raise NotReady("The model is loading.")
        return self._current

    @property
    def sha256(self) -> str | None:
        """That of the model in service, if there is one."""
        return self._current.sha256 if self._current else None

    def load(self) -> None:
        """Load the first model. Raises CheckpointError."""
        self._seen = self._signature()
        self._take(self._load())

    def drop(self) -> None:
        """Let the model go: whatever else outlives the service then holds little."""
        self._current = None

    async def warm(self, engine: Engine) -> None:
        """Make the first model ready. Raises ValueError when it answers NaN."""
        self._take(await warm(engine, self.current, self._metrics))

    def ask(self) -> None:
        """Look at the files again, changed or not."""
        self._asked.set()

    async def watch(self, engine: Engine, seconds: float) -> None:
        """Take over every new checkpoint, until cancelled. A broken one is refused and logged."""
        while True:
            try:
                async with asyncio.timeout(seconds):
                    await self._asked.wait()
            except TimeoutError:
                pass
            asked = self._asked.is_set()
            self._asked.clear()
            signature = await asyncio.to_thread(self._signature)
            if signature == self._seen and not asked:
                continue
            self._seen = signature
            try:
                model = await asyncio.to_thread(self._load)
                if not asked and self._serves(model):
                    continue  # seen between its two renames: taken over already
                model = await warm(engine, model, self._metrics)
            except Exception as error:
                self._metrics.reloads.labels("failed").inc()
                known = isinstance(error, CheckpointError)
                logger.error(
                    "refused the new checkpoint; the old one serves on: %s",
                    error,
                    exc_info=None if known else error,
                )
            else:
                self._take(model)
                resettle()
                self._metrics.reloads.labels("ok").inc()
                logger.info("took over the checkpoint %s", model.sha256)

    def _load(self) -> ServedModel:
        return load_model(self._path, self._device, threads=self._threads, metrics=self._metrics)

    def _serves(self, model: ServedModel) -> bool:
        current = self._current
        return (
            current is not None
            and current.sha256 == model.sha256
            and current.sidecar == model.sidecar
        )

    def _take(self, model: ServedModel) -> None:
        self._current = model
        self._metrics.model.info(
            {
                "sha256": model.sha256,
                "arch": model.sidecar.architecture.arch,
                "device": device_in_words(model.device),
            }
        )
        self._metrics.runtime_rate.clear()
        for choice in model.plan.choices if model.plan else ():
            labels = choice.runtime.name, str(choice.images)
            self._metrics.runtime_rate.labels(*labels).set(choice.rate)

    def _signature(self) -> Signature:
        return tuple(map(_stamp, (self._path, sidecar_path(self._path))))


async def warm(engine: Engine, model: ServedModel, metrics: Metrics) -> ServedModel:
    """Run `model` on the device thread, and return it with what computes its predictions chosen.

    Other work goes on in between. Raises ValueError when it answers NaN.
    """

    def choose(session: Session) -> Plan | None:
        size = model.input_size
        predict(session, torch.full((1, 3, size, size), 0.5, device=session.device))
        if session.device.type != "cpu":
            warm_kernels(session, size, device=session.device, most=engine.max_batch)
            return None
        return plan_for(model.runtimes, side=size, metrics=metrics, pause=session.pause)

    plan = await engine.run(Kind.ATTACK, model, choose, cost=0)
    give_back()
    return replace(model, plan=plan, runtimes=())


def warm_kernels(model: Model, side: int, *, device: torch.device, most: int) -> None:
    """Run every size of pass that serves up to `most` images, and a gradient, where memory allows.

    A device looks for its kernels at the first pass of a size.
    """
    sizes = [2**power for power in range(bucket(most).bit_length())]
    x = examples(FEW, side).to(device).requires_grad_()
    torch.autograd.grad(model(x).sum(), x)
    for n in sizes:
        try:
            predict(model, examples(n, side).to(device))
        except RuntimeError as error:
            if n == 1 or not is_out_of_memory(error):
                raise
            logger.warning("out of memory with %d images; larger passes are not warmed", n)
            return


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino

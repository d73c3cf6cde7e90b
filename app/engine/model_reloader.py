"""Keeps the served model, and replaces it by a new checkpoint without dropping a request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from app.engine.cpu_limits import device_threads
from app.engine.engine import Engine
from app.engine.gc_tuning import refreeze_objects, release_memory
from app.engine.queue import Kind
from app.engine.runtime import Dtype
from app.engine.runtime_plan import examples, make_plan
from app.engine.served_model import ServedModel, bucket, load_model
from app.engine.session import Session
from app.errors import NotReady
from app.metrics import Metrics
from robust.attacks import Model
from robust.checkpoint import CheckpointError, sidecar_path
from robust.device import DeviceDisagrees
from robust.environment import device_in_words
from robust.evaluation.precision import (
    FAILURES,
    MIN_PASSES,
    PROBE,
    Precision,
    SearchPrecision,
    in_float32_after,
    try_bf16,
)
from robust.loading import ModelOptions
from robust.memory import is_out_of_memory
from robust.packed import Packed
from robust.prediction import predict

logger = logging.getLogger(__name__)

Signature = tuple[tuple[int, int, int] | None, ...]


class ModelReloader:
    """Keeps the model for new work; admitted work keeps the model it was admitted with."""

    def __init__(
        self,
        path: Path,
        *,
        device: torch.device,
        metrics: Metrics,
        options: ModelOptions | None = None,
        fall_back: bool = False,
        threads: int = 0,
        precision: Precision = "fp32",
    ) -> None:
        self._path, self._device, self._metrics = path, device, metrics
        self._options, self._fall_back = options, fall_back
        self._threads, self._precision = threads, precision
        self._current: ServedModel | None = None
        self._signature: Signature = ()  # of the files that were loaded or refused last
        self._check_now = asyncio.Event()

    @property
    def loaded(self) -> bool:
        """Whether a model is loaded."""
        return self._current is not None

    @property
    def current(self) -> ServedModel:
        """The served model. Raises NotReady if none is loaded yet."""
        if self._current is None:
            raise NotReady("The model is loading.")
        return self._current

    @property
    def sha256(self) -> str | None:
        """SHA-256 of the served model, if there is one."""
        return self._current.sha256 if self._current else None

    @property
    def precision(self) -> Dtype:
        """The precision of predictions."""
        return self._current.precision if self._current else "fp32"

    @property
    def device_in_words(self) -> str:
        """The device and its number of threads, in words."""
        device = self._current.device if self._current else self._device
        return device_in_words(device, device_threads(self._threads))

    def load(self) -> None:
        """Load the first model. Raises CheckpointError and DeviceDisagrees."""
        self._signature = self._read_signature()
        self._serve(self._load())

    def drop(self) -> None:
        """Release the model, so that whatever outlives the service keeps little memory."""
        self._current = None

    async def warm(self, engine: Engine) -> None:
        """Warm up the first model. Raises ValueError if it returns NaN."""
        self._serve(await warm(engine, self.current, self._metrics, self._precision))

    def reload(self) -> None:
        """Load the files now, whether or not they have changed."""
        self._check_now.set()

    async def watch(self, engine: Engine, seconds: float) -> None:
        """Load every new checkpoint, until cancelled. A broken one is refused and logged.

        The files are checked every `seconds`, and when `reload` is called.
        """
        while True:
            try:
                async with asyncio.timeout(seconds):
                    await self._check_now.wait()
            except TimeoutError:
                pass
            forced = self._check_now.is_set()
            self._check_now.clear()
            signature = await asyncio.to_thread(self._read_signature)
            if signature == self._signature and not forced:
                continue
            self._signature = signature
            try:
                model = await asyncio.to_thread(self._load)
                if not forced and self._is_served(model):
                    continue  # it was already loaded between the renames of its two files
                model = await warm(engine, model, self._metrics, self._precision)
            except Exception as error:
                self._metrics.reloads.labels("failed").inc()
                known = isinstance(error, CheckpointError | DeviceDisagrees)
                logger.error(
                    "refused the new checkpoint; still serving the old one: %s",
                    error,
                    exc_info=None if known else error,
                )
            else:
                self._serve(model)
                refreeze_objects()
                self._metrics.reloads.labels("ok").inc()
                logger.info("loaded the new checkpoint %s", model.sha256)

    def _load(self) -> ServedModel:
        return load_model(
            self._path,
            self._device,
            options=self._options,
            fall_back=self._fall_back,
            threads=self._threads,
            metrics=self._metrics,
            precision=self._precision,
        )

    def _is_served(self, model: ServedModel) -> bool:
        current = self._current
        return (
            current is not None
            and current.sha256 == model.sha256
            and current.sidecar == model.sidecar
        )

    def _serve(self, model: ServedModel) -> None:
        self._current = model
        self._metrics.model.info(
            {
                "sha256": model.sha256,
                "arch": model.sidecar.architecture.arch,
                "device": self.device_in_words,
                "precision": model.precision,
            }
        )
        release_memory()  # of the runtimes that were not chosen, and of the previous model
        self._metrics.runtime_rate.clear()
        for choice in model.plan.choices if model.plan else ():
            labels = choice.runtime.name, str(choice.images)
            self._metrics.runtime_rate.labels(*labels).set(choice.rate)

    def _read_signature(self) -> Signature:
        path = self._path
        # The last two hold the weights of a large ONNX file, as torch and Hugging Face write it.
        beside = [path.parent / f"{path.name}{suffix}" for suffix in (".data", "_data")]
        return tuple(map(_file_signature, (path, sidecar_path(path), *beside)))


async def warm(
    engine: Engine, model: ServedModel, metrics: Metrics, precision: Precision = "fp32"
) -> ServedModel:
    """Run `model` on the device thread, and return it with its runtimes and precisions chosen.

    If bf16 is requested but disagrees, predictions stay in float32 and the log says so: they are no
    worse, and a new checkpoint must not be refused because of rounding.

    Other work runs in between. Raises ValueError if the model returns NaN.
    """

    def choose(session: Session) -> ServedModel:
        size, device = model.input_size, session.device
        predict(session, torch.full((1, 3, size, size), 0.5, device=device))
        plan = None
        if model.runtimes and (device.type == "cpu" or model.bf16 is not None):
            plan = make_plan(
                model.runtimes,
                side=size,
                metrics=metrics,
                precision=precision,
                why_not_bf16=model.search.reason,
                device=device,
                pause=session.pause,
            )
        search = choose_search(model, precision, pause=session.pause)
        if search.bf16 and isinstance(model.fast, Packed):
            model.fast.drop_gradient()  # only a search that is repeated in float32 needs it
        if device.type != "cpu":
            warm_kernels(session, size, device=device, most=engine.max_batch)
            if model.bf16 is not None:
                warm_kernels(model.bf16, size, device=device, most=engine.max_batch)
            plan = plan if plan is not None and plan.precision == "bf16" else None
        return replace(
            model, plan=plan, search=search, runtimes=(), bf16=model.bf16 if search.bf16 else None
        )

    predicts = bool(model.runtimes)  # the comparison model only attacks
    model = await engine.run(Kind.ATTACK, model, choose, cost=0)
    search = "bf16" if model.search.bf16 else "fp32"
    told = f"attacks search in {search} ({model.search.reason})"
    if predicts:
        told = f"predictions in {model.precision} ({model.precision_reason}); {told}"
    refused = precision == "bf16" and (model.precision if predicts else search) == "fp32"
    logger.log(logging.WARNING if refused else logging.INFO, "%s: %s", model.name, told)
    return model


def choose_search(
    model: ServedModel, precision: Precision, *, pause: Callable[[], None]
) -> SearchPrecision:
    """The precision in which attacks and evaluations search; successes are verified in float32."""
    fast, bf16 = model.fast, model.bf16
    if fast is None or bf16 is None:
        return model.search
    x = examples(PROBE, model.input_size).to(model.device)
    try:
        pause()
        with torch.no_grad():
            y = bf16(x).argmax(dim=1)
        pause()
        return try_bf16(precision, fast, x, y, passes=MIN_PASSES, bf16=bf16)[0]
    except FAILURES as error:
        return in_float32_after(error)


def warm_kernels(model: Model, side: int, *, device: torch.device, most: int) -> None:
    """Run a gradient, and a pass of every batch size up to `most` images that fits in memory.

    A device selects its kernels at the first pass of each batch size.
    """
    sizes = [2**power for power in range(bucket(most).bit_length())]
    x = examples(1, side).to(device).requires_grad_()
    torch.autograd.grad(model(x).sum(), x)
    for n in sizes:
        try:
            predict(model, examples(n, side).to(device))
        except RuntimeError as error:
            if n == 1 or not is_out_of_memory(error):
                raise
            logger.warning("out of memory with %d images; larger batches are not warmed up", n)
            return


def _file_signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino

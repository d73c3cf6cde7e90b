"""A task's handle of the model on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from app.engine.queue import Work
from app.errors import ServiceError
from robust.attacks import Model
from robust.classifier import Classifier

if TYPE_CHECKING:
    from app.engine.engine import Engine


class Session:
    """The model, as a task on the device calls it: maps images to logits, between urgent work.

    Before each call it runs more urgent work, and raises Cancelled or DeadlineExceeded once no
    client waits for any of the task's results.
    """

    def __init__(self, engine: Engine, batch: list[Work]) -> None:
        self._engine, self._batch = engine, batch
        self.errors: list[ServiceError | None] = [None] * len(batch)
        self.model = batch[0].model
        self.device = batch[0].model.device
        self._exact: Classifier | None = None
        self.bf16: Model | None = None if self.model.bf16 is None else self._in_bf16

    def __call__(self, x: Tensor) -> Tensor:
        self.pause()
        return self.model.logits(x)

    def _in_bf16(self, x: Tensor) -> Tensor:
        """Logits from the bfloat16 copy, for searches."""
        assert self.model.bf16 is not None
        self.pause()
        return self.model.bf16(x)

    def exact(self, x: Tensor) -> Tensor:
        """Logits from the classifier itself, not from its faster copy."""
        self.pause()
        if self._exact is None:
            self._exact = self.model.exact()
        logits: Tensor = self._exact(x)
        return logits

    def cancelled(self) -> Tensor:
        """Mask of the session's works that are cancelled or past their deadline, bool (n,)."""
        return torch.tensor([error is not None for error in self.errors])

    def pause(self) -> None:
        """Run more urgent work; raise once no client waits for any of the results."""
        self._engine.serve(below=self._batch[0].kind)
        self._engine.serve_sooner(self._batch)
        for index, work in enumerate(self._batch):
            try:
                work.check()
            except ServiceError as error:
                self.errors[index] = self.errors[index] or error
        first = self.errors[0]
        if first is not None and all(self.errors):
            raise first

    def seconds(self) -> float:
        """Time on the device so far, excluding the work that ran in between."""
        return self._engine.own_seconds()

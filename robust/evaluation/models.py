"""The three versions of the model that an evaluation uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from robust.attacks import Model, ModelError, frozen
from robust.classifier import Classifier
from robust.evaluation.precision import SearchPrecision, full_float32, repeatable
from robust.inference import for_inference

# Largest difference of `fast` from `exact` at which it is trusted, relative to the largest logit.
TRUSTED = 1e-5
# Lead of the top class, relative to the image's largest logit, below which `exact` is asked anyway.
DOUBTFUL = 1e-3


class Models:
    """`exact` decides, `fast` is a faster float32 copy, and attacks query `search`.

    Once `fast` is trusted, `exact` uses its logits wherever the top class leads clearly, and runs
    the model itself on the other images, so every predicted label is that of the model.

    Each maps images float32 (N, C, H, W) to logits. Each call runs `watch` first, which may raise
    to stop the evaluation, and raises ModelError for NaN.
    """

    def __init__(
        self,
        exact: Model,
        *,
        fast: Model,
        search: Model,
        precision: SearchPrecision,
        watch: Callable[[], None],
    ) -> None:
        self.original, self._fast = exact, fast
        self.precision, self._watch = precision, watch
        models = (self._decide, fast, search)
        self.exact, self.fast, self.search = map(self._watched, models)
        self.has_fast, self._trusted = fast is not exact, False

    @property
    def confirm(self) -> Model | None:
        """The model that a success must also fool to count; None if `search` is exact."""
        return self.exact if self.precision.bf16 else None

    @contextmanager
    def hold(self, device: torch.device) -> Iterator[None]:
        """Freeze the models and use full float32 precision until the context ends."""
        with frozen(self.original, device), frozen(self._fast, device):
            with full_float32(), repeatable():
                yield

    def trust_fast(self, difference: float) -> None:
        """Trust `fast` if its measured `difference` from `exact` is small enough."""
        self._trusted = self.has_fast and difference <= TRUSTED

    def _decide(self, x: Tensor) -> Tensor:
        if not self._trusted:
            return self.original(x)
        logits = self._fast(x)
        first, second = logits.topk(2, dim=1).values.unbind(dim=1)
        doubtful = ~(first - second > DOUBTFUL * logits.abs().amax(dim=1))  # also for NaN
        if bool(doubtful.any()):
            logits = logits.clone()
            logits[doubtful] = self.original(x[doubtful])
        return logits

    def _watched(self, model: Model) -> Model:
        def forward(x: Tensor) -> Tensor:
            self._watch()
            logits = model(x)
            if isinstance(logits, Tensor) and logits.ndim == 2 and bool(logits.isnan().any()):
                check_finite(logits)
            return logits

        return forward


def check_finite(logits: Tensor) -> None:
    """Raise ModelError for logits (N, K) that are NaN or infinite."""
    bad = (~logits.isfinite()).any(dim=1)
    if bool(bad.any()):
        raise ModelError(
            f"expected finite logits, got NaN or infinities for {int(bad.sum())} of "
            f"{len(logits)} images"
        )


def fast_copy(model: Model, images: Tensor, device: torch.device) -> Model:
    """A faster copy of a `Classifier` for images of its input size, otherwise `model` itself."""
    if isinstance(model, Classifier):
        size = model.architecture.input_size
        if images.shape[2:] == (size, size):
            return for_inference(model, device)
    return model

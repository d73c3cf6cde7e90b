"""BentoML with adaptive batching, set by SERVING_BATCH and SERVING_WAIT_MS; for `bentoml serve`."""

from __future__ import annotations

import os

import bentoml
import torch
from network import answer, load_network, to_input
from PIL.Image import Image


@bentoml.service(workers=1, traffic={"timeout": 600, "max_concurrency": 10_000})
class Classify:
    def __init__(self) -> None:
        self.network = load_network()

    @bentoml.api(
        batchable=True,
        max_batch_size=int(os.environ["SERVING_BATCH"]),
        max_latency_ms=int(os.environ["SERVING_WAIT_MS"]),
    )
    def predict(self, file: list[Image]) -> list[dict[str, int | float]]:
        x = torch.stack([to_input(image) for image in file])
        with torch.inference_mode():
            return [answer(row) for row in self.network(x).softmax(dim=1)]

"""LitServe with batching, set by SERVING_BATCH and SERVING_WAIT_MS: python lit.py PORT."""

from __future__ import annotations

import os
import sys

import litserve
import torch
from network import answer, load_network, to_input
from PIL import Image
from torch import Tensor


class Classify(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.network = load_network()

    def decode_request(self, request) -> Tensor:  # with a type LitServe would treat it as a query
        return to_input(Image.open(request["file"].file))

    def batch(self, inputs: list[Tensor]) -> Tensor:
        return torch.stack(inputs)

    def predict(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.network(x).softmax(dim=1)

    def unbatch(self, output: Tensor) -> list[Tensor]:
        return list(output)

    def encode_response(self, output: Tensor) -> dict[str, int | float]:
        return answer(output)


if __name__ == "__main__":
    api = Classify(
        max_batch_size=int(os.environ["SERVING_BATCH"]),
        batch_timeout=float(os.environ["SERVING_WAIT_MS"]) / 1000,
    )
    server = litserve.LitServer(
        api, accelerator="cpu", timeout=False, fast_queue=os.environ["SERVING_FAST_QUEUE"] == "1"
    )
    server.run(port=int(sys.argv[1]), generate_client_file=False, log_level="warning")

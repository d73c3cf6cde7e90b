"""The network and its input for the peers, with torch and torchvision but not this project.

The environment variable SERVING_WEIGHTS is the path of the checkpoint, with its sidecar beside it;
SERVING_PRECISION is fp32 or bf16.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor


class InBFloat16(nn.Module):
    """A network in bfloat16 with inputs and logits in float32.

    Its weights are converted once, while autocast would convert them in every pass; channels last
    is the layout in which torch's convolutions in bfloat16 are fastest on a CPU.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.to(torch.bfloat16, memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.to(torch.bfloat16, memory_format=torch.channels_last))
        return logits.float()


def load_network() -> nn.Module:
    """torchvision's network in eval mode, with the weights of the checkpoint."""
    weights = Path(os.environ["SERVING_WEIGHTS"])
    about = json.loads(weights.with_suffix(".json").read_text())["architecture"]
    if about["mean"] != [0, 0, 0] or about["std"] != [1, 1, 1]:
        raise SystemExit("expected a checkpoint without normalization")
    network: nn.Module = getattr(torchvision.models, about["arch"])(
        num_classes=about["num_classes"]
    )
    if about["stem"] == "cifar":
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    if about["activation"] == "silu":
        for module in list(network.modules()):
            if hasattr(module, "relu"):
                module.relu = nn.SiLU(inplace=True)
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.eval()
    return InBFloat16(network) if os.environ["SERVING_PRECISION"] == "bf16" else network


def to_input(image: object) -> Tensor:
    """A Pillow image of the network's size as float32 (3, H, W) in [0, 1]."""
    pixels: Tensor = pil_to_tensor(image.convert("RGB"))  # type: ignore[attr-defined]
    return pixels.float() / 255


def answer(probabilities: Tensor) -> dict[str, int | float]:
    """The response: the likeliest class of probabilities (K,)."""
    index = int(probabilities.argmax())
    return {"index": index, "probability": float(probabilities[index])}

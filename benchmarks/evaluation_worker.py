"""Runs one tool of benchmarks/evaluation.py in its own process.

For `robust` it runs in this project's environment, for peers in theirs, so it imports only what its
tool needs. It reads requests for attacks on some images, one line of JSON each, and writes a line
of JSON with the seconds and, for peers, the file of adversarial images.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

REPEATS = 7  # timed passes, whose median counts

Attack = Callable[[nn.Module, Tensor, Tensor, dict[str, Any]], Tensor]


class Normalized(nn.Module):
    """torchvision's network as described by the sidecar, with its normalization in front."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        about = json.loads(weights.with_suffix(".json").read_text())["architecture"]
        if not hasattr(torchvision.models, about["arch"]):
            raise SystemExit(f"expected an architecture of torchvision, got {about['arch']}")
        self.net = getattr(torchvision.models, about["arch"])(num_classes=about["num_classes"])
        if about["stem"] == "cifar":
            self.net.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
            self.net.maxpool = nn.Identity()
        if about["activation"] == "silu":
            for module in list(self.net.modules()):
                if hasattr(module, "relu"):
                    module.relu = nn.SiLU(inplace=True)
        self.net.load_state_dict(torch.load(weights, weights_only=True))
        self.register_buffer("mean", torch.tensor(about["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(about["std"]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net((x - self.mean) / self.std)
        return logits


def torchattacks(model: nn.Module, x: Tensor, y: Tensor, request: dict[str, Any]) -> Tensor:
    import torchattacks as peer

    attack = peer.PGD(
        model, eps=request["eps"], alpha=request["alpha"], steps=request["steps"], random_start=True
    )
    parts = zip(x.split(request["batch"]), y.split(request["batch"]), strict=True)
    return torch.cat([attack(images, labels) for images, labels in parts])


def foolbox(model: nn.Module, x: Tensor, y: Tensor, request: dict[str, Any]) -> Tensor:
    import foolbox as peer

    wrapped = peer.PyTorchModel(model, bounds=(0, 1), device=x.device)
    attack = peer.attacks.LinfPGD(
        abs_stepsize=request["alpha"], steps=request["steps"], random_start=True
    )
    parts = zip(x.split(request["batch"]), y.split(request["batch"]), strict=True)
    return torch.cat([attack(wrapped, i, n, epsilons=request["eps"])[1] for i, n in parts])


def art(model: nn.Module, x: Tensor, y: Tensor, request: dict[str, Any]) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=int(request["classes"]),
        clip_values=(0.0, 1.0),
        device_type="gpu" if x.is_cuda else "cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier,
        eps=request["eps"],
        eps_step=request["alpha"],
        max_iter=request["steps"],
        num_random_init=1,
        batch_size=request["batch"],
        verbose=False,
    )
    return torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x.device)


def reference(model: nn.Module, x: Tensor, y: Tensor, request: dict[str, Any]) -> Tensor:
    sys.path.insert(0, request["reference"])
    from autoattack import AutoAttack

    attack = AutoAttack(
        model, norm="Linf", eps=request["eps"], version="standard", device=str(x.device), seed=0,
        verbose=False,
    )  # fmt: skip
    if request["attack"] != "autoattack":  # a warm-up of a few steps
        attack.attacks_to_run, attack.apgd.n_iter = ["apgd-ce"], request["steps"]
    found: Tensor = attack.run_standard_evaluation(x, y, bs=request["batch"])
    return found


PEERS: dict[str, Attack] = {
    "torchattacks": torchattacks,
    "foolbox": foolbox,
    "art": art,
    "autoattack": reference,
}


def robust_worker(weights: Path, x: Tensor, y: Tensor) -> Callable[[dict[str, Any]], Any]:
    """Runs our whole evaluation, with clean pass, probes and verification."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from robust.attacks import resolve_attack
    from robust.attacks.passes import Passes
    from robust.checkpoint import load_checkpoint
    from robust.evaluation import evaluate
    from robust.evaluation.precision import in_bf16, packed_float32
    from robust.inference import for_inference
    from robust.threat_model import ThreatModel

    model = load_checkpoint(weights, device=x.device).classifier

    def run(request: dict[str, Any]) -> dict[str, Any]:
        rows = slice(*request["rows"])
        parameters = {"alpha": request["alpha"]} if request["attack"].startswith("pgd") else {}
        attack = resolve_attack(request["attack"], ThreatModel(eps=request["eps"]), **parameters)
        begin = time.perf_counter()
        result = evaluate(
            model,
            (x[rows] * 255).round().to(torch.uint8),
            y[rows],
            num_classes=request["classes"],
            attacks=[attack],
            device=x.device,
            batch_size=request["batch"],
            precision=request["precision"],
        )
        seconds = time.perf_counter() - begin
        (item,) = result.attacks
        stages = [vars(stage) for stage in item.stages]
        passes = item.forwards + item.backwards
        return {
            "seconds": seconds,
            "correct": item.correct,
            "clean": result.clean.correct,
            "stages": stages,
            "passes": passes,
            "forwards": item.forwards,
            "backwards": item.backwards,
            "precision": result.precision,
        }

    def rates(request: dict[str, Any]) -> dict[str, Any]:
        """Seconds per image of a forward pass and of a gradient, in the requested precision."""
        images, labels = x[: request["batch"]], y[: request["batch"]]
        fast = for_inference(model, x.device)
        bf16 = request["precision"].startswith("bf16")
        passes = Passes((in_bf16 if bf16 else packed_float32)(fast, x.device))

        def loss(logits: Tensor, part: slice) -> Tensor:
            return nn.functional.cross_entropy(logits, labels[part], reduction="none")

        spent: dict[str, list[float]] = {"forward": [], "gradient": []}
        for _ in range(REPEATS):
            for name, call in (
                ("forward", lambda: passes.logits(images)),
                ("gradient", lambda: passes.gradient(images, loss)),
            ):
                begin = time.perf_counter()
                call()
                if x.is_cuda:
                    torch.cuda.synchronize()
                spent[name].append((time.perf_counter() - begin) / len(images))
        return {name: statistics.median(seconds) for name, seconds in spent.items()}

    return lambda request: rates(request) if request["attack"] == "rates" else run(request)


def peer_worker(
    name: str, weights: Path, x: Tensor, y: Tensor, folder: Path
) -> Callable[[dict[str, Any]], Any]:
    # Frozen, as some peers call backward(), which would also compute every weight's gradient.
    model = Normalized(weights).to(x.device).eval().requires_grad_(False)

    def run(request: dict[str, Any]) -> dict[str, Any]:
        rows = slice(*request["rows"])
        begin = time.perf_counter()
        x_adv = PEERS[name](model, x[rows], y[rows], request)
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        path = folder / f"{name}.npy"
        np.save(path, x_adv.detach().cpu().numpy())
        return {"seconds": seconds, "file": str(path)}

    return run


def main() -> None:
    name, weights, data, device, folder = sys.argv[1:6]
    with np.load(data) as arrays:
        x = torch.from_numpy(arrays["images"]).to(device).float() / 255
        y = torch.from_numpy(arrays["labels"]).to(device).long()
    out, sys.stdout = sys.stdout, sys.stderr  # keeps what tools print out of the responses
    if name == "robust":
        run = robust_worker(Path(weights), x, y)
    else:
        run = peer_worker(name, Path(weights), x, y, Path(folder))
    for line in sys.stdin:
        out.write(json.dumps(run(json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()

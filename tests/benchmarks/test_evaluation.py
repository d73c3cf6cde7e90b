"""What the comparison of benchmarks/evaluation.py rests on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import evaluation, evaluation_worker
from robust.checkpoint import load_checkpoint

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_peers_attack_the_same_model_and_compute_no_gradients_of_its_weights(
    checkpoint_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []

    def attack(model: nn.Module, x: Tensor, y: Tensor, request: dict[str, Any]) -> Tensor:
        models.append(model)
        return x

    monkeypatch.setitem(evaluation_worker.PEERS, "foolbox", attack)
    labels = torch.zeros(3, dtype=torch.int64)
    run = evaluation_worker.peer_worker("foolbox", checkpoint_path, IMAGES, labels, tmp_path)
    assert Path(run({"rows": (0, 3)})["file"]).is_file()
    (model,) = models
    assert not any(weights.requires_grad for weights in model.parameters())
    torch.testing.assert_close(model(IMAGES), load_checkpoint(checkpoint_path).classifier(IMAGES))


def test_every_tool_is_warmed_up_with_as_many_images_as_in_a_timed_batch() -> None:
    requests: list[tuple[str, dict[str, Any]]] = []

    def tool(name: str) -> Any:
        return SimpleNamespace(request=lambda **what: requests.append((name, what)))

    for part, images in ((50, 50), (256, 128)):
        requests.clear()
        evaluation.warm_up([tool("robust"), tool("autoattack")], part, batch=128, steps=20)
        wanted = {"batch": 128, "rows": (0, images), "attack": "pgd-2", "steps": 2}
        assert requests == [("robust", wanted), ("autoattack", wanted)]

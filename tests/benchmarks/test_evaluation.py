"""What the comparison of benchmarks/evaluation.py rests on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
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


def tool(name: str, seconds: list[float], correct: list[int]) -> Any:
    return SimpleNamespace(name=name, seconds=seconds, correct=correct)


def test_times_are_compared_part_by_part() -> None:
    rows = evaluation.table(
        [tool("robust", [1.0, 2.0, 1.0], [3, 4, 5]), tool("art", [4.0, 4.0, 3.0], [3, 4, 6])], 20
    )
    assert [row["ratio_median"] for row in rows] == [1, 3]
    assert (rows[1]["ratio_least"], rows[1]["ratio_most"]) == (2, 4)
    assert (rows[1]["seconds"], rows[1]["accuracy"], rows[0]["images_per_second"]) == (11, 0.65, 5)
    assert evaluation.parts_of(5, 2) == [(0, 2), (2, 4), (4, 5)]


def test_only_images_within_eps_and_the_pixel_range_fool(checkpoint_path: Path) -> None:
    labels = torch.tensor([1, 1, 1, 1, 2])
    judge = evaluation.Judge(checkpoint_path, torch.zeros(5, 3, 32, 32, dtype=torch.uint8), labels)

    def black(x: Tensor) -> Tensor:
        """Predicts 1 for a black image, else 0."""
        return nn.functional.one_hot((x == 0).flatten(1).all(dim=1).long(), 4)

    judge.model = black  # type: ignore[assignment]
    found = np.zeros((5, 3, 32, 32), np.float32)
    # Fooled, too far, no image, not fooled, and wrong without an attack.
    found[:, 0, 0, 0] = (0.01, 0.1, -0.01, 0, 0)
    assert judge.count_robust(found, (0, 5), 0.05) == 3


def test_passes_alone_are_plain_forward_passes_and_gradients() -> None:
    answers = iter(
        [
            {"seconds": 30.0, "forwards": 7, "backwards": 5, "passes": 12, "precision": "fp32"},
            {"forward": 1.0, "gradient": 4.0},
        ]
    )
    one: Any = SimpleNamespace(request=lambda **_: next(answers))
    (row,) = evaluation.limits(one, [3], {"attack": "pgd-2", "batch": 2, "precision": "auto"})
    assert row["limit"] == 5 * 4 + (3 + 7 - 5) * 1
    assert row["ratio"] == 30 / 25

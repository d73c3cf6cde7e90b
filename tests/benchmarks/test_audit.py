"""What the table of benchmarks/audit.py rests on: its cache and the cost of a sequence."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import audit
from benchmarks.audit import SUBJECTS, Measured, cache, in_turn, union
from tests.support.small import colors

MEASURED = {
    "a": Measured(
        fooled=torch.tensor([True, False, False, False]), passes=torch.tensor([1, 2, 2, 2])
    ),
    "b": Measured(
        fooled=torch.tensor([True, True, False, False]), passes=torch.tensor([10, 10, 20, 20])
    ),
}


def test_a_stage_counts_only_images_that_no_earlier_one_fooled() -> None:
    assert in_turn(["a", "b"], MEASURED) == [(4, 1, 7), (3, 1, 50)]
    assert in_turn(["b", "a"], MEASURED) == [(4, 2, 60), (2, 0, 4)]
    assert union(["a", "b"], MEASURED).tolist() == [True, True, False, False]


def test_nothing_is_reused_for_other_images_networks_or_attacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, dataset = SUBJECTS[0], colors()
    files = [
        cache(tmp_path, subject, dataset, 10),
        cache(tmp_path, SUBJECTS[1], dataset, 10),
        cache(tmp_path, replace(subject, eps="4/255"), dataset, 10),
        cache(tmp_path, subject, dataset.subset(range(79)), 10),
        cache(tmp_path, subject, dataset, 11),  # then other images are trained on
        cache(tmp_path, subject, dataset, 10, "malt"),
        cache(tmp_path, subject, dataset, 10, "malt/1"),
    ]
    assert cache(tmp_path, subject, colors(), 10) == files[0]
    monkeypatch.setattr(audit, "SIZE", 32)
    files.append(cache(tmp_path, subject, dataset, 10))
    monkeypatch.setattr("robust.__version__", "0", raising=False)
    files.append(cache(tmp_path, subject, dataset, 10))
    assert len(set(files)) == len(files)
    assert all(file.parent == tmp_path for file in files)

"""What the comparison of benchmarks/autoattack.py records and repeats."""

import subprocess
from pathlib import Path

import click
import pytest
import torch

from benchmarks import autoattack


def test_another_commit_of_the_reference_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "a"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    commit = head.stdout.strip()
    with pytest.raises(click.ClickException, match=f"{autoattack.REFERENCE_COMMIT}.* got {commit}"):
        autoattack.load_reference(tmp_path)
    monkeypatch.setattr(autoattack, "REFERENCE_COMMIT", commit)
    autoattack.check_commit(tmp_path)
    with pytest.raises(click.ClickException, match="got fatal"):
        autoattack.check_commit(tmp_path / "missing")


def test_the_control_starts_a_rounding_error_away_at_the_same_point_in_every_run() -> None:
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    moved = autoattack.nudged(x)
    torch.manual_seed(1)
    assert torch.equal(moved, autoattack.nudged(x))
    assert 0 < (moved - x).abs().max() < 1.3e-7
    assert moved.min() >= 0
    assert moved.max() <= 1


def test_images_that_only_one_implementation_fooled_are_counted() -> None:
    ours = torch.tensor([True, True, False, True])
    theirs = torch.tensor([True, False, True, False])
    assert autoattack._compare(ours, theirs) == {
        "ours": 0.75,
        "theirs": 0.5,
        "robust only in ours": 2,
        "only in theirs": 1,
    }

from pathlib import Path

import pytest

from robust.datasets import Dataset
from tests.training import small
from training.recipe import Recipe


@pytest.fixture(scope="session")
def colours() -> Dataset:
    return small.colours()


@pytest.fixture(scope="session")
def tiny() -> Recipe:
    return small.tiny()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "model.pt"

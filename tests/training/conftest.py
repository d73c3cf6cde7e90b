from pathlib import Path

import pytest

from robust.datasets import Dataset
from tests.support import small
from training.recipe import Recipe


@pytest.fixture(scope="session")
def colors() -> Dataset:
    return small.colors()


@pytest.fixture(scope="session")
def tiny() -> Recipe:
    return small.tiny()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "model.pt"

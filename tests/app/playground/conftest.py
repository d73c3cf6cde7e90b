"""A Chromium, a service for it to visit, and a visit.

All files share the services, so tests that evaluate the same dataset need different eps, or one
finds the result of another. Each file has its own Chromium: Playwright keeps an event loop in the
thread of the tests, where other tests run theirs.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from app.settings import Settings
from tests.app.conftest import write_checkpoint
from tests.support.browser import Visit, chromium
from tests.support.serving import Running, labeled, serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("visited") / "robust_model.pt"
    write_checkpoint(path, arch="resnet18")
    return path


@pytest.fixture(scope="session")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service with two registered sets, one of them long."""
    folder = tmp_path_factory.mktemp("sets")
    (folder / "few.npz").write_bytes(labeled(30))
    (folder / "many.npz").write_bytes(labeled(1200))
    settings = Settings(
        checkpoint=checkpoint, threads=1, device="cpu", datasets=folder, max_body_bytes=300_000
    )
    with serving(settings) as running:
        yield running


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service with a model to compare with."""
    folder = tmp_path_factory.mktemp("compared")
    write_checkpoint(folder / "robust_model.pt", seed=1, arch="resnet18")
    write_checkpoint(folder / "plain_model.pt", seed=2, arch="resnet18")
    settings = Settings(checkpoint=folder / "robust_model.pt", threads=1, device="cpu")
    with serving(settings) as running:
        yield running


@pytest.fixture
def visit(browser: Browser, served: Running) -> Iterator[Visit]:
    visit = Visit(browser, served.url)
    yield visit
    visit.close()

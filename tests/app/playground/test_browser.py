"""The page in a real Chromium: a service that goes away or changes, and what is for everybody."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, Route, expect

from app.application import create_app
from app.settings import Settings
from tests.app.conftest import write_checkpoint
from tests.support.browser import Visit
from tests.support.playground import settled, start
from tests.support.processes import free_port
from tests.support.serving import Running, labeled, serving, until

pytestmark = pytest.mark.browser


@contextmanager
def serving_at(port: int, settings: Settings) -> Iterator[None]:
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings), port=port, log_config=None, access_log=False, lifespan="on"
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        yield
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


@pytest.fixture
def port() -> int:
    return free_port()


def test_service_that_stops_and_returns(
    browser: Browser, checkpoint: Path, tmp_path: Path, port: int
) -> None:
    (tmp_path / "many.npz").write_bytes(labeled(3000))
    settings = Settings(checkpoint=checkpoint, threads=1, device="cpu", datasets=tmp_path)
    visit = Visit(browser, f"http://127.0.0.1:{port}")
    with serving_at(port, settings):
        page = visit.open()
        settled(page)
        start(page, "many")
        expect(page.locator("#accuracies tbody tr")).to_have_count(4)
    expect(page.locator("#evaluate-error")).to_have_text("The connection was lost. Trying again…")
    expect(page.locator("#status")).to_contain_text("does not respond")
    expect(page.locator("#accuracies tbody tr")).to_have_count(4)  # what came stays
    page.fill("#eps-number", "20")
    expect(page.locator("#attack-error")).to_contain_text("The service does not respond.")
    with serving_at(port, settings):
        expect(page.locator("#status")).to_contain_text("resnet18")
        expect(page.locator("html")).to_have_attribute("data-shown", "fgsm 20")
        expect(page.locator("#attack-error")).to_be_hidden()
        # Either it was begun anew with the service, or it is known to be lost: never a silence.
        expect(
            page.locator("#evaluate-error, #evaluate-text").filter(visible=True).first
        ).not_to_have_text(re.compile("Trying again"), timeout=30_000)
        page.select_option("#name", "pgd")
        expect(page.locator("html")).to_have_attribute("data-shown", "pgd 20")
    visit.close()


def test_model_change_is_noticed(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "robust_model.pt"
    first = write_checkpoint(path, seed=1, arch="resnet18")
    (tmp_path / "few.npz").write_bytes(labeled(6))
    settings = Settings(
        checkpoint=path, threads=1, device="cpu", reload_seconds=0.1, datasets=tmp_path
    )
    with serving(settings) as running:
        visit = Visit(browser, running.url)
        visit.page.clock.install()
        page = visit.open()
        expect(page.locator("#status")).to_contain_text(first[:8])
        start(page, "few")
        expect(page.locator("#evaluate-text")).to_have_text(re.compile("^Done"))
        expect(page.locator("#evaluate-stale")).to_be_hidden()
        second = write_checkpoint(path, seed=2, arch="resnet18")
        until(lambda: running.service.models.sha256 == second)
        page.clock.fast_forward(11_000)
        expect(page.locator("#status")).to_contain_text(second[:8])
        expect(page.locator("#card")).to_contain_text(second[:12])
        earlier = "The dimmed result is for an earlier model."
        expect(page.locator("#evaluate-stale")).to_have_text(earlier)
        page.reload()
        expect(page.locator("#evaluate-text")).to_have_text(re.compile("^Done"))
        expect(page.locator("#evaluate-stale")).to_have_text(earlier)
        visit.close()


def test_model_change_while_the_page_opens_is_noticed(visit: Visit, served: Running) -> None:
    old = "0" * 64
    asked: list[str] = []

    def replaced(route: Route) -> None:
        answer = route.fetch()
        if asked:
            route.fulfill(response=answer)
        else:
            headers = answer.headers | {"x-model-sha256": old}
            route.fulfill(response=answer, json=answer.json() | {"sha256": old}, headers=headers)
        asked.append(route.request.url)

    visit.page.route("**/model", replaced)
    visit.open()
    sha256 = served.service.models.sha256
    assert sha256 is not None
    expect(visit.find("#status")).to_contain_text(sha256[:8])
    assert len(asked) == 2


def test_api_key_is_requested_and_used(browser: Browser, checkpoint: Path) -> None:
    settings = Settings(checkpoint=checkpoint, threads=1, device="cpu", api_keys=("open-sesame",))
    with serving(settings) as running:
        visit = Visit(browser, running.url)
        page = visit.page
        page.goto(running.url)
        expect(page.locator("#key-form")).to_be_visible()
        expect(page.locator("#model-error")).to_contain_text("requires an API key")
        expect(page.locator("#key-text")).to_be_hidden()
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-text")).to_contain_text("The service refused this key.")
        expect(page.locator("#key-form")).to_be_visible()
        page.fill("#key", "open-sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#verdict")).to_have_text(
            re.compile("^(Broken|Withstood|Misclassified)")
        )
        expect(page.locator("#key-form")).to_be_hidden()
        assert "open-sesame" not in page.content()
        assert "Authorization: Bearer KEY" in page.locator("#curl").inner_text()
        visit.close()


# For everybody


def test_system_theme_is_used_until_another_is_chosen(browser: Browser, served: Running) -> None:
    visit = Visit(browser, served.url, color_scheme="dark")
    page = visit.open()
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(ground)
    page.click("#theme")
    expect(page.locator("#theme")).to_have_text("Theme: light")
    light = page.evaluate(ground)
    assert light != dark
    page.reload()
    assert page.evaluate(ground) == light
    expect(page.locator("#theme")).to_have_text("Theme: light")
    page.click("#theme")
    page.click("#theme")
    expect(page.locator("#theme")).to_have_text("Theme: system")
    assert page.evaluate(ground) == dark
    visit.close()


def test_everything_can_be_reached_with_the_tab_key(visit: Visit) -> None:
    page = visit.open()
    settled(page)
    visible = page.evaluate(
        """() => [...document.querySelectorAll("a[href], button, input, select, summary")]
            .filter(node => !node.disabled && (node.checkVisibility() || node.id === "file"))
            .map(node => node.id || node.textContent.trim() || node.ariaLabel || node.value)"""
    )
    reached = set()
    for _ in range(len(visible) + 20):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                """() => { const node = document.activeElement;
                    return node.id || node.textContent.trim() || node.ariaLabel || node.value }"""
            )
        )
    assert set(visible) <= reached
    # Without the mouse: to an example, and on to the attack.
    page.focus('[data-example="deer"]')
    page.keyboard.press("Enter")
    expect(page.locator("#seen-text")).to_contain_text("deer.jpg")


def test_page_contacts_only_the_service(browser: Browser, served: Running) -> None:
    visit = Visit(browser, served.url)
    asked: set[str] = set()
    visit.page.on("request", lambda request: asked.add(request.url))
    page = visit.open()
    settled(page)
    start(page, "few")
    expect(page.locator("#evaluate-text")).to_have_text(re.compile("^Done"))
    assert len(asked) > 10
    assert {url for url in asked if not url.startswith((served.url, "data:", "blob:"))} == set()
    visit.close()

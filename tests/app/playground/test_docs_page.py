"""The documentation of the API in the browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from app.settings import Settings
from tests.support.browser import Visit, axe_faults
from tests.support.serving import Running, serving

pytestmark = pytest.mark.browser


# In the markup that Swagger UI makes, which only its authors can change.
SWAGGERS = ("nested-interactive", "heading-order")


def test_docs_page_passes_axe_and_links_back(browser: Browser, running: Running) -> None:
    # The policy is lifted for axe alone, which runs as an inline script.
    visit = Visit(browser, running.url, bypass_csp=True)
    page = visit.page
    page.goto(f"{running.url}/docs")
    expect(visit.find(".opblock").first).to_be_visible()
    assert axe_faults(page, ignored=SWAGGERS) == []
    assert visit.find("html").get_attribute("lang") == "en"
    assert visit.find(".authorization__btn").count() == 0  # no key is needed
    page.click("text=Back to the playground")
    expect(visit.find("#attack-title")).to_be_visible()
    visit.close()


def test_padlocks_mark_routes_that_need_a_key(browser: Browser, checkpoint: Path) -> None:
    settings = Settings(checkpoint=checkpoint, threads=1, device="cpu", api_keys=("sesame",))
    with serving(settings) as running:
        visit = Visit(browser, running.url)
        visit.page.goto(f"{running.url}/docs")
        expect(visit.find(".opblock").first).to_be_visible()
        locked = visit.find(".opblock:has(.authorization__btn) .opblock-summary-path")
        paths = {text.strip("\u200b") for text in locked.all_inner_texts()}
        assert any("predict" in path for path in paths)
        assert not any("livez" in path or "readyz" in path for path in paths)
        visit.close()

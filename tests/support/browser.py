"""A real Chromium for the playground's tests."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# With every context Chromium loads two pages more, the suggestions of its address bar. Of several
# lists of features to disable the last counts: the rest are those of Playwright's that matter here.
UNUSED = (
    "WebUIOmniboxPopup",
    "WebUIOmniboxAimPopup",
    "AvoidUnnecessaryBeforeUnloadCheckSync",
    "DestroyProfileOnBrowserClose",
    "HttpsUpgrades",
    "MediaRouter",
    "OptimizationHints",
    "PaintHolding",
    "PreconnectToSearch",
    "ThirdPartyStoragePartitioning",
)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    f"--disable-features={','.join(UNUSED)}",
]
# Chromium notes every answer that is an error, also one that the page shows in words.
NETWORK = "Failed to load resource"

TIMEOUT = 120_000  # ms: a machine may be busy
expect.set_options(timeout=TIMEOUT)


def executable() -> str | None:
    """The Chromium of this machine; CHROMIUM names another one."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    return found if found and Path(found).exists() else None


@contextmanager
def chromium() -> Iterator[Browser]:
    """A Chromium without a window. Skips where there is none."""
    path = executable()
    if path is None:
        pytest.skip("no Chromium here; install one, or name it in CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def axe_faults(page: Page, *, ignored: tuple[str, ...] = ()) -> list[str]:
    """What axe says against the page, whose policy must be lifted, without the rules `ignored`."""
    from axe_playwright_python.base import AXE_FILE_PATH  # type: ignore[import-untyped]

    if not page.evaluate("'axe' in window"):
        page.add_script_tag(path=str(AXE_FILE_PATH))
    # In full are the violations only: to describe all that passes takes most of the time.
    found = page.evaluate(
        """axe.run({resultTypes: ["violations"]})
            .then(({passes, violations}) => ({passes: passes.length, violations}))"""
    )
    assert found["passes"] > 10
    return [
        f"{item['id']}: {node['target']} {node['failureSummary']}"
        for item in found["violations"]
        if item["id"] not in ignored
        for node in item["nodes"]
    ]


class Visit:
    """A page of the playground, and what its console said."""

    def __init__(self, browser: Browser, url: str, **context: Any) -> None:
        given = {"viewport": {"width": 1280, "height": 900}, "accept_downloads": True} | context
        self.context = browser.new_context(**given)
        self.context.set_default_timeout(TIMEOUT)
        self.page: Page = self.context.new_page()
        self.said: list[str] = []
        self.url = url
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and NETWORK not in message.text:
            self.said.append(message.text)

    def open(self, query: str = "") -> Page:
        """Go there and wait for the first attack to be shown."""
        self.page.goto(f"{self.url}/{query}")
        expect(self.find("html")).to_have_attribute("data-shown", re.compile("."))
        return self.page

    def find(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def close(self) -> None:
        """Leave, having heard no complaint."""
        self.context.close()
        assert self.said == []

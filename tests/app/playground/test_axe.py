"""What axe finds in the page, with one model and with two, and in the report."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, expect

from tests.support.browser import Visit, axe_faults
from tests.support.serving import Running

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]  # axe takes minutes on a slow machine

WIDTHS = (375, 820, 1440)
SCHEMES = ("light", "dark")


def visit_without_csp(browser: Browser, url: str) -> Visit:
    """A visit that ignores the Content-Security-Policy, because axe runs as an inline script."""
    return Visit(browser, url, bypass_csp=True)


def faults(visit: Visit, widths: tuple[int, ...] = WIDTHS) -> list[str]:
    """What axe finds at each width in the light and in the dark, and what sticks out to the right.

    One visit is resized, so that attacks and evaluations run only once.
    """
    found = []
    for width in widths:
        visit.page.set_viewport_size({"width": width, "height": 900})
        for _ in range(20):  # a frame or a chart may still be drawn for the width before
            too_wide = visit.page.evaluate("document.documentElement.scrollWidth - innerWidth")
            if too_wide <= 0:
                break
            visit.page.wait_for_timeout(100)
        found += [f"{too_wide} pixels stick out at {width}"] * (too_wide > 0)
        # axe does not tell the contrast of text that sticks out of the root element.
        least = f"{width + too_wide}px" if too_wide > 0 else ""
        visit.page.evaluate("least => document.documentElement.style.minWidth = least", least)
        for scheme in SCHEMES:
            # Without transitions, so that the bars are in their place.
            visit.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
            found += [f"{width} {scheme} {fault}" for fault in axe_faults(visit.page)]
        visit.page.evaluate("document.documentElement.style.minWidth = ''")
    return found


def test_low_contrast_is_reported_on_an_overflowing_page(browser: Browser, served: Running) -> None:
    visit = visit_without_csp(browser, served.url)
    visit.page.goto(served.url)
    visit.page.add_style_tag(content="main { width: 500px } .intro { color: #888 !important }")
    found = faults(visit, widths=(375,))
    assert found[0] == "125 pixels stick out at 375"
    assert any(fault.startswith("375 light color-contrast: ['.intro']") for fault in found)
    visit.close()


def evaluated(visit: Visit, eps: int) -> None:
    visit.page.select_option("#set", label="few")
    visit.page.fill("#set-eps", str(eps))
    visit.page.click("#start")
    expect(visit.find("#evaluate-text")).to_have_text(re.compile("^Done"))


def test_the_page(browser: Browser, served: Running) -> None:
    visit = visit_without_csp(browser, served.url)
    page = visit.open()
    expect(visit.find("#curve-text")).to_have_text(re.compile("^(Smallest|PGD-10|The model)"))
    evaluated(visit, 4)
    wrong = {"name": "x.png", "mimeType": "image/png", "buffer": b"no image"}
    page.set_input_files("#file", wrong)  # type: ignore[arg-type]
    expect(visit.find("#picture-error")).to_be_visible()
    page.click("summary")
    assert faults(visit) == []
    visit.close()


def test_two_models_side_by_side(browser: Browser, compared: Running) -> None:
    visit = visit_without_csp(browser, compared.url)
    visit.open()
    expect(visit.find("html")).to_have_attribute("data-compared", re.compile("."))
    for column in ("#verdict", "#compared-verdict", "#adversarial", "#compared"):
        expect(visit.find(column)).to_be_visible()
    assert faults(visit) == []
    visit.close()


def test_the_report(browser: Browser, served: Running) -> None:
    visit = visit_without_csp(browser, served.url)
    page = visit.open()
    with page.expect_response(re.compile("/evaluate$")) as answer:
        evaluated(visit, 4)
    page.click("#report-show")
    expect(page.frame_locator("#report-frame").locator("h1")).to_be_visible()
    assert faults(visit) == []  # of the page with the report in it
    page.goto(f"{served.url}/evaluate/{answer.value.json()['id']}/report")
    expect(visit.find("h1")).to_be_visible()
    assert faults(visit) == []
    visit.close()

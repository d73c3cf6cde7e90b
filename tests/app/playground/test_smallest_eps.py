"""The search for the smallest eps that breaks an image: few attacks, whatever the model."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Route, expect

from tests.support.browser import Visit
from tests.support.playground import choose, settled, source
from tests.support.serving import CLASSES, Running, jpeg

pytestmark = pytest.mark.browser

EXAMPLES = Path(__file__).parents[3] / "examples"
Margin = Callable[[int], float]


class Scripted:
    """Answers attacks with PGD-10 by `margin` of eps, the distance to another prediction."""

    def __init__(
        self, visit: Visit, served: Running, margin: Margin, *, certain: bool = False
    ) -> None:
        self.margin, self.certain = margin, certain
        self.asked: list[int] = []  # eps in 255ths
        image = (EXAMPLES / "coffee.jpg").read_bytes()
        self.answer = served.client.post("/attack?attack=pgd&steps=10", content=image).json()
        visit.page.route("**/attack", self._answer)

    def _answer(self, route: Route) -> None:
        body = (route.request.post_data_buffer or b"").decode("latin-1")
        if self.certain and re.search(r'name="eps"\r\n\r\n0\r', body):
            answer = route.fetch().json()
            label = answer["before"]["label"]
            answer["before"]["top"] = [
                {"label": name, "index": index, "probability": float(name == label)}
                for index, name in enumerate(CLASSES)
            ]
            return route.fulfill(body=json.dumps(answer), content_type="application/json")
        match = re.search(r'name="eps"\r\n\r\n(\d+)/255', body)
        if not match or not re.search(r'name="steps"\r\n\r\n10\r', body):
            return route.continue_()
        self.asked.append(int(match[1]))
        answer = copy.deepcopy(self.answer)
        self._tell(answer, self.margin(self.asked[-1]))
        route.fulfill(body=json.dumps(answer), content_type="application/json")

    def _tell(self, answer: dict[str, Any], margin: float) -> None:
        label, other = answer["label"], {"label": "ship", "index": 8}
        p = 0.9 / (1 + math.exp(-margin))
        top = [{**label, "probability": p}, {**other, "probability": 0.9 - p}]
        top.sort(key=lambda item: -item["probability"])
        result = answer["results"][0]
        result["after"] = {**top[0], "top": top}
        result["outcome"] = "withstood" if margin > 0 else "broken"


@pytest.mark.parametrize(
    ("margin", "smallest", "most"),
    [
        (lambda k: 0.1 * (29.5 - k), 30, 4),  # straight: two lines and the eps below
        (lambda k: 3 * math.tanh((40.5 - k) / 8), 41, 6),  # flat at both ends
        (lambda k: 4.0 if k < 20 else -0.05, 20, 11),  # a step, to which lines lead slowly
        (lambda k: math.inf if k < 20 else -math.inf, 20, 7),  # probabilities of 0 and 1
    ],
)
def test_smallest_eps_is_found_with_few_attacks(
    visit: Visit, served: Running, margin: Margin, smallest: int, most: int
) -> None:
    page = visit.page
    scripted = Scripted(visit, served, margin)
    # The first attack, of no size, tells the model's own prediction: it becomes the label.
    page.goto(f"{visit.url}/?example=coffee&attack=fgsm")
    expect(visit.find("#curve-text")).to_have_text(f"Smallest eps that breaks this image: "
                                                   f"{smallest}/255 (PGD-10, L∞).")  # fmt: skip
    found = scripted.asked[: 1 + max(scripted.asked.index(k) for k in (smallest, smallest - 1))]
    assert 0 not in found  # the prediction of the original is known
    assert len(found) <= most


def test_curve_starts_at_a_probability_of_one(visit: Visit, served: Running) -> None:
    scripted = Scripted(visit, served, lambda k: 0.1 * (29.5 - k), certain=True)
    visit.page.goto(f"{visit.url}/?example=coffee&attack=fgsm")
    expect(visit.find("#curve-text")).to_have_text(re.compile("breaks this image: 30/255"))
    assert scripted.asked[:4] == [8, 32, 30, 29]


def test_found_image_is_shown_without_another_attack(visit: Visit, served: Running) -> None:
    page = visit.page
    scripted = Scripted(visit, served, lambda k: 0.1 * (29.5 - k))
    page.goto(f"{visit.url}/?example=coffee&attack=fgsm")
    expect(visit.find("html")).to_have_attribute("data-shown", "fgsm 8")
    page.click("#eps-find")
    expect(visit.find("html")).to_have_attribute("data-shown", "pgd 30")
    expect(visit.find("#verdict")).to_have_text(re.compile("became ship"))
    expect(visit.find("#result-settings")).to_contain_text("Result for PGD, L∞, eps 30/255")
    page.wait_for_timeout(300)
    assert scripted.asked.count(30) == 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_smallest_eps_succeeds_and_the_level_below_fails(
    visit: Visit, served: Running, norm: str
) -> None:
    page = visit.open()
    page.select_option("#label", "")
    page.select_option("#norm", norm)
    expect(page.locator("#curve-text")).to_have_text(re.compile("^Smallest eps .*/255"))
    text = page.locator("#curve-text").inner_text()
    match = re.search(r"(\d+)/255", text)
    assert match
    k = int(match[1])
    image = source(page, "#original")

    def success(k: int) -> bool:
        query = f"attack=pgd&steps=10&norm={norm}&eps={k}/255&label={label}"
        return bool(
            served.client.post(f"/attack?{query}", content=image).json()["results"][0]["success"]
        )

    label = page.locator("#original-text").inner_text().split()[0]
    assert success(k)
    assert not success(k - 1)
    page.click("#eps-find")
    expect(page.locator("#eps")).to_have_value(str(k))
    expect(page.locator("#name")).to_have_value("pgd")
    expect(page.locator("#steps")).to_have_value("10")
    expect(page.locator("#verdict")).to_have_text(re.compile("^Broken"))  # by that very attack
    expect(page.locator("#settings-note")).to_contain_text(f"{k}/255")
    page.click("summary")
    rows = page.locator("#curve-table tbody tr")
    assert rows.count() >= 5
    dots = page.locator("#curve circle.dot")
    assert dots.count() == rows.count()
    broken = [row.locator("td").last.inner_text() for row in rows.all()]
    assert broken[0] == "withstood"
    assert "broken" in broken


def test_new_image_or_target_resets_the_curve(visit: Visit) -> None:
    page = visit.open()
    settled(page)
    page.select_option("#target", "frog")
    expect(page.locator("#curve-text")).to_contain_text("frog")
    settled(page)
    choose(page, jpeg(9), "other.jpg")
    expect(page.locator("#seen-text")).to_contain_text("other.jpg")
    settled(page)

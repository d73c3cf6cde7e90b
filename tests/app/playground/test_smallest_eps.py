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
from tests.support.serving import Running

pytestmark = pytest.mark.browser

EXAMPLES = Path(__file__).parents[3] / "examples"
Margin = Callable[[int], float]


class Scripted:
    """Answers attacks with PGD-10 by `margin` of eps, the distance to another prediction."""

    def __init__(self, visit: Visit, served: Running, margin: Margin) -> None:
        self.margin = margin
        self.asked: list[int] = []  # eps in 255ths
        image = (EXAMPLES / "coffee.jpg").read_bytes()
        self.answer = served.client.post("/attack?attack=pgd&steps=10", content=image).json()
        visit.page.route("**/attack", self._answer)

    def _answer(self, route: Route) -> None:
        body = (route.request.post_data_buffer or b"").decode("latin-1")
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
    ],
)
def test_few_attacks_find_it(
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


def test_what_was_found_is_shown_without_another_attack(visit: Visit, served: Running) -> None:
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

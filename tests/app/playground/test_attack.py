"""The attack: its controls, its answers, and what is told where it fails."""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Route, expect

from robust.attacks import ATTACKS
from tests.support.browser import Visit
from tests.support.playground import attacks, choose, levels, settled, source
from tests.support.serving import CLASSES, Running, gated, jpeg, until

pytestmark = pytest.mark.browser


def test_every_attack_and_both_norms_can_be_chosen(visit: Visit, served: Running) -> None:
    page = visit.open()
    offered = page.locator("#name option").evaluate_all("all => all.map(({value}) => value)")
    assert offered == list(ATTACKS)
    limits = served.client.get("/limits").json()
    for item in limits["attacks"]:
        option = page.locator(f'#name option[value="{item["name"]}"]')
        if item["cost"] + 3 > limits["max_cost"]:
            expect(option).to_be_disabled()
            continue
        page.select_option("#name", item["name"])
        expect(page.locator("#target")).to_be_enabled(enabled=item["takes_target"])
        expect(page.locator("#steps")).to_be_enabled(enabled=item["takes_steps"])
        if item["takes_steps"]:
            page.fill("#steps", "2")
        expect(page.locator("html")).to_have_attribute("data-shown", f"{item['name']} 8")
        expect(page.locator("#attack-error")).to_be_hidden()
    page.select_option("#name", "fgsm")
    page.select_option("#norm", "l2")
    expect(page.locator("#eps-text")).to_have_text("0.502 (128/255)")
    expect(page.locator("html")).to_have_attribute("data-shown", "fgsm 128")
    assert float(page.locator("#fact-l2").inner_text()) <= 128 / 255


def test_eps_slider_and_image_move_in_steps_of_one_level(visit: Visit) -> None:
    page = visit.open()
    expect(page.locator("#eps")).to_have_attribute("max", "64")
    page.focus("#eps")
    for k in (9, 10, 11):
        page.keyboard.press("ArrowRight")
        expect(page.locator("html")).to_have_attribute("data-shown", f"fgsm {k}")
        expect(page.locator("#eps-text")).to_have_text(f"{k}/255")
        expect(page.locator("#eps")).to_have_attribute("aria-valuetext", f"{k}/255")
        expect(page.locator("#fact-linf")).to_have_text(f"{k}/255")
        change = levels(source(page, "#adversarial")) - levels(source(page, "#original"))
        assert np.abs(change).max() == k
    page.fill("#eps-number", "3")
    expect(page.locator("html")).to_have_attribute("data-shown", "fgsm 3")
    expect(page.locator("#eps")).to_have_value("3")
    page.fill("#eps-number", "900")  # more than is taken: the last that was valid holds
    page.locator("#eps-number").blur()
    expect(page.locator("#eps-number")).to_have_value("3")
    page.focus("#eps")
    page.keyboard.press("Home")
    expect(page.locator("html")).to_have_attribute("data-shown", "fgsm 0")
    expect(page.locator("#perturbation-text")).to_have_text("none")


def test_steps_target_and_label_are_sent_and_shown(visit: Visit, served: Running) -> None:
    page = visit.open()
    page.select_option("#name", "pgd")
    expect(page.locator("#steps")).to_have_value("20")
    page.fill("#steps", "3")
    expect(page.locator("#curl")).to_contain_text("-F steps=3")
    page.fill("#steps", "100000")
    page.locator("#steps").blur()
    expect(page.locator("#steps")).to_have_value("200")
    page.fill("#steps", "5")
    page.select_option("#label", "frog")
    expect(page.locator('#target option[value="frog"]')).to_be_disabled()
    expect(page.locator("#verdict")).to_contain_text("Misclassified without an attack: ")
    page.select_option("#label", "")
    predicted = page.locator("#original-text").inner_text().split()[0]
    target = next(name for name in CLASSES if name != predicted)
    page.select_option("#target", target)
    page.focus("#eps")
    page.keyboard.press("End")
    expect(page.locator("#verdict")).to_have_text(f"Broken: {predicted} became {target}.")
    expect(page.locator("#fact-outcome")).to_have_text("broken")
    expect(page.locator("#adversarial-text")).to_contain_text(target)
    bold = page.locator("#both-bars td.number.top").evaluate_all(
        "cells => cells.map(cell => cell.parentNode.cells[0].textContent)"
    )
    assert bold == [name for name in CLASSES if name in (predicted, target)]


def test_probabilities_after_belong_to_the_shown_image(visit: Visit, served: Running) -> None:
    page = visit.open()
    expect(page.locator("#both-bars")).not_to_contain_text("…")
    answer = served.client.post("/predict?top_k=10", content=source(page, "#adversarial")).json()
    told = {item["label"]: item["probability"] for item in answer["results"][0]["top"]}
    for row in page.locator("#both-bars tbody tr").all():
        name = row.locator("th").inner_text()
        shown = row.locator("td").last.inner_text()
        assert float(shown.strip("<>%")) == pytest.approx(100 * told[name], abs=0.11)


def test_top_classes_come_from_the_attack_response(visit: Visit) -> None:
    attacked: list[dict[str, Any]] = []

    def remember(route: Route) -> None:
        response = route.fetch()
        attacked.append(response.json())
        route.fulfill(response=response)

    def differ(route: Route) -> None:
        answer = route.fetch().json()
        for item in answer["results"][0]["top"]:
            item["probability"] = 0.77
        route.fulfill(body=json.dumps(answer), content_type="application/json")

    visit.page.route("**/attack", remember)
    visit.page.route("**/predict?top_k=10", differ)
    page = visit.open()
    settled(page)
    expect(page.locator("#both-bars")).to_contain_text("77.0%")
    shown = {
        row.locator("th").inner_text(): [
            cell.inner_text() for cell in row.locator("td.number").all()
        ]
        for row in page.locator("#both-bars tbody tr").all()
    }
    adversarial = page.locator("#adversarial").get_attribute("src") or ""
    (answer, result) = next(
        (answer, result)
        for answer in attacked
        for result in answer["results"]
        if adversarial.endswith(result["adversarial_png"])
    )
    for place, seen in enumerate((answer["before"], result["after"])):
        top = {item["label"]: item["probability"] for item in seen["top"]}
        assert 0 < len(top) < len(CLASSES)
        for label, probability in top.items():
            number = float(shown[label][place].strip("<>%"))
            assert number == pytest.approx(100 * probability, abs=0.06), label
    page.unroute_all(behavior="ignoreErrors")


def test_older_response_never_overwrites_a_newer_one(visit: Visit) -> None:
    page = visit.open()
    settled(page)
    held: list[Route] = []

    def hold_the_first(route: Route) -> None:
        if not held:
            held.append(route)
        else:
            route.continue_()

    page.select_option("#name", "pgd")
    expect(page.locator("html")).to_have_attribute("data-shown", "pgd 8")
    page.route("**/attack", hold_the_first)
    page.fill("#eps-number", "30")
    until(lambda: page.wait_for_timeout(20) or held)
    page.fill("#eps-number", "4")
    expect(page.locator("html")).to_have_attribute("data-shown", "pgd 4")
    newer = source(page, "#adversarial")
    held[0].continue_()
    page.wait_for_timeout(400)
    expect(page.locator("html")).to_have_attribute("data-shown", "pgd 4")
    assert source(page, "#adversarial") == newer
    expect(page.locator("#fact-linf")).to_have_text("4/255")


def test_fast_slider_moves_end_at_the_last_value(visit: Visit, served: Running) -> None:
    page = visit.open()
    settled(page)
    asked = attacks(page)
    page.focus("#eps")
    with gated(served.service):
        with page.expect_request("**/attack"):
            page.keyboard.press("ArrowRight")
        for _ in range(39):
            page.keyboard.press("ArrowRight")
        assert len(asked) < 10  # what was overtaken before it began is never asked for
    expect(page.locator("html")).to_have_attribute("data-shown", "fgsm 48")
    expect(page.locator("#fact-linf")).to_have_text("48/255")


def test_long_attack_shows_progress_and_can_be_stopped(visit: Visit, served: Running) -> None:
    page = visit.open()
    settled(page)
    page.wait_for_timeout(300)
    before = source(page, "#adversarial")
    with gated(served.service):
        page.select_option("#name", "pgd")
        expect(page.locator("#progress")).to_have_attribute("data-busy", "true")
        expect(page.locator("#progress-text")).to_contain_text("PGD: ")
        expect(page.locator("#progress-text")).to_contain_text("of about")
        first = float(page.locator("#progress-bar").get_attribute("value") or 0)
        page.wait_for_timeout(200)
        assert first < float(page.locator("#progress-bar").get_attribute("value") or 0) < 1
        page.click("#stop")
        expect(page.locator("#attack-error")).to_have_text(re.compile("^Stopped"))
        expect(page.locator("#progress")).to_have_attribute("data-busy", "false")
    assert source(page, "#adversarial") == before
    page.fill("#eps-number", "9")
    expect(page.locator("html")).to_have_attribute("data-shown", "pgd 9")
    expect(page.locator("#attack-error")).to_be_hidden()


def test_curl_command_reproduces_the_shown_result(visit: Visit, tmp_path: Path) -> None:
    page = visit.open()
    name = 'it\'s; a, "photo".png'
    choose(page, jpeg(3), name)
    expect(page.locator("#seen-text")).to_contain_text(name)
    page.select_option("#name", "pgd")
    page.fill("#steps", "4")
    page.fill("#eps-number", "5")
    expect(page.locator("#fact-linf")).to_have_text("5/255")
    expect(page.locator("html")).to_have_attribute("data-shown", "pgd 5")
    line = page.locator("#curl").inner_text()
    assert shlex.split(line)[0] == "curl"
    if shutil.which("curl") is None:
        pytest.skip("no curl here to run the line with")
    (tmp_path / name).write_bytes(jpeg(3))
    finished = subprocess.run(
        ["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    result = json.loads(finished.stdout)["results"][0]
    assert base64.b64decode(result["adversarial_png"]) == source(page, "#adversarial")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#curl-copy")
    expect(page.locator("#curl-copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == line


# Errors


@pytest.mark.parametrize(
    ("status", "detail", "words"),
    [
        (
            429,
            "Too many requests are in hand.",
            "busy. Too many requests are in hand. Try again in 7",
        ),
        (504, "The work did not finish in time.", "did not finish in time. Try fewer steps"),
        (500, "The service failed; the log says why.", "The service failed; the log says why."),
        (502, None, "The service responded with status 502."),
    ],
)
def test_failed_attack_shows_an_error_message(
    visit: Visit, status: int, detail: str | None, words: str
) -> None:
    visit.page.clock.install()
    page = visit.open()
    settled(page)
    asked = attacks(page)
    body = "<html>" if detail is None else json.dumps({"title": "x", "detail": detail})
    page.route(
        "**/attack",
        lambda route: route.fulfill(status=status, body=body, headers={"Retry-After": "7"}),
    )
    page.fill("#eps-number", "12")
    if status == 429:  # it is asked again for 10 s
        until(lambda: page.wait_for_timeout(20) or len(asked) > 1)
        page.clock.fast_forward(11_000)
    expect(page.locator("#attack-error")).to_contain_text(words)
    page.unroute("**/attack")
    page.fill("#eps-number", "13")
    expect(page.locator("#attack-error")).to_be_hidden()


def test_busy_service_is_retried(visit: Visit) -> None:
    page = visit.open()
    settled(page)
    busy = iter([429, 429])

    def answered(route: Route) -> None:
        if status := next(busy, None):
            route.fulfill(status=status, body="{}", headers={"Retry-After": "70"})
        else:
            route.continue_()

    page.route("**/attack", answered)
    page.fill("#eps-number", "12")
    expect(page.locator("html")).to_have_attribute("data-shown", "fgsm 12")
    expect(page.locator("#attack-error")).to_be_hidden()
    assert next(busy, None) is None
    page.unroute("**/attack")

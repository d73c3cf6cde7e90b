"""What the page does when the service restarts, is away, or asks for a key."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Route, expect
from torch import Tensor

from app.settings import Settings
from tests.support.browser import Visit
from tests.support.playground import settled
from tests.support.serving import Running, gated, serving, until

pytestmark = pytest.mark.browser


def started(visit: Visit, eps: int) -> None:
    visit.page.select_option("#set", label="few")
    visit.page.fill("#set-eps", str(eps))
    visit.page.click("#start")


def test_evaluation_lost_with_the_service_is_offered_again(visit: Visit) -> None:
    page = visit.open()
    page.uncheck('#set-attacks [value="pgd"]')
    held: list[Route] = []
    page.route("**/evaluate/*/events", lambda route: held.append(route))
    started(visit, 41)
    until(lambda: page.wait_for_timeout(10) or held)
    page.fill("#set-eps", "40")
    held[0].fulfill(status=404, body="{}")
    expect(visit.find("#evaluate-error")).to_contain_text("no longer has this evaluation")
    expect(visit.find("#evaluate-again")).to_be_visible()
    # Its settings are in form and command, whatever was chosen meanwhile.
    expect(visit.find("#set-eps")).to_have_value("41")
    page.unroute("**/evaluate/*/events")
    page.click("#evaluate-again")
    expect(visit.find("#evaluate-text")).to_contain_text("Done: 30 images of few.npz.")
    expect(visit.find("#evaluate-again")).to_be_hidden()
    expect(visit.find("#evaluate-error")).to_be_hidden()


def test_lost_evaluation_is_shown_with_its_settings_after_a_reload(visit: Visit) -> None:
    page = visit.open()
    page.uncheck('#set-attacks [value="pgd"]')
    started(visit, 42)
    expect(visit.find("#evaluate-text")).to_contain_text("Done")
    lost = re.compile(r"/evaluate/\w+$")
    answers = [503, 404]  # still loading at first

    def without(route: Route) -> None:
        route.fulfill(status=answers[0] if len(answers) == 1 else answers.pop(0), body="{}")

    page.route(lost, without)
    page.reload()
    expect(visit.find("#evaluate-error")).to_contain_text("no longer has this evaluation")
    expect(visit.find("#set-eps")).to_have_value("42")
    assert not page.is_checked('#set-attacks [value="pgd"]')
    line = visit.find("#evaluate-curl").inner_text()
    assert "eps=42/255" in line
    assert "attack=pgd" not in line
    expect(visit.find("#evaluate-again")).to_be_visible()


def test_evaluation_requested_offline_starts_when_online(
    visit: Visit,
) -> None:
    page = visit.open()
    for path in ("evaluate", "readyz"):
        page.route(f"**/{path}", lambda route: route.abort())
    started(visit, 43)
    expect(visit.find("#evaluate-error")).to_contain_text("does not respond")
    page.fill("#set-eps", "44")  # what was clicked is 43
    for path in ("evaluate", "readyz"):
        page.unroute(f"**/{path}")
    expect(visit.find("#evaluate-text")).to_contain_text("Done: 30 images of few.npz.")
    expect(visit.find("#accuracies tbody tr").nth(1)).to_contain_text("43/255")
    expect(visit.find("#evaluate-stale")).to_contain_text("eps 43/255")


def test_evaluation_refused_by_a_ready_service_is_tried_three_times(
    visit: Visit,
) -> None:
    page = visit.open()
    settled(page)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.removeprefix(visit.url)))
    refusal = json.dumps({"title": "x", "detail": "The database does not respond."})
    page.route(
        "**/evaluate",
        lambda route: route.fulfill(status=503, body=refusal, headers={"Retry-After": "1"}),
    )
    started(visit, 50)
    expect(visit.find("#evaluate-error")).to_have_text(
        "The database does not respond. Try again in 1 s."
    )
    page.wait_for_timeout(1500)
    assert asked.count("/evaluate") == 3
    assert not {"/model", "/limits"} & set(asked)  # the page does not begin anew
    expect(visit.find("#status")).to_contain_text("resnet18")
    expect(visit.find("#start")).to_be_enabled()


def test_lost_evaluation_is_not_rerun_automatically(visit: Visit) -> None:
    """The service is back, without the evaluation, before the page knows that it is back."""
    page = visit.open()
    posted: list[str] = []
    page.on(
        "request", lambda request: posted.append(request.url) if request.method == "POST" else 0
    )
    lost, gone = [True], json.dumps({"title": "x", "detail": "There is no such evaluation."})

    def events(route: Route) -> None:
        route.abort() if lost else route.fulfill(status=404, body=gone)

    page.route("**/evaluate/*/events", events)
    page.route("**/readyz", lambda route: route.abort())
    started(visit, 48)
    expect(visit.find("#evaluate-error")).to_contain_text("The connection was lost.")
    expect(visit.find("#evaluate-time")).to_be_hidden()  # nothing is known of it
    lost.clear()
    expect(visit.find("#evaluate-again")).to_be_visible()
    page.unroute("**/readyz")
    expect(visit.find("#status")).to_contain_text("resnet18")
    page.wait_for_timeout(300)
    assert sum(url.endswith("/evaluate") for url in posted) == 1
    expect(visit.find("#evaluate-error")).to_contain_text("no longer has this evaluation")


def test_example_clicked_offline_is_shown(visit: Visit) -> None:
    page = visit.open()
    page.context.set_offline(True)
    page.click('[data-example="deer"]')
    for name in ("#seen", "#original"):
        expect(visit.find(name)).to_have_attribute("src", re.compile("deer.jpg$"))
        page.wait_for_timeout(300)
        assert visit.find(name).evaluate("image => image.complete && image.naturalWidth") > 0
    page.context.set_offline(False)
    expect(visit.find("#result-settings")).to_contain_text("true class deer, examples/deer.jpg.")


def test_settings_changed_offline_are_attacked_when_online(
    visit: Visit,
) -> None:
    page = visit.open()
    page.select_option("#target", "ship")
    page.select_option("#label", "frog")
    for path in ("attack", "readyz"):
        page.route(f"**/{path}", lambda route: route.abort())
    page.fill("#eps-number", "21")
    expect(visit.find("#attack-error")).to_contain_text("does not respond")
    for path in ("attack", "readyz"):
        page.unroute(f"**/{path}")
    expect(visit.find("html")).to_have_attribute("data-shown", "fgsm 21")
    expect(visit.find("#target")).to_have_value("ship")
    expect(visit.find("#label")).to_have_value("frog")


def test_evaluation_shows_progress_before_any_image_finishes(
    visit: Visit, served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robust.evaluation.stages.SHOW_SECONDS", 0.0)
    page = visit.open()
    page.route("**/attack", lambda route: route.fulfill(status=500, body="{}"))  # no other work
    page.uncheck('#set-attacks [value="fgsm"]')
    page.select_option("#set", label="many")
    page.fill("#set-limit", "16")
    page.fill("#set-eps", "0")  # no image gives way
    with gated(served.service) as gate:
        passes, inner = threading.Semaphore(0), gate.inner

        def one_by_one(x: Tensor) -> Tensor:
            assert passes.acquire(timeout=60)
            return inner(x)

        gate.inner = one_by_one
        gate.open.set()

        def told() -> tuple[str, str]:
            time_and_share = visit.find("#evaluate-time").inner_text()
            return visit.find("#evaluate-text").inner_text(), time_and_share.partition(", ")[2]

        def next_pass(patience: float) -> tuple[str, str]:
            """What is told after one more pass, which may change nothing."""
            before, latest = told(), time.monotonic() + patience
            passes.release()
            while told() == before and time.monotonic() < latest:
                page.wait_for_timeout(20)
            return told()

        try:
            page.click("#start")
            while "PGD-20: 0 of 16" not in next_pass(1)[0]:
                pass
            shares: set[str] = set()
            for _ in range(10):
                text, share = next_pass(10)
                assert "PGD-20: 0 of 16 images" in text
                shares.add(share)
                if len(shares) == 5:
                    break
            assert len(shares) == 5
            assert all(re.fullmatch(r"[\d.]+% of the work done\.", share) for share in shares)
        finally:
            passes.release(1000)
        expect(visit.find("#evaluate-text")).to_contain_text("Done: 16 images")
        expect(visit.find("#evaluate-time")).to_be_hidden()
    page.unroute_all(behavior="ignoreErrors")


def test_single_point_draws_no_chart(visit: Visit) -> None:
    def with_one_point(route: Route) -> None:
        answer = json.loads(route.fetch().text().split("data: ")[-1].split("\n")[0])
        route.fulfill(
            status=200,
            content_type="text/event-stream",
            body=f"event: done\ndata: {json.dumps(answer)}\n\n",
        )

    page = visit.open()
    page.route("**/evaluate/*/events", with_one_point)
    started(visit, 46)
    expect(visit.find("#accuracies tbody tr").first).to_be_visible()
    expect(visit.find("#settling")).to_be_hidden()
    page.unroute_all(behavior="ignoreErrors")


# Keys


def test_api_key_is_requested_once(browser: Browser, checkpoint: Path) -> None:
    """An answer to what was asked without a key, which comes once there is one."""
    settings = Settings(checkpoint=checkpoint, threads=1, device="cpu", api_keys=("sesame",))
    with serving(settings) as running:
        visit = Visit(browser, running.url)
        page, held = visit.page, []

        def hold_the_first(route: Route) -> None:
            if held:
                route.continue_()
            held.append(route)

        page.route("**/limits", hold_the_first)
        page.goto(running.url)
        expect(visit.find("#key-form")).to_be_visible()
        page.fill("#key", "sesame")
        page.keyboard.press("Enter")
        expect(visit.find("html")).to_have_attribute("data-shown", re.compile("."))
        with page.expect_response(lambda answer: answer.status == 401):
            held[0].continue_()
        page.wait_for_timeout(300)
        expect(visit.find("#key-form")).to_be_hidden()
        visit.close()


# The report


def test_report_opens_in_the_page_with_an_api_key(
    browser: Browser, checkpoint: Path, tmp_path: Path, served: Running
) -> None:
    datasets = served.service.settings.datasets
    settings = Settings(
        checkpoint=checkpoint, threads=1, device="cpu", api_keys=("sesame",), datasets=datasets
    )
    with serving(settings) as running:
        visit = Visit(browser, running.url)
        page = visit.page
        page.goto(running.url)
        for key in ("wrong", "sesame"):
            page.fill("#key", key)
            page.keyboard.press("Enter")
            if key == "wrong":
                expect(visit.find("#key-text")).to_contain_text("refused this key")
        expect(visit.find("html")).to_have_attribute("data-shown", re.compile("."))
        expect(visit.find("#key-form")).to_be_hidden()  # and it is not asked for again
        started(visit, 4)
        expect(visit.find("#report-show")).to_be_visible()
        page.click("#report-show")
        report = page.frame_locator("#report-frame")
        expect(report.locator("h1")).to_be_visible()
        expect(report.locator("table").first).to_contain_text("pgd-20")
        color = "node => getComputedStyle(node).borderBottomStyle"
        assert report.locator("thead th").first.evaluate(color) == "solid"  # its styles apply
        page.click("#report-show")
        expect(visit.find("#report-frame")).to_be_hidden()
        expect(visit.find("#key-form")).to_be_hidden()
        visit.close()


# On paper and in forced colors


def test_print_shows_bars_and_verdicts_without_controls(visit: Visit) -> None:
    page = visit.open()
    page.emulate_media(media="print")
    for shown in ("#verdict", "#both-bars .track", "#adversarial", "#fact-outcome"):
        expect(visit.find(shown).first).to_be_visible()
    hidden = ("#name", "#eps", "#drop", "#theme", "#curl", "#flicker", "#start", "#label")
    for control in hidden:
        expect(visit.find(control)).to_be_hidden()
    adjust = "node => getComputedStyle(node).printColorAdjust"
    assert visit.find("#both-bars i.after").first.evaluate(adjust) == "exact"
    assert page.locator("button:visible, select:visible, input:visible").count() == 0


def test_forced_colors_keep_bars_and_verdicts(visit: Visit) -> None:
    page = visit.open()
    page.emulate_media(forced_colors="active")
    ground = "node => getComputedStyle(node).backgroundColor"
    track = visit.find("#both-bars .track").first
    before, after = (track.locator(f"i.{name}") for name in ("before", "after"))
    assert len({node.evaluate(ground) for node in (track, before, after)}) == 3
    mark = "node => getComputedStyle(node, '::before').backgroundColor"
    panel = visit.find("#attack").evaluate(ground)
    border = "node => getComputedStyle(node, '::before').borderTopWidth"
    verdict = visit.find("#verdict")
    assert verdict.evaluate(mark) != panel or verdict.evaluate(border) != "0px"


# Terms


def test_terms_explain_themselves_on_hover_and_focus(visit: Visit) -> None:
    asked: list[str] = []

    def in_two_pieces(route: Route) -> None:
        job = json.loads(route.fetch().text().split("data: ")[-1].split("\n")[0])
        if not asked:
            job["state"] = "running"
            for row in job["evaluation"]["results"]:
                row["n"] = 10
        asked.append(route.request.url)
        body = f"data: {json.dumps(job)}\n\n"
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page = visit.open()
    page.route("**/evaluate/*/events", in_two_pieces)
    started(visit, 49)
    expect(visit.find("#accuracies tbody tr").nth(2)).to_be_visible()
    row = visit.find("#accuracies tbody tr").nth(2).locator(".term")
    row.focus()
    expect(visit.find("#reports")).to_be_visible()
    expect(row).to_be_focused()  # the numbers changed, the row stayed
    wilson = visit.find('[data-term="wilson"] .term')
    wilson.focus()
    expect(wilson.locator(".about")).to_contain_text("95 of 100")
    page.keyboard.press("Escape")
    expect(wilson.locator(".about")).to_be_hidden()
    row.hover()
    expect(row.locator(".about")).to_contain_text("cross-entropy")
    described = row.get_attribute("aria-describedby")
    assert row.locator(".about").get_attribute("id") == described
    box = row.locator(".about").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 1280

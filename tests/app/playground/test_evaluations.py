"""Evaluations: started, shown as they go on, cancelled and found again."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from robust.attacks import DEFAULT_ATTACKS
from tests.support.browser import Visit
from tests.support.playground import settled, start
from tests.support.serving import Brake, Running, gated, labeled, until

pytestmark = pytest.mark.browser


def in_pieces(route: Route, counts: tuple[int, ...]) -> None:
    """Answer with the events of an evaluation that was shown after so many images."""
    last = route.fetch().text().split("data: ")[-1].split("\n")[0]
    body = ""
    for count in counts:
        job = json.loads(last)
        job["state"] = "done" if count == counts[-1] else "running"
        for row in job["evaluation"]["results"]:
            row["n"] = count
        body += f"event: progress\ndata: {json.dumps(job)}\n\n"
    route.fulfill(status=200, content_type="text/event-stream", body=body)


def test_registered_dataset_is_evaluated_and_shown(visit: Visit, served: Running) -> None:
    page = visit.open()
    page.route("**/evaluate/*/events", lambda route: in_pieces(route, (10, 20, 30)))
    offered = page.locator("#set option").all_inner_texts()
    assert offered == ["few", "many", "Five example photographs (demo)", "Upload a file…"]
    start(page, "few", eps="7")
    expect(page.locator("#evaluate-text")).to_have_text("Done: 30 images of few.npz.")
    rows = page.locator("#accuracies tbody tr")
    names = [row.split("\t")[0].strip() for row in rows.all_inner_texts()]
    assert names == ["Clean", "FGSM", "PGD-20", "Worst case"]
    expect(rows.nth(1)).to_contain_text("L∞ 7/255")
    expect(page.locator("#cancel")).to_be_disabled()
    lines = page.locator("#settling g.series polyline")
    points = [line.get_attribute("points") or "" for line in lines.all()]
    assert [len(line.split()) for line in points] == [3, 3, 3]  # clean, FGSM and PGD
    page.click("#start")
    expect(page.locator("#evaluate-text")).to_have_text(
        "Done: 30 images of few.npz. "
        "This is the result of an earlier evaluation with the same settings."
    )
    line = shlex.split(page.locator("#evaluate-curl").inner_text())
    assert "dataset=few" in line
    if shutil.which("curl"):
        finished = subprocess.run(line, capture_output=True, text=True, timeout=60)
        results = json.loads(finished.stdout)["evaluation"]["results"]
        for row, result in zip(rows.all()[:3], results, strict=True):
            expect(row).to_contain_text(f"{result['correct']} of 30")
            low, high = (f"{100 * value:.1f}" for value in result["interval"])
            expect(row).to_contain_text(f"{low} to {high}")


def test_evaluation_report_is_downloaded(visit: Visit, tmp_path: Path) -> None:
    page = visit.open()
    expect(page.locator("#reports")).to_be_hidden()
    start(page, "few", eps="4")
    for name, beginning in (("html", b"<!doctype html>"), ("pdf", b"%PDF")):
        expect(page.locator("#reports")).to_be_visible()
        with page.expect_download() as download:
            page.click(f"#report-{name}")
        assert download.value.suggested_filename == f"report.{name}"
        download.value.save_as(tmp_path / name)
        assert (tmp_path / name).read_bytes().lower().startswith(beginning.lower())


def test_late_report_is_not_shown_with_the_next_evaluation(visit: Visit) -> None:
    page = visit.open()
    held: list[Route] = []
    page.route("**/report", lambda route: held.append(route))
    start(page, "few")
    expect(page.locator("#reports")).to_be_visible()
    page.click("#report-show")
    until(lambda: page.wait_for_timeout(10) or held)
    start(page, "few")
    expect(page.locator("#reports")).to_be_visible()
    held[0].fulfill(body="<p>The first evaluation</p>", content_type="text/html")
    page.wait_for_timeout(300)
    expect(page.locator("#report-frame")).to_be_hidden()
    expect(page.locator("#report-show")).to_have_text("Open")


def without_attacks(visit: Visit) -> Page:
    """The page, whose attacks fail, so that the device has no other work than evaluations."""
    visit.page.route("**/attack", lambda route: route.fulfill(status=500, body="{}"))
    visit.page.goto(visit.url)
    expect(visit.find("html")).to_have_attribute("data-ready", "true")
    return visit.page


def test_running_evaluation_updates_live(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robust.evaluation.stages.SHOW_SECONDS", 0.0)  # however fast the machine
    page = visit.open()
    seen: dict[str, list[str]] = {"evaluate-text": [], "evaluate-state": []}
    page.expose_function("heard", lambda name, text: seen[name].append(text))
    page.evaluate(
        """() => {
            for (const name of ["evaluate-text", "evaluate-state"]) {
                const node = document.getElementById(name);
                const tell = () => heard(name, node.textContent);
                new MutationObserver(tell).observe(node, {childList: true});
            }
        }"""
    )
    start(page, "many", limit="400")
    done = "Done: 400 images of many.npz."
    expect(page.locator("#evaluate-text")).to_have_text(done)
    texts, states = seen["evaluate-text"], seen["evaluate-state"]
    progress = {text for text in texts if re.fullmatch(r"[\w-]+: \d+ of 400 images .*", text)}
    assert len(progress) >= 3
    # Screen readers announce only when the state changes.
    until(lambda: page.wait_for_timeout(10) or states[-1] == done)
    assert [text.split(":")[0] for text in states if text[:6] != "Queued"] == [
        "Sending…",
        "Running",
        "Done",
    ]
    points = page.locator("#settling g.series polyline").first.get_attribute("points") or ""
    assert len(points.split()) >= 2


def test_dataset_and_examples_can_be_uploaded(visit: Visit) -> None:
    page = visit.open()
    start(page, "Five example photographs (demo)")
    expect(page.locator("#evaluate-error")).to_be_visible()  # of classes this model does not have
    expect(page.locator("#evaluate-error")).to_contain_text("xpected")
    page.select_option("#set", label="Upload a file…")
    page.set_input_files(
        "#set-file",
        {"name": "mine.npz", "mimeType": "application/zip", "buffer": labeled(12)},
    )
    page.fill("#set-limit", "10")
    expect(page.locator("#evaluate-curl")).to_contain_text("file=@mine.npz")
    page.click("#start")
    expect(page.locator("#evaluate-text")).to_have_text(re.compile("^Done: 10 images"))
    expect(page.locator("#evaluate-error")).to_be_hidden()


@pytest.mark.parametrize("width", [320, 390])
def test_form_and_results_fit_a_phone(browser: Browser, served: Running, width: int) -> None:
    visit = Visit(browser, served.url, viewport={"width": width, "height": 800})
    page = visit.open()
    start(page, "few")
    expect(visit.find("#evaluate-text")).to_contain_text("Done: 30 images of few.npz.")
    page.select_option("#set", label="Upload a file…")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    clipped = "node => node.parentElement.scrollWidth - node.parentElement.clientWidth"
    assert visit.find("#accuracies").evaluate(clipped) == 0
    visit.close()


def test_command_waits_no_longer_than_the_service_and_needs_an_attack(visit: Visit) -> None:
    page = visit.open()
    code = visit.find("#evaluate-curl")
    expect(code).to_contain_text("'Prefer: wait=30'")  # the default deadline
    for name in DEFAULT_ATTACKS:
        page.uncheck(f'#set-attacks [value="{name}"]')
    for form in ("python", "curl"):
        page.click(f'.snippet:has(#evaluate-curl) [data-form="{form}"]')
        expect(code).to_have_text("# Choose at least one attack.")
    page.check('#set-attacks [value="pgd"]')
    expect(code).to_contain_text("attack=pgd")


def test_unusable_dataset_shows_an_error_message(visit: Visit) -> None:
    page = visit.open()
    page.select_option("#set", label="Upload a file…")
    page.click("#start")
    expect(page.locator("#evaluate-error")).to_contain_text("Choose a file first")
    page.set_input_files(
        "#set-file", {"name": "x.npz", "mimeType": "application/zip", "buffer": b"nothing of use"}
    )
    page.click("#start")
    expect(page.locator("#evaluate-error")).to_contain_text("xpected")
    page.select_option("#set", label="few")
    page.fill("#set-eps", "9999")
    page.click("#start")
    expect(page.locator("#evaluate-error")).to_contain_text("at most 64/255")
    page.fill("#set-eps", "8")
    for name in DEFAULT_ATTACKS:
        page.uncheck(f'#set-attacks [value="{name}"]')
    page.click("#start")
    expect(page.locator("#evaluate-error")).to_contain_text("Choose at least one attack")
    expect(page.locator("#start")).to_be_enabled()


def test_evaluation_can_be_cancelled(visit: Visit, served: Running) -> None:
    page = visit.open()
    settled(page)
    with gated(served.service):
        start(page, "many")
        expect(page.locator("#evaluate-text")).to_have_text(re.compile("many"))
        expect(page.locator("#start")).to_be_disabled()
        page.click("#cancel")
        expect(page.locator("#evaluate-text")).to_have_text(
            re.compile("^Canceled at .*0 of 1200 images of many.npz.$")
        )
    expect(page.locator("#cancel")).to_be_disabled()
    expect(page.locator("#evaluate-bar")).to_be_hidden()
    start(page, "few")
    expect(page.locator("#evaluate-text")).to_have_text("Done: 30 images of few.npz.")


def test_cancelling_keeps_partial_results(
    visit: Visit, served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robust.evaluation.stages.SHOW_SECONDS", 0.0)
    page = without_attacks(visit)
    with gated(served.service) as gate:
        brake = Brake(gate, passes=100)  # the probes, 75 clean batches, and few of those attacked
        start(page, "many")
        expect(page.locator("#accuracies tbody tr")).to_have_count(4)
        page.click("#cancel")
        expect(page.locator("#evaluate-text")).to_have_text(
            re.compile("^Canceled at [\\w-]+: [0-9]+ of 1200 images")
        )
        brake.released.set()
    expect(page.locator("#accuracies tbody tr")).to_have_count(4)


def test_evaluation_is_cancelled_once_its_id_is_known(visit: Visit, served: Running) -> None:
    page = without_attacks(visit)
    held: list[Route] = []

    def hold_the_first(route: Route) -> None:
        if held:
            route.continue_()
        held.append(route)

    def cancelled_in_time() -> None:
        until(lambda: page.wait_for_timeout(10) or held)
        page.click("#cancel")
        expect(page.locator("#evaluate-text")).to_have_text("Canceling…")
        held[0].continue_()
        expect(page.locator("#evaluate-text")).to_have_text(
            re.compile("^Canceled at .*0 of 30 images of few.npz.$")
        )
        expect(page.locator("#start")).to_be_enabled()
        newest = served.client.get("/evaluate").json()[0]
        assert newest["state"] == "cancelled"

    with gated(served.service):
        page.route("**/evaluate", hold_the_first)
        start(page, "few")
        cancelled_in_time()
        page.unroute("**/evaluate")
        held.clear()
        page.route(re.compile(r"/evaluate/\w+$"), hold_the_first)
        start(page, "few")
        expect(page.locator("#evaluate-text")).to_have_text(re.compile("0 of 30 images|^Queued"))
        page.reload()  # it looks for the evaluation
        cancelled_in_time()


def test_evaluation_is_shown_again_after_a_reload(visit: Visit) -> None:
    page = visit.open()
    start(page, "few")
    expect(page.locator("#evaluate-text")).to_have_text("Done: 30 images of few.npz.")
    page.reload()
    expect(page.locator("#evaluate-text")).to_have_text("Done: 30 images of few.npz.")
    expect(page.locator("#accuracies tbody tr")).to_have_count(4)


FLAG = {"name": "masked", "text": "PGD is weaker than FGSM.", "advice": "Use Square."}


def test_flags_are_shown(visit: Visit) -> None:
    page = visit.open()

    def flagged(route: Route) -> None:
        answer = json.loads(route.fetch().text().split("data: ")[-1].split("\n")[0])
        answer["evaluation"]["flags"] = [FLAG]
        route.fulfill(
            status=200,
            content_type="text/event-stream",
            body=f"event: done\ndata: {json.dumps(answer)}\n\n",
        )

    page.route("**/evaluate/*/events", flagged)
    start(page, "few")
    words = "Masked: PGD is weaker than FGSM. – Use Square."
    expect(page.locator("#flags li")).to_have_text(words)

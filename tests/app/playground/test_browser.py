"""The playground in a real Chromium: every control, the errors, a service that goes away."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import shlex
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

from app.application import create_app
from app.settings import Settings
from robust.attacks import ATTACKS, DEFAULT_ATTACKS
from tests.app.conftest import write_checkpoint
from tests.support.browser import Visit
from tests.support.serving import CLASSES, Running, gated, jpeg, labeled, serving, until

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[3]


def settled(page: Page) -> None:
    """Wait until the curve has found what breaks the image."""
    expect(page.locator("#curve-text")).to_have_text(re.compile("^(Smallest|PGD-10|The model)"))


def choose(page: Page, data: bytes, name: str) -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": data})


def source(page: Page, selector: str) -> bytes:
    """The PNG that an image shows."""
    link = page.locator(selector).get_attribute("src") or ""
    return base64.b64decode(link.removeprefix("data:image/png;base64,"))


def levels(data: bytes) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int64)


def attacks(page: Page) -> list[str]:
    """Collects the address of every attack asked for from now on, the curve's too."""
    found: list[str] = []
    page.on("request", lambda request: found.append(request.url) if "/attack" in request.url else 0)
    return found


# The picture


def test_opening_the_page_shows_an_example_already_attacked(visit: Visit) -> None:
    page = visit.open()
    expect(page.locator("#seen")).to_be_visible()
    expect(page.locator("#seen-bars tbody tr")).to_have_count(len(CLASSES))
    shown = page.locator("#seen-bars tbody td.number").all_inner_texts()
    total = sum(float(text.strip("<>%")) for text in shown)
    assert total == pytest.approx(100, abs=1)
    for name in ("original", "perturbation", "adversarial"):
        image = page.locator(f"#{name}")
        expect(image).to_be_visible()
        assert image.evaluate("image => image.naturalWidth") == 32
        assert image.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    expect(page.locator("#status")).to_contain_text("resnet18")
    expect(page.locator("#card")).to_contain_text("10: airplane")
    settled(page)


def test_each_example_can_be_taken(visit: Visit) -> None:
    page = visit.open()
    for name in ("deer", "dog", "cat", "bird", "coffee", "horse"):
        page.click(f'[data-example="{name}"]')
        expect(page.locator("#seen-text")).to_contain_text(f"{name}.jpg")
        pressed = page.locator('[data-example][aria-pressed="true"]')
        expect(pressed).to_have_attribute("data-example", name)
        known = name if name in CLASSES else ""
        expect(page.locator("#label")).to_have_value(known)


def test_a_chosen_file_is_seen_as_the_service_sees_it(visit: Visit, served: Running) -> None:
    page = visit.open()
    data = jpeg(5, size=(90, 60))
    choose(page, data, "my photo.jpg")
    expect(page.locator("#seen-text")).to_contain_text("my photo.jpg")
    answer = served.client.post("/attack?attack=fgsm", content=data).json()
    assert source(page, "#seen") == base64.b64decode(answer["input_png"])
    expect(page.locator("#label")).to_have_value("")


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_an_image_can_be_dropped_and_pasted(visit: Visit, way: str) -> None:
    page = visit.open()
    data = base64.b64encode(jpeg(6)).decode()
    transfer = page.evaluate_handle(
        """data => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "brought.jpg", {type: "image/jpeg"}));
            return transfer;
        }""",
        data,
    )
    if way == "drop":
        page.dispatch_event("#drop", "dragenter", {"dataTransfer": transfer})
        expect(page.locator("#drop")).to_have_class(re.compile("over"))
        page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
        expect(page.locator("#drop")).not_to_have_class(re.compile("over"))
    else:
        page.evaluate(
            """transfer => document.dispatchEvent(
                new ClipboardEvent("paste", {clipboardData: transfer, cancelable: true}))""",
            transfer,
        )
    expect(page.locator("#seen-text")).to_contain_text("brought.jpg")


# The attack


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


def test_the_slider_moves_in_steps_of_one_level_and_so_does_the_image(visit: Visit) -> None:
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


def test_steps_target_and_label_are_asked_for_and_told(visit: Visit, served: Running) -> None:
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
    expect(page.locator("#verdict")).to_contain_text("Wrong before any attack: ")
    page.select_option("#label", "")
    predicted = page.locator("#original-text").inner_text().split()[0]
    target = next(name for name in CLASSES if name != predicted)
    page.select_option("#target", target)
    page.focus("#eps")
    page.keyboard.press("End")
    expect(page.locator("#verdict")).to_have_text(f"Fooled: {predicted} became {target}.")
    expect(page.locator("#fact-outcome")).to_have_text("broken")
    expect(page.locator("#adversarial-text")).to_contain_text(target)
    bold = page.locator("#both-bars td.number.top").evaluate_all(
        "cells => cells.map(cell => cell.parentNode.cells[0].textContent)"
    )
    assert bold == [name for name in CLASSES if name in (predicted, target)]


def test_probabilities_after_are_those_of_the_picture_shown(visit: Visit, served: Running) -> None:
    page = visit.open()
    expect(page.locator("#both-bars")).not_to_contain_text("…")
    answer = served.client.post("/predict?top_k=10", content=source(page, "#adversarial")).json()
    told = {item["label"]: item["probability"] for item in answer["results"][0]["top"]}
    for row in page.locator("#both-bars tbody tr").all():
        name = row.locator("th").inner_text()
        shown = row.locator("td").last.inner_text()
        assert float(shown.strip("<>%")) == pytest.approx(100 * told[name], abs=0.11)


def test_the_likeliest_classes_are_those_of_the_attack_not_of_a_prediction(visit: Visit) -> None:
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


def test_an_older_answer_never_overwrites_a_newer_one(visit: Visit) -> None:
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


def test_moving_the_slider_fast_ends_at_the_last_place(visit: Visit) -> None:
    page = visit.open()
    asked = attacks(page)
    page.focus("#eps")
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    expect(page.locator("html")).to_have_attribute("data-shown", "fgsm 48")
    expect(page.locator("#fact-linf")).to_have_text("48/255")
    assert 1 <= len(asked) < 40  # what was overtaken before it began was never asked for


def test_a_long_attack_shows_progress_and_can_be_stopped(visit: Visit, served: Running) -> None:
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


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_smallest_eps_breaks_it_and_the_one_below_does_not(
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
    expect(page.locator("#verdict")).to_have_text(re.compile("^Fooled"))  # by that very attack
    expect(page.locator("#settings-note")).to_contain_text(f"{k}/255")
    page.click("summary")
    rows = page.locator("#curve-table tbody tr")
    assert rows.count() >= 5
    dots = page.locator("#curve circle.dot")
    assert dots.count() == rows.count()
    broken = [row.locator("td").last.inner_text() for row in rows.all()]
    assert broken[0] == "withstood"
    assert "broken" in broken


def test_the_curve_begins_anew_for_another_image_and_target(visit: Visit) -> None:
    page = visit.open()
    settled(page)
    page.select_option("#target", "frog")
    expect(page.locator("#curve-text")).to_contain_text("frog")
    settled(page)
    choose(page, jpeg(9), "other.jpg")
    expect(page.locator("#seen-text")).to_contain_text("other.jpg")
    settled(page)


def test_pictures_are_downloaded_as_the_png_that_was_scored(visit: Visit, tmp_path: Path) -> None:
    page = visit.open()
    for kind in ("original", "perturbation", "adversarial"):
        with page.expect_download() as download:
            page.click(f"#{kind}-save")
        name = download.value.suggested_filename
        assert re.fullmatch(r"horse-(input|fgsm-linf-8of255-\w+)\.png", name)
        download.value.save_as(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        assert data == source(page, f"#{kind}")
        assert levels(data).shape == (32, 32, 3)


def test_the_curl_line_gives_what_is_on_the_screen(visit: Visit, tmp_path: Path) -> None:
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
    ("data", "name", "words"),
    [
        (b"this is no image", "notes.txt", "JPEG, PNG or WebP"),
        (jpeg()[:200], "half.jpg", "xpected"),
        (b"", "empty.png", "xpected"),
        (bytes(400_000), "large.png", "too large"),
    ],
)
def test_an_image_that_cannot_be_used_is_told_in_words(
    visit: Visit, data: bytes, name: str, words: str
) -> None:
    page = visit.open()
    before = source(page, "#seen")
    choose(page, data, name)
    expect(page.locator("#picture-error")).to_contain_text(words)
    text = page.locator("#picture-error").inner_text()
    assert text[0].isupper()
    assert text.endswith(".")
    assert not re.search(r"undefined|null|NaN|\{|urn:", text)
    assert source(page, "#seen") == before  # what was there stays, and can still be attacked
    page.fill("#eps-number", "11")
    expect(page.locator("html")).to_have_attribute("data-shown", "fgsm 11")
    page.click('[data-example="deer"]')
    expect(page.locator("#picture-error")).to_be_hidden()


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
def test_an_attack_that_fails_is_told_in_words(
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


def test_a_service_that_is_busy_for_a_moment_is_asked_again(visit: Visit) -> None:
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


# Evaluations


SIZES = itertools.count(9)  # of eps: the same settings twice would be one evaluation


def start(page: Page, name: str, **given: str) -> None:
    page.select_option("#set", label=name)
    for field, value in ({"eps": str(next(SIZES))} | given).items():
        page.fill(f"#set-{field}", value)
    page.click("#start")


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


def test_a_registered_set_is_evaluated_and_shown(visit: Visit, served: Running) -> None:
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


def test_the_report_on_an_evaluation_is_saved(visit: Visit, tmp_path: Path) -> None:
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


def test_an_evaluation_converges_live(visit: Visit) -> None:
    page = visit.open()
    seen: set[str] = set()
    page.expose_function("heard", lambda text: seen.add(text))
    page.evaluate(
        """() => {
            const node = document.querySelector("#evaluate-text");
            new MutationObserver(() => heard(node.textContent)).observe(node, {childList: true});
        }"""
    )
    start(page, "many")
    expect(page.locator("#evaluate-text")).to_have_text(
        "Done: 1200 images of many.npz.", timeout=120_000
    )
    progress = [text for text in seen if re.fullmatch(r"[\w-]+: \d+ of 1200 images .*", text)]
    assert len(progress) >= 3
    points = page.locator("#settling g.series polyline").first.get_attribute("points") or ""
    assert len(points.split()) >= 2


def test_a_set_can_be_uploaded_and_so_can_the_examples(visit: Visit) -> None:
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


def test_what_cannot_be_evaluated_is_told_in_words(visit: Visit) -> None:
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


def test_an_evaluation_can_be_cancelled(visit: Visit, served: Running) -> None:
    page = visit.open()
    settled(page)
    with gated(served.service):
        start(page, "many")
        expect(page.locator("#evaluate-text")).to_have_text(re.compile("many"))
        expect(page.locator("#start")).to_be_disabled()
        page.click("#cancel")
        expect(page.locator("#evaluate-text")).to_have_text(
            re.compile("^Cancelled at .*0 of 1200 images of many.npz.$")
        )
    expect(page.locator("#cancel")).to_be_disabled()
    expect(page.locator("#evaluate-bar")).to_be_hidden()
    start(page, "few")
    expect(page.locator("#evaluate-text")).to_have_text("Done: 30 images of few.npz.")


def test_cancelling_keeps_the_numbers_so_far(visit: Visit) -> None:
    page = visit.open()
    start(page, "many")
    expect(page.locator("#accuracies tbody tr")).to_have_count(4)
    page.click("#cancel")
    expect(page.locator("#evaluate-text")).to_have_text(
        re.compile("^Cancelled at [\\w-]+: [0-9]+ of 1200 images")
    )
    expect(page.locator("#accuracies tbody tr")).to_have_count(4)


def test_an_evaluation_is_found_again_after_a_reload(visit: Visit) -> None:
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


# The service goes away, comes back, changes, and asks for a key


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
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_a_service_that_goes_away_and_comes_back(
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


def test_another_model_in_service_is_noticed(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "robust_model.pt"
    first = write_checkpoint(path, seed=1, arch="resnet18")
    settings = Settings(checkpoint=path, threads=1, device="cpu", reload_seconds=0.1)
    with serving(settings) as running:
        visit = Visit(browser, running.url)
        visit.page.clock.install()
        page = visit.open()
        expect(page.locator("#status")).to_contain_text(first[:8])
        second = write_checkpoint(path, seed=2, arch="resnet18")
        until(lambda: running.service.models.sha256 == second)
        page.clock.fast_forward(11_000)
        expect(page.locator("#status")).to_contain_text(second[:8])
        expect(page.locator("#card")).to_contain_text(second[:12])
        visit.close()


def test_a_key_is_asked_for_and_used(browser: Browser, checkpoint: Path) -> None:
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
        expect(page.locator("#verdict")).to_have_text(re.compile("^(Fooled|Withstood|Wrong)"))
        expect(page.locator("#key-form")).to_be_hidden()
        assert "open-sesame" not in page.content()
        assert "Authorization: Bearer KEY" in page.locator("#curl").inner_text()
        visit.close()


# For everybody


def test_the_theme_is_the_systems_until_another_is_chosen(
    browser: Browser, served: Running
) -> None:
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


def test_only_the_service_is_asked(browser: Browser, served: Running) -> None:
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

"""The page with a model without gradients, such as an ONNX file or a remote service."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from app.settings import Settings
from tests.support.browser import Visit
from tests.support.onnx_file import write_onnx
from tests.support.playground import source
from tests.support.serving import CLASSES, Running, jpeg, labeled, serving

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("theirs")
    write_onnx(folder / "theirs.onnx")
    (folder / "sets").mkdir()
    (folder / "sets" / "few.npz").write_bytes(labeled(5))
    settings = Settings(
        checkpoint=folder / "theirs.onnx",
        classes=",".join(CLASSES),
        threads=1,
        device="cpu",
        datasets=folder / "sets",
    )
    with serving(settings) as running:
        yield running


@pytest.fixture
def visit(browser: Browser, theirs: Running) -> Iterator[Visit]:
    visit = Visit(browser, theirs.url)
    yield visit
    visit.close()


def test_card_shows_what_the_file_does_not_record(visit: Visit) -> None:
    visit.open()
    rows = visit.find("#card dl > div")
    expect(rows.filter(has_text="Assumed")).to_have_text("Assumedmean 0, 0, 0; std 1, 1, 1")


def test_image_is_read_and_attacked_without_gradients(visit: Visit, theirs: Running) -> None:
    assert theirs.client.get("/model").json()["differentiable"] is False
    page = visit.open()
    expect(visit.find("#seen-text")).to_contain_text("horse.jpg: the 32 × 32 pixels")
    expect(visit.find("#result-settings")).to_contain_text("Result for Square, L∞, eps 8/255, 500")
    name = "photo.jpg"
    page.set_input_files("#file", {"name": name, "mimeType": "image/jpeg", "buffer": jpeg(5)})
    expect(visit.find("#seen-text")).to_contain_text("photo.jpg: the 32 × 32 pixels")
    answer = theirs.client.post("/attack?attack=square&steps=1&eps=0", content=jpeg(5)).json()
    assert source(page, "#seen") == base64.b64decode(answer["input_png"])
    page.focus("#eps")
    page.keyboard.press("End")
    expect(visit.find("#fact-outcome")).to_have_text("broken")
    for error in ("#picture-error", "#attack-error"):
        expect(visit.find(error)).to_be_hidden()


def test_only_attacks_without_gradients_can_be_chosen(visit: Visit, theirs: Running) -> None:
    visit.open("?attack=pgd&steps=20")
    expect(visit.find("#name")).to_have_value("square")
    for item in theirs.client.get("/limits").json()["attacks"]:
        usable = not item["uses_gradient"]
        option = visit.find(f'#name option[value="{item["name"]}"]')
        expect(option).to_be_enabled(enabled=usable)
        expect(option).to_have_text(re.compile(r"^[^(]+$" if usable else r" \(needs gradients\)$"))
        box = visit.find(f'#set-attacks [value="{item["name"]}"]')
        expect(box).to_be_enabled(enabled=usable)
        expect(box).to_be_checked(checked=usable)
    why = "Attacks that need gradients can’t be used, because this model has none."
    expect(visit.find("#name-summary")).to_contain_text(why)
    expect(visit.find("#set-attacks-note")).to_have_text(why)
    visit.page.click("#start")
    expect(visit.find("#evaluate-text")).to_have_text("Done: 5 images of few.npz.")
    expect(visit.find("#accuracies tbody th").last).to_have_text(re.compile("^Square"))


def test_page_says_why_there_is_no_curve(visit: Visit) -> None:
    visit.open()
    expect(visit.find("#curve-text")).to_have_text(
        "The curve and the smallest eps need PGD, which uses gradients; this model has none."
    )
    expect(visit.find("#eps-find")).to_be_disabled()
    for name in ("#curve", "#curve-numbers"):
        expect(visit.find(name)).to_be_hidden()

"""The picture to attack, and those that come of it: chosen, shown, downloaded, refused."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.support.browser import Visit
from tests.support.playground import choose, levels, settled, source
from tests.support.serving import CLASSES, Running, jpeg

pytestmark = pytest.mark.browser


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


def test_each_example_can_be_chosen(visit: Visit) -> None:
    page = visit.open()
    for name in ("deer", "dog", "cat", "bird", "coffee", "horse"):
        page.click(f'[data-example="{name}"]')
        expect(page.locator("#seen-text")).to_contain_text(f"{name}.jpg")
        pressed = page.locator('[data-example][aria-pressed="true"]')
        expect(pressed).to_have_attribute("data-example", name)
        known = name if name in CLASSES else ""
        expect(page.locator("#label")).to_have_value(known)


def test_chosen_file_is_shown_as_the_service_decodes_it(visit: Visit, served: Running) -> None:
    page = visit.open()
    data = jpeg(5, size=(90, 60))
    choose(page, data, "my photo.jpg")
    expect(page.locator("#seen-text")).to_contain_text("my photo.jpg")
    answer = served.client.post("/attack?attack=fgsm", content=data).json()
    assert source(page, "#seen") == base64.b64decode(answer["input_png"])
    expect(page.locator("#label")).to_have_value("")


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_image_can_be_dropped_and_pasted(visit: Visit, way: str) -> None:
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


def test_downloaded_image_is_the_png_that_was_scored(visit: Visit, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("data", "name", "words"),
    [
        (b"this is no image", "notes.txt", "JPEG, PNG or WebP"),
        (jpeg()[:200], "half.jpg", "xpected"),
        (b"", "empty.png", "xpected"),
        (bytes(400_000), "large.png", "too large"),
    ],
)
def test_unusable_image_shows_an_error_message(
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

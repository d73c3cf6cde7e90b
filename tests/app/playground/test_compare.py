"""Two models side by side, the original over the adversarial image, and commands that run."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Route, expect

from tests.support.browser import Visit
from tests.support.serving import Running, until

pytestmark = pytest.mark.browser

EXAMPLE = Path(__file__).parents[3] / "examples" / "horse.jpg"


@pytest.fixture
def pair(browser: Browser, compared: Running) -> Iterator[Visit]:
    visit = Visit(browser, compared.url)
    yield visit
    visit.close()


def test_served_model_is_shown_before_the_comparison_finishes(
    pair: Visit, compared: Running
) -> None:
    asked: list[str] = []

    def note(route: Route) -> None:
        data = route.request.post_data_buffer or b""
        asked.append("compared" if b'name="compare"' in data else "served")
        route.continue_()

    pair.page.route("**/attack", note)
    page = pair.open("?attack=fgsm")
    expect(pair.find("#compared-verdict")).to_have_text(
        re.compile("^(Broken|Withstood|Misclassified)")
    )
    # The image is read, then attacked.
    assert asked[:3] == ["served", "served", "compared"]
    answer = compared.client.post(
        "/attack?attack=fgsm&eps=8/255&label=horse&compare=true",
        files={"file": EXAMPLE.read_bytes()},
    ).json()
    for name, result in (
        ("adversarial", answer["results"][0]),
        ("compared", answer["compare"]["results"][0]),
    ):
        png = f"data:image/png;base64,{result['adversarial_png']}"
        assert pair.find(f"#{name}").get_attribute("src") == png
        expect(pair.find(f"#{name}-text")).to_contain_text(result["after"]["label"])
    words = {"broken": "^Broken", "withstood": "^Withstood", "already_wrong": "^Misclassified"}
    outcome = answer["compare"]["results"][0]["outcome"]
    expect(pair.find("#compared-verdict")).to_have_text(re.compile(words[outcome]))
    transfer = answer["compare"]["results"][0]["transfer"]["after"]["label"]
    expect(pair.find("#compared-transfer")).to_contain_text(f"predicts {transfer}")
    # The next eps of both.
    page.fill("#eps-number", "9")
    expect(pair.find("html")).to_have_attribute("data-compared", "fgsm 9")
    name = pair.find("#compared-save").get_attribute("download")
    assert name == "horse-fgsm-linf-9of255-standard-model.png"


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 720)])
def test_verdict_is_above_the_fold(
    browser: Browser, compared: Running, width: int, height: int
) -> None:
    visit = Visit(browser, compared.url, viewport={"width": width, "height": height})
    visit.open()
    expect(visit.find("#examples-note")).to_be_visible()  # what stands above it is there
    box = visit.find("#verdict").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= height
    visit.close()


@pytest.mark.parametrize(
    ("kind", "words"), [("clean", "Standard model"), ("pgd", "Comparison model")]
)
def test_model_without_adversarial_training_is_called_standard(
    pair: Visit, kind: str, words: str
) -> None:
    """Its threat model says what it was attacked with, not that it was trained to withstand it."""

    def told(route: Route) -> None:
        answer = route.fetch().json()
        phases = {"card": [{"name": "a", "parts": [{"kind": "pgd"}]}], "compare": []}
        phases["compare"] = [{"name": "clean", "parts": [{"kind": kind}]}]
        for card, own in ((answer["card"], "card"), (answer["compare"]["card"], "compare")):
            card["threat_model"] = {"norm": "linf", "eps": 8 / 255}
            card["recipe"] = {"name": "x", "phases": phases[own]}
            card["evaluation"] = [
                {"data": data, "attack": "clean", "accuracy": accuracy, "n": 9}
                for data, accuracy in (("held out", 0.914), ("test", 0.889))
            ]
        route.fulfill(body=json.dumps(answer), content_type="application/json")

    pair.page.route("**/model", told)
    pair.open()
    expect(pair.find("#compared-title")).to_contain_text(f"{words}: resnet18")
    expect(pair.find("#served-title")).to_have_text(
        "This model: resnet18, trained to withstand attacks"
    )
    expect(pair.find("#compared-name")).to_have_text(f"{words}, attacked")
    expect(pair.find("#compare-field")).to_contain_text(f"Compare with a {words.lower()}")
    # Of the test images, and not of those held out while training.
    expect(pair.find("#card")).to_contain_text("plain_model.pt: resnet18, Clean 88.9%")
    expect(pair.find(".intro")).to_contain_text("fools a robust model and a standard one.")
    pair.page.unroute_all(behavior="ignoreErrors")


def test_comparison_is_dimmed_until_its_response_arrives(pair: Visit) -> None:
    page = pair.open("?attack=fgsm")
    expect(pair.find("#compared-result")).to_have_attribute("aria-busy", "false")
    held: list[Route] = []

    def hold_the_second_model(route: Route) -> None:
        second = b'name="compare"' in (route.request.post_data_buffer or b"")
        if second and not held:
            held.append(route)
        else:
            route.continue_()

    page.route("**/attack", hold_the_second_model)
    page.fill("#eps-number", "9")
    expect(pair.find("html")).to_have_attribute("data-shown", "fgsm 9")
    until(lambda: page.wait_for_timeout(10) or held)
    expect(pair.find("#result")).to_have_attribute("aria-busy", "false")
    expect(pair.find("#compared-result")).to_have_attribute("aria-busy", "true")
    opacity = "node => getComputedStyle(node).opacity"
    assert float(pair.find("#compared-figure").evaluate(opacity)) < 0.5
    assert float(pair.find("#verdict").evaluate(opacity)) == 1
    page.fill("#eps-number", "10")  # gives up the comparison that is on its way
    expect(pair.find("html")).to_have_attribute("data-compared", "fgsm 10")
    expect(pair.find("#compared-result")).to_have_attribute("aria-busy", "false")
    assert float(pair.find("#compared-figure").evaluate(opacity)) == 1
    page.unroute_all(behavior="ignoreErrors")


def test_comparison_is_retried_while_the_service_is_busy(pair: Visit) -> None:
    busy = iter([429, 429])

    def answered(route: Route) -> None:
        second = b'name="compare"' in (route.request.post_data_buffer or b"")
        if second and (status := next(busy, None)):
            route.fulfill(status=status, body="{}", headers={"Retry-After": "70"})
        else:
            route.continue_()

    pair.page.route("**/attack", answered)
    pair.open("?attack=fgsm")
    expect(pair.find("html")).to_have_attribute("data-compared", "fgsm 8")
    expect(pair.find("#compare-error")).to_be_hidden()
    assert next(busy, None) is None
    pair.page.unroute_all(behavior="ignoreErrors")


def test_comparison_can_be_switched_off(pair: Visit) -> None:
    page = pair.open()
    expect(pair.find("#curl")).to_contain_text("compare=true")
    page.uncheck("#compare")
    for name in ("figure", "result", "transfer"):
        expect(pair.find(f"#compared-{name}")).to_be_hidden()
    page.wait_for_url(re.compile("compare=no"))
    expect(pair.find("#curl")).not_to_contain_text("compare")
    page.reload()
    expect(pair.find("html")).to_have_attribute("data-shown", "pgd 8")
    expect(pair.find("#compared-figure")).to_be_hidden()
    page.check("#compare")
    expect(pair.find("html")).to_have_attribute("data-compared", "pgd 8")


def test_comparison_is_hidden_without_a_comparison_model(visit: Visit) -> None:
    visit.open()
    for name in ("#compare-field", "#compared-figure", "#compared-result", "#served-title"):
        expect(visit.find(name)).to_be_hidden()
    assert "compare" not in visit.find("#curl").inner_text()


def test_original_can_be_wiped_over_and_flickered_with_the_adversarial_image(pair: Visit) -> None:
    page = pair.open()
    clip = "node => getComputedStyle(node).clipPath"
    over = pair.find("#adversarial-original")
    assert over.get_attribute("src") == pair.find("#original").get_attribute("src")
    whole = pair.find("#adversarial").screenshot()
    page.focus("#wipe")
    page.keyboard.press("End")
    assert over.evaluate(clip) in ("inset(0px)", "inset(0px 0% 0px 0px)")
    original = Image.open(io.BytesIO(pair.find("#adversarial").screenshot()))
    assert original.tobytes() != Image.open(io.BytesIO(whole)).tobytes()
    page.keyboard.press("Home")
    page.click("#flicker")
    for original_shown in (True, False, True):
        selector = "[data-original]" if original_shown else ":not([data-original])"
        expect(pair.find(f"#result{selector}")).to_have_count(1)
    expect(pair.find("#flicker")).to_have_attribute("aria-pressed", "true")
    page.click("#flicker")
    expect(pair.find("#result[data-original]")).to_have_count(0)
    expect(pair.find("#flicker")).to_have_attribute("aria-pressed", "false")


def test_new_attack_replaces_a_running_one(visit: Visit) -> None:
    page = visit.open()
    held: list[Route] = []
    given_up: list[str] = []

    def hold_pgd(route: Route) -> None:
        if b"pgd" in (route.request.post_data_buffer or b""):
            held.append(route)
        else:
            route.continue_()

    page.on("requestfailed", lambda request: given_up.append(request.url))
    page.route("**/attack", hold_pgd)
    page.select_option("#name", "pgd")
    until(lambda: page.wait_for_timeout(10) or held)
    given_up.clear()
    page.select_option("#name", "fgsm")
    page.fill("#eps-number", "9")
    expect(visit.find("html")).to_have_attribute("data-shown", "fgsm 9")
    assert len(given_up) >= 1  # the browser hung up; the service then stops at its next step
    page.unroute_all(behavior="ignoreErrors")


# Commands


def copied(visit: Visit, form: str) -> str:
    visit.find(f'.snippet:has(#curl) [data-form="{form}"]').click()
    return visit.find("#curl").inner_text()


def run(script: str, folder: Path) -> str:
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_python_command_reproduces_the_shown_result(pair: Visit, tmp_path: Path) -> None:
    page = pair.open()
    page.select_option("#name", "pgd")
    page.fill("#steps", "3")
    expect(pair.find("html")).to_have_attribute("data-compared", "pgd 8")
    printed = run(copied(pair, "python"), tmp_path).splitlines()
    after = pair.find("#adversarial-text").inner_text().split()[0]
    other = pair.find("#compared-text").inner_text().split()[0]
    assert re.fullmatch(rf"\w+ -> {after} \w+", printed[0])
    assert re.fullmatch(rf"\w+ -> {other} \w+", printed[1])
    shown = pair.find("#adversarial").get_attribute("src") or ""
    assert (tmp_path / "adversarial.png").read_bytes() == base64.b64decode(shown.split(",")[1])


@pytest.mark.parametrize(
    ("name", "norm", "target"),
    [("fgsm", "linf", ""), ("pgd", "l2", "ship"), ("apgd-ce", "linf", "")],
)
def test_pytorch_command_runs_without_the_service(
    pair: Visit, compared: Running, tmp_path: Path, name: str, norm: str, target: str
) -> None:
    page = pair.page
    steps = "" if name == "fgsm" else "3"
    query = f"?attack={name}&norm={norm}&steps={steps}&target={target}&compare=no"
    page.goto(f"{pair.url}/{query}")
    expect(pair.find("html")).to_have_attribute("data-shown", re.compile(name))
    for path in compared.service.settings.checkpoint.parent.glob("robust_model.*"):
        shutil.copy(path, tmp_path)
    aimed = "goal" if target else "y"
    script = copied(pair, "torch") + (
        f"\nprint(*(model(image).softmax(1)[0, {aimed}].item() for image in (x, x_adv)))"
    )
    before, after, moved = (line.split() for line in run(script, tmp_path).splitlines())
    first, last = map(float, moved)
    assert last > first if target else last < first  # towards the target, or away from the label
    seen = pair.find("#seen-bars td.number.top").evaluate(
        "cell => cell.parentNode.cells[0].textContent"
    )
    assert before[0] == seen
    if name == "fgsm":  # the same attack; only the result is not rounded to 8 bits
        label, share = pair.find("#adversarial-text").inner_text().split()
        assert after[0] == label
        assert 100 * float(after[1]) == pytest.approx(float(share.strip("%")), abs=1.0)


def test_evaluation_commands_run(visit: Visit, tmp_path: Path) -> None:
    page = visit.open()
    page.select_option("#set", label="few")
    page.click('.snippet:has(#evaluate-curl) [data-form="python"]')
    page.fill("#set-eps", "")  # the service's default
    expect(visit.find("#evaluate-curl")).not_to_contain_text("eps")
    page.fill("#set-eps", "3")
    printed = run(visit.find("#evaluate-curl").inner_text(), tmp_path)
    assert "done\nclean 0." in printed
    assert re.search(r"\npgd-20 [\d.]+ \[[\d.]+, [\d.]+\]\n$", printed)

"""The playground says what it shows: of which model, which settings, and with what outcome."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from playwright.sync_api import Route, expect

from tests.support.browser import Visit
from tests.support.playground import settled
from tests.support.serving import CLASSES, Running, labeled, until

pytestmark = pytest.mark.browser

EXAMPLES = Path(__file__).parents[3] / "app" / "playground" / "assets" / "examples"


# What the page is


def test_page_explains_itself_and_eps(visit: Visit) -> None:
    visit.open()
    text = visit.find(".intro").inner_text()
    assert "fool an image classifier" in text
    assert "8/255 means 8 of 255 brightness levels" in text
    assert text.count(".") == 1  # one sentence
    assert "each pixel" in text
    visit.page.select_option("#norm", "l2")
    text = visit.find(".intro").inner_text()
    assert "a photograph as a whole by at most eps" in text
    assert "each pixel" not in text
    assert text.count(".") == 1


def test_misclassified_examples_are_marked(visit: Visit, served: Running) -> None:
    visit.open()
    wrong = []
    for button in visit.find("#examples button").all():
        name = button.get_attribute("data-example") or ""
        body = (EXAMPLES / f"{name}.jpg").read_bytes()
        predicted = served.client.post("/predict", content=body).json()["results"][0]["label"]
        if name in CLASSES and predicted != name:
            wrong.append(name)
    assert wrong  # the weights of this model are random
    sentence = f"Misclassified without an attack: {', '.join(wrong)}."
    expect(visit.find("#examples-note")).to_have_text(
        f"{sentence} Not among the model’s classes: coffee."
    )
    marked = visit.find("#examples .missed").evaluate_all("all => all.map(b => b.dataset.example)")
    assert marked == wrong
    expect(visit.find("#examples .missed").first).to_have_attribute(
        "aria-label", f"Example: {wrong[0]}, which the model misclassifies"
    )


def test_model_card_rows_show_their_own_image_counts(visit: Visit) -> None:
    def measured(route: Route) -> None:
        answer = route.fetch().json()
        rows = [("clean", 5000), ("autoattack", 500)]
        answer["card"]["evaluation"] = [
            {"data": "test", "attack": attack, "accuracy": 0.5, "n": n, "interval": [0.4, 0.6]}
            | ({} if attack == "clean" else {"norm": "linf", "eps_text": "8/255"})
            for attack, n in rows
        ]
        route.fulfill(body=json.dumps(answer), content_type="application/json")

    visit.page.route("**/model", measured)
    visit.open()
    expect(visit.find("#card caption")).to_have_text("Accuracy on test")
    rows = visit.find("#card tbody tr")
    expect(rows.nth(0)).to_have_text(re.compile(r"Clean\s*50.0%\s*5,000$"))
    expect(rows.nth(1)).to_have_text(re.compile(r"^AutoAttack.*50.0%\s*500$"))
    right = "node => node.getBoundingClientRect().right"
    assert visit.find("#card table").evaluate(right) <= visit.find("#card").evaluate(right)


def test_five_photographs_are_labeled_a_demonstration(visit: Visit) -> None:
    page = visit.open()
    expect(visit.find("#set-note")).to_be_hidden()
    page.select_option("#set", label="Five example photographs (demo)")
    expect(visit.find("#set-note")).to_contain_text("too few to measure accuracy")


# Never stale


class Held:
    """Holds every attack asked for from now on, until they are released."""

    def __init__(self, visit: Visit) -> None:
        self.routes: list[Route] = []
        self.holding = True
        visit.page.route("**/attack", lambda route: self._take(route))

    def _take(self, route: Route) -> None:
        if self.holding:
            self.routes.append(route)
        else:
            route.continue_()

    def release(self) -> None:
        self.holding = False
        for route in self.routes:
            route.continue_()


def test_stale_results_are_dimmed_until_the_response_arrives(
    visit: Visit,
) -> None:
    page = visit.open()
    expect(visit.find("#result")).to_have_attribute("aria-busy", "false")
    words = "FGSM, L∞, eps 8/255, true class horse, examples/horse.jpg."
    expect(visit.find("#result-settings")).to_have_text(f"Result for {words}")
    waiting = Held(visit)
    page.fill("#eps-number", "9")
    expect(visit.find("#result")).to_have_attribute("aria-busy", "true")
    expect(visit.find("#result-settings")).to_have_text(
        f"Updating; the dimmed result is for {words}"
    )
    opacity = visit.find("#verdict").evaluate("node => getComputedStyle(node).opacity")
    assert float(opacity) < 0.5
    name = visit.find("#adversarial-save").get_attribute("download")
    assert name == "horse-fgsm-linf-8of255-adversarial.png"  # of what is still shown
    until(lambda: page.wait_for_timeout(10) or waiting.routes)
    waiting.release()
    expect(visit.find("#result")).to_have_attribute("aria-busy", "false")
    expect(visit.find("#result-settings")).to_contain_text(
        f"Result for {words}".replace("8/", "9/")
    )
    assert visit.find("#attack").get_attribute("data-stale") is None
    name = visit.find("#adversarial-save").get_attribute("download")
    assert name == "horse-fgsm-linf-9of255-adversarial.png"


def test_clicked_image_is_shown_before_the_service_responds(visit: Visit) -> None:
    page = visit.open()
    Held(visit)
    page.click('[data-example="deer"]')
    for name in ("#seen", "#original"):
        expect(visit.find(name)).to_have_attribute("src", re.compile("deer.jpg$"))
    expect(visit.find("#seen-text")).to_have_text("examples/deer.jpg: waiting for the model…")
    expect(visit.find("#seen-bars")).to_have_attribute("aria-busy", "true")
    expect(visit.find("#seen-caption")).to_contain_text("horse.jpg")  # whose bars those are
    expect(visit.find("#result")).to_have_attribute("aria-busy", "true")
    expect(visit.find("#original-save")).to_be_hidden()
    expect(visit.find("#result-settings")).to_contain_text("horse.jpg")


def test_page_opened_while_the_model_loads_says_so(visit: Visit) -> None:
    page = visit.page
    loading = json.dumps({"title": "x", "detail": "The model is loading."})
    for path in ("model", "limits", "readyz"):
        page.route(f"**/{path}", lambda route: route.fulfill(status=503, body=loading))
    page.goto(visit.url)
    expect(visit.find("#status")).to_contain_text("The model is loading.")
    expect(visit.find("#seen")).to_have_attribute("src", re.compile("horse.jpg$"))
    page.click('[data-example="deer"]')
    expect(visit.find("#seen")).to_have_attribute("src", re.compile("deer.jpg$"))
    for path in ("model", "limits", "readyz"):
        page.unroute(f"**/{path}")
    expect(visit.find("#seen-text")).to_contain_text("deer.jpg: the 32 × 32 pixels")
    expect(visit.find("#result-settings")).to_contain_text("deer.jpg.")


# Outcomes


@pytest.mark.parametrize(
    ("outcome", "word", "verdict"),
    [
        ("broken", "broken", "Broken: "),
        ("withstood", "withstood", "Withstood: "),
        (
            "already_wrong",
            "misclassified without an attack",
            "Misclassified without an attack: ",
        ),
    ],
)
def test_attack_outcome_is_one_of_three(
    visit: Visit, outcome: str, word: str, verdict: str
) -> None:
    def answered(route: Route) -> None:
        answer = route.fetch().json()
        answer["results"][0] |= {"outcome": outcome, "success": outcome == "broken"}
        route.fulfill(body=json.dumps(answer), content_type="application/json")

    visit.page.route("**/attack", answered)
    visit.open()
    expect(visit.find("#fact-outcome")).to_have_text(word)
    expect(visit.find("#verdict")).to_have_text(re.compile(f"^{verdict}"))
    states = {"broken": "lost", "withstood": "held", "already_wrong": "wrong"}
    expect(visit.find("#verdict")).to_have_attribute("data-state", states[outcome])
    visit.page.unroute_all(behavior="ignoreErrors")


def test_adjusted_settings_are_reported(visit: Visit) -> None:
    page = visit.open()
    expect(visit.find("#settings-note")).to_be_hidden()
    page.select_option("#norm", "l2")
    expect(visit.find("#settings-note")).to_have_text(
        "eps was set to 0.502 (128/255), the default under L2, "
        "where eps limits the length of the whole change."
    )
    page.select_option("#name", "pgd")
    expect(visit.find("#steps")).to_have_value("20")  # as the library's, however slow the model
    page.fill("#steps", "100000")
    page.locator("#steps").blur()
    expect(visit.find("#steps-note")).to_have_text("Steps were set to 200: choose from 1 to 200.")


@pytest.mark.parametrize("value", ["999", "", "0.5", "-3"])
def test_invalid_eps_is_explained_beside_the_field(visit: Visit, value: str) -> None:
    page = visit.open()
    page.fill("#eps-number", value)
    range_ = "hoose a whole number of 255ths from 0 to 64 under L∞."
    expect(visit.find("#eps-note")).to_have_text(f"C{range_}")
    page.locator("#eps-number").blur()
    expect(visit.find("#eps-number")).to_have_value("8")
    expect(visit.find("#eps-note")).to_have_text(f"eps stays at 8/255: c{range_}")
    page.fill("#eps-number", "9")
    expect(visit.find("#eps-note")).to_be_hidden()


def test_steps_are_called_queries_where_they_are(visit: Visit) -> None:
    page = visit.open("?attack=square&steps=20")
    expect(visit.find("#steps-name")).to_have_text("Queries")
    expect(visit.find("#result-settings")).to_contain_text("20 queries")
    page.fill("#steps", "99999")
    expect(visit.find("#steps-note")).to_have_text("Queries: choose a whole number from 1 to 5000.")
    page.select_option("#name", "pgd")
    expect(visit.find("#steps-name")).to_have_text("Steps")
    page.fill("#steps", "300")
    expect(visit.find("#steps-note")).to_have_text("Steps: choose a whole number from 1 to 200.")


def test_curve_names_the_class_whose_confidence_it_shows(visit: Visit) -> None:
    page = visit.open()
    title = visit.find("h3:has(#curve-class)")
    expect(title).to_have_text("Confidence in the true class against eps")
    page.select_option("#label", "")
    expect(title).to_have_text("Confidence in the predicted class against eps")


def test_copied_command_works_in_any_folder(visit: Visit, tmp_path: Path) -> None:
    page = visit.open()
    page.select_option("#set", label="Five example photographs (demo)")
    for selector in ("#curl", "#evaluate-curl"):
        line = visit.find(selector).inner_text()
        assert line.count("curl -sS ") == 2
        assert "/playground/examples/" in line
    if shutil.which("curl") is None:
        pytest.skip("no curl here to run the line with")
    line = visit.find("#curl").inner_text()
    finished = subprocess.run(
        ["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    result = json.loads(finished.stdout)["results"][0]
    shown = visit.find("#adversarial").get_attribute("src")
    assert shown == f"data:image/png;base64,{result['adversarial_png']}"


def test_evaluation_with_other_settings_is_dimmed(visit: Visit) -> None:
    page = visit.open()
    page.select_option("#set", label="few")
    page.fill("#set-eps", "5")
    page.uncheck('#set-attacks [value="pgd"]')
    page.click("#start")
    expect(visit.find("#evaluate-text")).to_contain_text("Done: 30 images of few.npz.")
    expect(visit.find("#evaluate-stale")).to_be_hidden()
    page.fill("#set-eps", "6")
    expect(visit.find("#evaluate-stale")).to_have_text(
        "The dimmed result is for few.npz, L∞, eps 5/255, not for the settings above."
    )
    assert visit.find("#evaluate-result").evaluate("n => getComputedStyle(n).opacity") == "0.35"
    page.fill("#set-eps", "5")
    expect(visit.find("#evaluate-stale")).to_be_hidden()
    page.reload()
    expect(visit.find("#evaluate-text")).to_contain_text("Done: 30 images of few.npz.")
    expect(visit.find("#set-eps")).to_have_value("5")
    assert not page.is_checked('#set-attacks [value="pgd"]')
    expect(visit.find("#evaluate-stale")).to_be_hidden()


def test_evaluation_of_another_file_is_dimmed(visit: Visit) -> None:
    def chosen(name: str) -> None:
        file = {"name": name, "mimeType": "application/zip", "buffer": labeled(6)}
        page.set_input_files("#set-file", file)  # type: ignore[arg-type]

    page = visit.open()
    page.select_option("#set", label="Upload a file…")
    chosen("a.npz")
    page.fill("#set-eps", "52")
    page.click("#start")
    expect(visit.find("#evaluate-text")).to_contain_text("Done: 6 images of the uploaded set.")
    expect(visit.find("#evaluate-stale")).to_be_hidden()
    chosen("b.npz")
    expect(visit.find("#evaluate-stale")).to_have_text(
        "The dimmed result is for the uploaded set, L∞, eps 52/255, not for the settings above."
    )
    page.reload()  # no file is chosen any more
    expect(visit.find("#evaluate-text")).to_contain_text("Done: 6 images of the uploaded set.")
    expect(visit.find("#evaluate-stale")).to_be_hidden()
    chosen("c.npz")
    expect(visit.find("#evaluate-stale")).to_be_visible()


def test_url_holds_the_settings(visit: Visit) -> None:
    page = visit.open()
    page.click('[data-example="dog"]')
    page.select_option("#name", "pgd")
    page.fill("#steps", "3")
    page.select_option("#target", "ship")
    page.fill("#eps-number", "5")
    address = "?example=dog&attack=pgd&eps=5/255&norm=linf&steps=3&target=ship"
    page.wait_for_url(f"**/{address}")
    words = "Result for PGD, L∞, eps 5/255, 3 steps, true class dog, target ship, examples/dog.jpg."
    expect(visit.find("#result-settings")).to_have_text(words)
    page.reload()
    expect(visit.find("#result-settings")).to_have_text(words)
    page.click('[data-example="deer"]')
    page.wait_for_url(re.compile("example=deer"))
    page.go_back()
    expect(visit.find("#result-settings")).to_have_text(words)
    page.go_forward()
    expect(visit.find("#result-settings")).to_have_text(words.replace("dog", "deer"))
    page.goto(f"{visit.url}/?example=none&attack=what&eps=-1&steps=1e9&norm=x&target=y")
    expect(visit.find("#result-settings")).to_have_text(
        "Result for FGSM, L∞, eps 8/255, true class horse, examples/horse.jpg."
    )


def test_links_to_sections_keep_result_and_curve(visit: Visit) -> None:
    page = visit.open()
    settled(page)
    page.wait_for_url(re.compile("attack=fgsm"))
    asked: list[bytes] = []

    def noted(route: Route) -> None:
        asked.append(route.request.post_data_buffer or b"")
        route.continue_()

    page.route("**/attack", noted)
    for name in ("evaluate", "model"):
        page.click(f'a[href="#{name}"]')
        page.wait_for_url(re.compile(f"#{name}$"))
    page.go_back()
    page.wait_for_url(re.compile("#evaluate$"))
    page.wait_for_timeout(300)
    assert not any(b"\r\n\r\nfgsm\r\n" in body for body in asked)  # PGD draws the rest of the curve
    page.unroute_all(behavior="ignoreErrors")


def test_url_holds_the_true_class_and_queries(visit: Visit) -> None:
    page = visit.open("?example=deer&attack=square&steps=300&eps=64/255")
    expect(visit.find("#steps")).to_have_value("300")  # more than other attacks' steps
    expect(visit.find("#label")).to_have_value("deer")
    page.select_option("#name", "fgsm")
    for label, words, query in [
        ("frog", ", true class frog", "label=frog"),
        ("", "", "label=predicted"),
    ]:
        page.select_option("#label", label)
        page.wait_for_url(re.compile(query))
        page.reload()
        expect(visit.find("#result-settings")).to_have_text(
            f"Result for FGSM, L∞, eps 64/255{words}, examples/deer.jpg."
        )
    page.select_option("#label", "deer")
    page.wait_for_url(re.compile("^(?!.*label)"))
    page.go_back()
    expect(visit.find("#label")).to_have_value("")
    page.click('[data-example="dog"]')  # has its own
    expect(visit.find("#result-settings")).to_contain_text("true class dog")


def test_attack_names_have_explanations(visit: Visit, served: Running) -> None:
    page = visit.open()
    summaries = {
        item["name"]: item["summary"] for item in served.client.get("/limits").json()["attacks"]
    }
    expect(visit.find("#name-summary")).to_have_text(f"FGSM: {summaries['fgsm']}.")
    expect(visit.find("#about-apgd-t")).to_be_hidden()
    page.focus('#set-attacks [value="apgd-t"]')
    expect(visit.find("#about-apgd-t")).to_be_visible()
    expect(visit.find("#about-apgd-t")).to_have_text(f"{summaries['apgd-t']}.")
    page.hover('#set-attacks [value="fab-t"]')
    expect(visit.find("#about-fab-t")).to_be_visible()

"""The parts a report is made of, one by one."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pypdf import PdfReader
from torch import Tensor, nn

from robust.checkpoint import Checkpoint
from robust.classifier import Architecture
from robust.commands.report import find_run
from robust.datasets import Dataset
from robust.evaluation import wilson_interval
from robust.loading import ModelOptions
from robust.loading.given import Given, classifier_of
from robust.report import words
from robust.report.build import _card
from robust.report.document import INK, Document, Notice, Plot, Section, Table, Text
from robust.report.evaluations import Measurement, parse_evaluation, recorded_evaluations
from robust.report.example_sections import gallery, surface
from robust.report.examples import SIDE, Surface, measure_surface, show_examples
from robust.report.html import render_html
from robust.report.pdf import render_pdf
from robust.report.result_sections import accuracies, against_eps, by_class, cost, differences
from robust.report.run import ReportError, TrainingRun, check_belongs
from robust.report.training_sections import method
from robust.report.trust import trust
from robust.report.words import images_of, interval
from robust.sidecar import Sidecar
from robust.threat_model import ThreatModel
from tests.support.browser import chromium

Values = dict[str, Any]


def parsed(values: Values, sidecar: Sidecar) -> Measurement:
    return parse_evaluation(values, source="a.json", sidecar=sidecar, sha256="0000")


def titles(section: Section) -> list[str]:
    return [block.title for block in section.blocks if isinstance(block, Notice)]


# Evaluations


def test_attack_stages_are_listed(evaluation: Values, sidecar: Sidecar) -> None:
    evaluation["results"][1] |= {
        "attack": "autoattack",
        "stages": [
            {"attack": "apgd-ce", "attacked": 83, "correct": 44, "seconds": 1.0},
            {"attack": "square", "attacked": 42, "correct": 42, "seconds": 1.0},
        ],
    }
    found = parsed(evaluation, sidecar)
    assert [row[0] for row in accuracies([found]).rows][2:] == [
        *("after its apgd-ce", "after its square")
    ]
    assert [row[4] for row in accuracies([found]).rows][2:] == ["44 of 120", "42 of 120"]
    assert "No AutoAttack" not in titles(trust([found], None))


def test_images_fooled_by_only_one_attack_are_listed(evaluation: Values, sidecar: Sidecar) -> None:
    stages = [{"attack": "pgd-1", "attacked": 83, "correct": 42, "seconds": 1.0}]
    base = evaluation["results"][1] | {"stages": stages}
    one = evaluation | {
        "results": [evaluation["results"][0], base | {"attack": "audit", "fooled": [1, 5, 7]}],
        "times": {"evaluation": 12.0, "passes": 11.0, "limit": 10.5},
    }
    other = evaluation | {
        "results": [evaluation["results"][0], base | {"attack": "autoattack", "fooled": [1, 8]}]
    }
    found = [parsed(one, sidecar), parsed(other, sidecar)]
    (table,) = differences(found)
    assert [row[:2] + row[3:] for row in table.rows] == [
        ("audit", "autoattack", "2 of 120", "5, 7"),
        ("autoattack", "audit", "1 of 120", "8"),
    ]
    elsewhere = other | {"data": other["data"] | {"scored_sha256": "0" * 64}}
    assert differences([found[0], parsed(elsewhere, sidecar)]) == []  # other images
    told = [block.text for block in cost(found, []).blocks if isinstance(block, Text)]
    assert "12.0 s in all, of which passes took 11.0 s" in told[-1]
    assert told[-1].endswith("as many passes would take 10.5 s.")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("upload", "120 uploaded images"),
        ("held out from training", "120 images held out from training"),
        ("test.npz", "120 images of test.npz"),
    ],
)
def test_summary_names_its_images(
    evaluation: Values, sidecar: Sidecar, data: str, words: str
) -> None:
    evaluation["data"]["name"] = data
    _, _, details = _card(parsed(evaluation, sidecar), parsed(evaluation, sidecar).results[0])
    assert details == f"{interval(wilson_interval(83, 120))}; {words}"
    assert words.replace("120 ", "1 ").replace("images", "image") == images_of(1, data)


def test_worst_case_of_several_attacks_is_reported(
    evaluation: Values, sidecar: Sidecar, make_result: Callable[..., Values]
) -> None:
    weak = make_result("fgsm", [[20, 12, 6, 2], [5, 19, 12, 4], [4, 10, 26, 0], [0] * 4])
    evaluation["results"].insert(1, weak)
    evaluation["worst_case"]["correct"] = 41
    found = parsed(evaluation, sidecar)
    assert found.hardest is not None
    assert found.robust is not None
    assert (found.hardest.attack, found.hardest.correct) == ("pgd-20", 42)
    assert (found.robust.correct, found.robust.ball) == (41, "linf 8/255")


def test_no_flags_is_reported_as_no_sign_of_a_problem(evaluation: Values, sidecar: Sidecar) -> None:
    evaluation |= {"flags": [], "notes": []}
    assert titles(trust([parsed(evaluation, sidecar)], None)) == [
        *("No sign of a problem", "No AutoAttack", "Few images")
    ]


def test_model_without_gradients_gets_possible_advice(evaluation: Values, sidecar: Sidecar) -> None:
    evaluation |= {"curve": []}
    evaluation["probes"]["differentiated"] = 0
    found = [parsed(evaluation, sidecar)]
    (text, *_) = [b.text for b in against_eps(found, classes=4).blocks if isinstance(b, Text)]
    assert text.startswith("There is no curve, as its attack needs gradients")
    (notice,) = [
        block
        for block in trust(found, None).blocks
        if isinstance(block, Notice) and block.title == "No AutoAttack"
    ]
    assert notice.text.endswith("so run square with more queries and restarts.")
    onnx = Architecture(arch="onnx", stem="own", activation="own", num_classes=4)
    (first, *_) = method(replace(sidecar, architecture=onnx)).blocks
    assert isinstance(first, Text)
    assert first.text.startswith("The onnx model classifies color images")


@pytest.mark.parametrize("value", ["NaN", None, [1], float("inf")])
def test_non_numbers_are_rejected(evaluation: Values, sidecar: Sidecar, value: object) -> None:
    evaluation["results"][1]["correct"] = value
    with pytest.raises(ValueError, match=r"a\.json: expected the JSON of robust evaluate"):
        parsed(evaluation, sidecar)


def test_recorded_infinity_is_refused(sidecar: Sidecar) -> None:
    row = {"data": "test.npz", "attack": "clean", "correct": 1, "n": float("inf")}
    with pytest.raises(ValueError, match=r"a\.json: expected recorded accuracies"):
        recorded_evaluations(replace(sidecar, evaluation=[row]), "a.json")


@pytest.mark.parametrize("field", ["confusion", "stages", "per_class"])
def test_malformed_parts_are_refused(evaluation: Values, sidecar: Sidecar, field: str) -> None:
    evaluation["results"][1][field] = [{"a": 1}, 2]
    with pytest.raises(ValueError, match=r"a\.json: expected the JSON of robust evaluate"):
        parsed(evaluation, sidecar)


def test_any_class_name_can_be_shown(evaluation: Values) -> None:
    names = ("$x_{", "<script>\x1b[2J\x00", "漢字\n", "")
    architecture = Architecture(arch="resnet18", num_classes=4)
    sidecar = Sidecar(architecture=architecture, classes=names)
    section = by_class([parsed(evaluation | {"classes": list(names)}, sidecar)], names)
    document = Document(title="t", subtitle="s", sections=(section,))
    page = render_html(document)
    assert not {"\x1b", "\x00"} & set(page)
    assert "<script" not in page
    assert "漢字" in page
    assert render_pdf(document).startswith(b"%PDF")


def test_single_attack_is_reported_by_class(evaluation: Values, sidecar: Sidecar) -> None:
    whole = parsed(evaluation, sidecar)  # a sidecar may record an attack on fewer images alone
    measurement = replace(whole, results=whole.results[1:2])
    tables = [b for b in by_class([measurement], sidecar.classes).blocks if isinstance(b, Table)]
    assert [row[0] for row in tables[0].rows] == list(sidecar.classes)


def test_many_classes_with_long_names_fit_the_page(
    evaluation: Values, make_result: Callable[..., Values]
) -> None:
    k = 40
    names = tuple(f"a class with quite a long name, the {i}th" for i in range(k))
    matrix = (np.eye(k, dtype=int) * 7 + np.roll(np.eye(k, dtype=int), 1, axis=1) * 3).tolist()
    results = [make_result("clean", matrix), make_result("pgd-20", matrix)]
    evaluation |= {"results": results, "classes": list(names), "curve": []}
    sidecar = Sidecar(architecture=Architecture(arch="resnet18", num_classes=k), classes=names)
    section = by_class([parsed(evaluation, sidecar)], names)
    tables = [block for block in section.blocks if isinstance(block, Table)]
    assert [len(table.rows) for table in tables] == [k, 20, 20]
    assert tables[1].rows[0] == (names[0], names[1], "3")
    document = Document(title="t", subtitle="s", sections=(section,))
    assert render_pdf(document).startswith(b"%PDF")
    assert names[-1] in render_html(document)


# The surface of the loss


class Margin(nn.Module):
    """Logits (w.x, 0): class 0 leads by w.x."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        lead = (x * self.w).flatten(1).sum(dim=1)
        return torch.stack([lead, torch.zeros_like(lead)], dim=1)


class Rounded(Margin):
    """The same, with a gradient that is turned away."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits.detach() + (logits.detach() - logits)


def test_loss_surface_of_a_linear_model_matches_the_formula() -> None:
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(3, 4, 4, generator=generator)
    x = 0.3 + 0.4 * torch.rand(1, 3, 4, 4, generator=generator)
    ball = ThreatModel(eps=8 / 255)
    found = measure_surface(Margin(w), x, 0, threat_model=ball, number=0)
    lead, fall = float((x * w).sum()), ball.eps * float(w.abs().sum())
    middle = SIDE // 2
    # The Linf margin falls by exactly eps times the L1 norm of w, evenly.
    expected = -(lead - fall * np.linspace(-1, 1, SIDE))
    np.testing.assert_allclose(found.margin[middle], expected, atol=1e-5)
    np.testing.assert_allclose(found.loss[middle], np.log1p(np.exp(expected)), atol=1e-5)
    slope = 1 / (1 + np.exp(lead))
    assert found.expected == pytest.approx(slope * fall, rel=1e-4)
    assert found.follows_gradient


def test_masked_gradient_is_reported() -> None:
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(3, 4, 4, generator=generator)
    x = 0.3 + 0.4 * torch.rand(1, 3, 4, 4, generator=generator)
    found = measure_surface(Rounded(w), x, 0, threat_model=ThreatModel(), number=0)
    assert found.along_gradient < found.at_image
    assert not found.follows_gradient


def test_a_flat_surface_does_not_follow_its_gradient(evaluation: Values, sidecar: Sidecar) -> None:
    flat = np.zeros((SIDE, SIDE))
    found = Surface(number=0, label=0, loss=flat, margin=flat - 1, expected=0.0)
    assert not found.follows_gradient
    assert "Loss surface" in titles(trust([parsed(evaluation, sidecar)], [found]))


def test_a_model_without_gradients_is_attacked_by_square() -> None:
    given = Given(
        kind="onnx",
        function=lambda x: 50 * x.mean(dim=(2, 3)),
        sha256="0" * 64,
        differentiable=False,
        input_size=8,
    )
    classifier, sha256, about = classifier_of("model.onnx", given, ModelOptions())
    sidecar = Sidecar(architecture=about.architecture, classes=about.classes)
    checkpoint = Checkpoint(
        classifier=classifier.eval(), sidecar=sidecar, sha256=sha256, path=Path("model.onnx")
    )
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(120, 136, (2, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = pixels.float().mean(dim=(2, 3)).argmax(dim=1)
    dataset = Dataset(images=pixels, labels=labels, classes=about.classes, name="tiny")
    examples = show_examples(checkpoint, dataset, count=2, device=torch.device("cpu"))
    assert examples.settings.label == "square-500"
    assert [outcome.success for outcome in examples.outcomes] == [True, True]
    assert examples.surfaces == ()
    assert gallery(examples).blocks[1].caption == "square-500 on each image"  # type: ignore[union-attr]
    assert surface(examples).blocks == (
        Text(text="The model gives no gradients, which this needs."),
    )


# Documents and words


def test_rows_must_match_their_header() -> None:
    with pytest.raises(ValueError, match="rows of 2 cells in 'c'"):
        Table(caption="c", header=("a", "b"), rows=(("1",),))


@pytest.mark.parametrize(
    ("cells", "numeric"),
    [
        (("1", "2,000", "–"), True),
        (("8/255", "0.5", "4.64e-09"), True),
        (("1", "held"), False),
        (("5.9 s",), False),
        ((), False),
    ],
)
def test_numeric_columns_are_recognized(cells: tuple[str, ...], numeric: bool) -> None:
    table = Table(caption="", header=("a",), rows=tuple((cell,) for cell in cells))
    assert table.is_numeric(0) is numeric


def test_long_table_repeats_its_header_on_each_page() -> None:
    rows = tuple((str(k), "value") for k in range(120))
    table = Table(caption="c", header=("number", "heading"), rows=rows)
    text = Text(text="Ω ≤ ε, naïve 漢字")  # some are not in the font: a box, and no failure
    document = Document(
        title="t", subtitle="s", sections=(Section(title="One", blocks=(text, table)),)
    )
    pages = PdfReader(BytesIO(render_pdf(document))).pages
    assert len(pages) > 1
    assert all("heading" in page.extract_text() for page in pages)
    assert "naïve" in pages[0].extract_text()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5.88, "5.9 s"), (99.9, "99.9 s"), (193, "3 min 13 s"), (6793.4, "1 h 53 min"), (None, "–")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "7", True])
def test_missing_numbers_are_shown_as_a_dash(value: object) -> None:
    for write in (words.percent, words.decimal, words.significant, words.count, words.duration):
        assert write(value) == "–"


def test_words_are_joined_with_commas_and_and() -> None:
    assert [words.listed(list("abc"[:k])) for k in range(4)] == ["", "a", "a and b", "a, b and c"]


@pytest.mark.parametrize(
    ("run", "checkpoint", "expected"),
    [
        ("m/runs/a", None, ("m/a.pt", "m/runs/a")),
        ("m/runs/a", "b.pt", ("b.pt", "m/runs/a")),
        (None, None, ("models/robust_model.pt", None)),
        (None, "m/a.pt", ("m/a.pt", "m/runs/a")),
        (None, "m/b.pt", ("m/b.pt", None)),
    ],
)
def test_run_and_checkpoint_find_each_other(
    run: str | None,
    checkpoint: str | None,
    expected: tuple[str, str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m/runs/a").mkdir(parents=True)
    found = find_run(run and Path(run), checkpoint and Path(checkpoint))  # type: ignore[arg-type]
    weights, folder = expected
    assert found[0].resolve() == Path(weights).resolve()
    assert found[1] == (folder and Path(folder))


def test_fields_added_by_a_run_do_not_change_its_recipe(tmp_path: Path) -> None:
    recipe = {"name": "tiny"}
    run = TrainingRun(name="a", epochs=(), manifest={"recipe": recipe, "data": None, "seed": 0})
    sidecar = Sidecar(
        architecture=Architecture(num_classes=2),
        classes=("a", "b"),
        recipe={**recipe, "kept_epoch": 3, "init": "c09de8"},
        seed=0,
    )
    check_belongs(run, sidecar, tmp_path / "a.pt")
    with pytest.raises(ReportError, match="another recipe"):
        check_belongs(run, replace(sidecar, recipe={"name": "cpu"}), tmp_path / "a.pt")


def test_by_class_shows_the_attack_even_if_it_fools_nothing(
    evaluation: Values, sidecar: Sidecar
) -> None:
    whole = parsed(evaluation, sidecar)
    clean, attack = whole.results[:2]
    unharmed = replace(attack, correct=clean.correct, per_class=clean.per_class)
    measurement = replace(whole, results=(clean, unharmed))
    plot = next(b for b in by_class([measurement], sidecar.classes).blocks if isinstance(b, Plot))
    assert plot.caption == "Accuracy by class: clean and pgd-20, linf 8/255"


@pytest.mark.parametrize("lines", [32, 36])
@pytest.mark.parametrize("words", [60, 300])
def test_heading_is_on_the_same_page_as_its_table(lines: int, words: int) -> None:
    rows = tuple((f"row{k}", "word " * words, "x " * 40) for k in range(3))
    table = Table(caption="Caption", header=("what", "value", "more"), rows=rows)
    filler = Section(title="Filler", blocks=(Text(text="filler"),) * lines)
    sections = (filler, Section(title="Heading", blocks=(table,)))
    printed = render_pdf(Document(title="t", subtitle="s", sections=sections))
    pages = [page.extract_text() for page in PdfReader(BytesIO(printed)).pages]
    places = [next(k for k, page in enumerate(pages) if word in page)
              for word in ("Heading", "Caption", "row0")]  # fmt: skip
    assert len(set(places)) == 1
    assert len(pages) > 1


@pytest.mark.browser
@pytest.mark.parametrize("media", [{"media": "print"}, {"forced_colors": "active"}], ids=str)
def test_print_and_forced_colors_keep_bars_and_verdicts(media: dict[str, Any]) -> None:
    svg = f'<svg width="9pt" height="9pt"><rect width="9" height="9" fill="#0072B2"/><text>{INK}'
    blocks = (
        Notice(kind="warning", title="Flag", text="text"),
        Notice(kind="good", title="Fine", text="text"),
        Plot(caption="Bars", alt="bars", svg=f"{svg}</text></svg>"),
    )
    section = Section(title="One", blocks=blocks)
    page = render_html(Document(title="t", subtitle="s", sections=(section,)))
    with chromium() as browser:
        tab = browser.new_page()
        tab.emulate_media(**media)
        tab.set_content(page)

        def style(selector: str, name: str) -> str:
            found: str = tab.locator(selector).evaluate(f"e => getComputedStyle(e)['{name}']")
            return found

        assert style("rect", "fill") == "rgb(0, 114, 178)"
        assert style("figure svg", "color") == style("body", "color")  # axes can be read
        borders = {style(f".notice.{kind}", "border-left-style") for kind in ("warning", "good")}
        assert borders == {"double", "solid"}  # told apart without color
        if "media" in media:
            assert style("nav", "display") == "none"

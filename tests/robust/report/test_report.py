"""`robust report`: every part is present, with the right numbers, and self-contained."""

import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from pypdf import PdfReader

import robust.report
from robust_cli import run

SECTIONS = [
    "Summary",
    "Can the numbers be trusted?",
    "Method and recipe",
    "Learning curves",
    "Accuracy against eps",
    "By class",
    "A few images",
    "The loss around an image",
    "Throughput and cost",
    "Manifest",
]
VOID = {"meta", "img", "br", "use", "path"}


class Page(HTMLParser):
    """What a reader of the page is told."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.path: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[tuple[str, str]] = []
        self.words: list[str] = []
        self._caption, self._rows = "", [[""]]
        self.feed(text)
        self.close()
        assert self.path == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag == "table":
            self._caption, self._rows = "", []
        if tag not in ("meta", "img"):
            self.path.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.path.pop() == tag
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        if not self.path or "style" in self.path or "svg" in self.path:
            return
        self.words.append(data)
        if self.path[-1] == "caption":
            self._caption += data
        elif self.path[-1] in ("td", "th"):
            self._rows[-1][-1] += data
        elif self.path[-1] in ("h1", "h2", "h3"):
            self.headings.append((self.path[-1], data))


@pytest.fixture(scope="module")
def made(house: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(house, tmp_path_factory.mktemp("made"), "--data", house / "set.npz")


def make(house: Path, out: Path, *more: object, evaluation: Path | None = None) -> Path:
    evaluation = evaluation or house / "pgd.json"
    options = ["--examples", 3, "--evaluation", evaluation, "--out", out, *more]
    assert run(["report", str(house / "runs" / "model"), *map(str, options)]) == 0
    return out


@pytest.fixture(scope="module")
def html(made: Path) -> str:
    return (made / "report.html").read_text()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.fixture(scope="module")
def printed(made: Path) -> PdfReader:
    return PdfReader(io.BytesIO((made / "report.pdf").read_bytes()))


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


def table(page: Page, caption: str) -> list[list[str]]:
    (found,) = (rows for name, rows in page.tables.items() if name.startswith(caption))
    return found


def test_every_section_is_present_in_order(page: Page, printed: PdfReader) -> None:
    assert [name for tag, name in page.headings if tag == "h2"] == SECTIONS
    assert [str(entry.title) for entry in printed.outline] == SECTIONS  # type: ignore[union-attr]


def test_pdf_has_the_same_text_as_the_page(page: Page, printed: PdfReader) -> None:
    texts = [squeezed(found.extract_text()) for found in printed.pages]
    footer = re.compile(r"Howrobustismodel\.pt\?\d+$")  # stands between what a page break parts
    pages = "".join(footer.sub("", text) for text in texts)
    cells = [cell for rows in page.tables.values() for row in rows for cell in row]
    assert len(cells) > 150
    missing = [cell for cell in cells if squeezed(cell) not in pages]
    assert missing == []
    for words in page.words:
        assert squeezed(words) in pages


def test_accuracies_with_intervals(page: Page) -> None:
    assert table(page, "All accuracies")[1:] == [
        ["clean", "–", "69.17", "60.4 to 76.7", "83 of 120", "test.npz", "pgd.json"],
        ["pgd-20", "linf 8/255", "35.00", "27.1 to 43.9", "42 of 120", "test.npz", "pgd.json"],
    ]


def test_eps_curve_and_its_attacks(page: Page) -> None:
    rows = table(page, "Accuracy at each eps, linf")
    assert [row[1:3] for row in rows[1:]] == [
        *(["0/255", "70.0"], ["4/255", "48.0"], ["8/255", "36.0"], ["32/255", "6.0"]),
        *(["128/255", "0.0"], ["8/255", "35.0"]),
    ]
    assert rows[3][3:] == ["24.1 to 49.9", "18 of 50"]


def test_classes_and_confusions(page: Page) -> None:
    assert table(page, "Accuracy by class")[1:] == [
        ["cat", "40", "75.0", "30.0"],
        ["dog & <b>", "40", "50.0", "22.5"],
        ["frog", "40", "82.5", "52.5"],
        ["ship", "0", "–", "–"],
    ]
    matrices = [rows for name, rows in page.tables.items() if name.startswith("Images of each")]
    assert [rows[2][1:] for rows in matrices] == [["10", "20", "8", "2"], ["15", "9", "12", "4"]]


def test_learning_curves_in_numbers(page: Page) -> None:
    rows = table(page, "Epochs")
    first = ["1", "clean", "1.853", "0.00125", "53.5", "30.0", "1.9", "50", "60.0 s"]
    assert rows[1] == first or rows[1] == [*first[:2], "1.852", *first[3:]]
    # A loss that is no number is a dash.
    assert rows[3][:3] == ["3 (kept)", "adversarial", "–"]


def test_method_section(page: Page) -> None:
    phases = table(page, "The phases")
    assert phases[1][2:] == [
        *("clean", "cross-entropy", "0.002", "10%"),
        "random crop, 4 pixels of padding, mirrored with probability 0.5",
    ]
    assert phases[2][2:4] == ["25% clean and 75% pgd with 3 steps", "trades, beta 6"]
    assert ["optimizer", "adamw"] in table(page, "Settings of all phases")


def test_costs(page: Page) -> None:
    assert table(page, "Cost of training")[1:] == [
        ["clean phase", "1", "50", "60.0 s", "6.0 s"],
        ["adversarial phase", "2", "120", "2 min 0 s", "12.0 s"],
        ["all", "3", "–", "3 min 20 s", "18.0 s"],
    ]
    assert table(page, "Cost of evaluation")[1][1:7] == ["120", "4.0 s", "30.0", "400", "80", "4.0"]


def test_flags_notes_and_limits_are_listed(page: Page) -> None:
    text = " ".join(page.words)
    assert "7 have no gradient" in text
    assert "look for rounding" in text
    assert "fab-t: tries 3 target classes" in text
    assert "No sign of a problem" not in text
    assert "No AutoAttack" in text
    assert "Few images" in text


def test_example_images(page: Page) -> None:
    rows = table(page, "pgd-20 on each image")
    assert len(rows) == 4
    assert [row[-1] == "misclassified before" for row in rows[1:]] == [False, True, False]
    assert {row[-1].split(",")[0] for row in rows[1:]} <= {
        "robust",
        "fooled",
        "misclassified before",
    }
    assert len(table(page, "The loss at a distance of 8/255")) == 3
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(pictures) == 9
    assert all(picture["alt"] for picture in pictures)


def test_manifest(page: Page, house: Path) -> None:
    rows = dict(row for rows in page.tables.values() for row in rows if len(row) == 2)
    sidecar = json.loads((house / "model.json").read_text())
    assert rows["SHA-256 of the weights"] == sidecar["weights_sha256"]
    assert rows["SHA-256 of the data"] == "e" * 64
    assert rows["SHA-256 of the images scored"] == "f" * 64
    assert rows["type of the images"] == "float32"
    assert rows["changed in reading"] == "skipped 1 broken link: cat/gone.png"
    assert rows["changed in reading these images"].startswith("read labels as numbers of")
    assert rows["precision"] == "fp32"
    assert rows["seed"] == "5"
    assert "somebody" not in " ".join(page.words)


def test_no_number_is_nan(html: str, page: Page) -> None:
    shown = " ".join(page.words + [row.get("aria-label") or "" for _, row in page.elements])
    assert re.findall(r"\b(nan|inf|null)\b", shown.replace("NaN in", "")) == []
    assert "nan" not in re.sub(r"data:[^\"]+", "", html).lower().replace("nan in", "")


def test_page_is_self_contained(html: str, page: Page) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "image", "base"}
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href"):
                assert str(value).startswith(("data:image/png;base64,", "#")), value
            elif not name.startswith("xmlns"):
                assert "//" not in str(value), (name, value)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]+)\)", html))


def test_page_is_accessible_to_screen_readers(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.headings]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert ("html", {"lang": "en"}) in page.elements
    for tag, attributes in page.elements:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert len(attributes["aria-label"] or "") > 20
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        assert tag != "td" or attributes.get("class") in (None, "number", "long")
    named = [a["aria-label"] for _, a in page.elements if a.get("role") == "region"]
    assert len(named) == len(set(named))
    narrow = re.findall(r'<td class="long">(.*?)</td>', page.text)
    assert all(len(cell) > 40 and "<" not in cell for cell in narrow)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    pointed = [v[1:] for _, a in page.elements for k, v in a.items() if v and k.endswith("href")]
    assert {name for name in pointed if "ata:" not in name} <= set(ids)
    assert [tag for tag, _ in page.elements].count("svg") == 5


def test_report_is_deterministic(house: Path, tmp_path: Path, made: Path, html: str) -> None:
    again = make(house, tmp_path, "--data", house / "set.npz")
    assert (again / "report.html").read_text() == html
    assert (again / "report.pdf").read_bytes() == (made / "report.pdf").read_bytes()


def test_without_evaluation_and_data(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", "--checkpoint", str(house / "model.pt"), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "recorded in the sidecar" in out
    page = Page((tmp_path / "report.html").read_text())
    text = " ".join(page.words)
    assert "Recorded accuracies" in text
    assert "no data was given" in text
    assert "their accuracy is slightly optimistic; that of other images is not" in text
    assert "had no part in the selection" not in text
    # The newest first, those of the hold-out last.
    assert [row[-2] for row in table(page, "All accuracies")[1:]] == [
        *("test.npz", "held out from training")
    ]
    assert table(page, "Epochs")  # of the run beside the checkpoint


def test_checkpoint_without_a_run_or_sidecar(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(house / "model.pt", tmp_path / "bare.pt")
    options = ["--checkpoint", str(tmp_path / "bare.pt"), "--out", str(tmp_path)]
    options += ["--data", str(house / "set.npz"), "--examples", "1"]
    options += ["--classes", "cat,dog,eel,fox"]
    assert run(["report", *options]) == 0
    page = Page((tmp_path / "report.html").read_text())
    assert [name for tag, name in page.headings if tag == "h2"] == SECTIONS
    assert "Not evaluated" in " ".join(page.words)
    note = "read labels as numbers of the model's classes"
    assert note in capsys.readouterr().err
    assert note in " ".join(page.words)


def broken(house: Path, folder: Path) -> Path:
    """A copy of the house with one thing of each kind broken."""
    shutil.copytree(house, folder)
    runs = folder / "runs"
    for name in ("cut", "unfinished", "bare", "other", "torn"):
        shutil.copytree(runs / "model", runs / name)
        for ending in ("pt", "json"):
            shutil.copy(folder / f"model.{ending}", folder / f"{name}.{ending}")
    metrics = (runs / "cut" / "metrics.jsonl").read_text()
    (runs / "cut" / "metrics.jsonl").write_text(metrics[: len(metrics) - 40])
    manifest = json.loads((runs / "model" / "run.json").read_text())
    (runs / "unfinished" / "run.json").write_text(json.dumps({**manifest, "finished": False}))
    (runs / "other" / "run.json").write_text(json.dumps({**manifest, "seed": 6}))
    (runs / "torn" / "run.json").write_text('{"recipe": {')
    (runs / "bare" / "run.json").unlink()
    good = json.loads((folder / "pgd.json").read_text())
    for name, values in {
        "weights": {**good, "weights_sha256": "0" * 64},
        "classes": {**good, "classes": ["a", "b", "c", "d"]},
        "part": {**good, "results": [{"attack": "clean"}]},
        "impossible": {**good, "results": [{**good["results"][0], "correct": 500}]},
        "list": [1, 2],
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    (folder / "cut.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def ruin(house: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return broken(house, tmp_path_factory.mktemp("ruin") / "house")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("runs/none", ["runs/none", "folder of a training run", "none of that name"]),
        ("model.pt", ["model.pt", "folder of a training run", "a file"]),
        ("runs/bare", ["runs/bare", "run.json", "none"]),
        ("runs/torn", ["run.json", "incomplete or malformed"]),
        ("runs/cut", ["metrics.jsonl", "line 3"]),
        ("runs/unfinished", ["a finished run", "after 3 epochs", "--resume"]),
        ("runs/other", ["other.pt", "another seed"]),
        ("runs/model --checkpoint none.pt", ["none.pt", "no such file"]),
        ("runs/model --evaluation none.json", ["none.json", "no such file"]),
        ("runs/model --evaluation runs", ["runs", "a folder"]),
        ("runs/model --evaluation cut.json", ["cut.json", "incomplete or malformed"]),
        ("runs/model --evaluation list.json", ["list.json", "robust evaluate --json"]),
        ("runs/model --evaluation weights.json", ["weights.json", "SHA-256", "0000000000000000…"]),
        ("runs/model --evaluation classes.json", ["classes.json", "classes of the checkpoint"]),
        ("runs/model --evaluation part.json", ["part.json", "missing or malformed"]),
        ("runs/model --evaluation impossible.json", ["impossible.json", "500 right of 120"]),
        ("runs/model --data none.npz", ["none.npz"]),
        ("runs/model --examples 0", ["--examples"]),
        ("runs/model --out model.pt", ["model.pt", "is a file"]),
    ],
)
def test_bad_input_gives_one_line_and_no_file(
    ruin: Path,
    arguments: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ruin)
    assert run(["report", *arguments.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert [word for word in words if word not in line] == [], line
    assert not (ruin / "report.html").exists()


def test_missing_extra_is_reported_with_its_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(robust.report, "find_spec", lambda name: None if name == "fpdf" else name)
    assert run(["report", "anything"]) == 2
    assert "found no fpdf2: pip install 'robust[report]'" in capsys.readouterr().err


def test_help_imports_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, robust_cli; robust_cli.run(['report', '--help']); "
        "sys.exit(len({'torch', 'matplotlib', 'fpdf'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE).returncode == 0


def test_the_json_of_robust_evaluate_is_read(house: Path, tmp_path: Path) -> None:
    evaluation = tmp_path / "fgsm.json"
    options = ["--data", house / "set.npz", "--attack", "fgsm", "--curve", 0, "--json", evaluation]
    options += ["--checkpoint", house / "model.pt"]
    assert run(["evaluate", *map(str, options)]) == 0
    page = Page((make(house, tmp_path, evaluation=evaluation) / "report.html").read_text())
    values = json.loads(evaluation.read_text())
    found = [row[4] for row in table(page, "All accuracies")[1:]]
    assert found == [f"{row['correct']} of {row['n']}" for row in values["results"]]

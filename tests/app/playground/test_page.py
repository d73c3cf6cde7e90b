"""The playground's files and the limits it asks for; what needs no browser."""

import re
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from app.settings import Settings
from robust.attacks import ATTACKS, DEFAULT_ATTACKS
from robust.sidecar import Sidecar
from tests.support.serving import Running, labeled, png, serving

ROOT = Path(__file__).parents[3]
ASSETS = ROOT / "app" / "playground" / "assets"
PAGE = (ASSETS / "index.html").read_text()
MODULES = {path.name: path.read_text() for path in sorted(ASSETS.glob("*.js"))}
SCRIPTS = "\n".join(MODULES.values())
# A name that stands for an address without being fetched.
NAMESPACE = "http://www.w3.org/2000/svg"


class Page(HTMLParser):
    """The elements of the page, with their attributes and the text of those that run or style."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""
        self.feed(PAGE)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] in ("script", "style"):
            self.inline += data.strip()

    def values(self, *names: str) -> list[str]:
        return [value for _, given in self.elements for name in names if (value := given.get(name))]


def test_page_is_served_at_the_root(running: Running) -> None:
    response = running.client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert response.text == PAGE
    assert running.client.head("/").status_code == 200


def test_policy_forbids_inline_and_external_code(running: Running) -> None:
    policy = running.client.get("/").headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", maxsplit=1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for kind in ("script-src", "style-src", "connect-src"):
        assert rules[kind] == "'self'"
    assert rules["img-src"] == "'self' data: blob:"
    assert rules["frame-ancestors"] == rules["base-uri"] == "'none'"
    assert "unsafe" not in policy


def test_page_has_no_inline_or_external_code() -> None:
    page = Page()
    assert page.inline == ""
    for tag, given in page.elements:
        assert "style" not in given, tag
        assert not any(name.startswith("on") for name in given), tag
    everything = [PAGE, SCRIPTS, (ASSETS / "playground.css").read_text()]
    for text in everything:
        assert set(re.findall(r"https?://[^\s\"'`)]+", text)) <= {NAMESPACE}
        assert not re.search(r"@import|url\(|innerHTML|insertAdjacentHTML|\beval\(", text)
        assert not re.search(r"""(?:src|href)=["']//""", text)


def test_every_asset_exists_and_is_used(
    running: Running,
) -> None:
    referred = {link for link in Page().values("src", "href") if link.startswith("playground/")} | {
        f"playground/{name}" for name in re.findall(r'from "\./([^"]+)"', SCRIPTS)
    }
    referred.add("playground/examples/photos.npz")
    assert "playground/examples/photos.npz" in MODULES["evaluate.js"]
    for link in referred:
        assert running.client.get(f"/{link}").status_code == 200, link
    for link in Page().values("href"):
        if not link.startswith(("#", "playground/")):
            assert running.client.get(f"/{link}").status_code == 200, link
    files = {
        f"playground/{path.relative_to(ASSETS)}" for path in ASSETS.rglob("*") if path.is_file()
    }
    framed = {"playground/report.html", "playground/report-frame.js"}
    assert files - referred == {"playground/index.html", *framed}
    assert '"playground/report.html"' in MODULES["report.js"]
    assert 'src="report-frame.js"' in (ASSETS / "report.html").read_text()


def test_only_the_page_itself_frames_the_report(running: Running) -> None:
    headers = running.client.get("/playground/report.html").headers
    assert "frame-ancestors 'self'" in headers["content-security-policy"]
    assert headers["x-frame-options"] == "SAMEORIGIN"
    policy = headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "connect-src" not in policy  # default-src 'none': it asks for nothing


def test_assets_have_a_content_type_and_an_etag(running: Running) -> None:
    for name, kind in {
        "main.js": "text/javascript",
        "playground.css": "text/css",
        "icon.svg": "image/svg+xml",
        "examples/cat.jpg": "image/jpeg",
    }.items():
        response = running.client.get(f"/playground/{name}")
        assert response.headers["content-type"].startswith(kind), name
        # An example is shown also when the service is away.
        kept = "max-age=86400" if name.startswith("examples/") else "no-cache"
        assert response.headers["cache-control"] == kept
        again = running.client.get(
            f"/playground/{name}", headers={"If-None-Match": response.headers["etag"]}
        )
        assert again.status_code == 304


@pytest.mark.parametrize(
    "path", ["../__init__.py", "%2e%2e/__init__.py", "..%2f..%2fsettings.py", "", "examples", "no"]
)
def test_other_files_are_not_served(running: Running, path: str) -> None:
    response = httpx.get(f"{running.url}/playground/{path}", timeout=120)
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


def test_the_scripts_find_every_element_by_its_id() -> None:
    ids = Page().values("id")
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'\$\("([\w-]+)"\)', SCRIPTS))
    assert len(wanted) > 40
    assert wanted <= set(ids)
    referred = Page().values("for", "aria-labelledby")
    assert set(referred) <= set(ids)
    anchors = {link[1:] for link in Page().values("href") if link.startswith("#")}
    assert anchors <= set(ids)


def test_every_control_has_a_name() -> None:
    page = Page()
    labeled = set(page.values("for"))
    for tag, given in page.elements:
        if tag in ("input", "select"):
            assert given["id"] in labeled or given.get("aria-label"), given
        if tag == "img":
            assert "alt" in given


def test_script_names_match_the_api(running: Running) -> None:
    document = running.client.get("/openapi.json").json()
    names: set[str] = set()
    stack: list[object] = [document]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            if isinstance(value.get("properties"), dict):
                names |= set(value["properties"])
            stack += value.values()
        elif isinstance(value, list):
            stack += value
    of_the_card = set(Sidecar.__dataclass_fields__)
    scripts = "".join(text for name, text in MODULES.items() if name != "snippets.js")  # Python
    used = set(re.findall(r"\b[a-z][a-z0-9]*(?:_[a-z0-9]+)+\b", scripts))
    assert {"input_png", "adversarial_png", "already_wrong", "takes_steps", "top_k"} <= used
    assert used - {"top_k"} <= names | of_the_card, "a name that no answer has"


def test_form_fields_match_the_routes(running: Running) -> None:
    document = running.client.get("/openapi.json").json()

    def fields(path: str) -> set[str]:
        content = document["paths"][path]["post"]["requestBody"]["content"]
        return set(content["multipart/form-data"]["schema"]["properties"])

    attack, evaluate, predict = fields("/attack"), fields("/evaluate"), fields("/predict")
    assert {"file", "attack", "norm", "eps", "steps", "label", "target"} <= attack
    assert {"file", "dataset", "attack", "norm", "eps", "limit"} <= evaluate
    assert {"file", "top_k"} <= predict
    # The getters that make the two forms name nothing else.
    for module, pattern, known in [
        ("attack.js", r"get fields\(\) \{\s*return \{(.*?)\};", attack),
        ("attack.js", r"get request\(\) \{\s*return \{(.*?)\};", attack),
        ("evaluate.js", r"get #fields\(\) \{.*?return \{(.*?)\};", evaluate),
    ]:
        match = re.search(pattern, MODULES[module], re.DOTALL)
        assert match
        named = set(re.findall(r"^\s*(\w+):", match[1].replace("{ ", "\n"), re.MULTILINE))
        named |= set(re.findall(r"[{,]\s*(\w+):", "{" + match[1]))
        assert named
        assert named <= known


def test_examples_match_the_project() -> None:
    shipped = {path.name: path.read_bytes() for path in (ASSETS / "examples").iterdir()}
    originals = {path.name: path.read_bytes() for path in (ROOT / "examples").iterdir()}
    del originals["README.md"]
    assert shipped == originals
    offered = set(re.findall(r'data-example="(\w+)"', PAGE))
    assert {f"{name}.jpg" for name in offered} | {"photos.npz"} == set(shipped)


# The limits


def test_limits_match_the_library_and_the_settings(checkpoint, tmp_path) -> None:
    (tmp_path / "birds.npz").write_bytes(labeled(3))
    settings = Settings(
        checkpoint=checkpoint,
        threads=1,
        device="cpu",
        datasets=tmp_path,
        max_steps=50,
        max_eps_linf=16 / 255,
        max_eps_l2=0.25,
    )
    with serving(settings) as running:
        limits = running.client.get("/limits").json()
        assert [item["name"] for item in limits["attacks"]] == list(ATTACKS)
        assert limits["default_attacks"] == list(DEFAULT_ATTACKS)
        assert limits["max_eps"] == {"linf": 16 / 255, "l2": 0.25}
        assert limits["default_eps"] == {"linf": 8 / 255, "l2": 0.25}
        assert limits["max_steps"] == 50
        assert limits["datasets"] == ["birds"]
        by_name = {item["name"]: item for item in limits["attacks"]}
        assert by_name["fgsm"]["steps"] == 1
        assert not by_name["fgsm"]["takes_steps"]
        assert by_name["pgd"]["takes_steps"]
        assert by_name["pgd"]["steps"] == 20
        (tmp_path / "ships.npz").write_bytes(labeled(3))  # found without a restart
        assert running.client.get("/limits").json()["datasets"] == ["birds", "ships"]

        # What is said to be taken is taken.
        for name, item in by_name.items():
            most = limits["max_queries" if item["unit"] == "queries" else "max_steps"]
            assert item["steps"] <= most or not item["takes_steps"]
            fields = {"attack": name, "eps": "1/255"}
            if item["takes_steps"]:
                fields["steps"] = "2"
            if item["cost"] + 3 > limits["max_cost"] or item["steps"] > most:
                continue
            response = running.client.post("/attack", data=fields, files={"file": png()})
            assert response.status_code == 200, (name, response.text)
            if item["takes_steps"]:
                assert response.json()["results"][0]["parameters"]["steps"] == 2


def test_limits_are_documented(running: Running) -> None:
    document = running.client.get("/openapi.json").json()
    assert "/limits" in document["paths"]
    properties = document["components"]["schemas"]["Limits"]["properties"]
    assert set(running.client.get("/limits").json()) == set(properties)
    assert "/playground/{path}" not in document["paths"]

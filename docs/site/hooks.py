"""Which pages the site has, and how links within the repository become links within the site.

README, the model card and the like are pages too. A link to any other file of the repository
becomes its path in the text; one to a file that does not exist fails `mkdocs build --strict`.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
logger = logging.getLogger("mkdocs.hooks")

# Title in the menu, page in the site, and where in the repository it is, if not in docs/.
GUIDE = (
    ("Overview", "index.md", "README.md"),
    ("Architecture", "architecture.md", ""),
    ("Training", "training.md", ""),
    ("Attacks", "attacks.md", ""),
    ("Evaluation", "evaluation.md", ""),
    ("Your own model", "your-own-model.md", ""),
    ("Data and checkpoint formats", "formats.md", ""),
    ("HTTP", "http.md", ""),
    ("Settings", "configuration.md", ""),
    ("Container", "container.md", ""),
    ("Replicas and Kubernetes", "deploy.md", ""),
    ("Reliability", "reliability.md", ""),
)
PROJECT = (
    ("Model card", "model-card.md", "models/README.md"),
    ("Examples", "examples.md", "examples/README.md"),
    ("Contributing", "contributing.md", "CONTRIBUTING.md"),
    ("Changelog", "changelog.md", "CHANGELOG.md"),
)
SITE_PATHS = {source: page for _, page, source in GUIDE + PROJECT if source}
_LINK = re.compile(r"(!?)\[([^\]\n]*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
_ELSEWHERE = re.compile(r"[a-z]+:|#", re.IGNORECASE)


def on_config(config: Any) -> Any:
    """The menu: the guide in reading order, then what is measured, then the reference."""
    named = {page for _, page, _ in GUIDE}
    measured = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in named)
    reference = sorted(path.name for path in (ROOT / "docs" / "reference").glob("*.md"))
    config.nav = [
        {"Guide": _existing(GUIDE)},
        {"Measurements": measured},
        {"Reference": [f"reference/{name}" for name in reference]},
        {"Project": _existing(PROJECT)},
    ]
    return config


def _existing(pages: tuple[tuple[str, str, str], ...]) -> list[dict[str, str]]:
    return [
        {title: page}
        for title, page, source in pages
        if (ROOT / (source or f"docs/{page}")).is_file()
    ]


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are elsewhere in the repository."""
    for source, page in SITE_PATHS.items():
        if (ROOT / source).is_file():
            files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links of a page to where their targets are in the site."""
    sources = {target: source for source, target in SITE_PATHS.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return rewrite(markdown, source, page.file.src_uri)


def rewrite(markdown: str, source: str, page: str) -> str:
    """`markdown` of the file `source` of the repository, with the links of the page `page`."""

    def link(match: re.Match[str]) -> str:
        image, text, address = match.groups()
        if _ELSEWHERE.match(address):
            return match[0]
        path, _, anchor = address.partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(source), path))
        if not (ROOT / target).exists():
            logger.warning("%s links to %s, which does not exist", source, address)
            return match[0]
        if target in SITE_PATHS or target.startswith("docs/"):
            place = SITE_PATHS.get(target, target.removeprefix("docs/"))
            relative = os.path.relpath(place, os.path.dirname(page) or ".")
            return f"{image}[{text}]({relative}{'#' * bool(anchor)}{anchor})"
        return f"{text} (`{target}`)" if text.strip("`") != target else f"`{target}`"

    parts = _CODE.split(markdown)
    return "".join(part if k % 2 else _LINK.sub(link, part) for k, part in enumerate(parts))

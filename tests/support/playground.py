"""Helpers for playground tests."""

from __future__ import annotations

import base64
import io
import itertools
import re
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Page, expect


def settled(page: Page) -> None:
    """Wait until the curve has found what breaks the image."""
    expect(page.locator("#curve-text")).to_have_text(re.compile("^(Smallest|PGD-10|The model)"))


def choose(page: Page, data: bytes, name: str) -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": data})


def source(page: Page, selector: str) -> bytes:
    """The PNG from the service that an image shows, once it shows one."""
    image = page.locator(selector)
    expect(image).to_have_attribute("src", re.compile("^data:image/png;base64,"))
    link = image.get_attribute("src") or ""
    return base64.b64decode(link.removeprefix("data:image/png;base64,"))


def levels(data: bytes) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int64)


def attacks(page: Page) -> list[str]:
    """Collects the address of every attack asked for from now on, the curve's too."""
    found: list[str] = []
    page.on("request", lambda request: found.append(request.url) if "/attack" in request.url else 0)
    return found


SIZES = itertools.count(9)  # of eps: the same settings twice would be one evaluation


def start(page: Page, name: str, **given: str) -> None:
    page.select_option("#set", label=name)
    for field, value in ({"eps": str(next(SIZES))} | given).items():
        page.fill(f"#set-{field}", value)
    page.click("#start")

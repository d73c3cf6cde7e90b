"""Measures the playground in Chromium, or takes its screenshots for docs/.

    python benchmarks/playground.py
    python benchmarks/playground.py --pictures

Starts `robust serve` with the shipped models, or uses a running service at --address. Measures the
time until the page is usable and, from a click to the painted picture on the browser's clock, FGSM
and PGD-20 after a move of the slider, FGSM on both models, and the smallest eps, in turn. Prints
median, minimum and maximum of --repeats, with the load and the machine. With --pictures it writes
docs/playground.png, docs/playground-dark.png and docs/playground-phone.png instead, with an example
photograph. Needs Chromium and the extra dev.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import click
import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, expect

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where it is not installed

from app.engine.cpu_limits import available_processors
from benchmarks.common import ROOT, processor_name, service
from tests.support.browser import chromium

WAIT = 120_000  # ms
NEXT_POINT = 3000  # ms, longer than one point of the curve takes
COLORS = 256  # in a picture's palette: a third of the bytes, with hardly visible loss
# Changes controls and resolves to the milliseconds until the data attribute `mark` of <html> is
# `wanted` and the image is painted; rejects after 20 seconds.
CLICK = """([change, mark, wanted, image]) => new Promise((resolve, reject) => {
    const root = document.documentElement;
    setTimeout(() => reject(new Error(`${mark} is ${root.dataset[mark]}, not ${wanted}`)), 20000);
    let begin;
    const watcher = new MutationObserver(async () => {
        if (root.dataset[mark] !== wanted) return;
        watcher.disconnect();
        await document.getElementById(image).decode();
        const painted = () => resolve(performance.now() - begin);
        requestAnimationFrame(() => requestAnimationFrame(painted));
    });
    watcher.observe(root, {attributes: true});
    begin = performance.now();
    for (const [id, value] of change) {
        const node = document.getElementById(id);
        if (value === null) { node.click(); continue; }
        node.value = value;
        node.dispatchEvent(new Event("input", {bubbles: true}));
        node.dispatchEvent(new Event("change", {bubbles: true}));
    }
})"""


def opened(browser: Browser, address: str, query: str = "", **context: object) -> Page:
    """The page after everything on it has been computed."""
    page = browser.new_context(**context).new_page()  # type: ignore[arg-type]
    page.goto(f"{address}/{query}")
    settle(page)
    return page


def settle(page: Page) -> None:
    """Wait until the smallest eps is found and the curve is complete."""
    expect(page.locator("html")).to_have_attribute("data-shown", re.compile("."), timeout=WAIT)
    pattern = re.compile("^(Smallest|PGD-10|The model|The curve is incomplete)")
    expect(page.locator("#curve-text")).to_have_text(pattern, timeout=WAIT)
    points, before = page.locator("#curve-table tbody tr"), -1
    while points.count() != before:
        before = points.count()
        page.wait_for_timeout(NEXT_POINT)


# Measurements


def measure(browser: Browser, address: str, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each measurement, `repeats` times; they take turns."""
    runs: dict[str, Callable[[int], float]] = {
        "page usable": lambda _: usable(browser, address),
        "FGSM, slider moved": slider(opened(browser, address, "?compare=no"), "fgsm"),
        "PGD-20, slider moved": slider(opened(browser, address, "?compare=no"), "pgd"),
        "smallest eps": lambda _: smallest(browser, address),
    }
    if httpx.get(f"{address}/model").json().get("compare") is not None:
        page = opened(browser, address)
        runs["FGSM on both models"] = slider(page, "fgsm", mark="compared", image="compared")
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            milliseconds = run(turn)
            if turn:  # the first turn warms up
                found[name].append(milliseconds)
    return found


def slider(
    page: Page, name: str, mark: str = "shown", image: str = "adversarial"
) -> Callable[[int], float]:
    """Moves the slider on `page` to another eps; returns the milliseconds until it is painted."""
    page.select_option("#name", name)
    page.wait_for_timeout(NEXT_POINT)

    def move(turn: int) -> float:
        k = 4 + turn % 8
        milliseconds: float = page.evaluate(CLICK, [[["eps", str(k)]], mark, f"{name} {k}", image])
        page.wait_for_timeout(100)
        return milliseconds

    return move


def usable(browser: Browser, address: str) -> float:
    """Milliseconds from opening the address to a usable page."""
    page = browser.new_context().new_page()
    page.goto(address)
    expect(page.locator("html")).to_have_attribute("data-ready", "true", timeout=WAIT)
    milliseconds: float = page.evaluate("performance.getEntriesByName('usable')[0].startTime")
    close(page)
    return milliseconds


def smallest(browser: Browser, address: str) -> float:
    """Milliseconds from the click on the button to the attack at the smallest eps."""
    page = browser.new_context().new_page()
    page.goto(f"{address}/?compare=no&example=dog")
    expect(page.locator("html")).to_have_attribute("data-shown", re.compile("."), timeout=WAIT)
    began = time.perf_counter()
    page.click("#eps-find")
    ended = re.compile("mallest eps|without an attack|does not")
    expect(page.locator("#settings-note")).to_have_text(ended, timeout=WAIT)
    found = 1000 * (time.perf_counter() - began)
    close(page)
    return found


def close(page: Page) -> None:
    """Close the page, and wait until the service has dropped its requests."""
    page.context.close()
    time.sleep(0.5)


def report(found: dict[str, list[float]]) -> None:
    load = os.getloadavg()[0]
    click.echo(f"{processor_name()}, {available_processors()} processors; load average {load:.1f}")
    for name, values in found.items():
        spread = f"({min(values):.0f} to {max(values):.0f})"
        click.echo(f"{name:22} median {median(values):7.0f} ms {spread} of {len(values)}")


# Screenshots


def pictures(browser: Browser, address: str) -> None:
    """Write the screenshots of docs/: small PNGs of 256 colors."""
    for name, width, height, scheme in (
        ("playground", 1240, 1120, "light"),
        ("playground-dark", 1240, 1120, "dark"),
        ("playground-phone", 375, 1400, "light"),
    ):
        page = opened(
            browser, address, viewport={"width": width, "height": height}, color_scheme=scheme
        )
        page.mouse.move(0, 0)
        write(page.screenshot(), ROOT / "docs" / f"{name}.png")
        page.context.close()


def write(screenshot: bytes, path: Path) -> None:
    image = Image.open(io.BytesIO(screenshot)).convert("RGB")
    few = image.quantize(COLORS, kmeans=3, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    click.echo(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1024} KiB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", help="address of a running service")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--pictures", action="store_true")
    arguments = parser.parse_args()
    running = nullcontext(arguments.address) if arguments.address else service()
    with running as address, chromium() as browser:
        if arguments.pictures:
            pictures(browser, address)
        else:
            report(measure(browser, address, arguments.repeats))


if __name__ == "__main__":
    main()

"""Measures the playground in Chromium, or takes its screenshots for docs/.

    python benchmarks/playground.py
    python benchmarks/playground.py --pictures

Starts `robust serve` with the shipped models, or uses a running service at --address. Measures the
time until the page is usable and, from a click to the painted picture on the browser's clock, FGSM
and PGD-20 after a move of the slider, FGSM on both models, and the smallest eps. Prints median and
worst of --repeats, with the load and the machine. With --pictures it writes docs/playground.png,
docs/playground-dark.png and docs/playground-phone.png instead, with an example photograph. Needs
Chromium and the extra dev.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import click
import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, expect

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where it is not installed

from app.engine.cpu_limits import available_processors
from tests.support.browser import chromium

ROOT = Path(__file__).resolve().parents[1]
WAIT = 120_000  # ms
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


@contextmanager
def service(address: str | None) -> Iterator[str]:
    """The address of a service, which is started if none is given."""
    if address is not None:
        yield address
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "robust_cli", "serve", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_until_ready(address, process)
        yield address
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(address: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{address}/readyz").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit("robust serve ended before it was ready")


def opened(browser: Browser, address: str, query: str = "", **context: object) -> Page:
    """The page after everything on it has been computed."""
    page = browser.new_context(**context).new_page()  # type: ignore[arg-type]
    page.goto(f"{address}/{query}")
    settle(page)
    return page


def settle(page: Page) -> None:
    expect(page.locator("html")).to_have_attribute("data-shown", re.compile("."), timeout=WAIT)
    pattern = re.compile("^(Smallest|PGD-10|The model|The curve is incomplete)")
    expect(page.locator("#curve-text")).to_have_text(pattern, timeout=WAIT)
    page.wait_for_timeout(500)


# Measurements


def measure(browser: Browser, address: str, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each measurement, `repeats` times."""
    compared = httpx.get(f"{address}/model").json().get("compare") is not None
    found = {"page usable": [usable(browser, address) for _ in range(repeats)]}
    page = opened(browser, address, "?compare=no")

    def moves(name: str, mark: str, image: str) -> Callable[[int], float]:
        def move(turn: int) -> float:
            k = 4 + turn % 8
            milliseconds: float = page.evaluate(
                CLICK, [[["eps", str(k)]], mark, f"{name} {k}", image]
            )
            return milliseconds

        return move

    page.select_option("#name", "fgsm")
    page.wait_for_timeout(3000)
    found["FGSM, slider moved"] = series(moves("fgsm", "shown", "adversarial"), repeats, page)
    page.select_option("#name", "pgd")
    page.wait_for_timeout(3000)
    found["PGD-20, slider moved"] = series(moves("pgd", "shown", "adversarial"), repeats, page)
    if compared:
        page = opened(browser, address, "?attack=fgsm")
        found["FGSM on both models"] = series(moves("fgsm", "compared", "compared"), repeats, page)
    found["smallest eps"] = [smallest(browser, address) for _ in range(min(repeats, 10))]
    return found


def series(move: Callable[[int], float], repeats: int, page: Page) -> list[float]:
    values = []
    for turn in range(repeats + 1):  # the first one warms up
        values.append(move(turn))
        page.wait_for_timeout(100)
    return values[1:]


def usable(browser: Browser, address: str) -> float:
    """Milliseconds from opening the address to a usable page."""
    page = browser.new_context().new_page()
    page.goto(address)
    expect(page.locator("html")).to_have_attribute("data-ready", "true", timeout=WAIT)
    milliseconds: float = page.evaluate("performance.getEntriesByName('usable')[0].startTime")
    page.context.close()
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
    page.context.close()
    return found


def report(found: dict[str, list[float]]) -> None:
    load = os.getloadavg()[0]
    click.echo(f"{machine()}, {available_processors()} processors; load average {load:.1f}")
    for name, values in found.items():
        worst, middle = max(values), median(values)
        click.echo(f"{name:22} median {middle:7.0f} ms, worst {worst:7.0f} ms of {len(values)}")


def machine() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", path.read_text()) if path.is_file() else []
    return names[0] if names else "unknown processor"


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
        page.wait_for_timeout(6000)  # until the curve is complete
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
    with service(arguments.address) as address, chromium() as browser:
        if arguments.pictures:
            pictures(browser, address)
        else:
            report(measure(browser, address, arguments.repeats))


if __name__ == "__main__":
    main()

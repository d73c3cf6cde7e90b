"""Draws the pictures of the README and the model card: docs/attack.png and docs/curve.png.

    robust evaluate --data test.npz --curve 500 --json test.json
    python benchmarks/figures.py test.json

`attack.png` shows a photograph at the model's input size, the perturbation by PGD-20 within 8/255
(amplified), and their sum. `curve.png` shows accuracy under PGD-20 against eps with 95% Wilson
intervals, from the JSON of an evaluation. Needs the extra report.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from robust.evaluation.intervals import wilson_interval

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SIDE, GAP = 256, 16  # pixels: side of a panel, and space between panels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("evaluation", type=Path, help="written by robust evaluate --json")
    arguments = parser.parse_args()
    draw_attack(ROOT / "examples" / "horse.jpg")
    draw_curve(json.loads(arguments.evaluation.read_text()))


def draw_attack(photograph: Path) -> None:
    """Original, perturbation and adversarial image side by side, each pixel enlarged."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "robust_cli", "attack", str(photograph)]
        command += ["--attack", "pgd-20", "--eps", "8/255", "--out", folder]
        subprocess.run(command, check=True, cwd=ROOT)
        stem = photograph.stem
        names = (f"{stem}-input", f"{stem}-pgd-20-perturbation", f"{stem}-pgd-20")
        panels = [Image.open(Path(folder) / f"{name}.png").convert("RGB") for name in names]
    sheet = Image.new("RGB", (3 * SIDE + 2 * GAP, SIDE), "white")
    for place, panel in enumerate(panels):
        enlarged = panel.resize((SIDE, SIDE), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (place * (SIDE + GAP), 0))
    sheet.save(DOCS / "attack.png", optimize=True)


def draw_curve(evaluation: dict) -> None:
    """Accuracy against eps in steps of 1/255, on a scale that shows small eps too."""
    from matplotlib.figure import Figure

    points = evaluation["curve"]
    eps = [255 * point["eps"] for point in points]
    accuracy = [100 * point["correct"] / point["n"] for point in points]
    bounds = [wilson_interval(point["correct"], point["n"]) for point in points]
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    low, high = ([100 * edge[k] for edge in bounds] for k in (0, 1))
    axes.fill_between(eps, low, high, alpha=0.2)
    axes.plot(eps, accuracy, marker="o")
    for x, y in zip(eps, accuracy, strict=True):
        axes.annotate(f"{y:.1f}", (x, y), xytext=(4, 5), textcoords="offset points", fontsize=8)
    axes.set_xscale("symlog", base=2, linthresh=2)
    axes.set_xticks(eps, [f"{x:g}" for x in eps])
    axes.set(xlabel="eps in 1/255 (Linf)", ylabel="accuracy under PGD-20, %", ylim=(0, 100))
    axes.set_title(f"{points[0]['n']} test images, band: 95% interval", fontsize=9, loc="left")
    axes.grid(alpha=0.25)
    figure.savefig(DOCS / "curve.png", dpi=120)


if __name__ == "__main__":
    main()

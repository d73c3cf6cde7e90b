"""Compares the speed of training with the limit of the device, and shows where the time goes.

    python -m benchmarks.training --recipe cpu
    python -m benchmarks.training --recipe gpu --device cuda --json training.json
    python -m benchmarks.training --recipe gpu --device cuda --profile
    python -m benchmarks.training --recipe cpu --compare-folding

With `--profile` it prints instead the kernels of the attack and of the loss, with their calls and
share of the time, and how often the host waits for the GPU. With `--compare-folding` it times the
attack through folded weights and through the model itself, in turns.

The limit is the best rate of matrix products on the device in the precision of the run. The FLOP of
a pass are counted on the model; a multiplication and an addition are two. A share of the limit is
FLOP over time, relative to that rate. A clean step, a step of the attack and an adversarial
training step are timed as a whole, the last one also part by part. The parts take turns, so that
other load slows all of them. Printed are medians; the JSON has the extremes too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where it is not installed

from benchmarks.inference import hardware
from robust.attacks import frozen
from robust.classifier import ARCHS, STEMS, Architecture, Classifier, resolve_device
from robust.datasets import Dataset
from training.monitor import Progress
from training.optimizer import autocast
from training.recipe import Phase, Recipe
from training.recipes import named_recipe
from training.run import Stopped, train
from training.step import Trainer

CLASSES = 10


class Steps:
    """A `Trainer` on random images, and the parts of its steps."""

    def __init__(
        self, recipe: Recipe, phase: Phase, device: torch.device, *, fold: bool = True
    ) -> None:
        self.recipe, self.phase, self.device = recipe, phase, device
        self.generator = torch.Generator(device).manual_seed(0)
        torch.manual_seed(0)
        architecture = Architecture(
            arch=recipe.arch,
            stem=recipe.stem,
            activation=recipe.activation,
            num_classes=CLASSES,
            input_size=recipe.input_size,
        )
        self.trainer = Trainer(Classifier(architecture), recipe, device=device, fold=fold)
        self.trainer.model.train()
        n, side = recipe.batch_size, recipe.input_size
        self.images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, device=device)
        self.labels = torch.arange(n, device=device) % CLASSES
        self.x, self.targets, _ = self.trainer.prepare(
            self.images, self.labels, self.clean_phase(), self.generator
        )
        self.batches = [self.x] * (1 if phase.split else max(1, len(phase.parts)))
        if phase.loss == "trades":
            self.batches = [self.x, (self.x + 0.01).clamp(0, 1)]

    def clean_phase(self) -> Phase:
        """A clean phase with the default augmentation."""
        return Phase(name="clean", epochs=1)

    def step(self, phase: Phase, *, read: bool = True) -> None:
        """A whole step of training; `read` waits for its loss."""
        loss = self.trainer.step(
            self.images,
            self.labels,
            phase=phase,
            learning_rate=0.0,
            awp=phase.awp,
            generator=self.generator,
        )
        if read:
            loss.item()

    def clean_step(self) -> None:
        """A whole step of a clean phase."""
        self.step(self.clean_phase())

    def adversarial_step(self) -> None:
        """A whole step of the phase."""
        self.step(self.phase)

    def unread_step(self) -> None:
        """A whole step of the phase that does not wait for its loss."""
        self.step(self.phase, read=False)

    def augment(self) -> None:
        """Convert and augment the images."""
        self.trainer.prepare(self.images, self.labels, self.phase, self.generator)

    def attack(self, phase: Phase | None = None) -> None:
        """The whole attack: passes, noise, steps and projections."""
        self.trainer.attack(self.x, self.targets, phase or self.phase, self.generator)

    def attack_step(self) -> None:
        """One gradient step of the attack on every image."""
        attack = next(part for part in self.phase.parts if part.kind != "clean")
        parts = (replace(attack, kind="pgd", steps=1, share=1.0),)
        self.attack(Phase(name="attack", epochs=1, parts=parts))

    def attack_passes(self) -> None:
        """The passes of the attack alone."""
        for part in self.phase.parts:
            n = round(part.share * len(self.x)) if self.phase.split else len(self.x)
            for _ in range(part.attack_steps):
                self._image_gradient(self.x[:n])
        model = self.trainer.attack_model
        if self.phase.loss == "trades":
            with torch.no_grad(), frozen(model, self.device), self._autocast():
                model(self.x)

    def _image_gradient(self, x: Tensor) -> None:
        model = self.trainer.attack_model
        with frozen(model, self.device), self._autocast():
            x = x.detach().requires_grad_(True)
            torch.autograd.grad(model(x).sum(), x)

    def _autocast(self) -> Any:
        return autocast(self.trainer.attack_bf16, self.device)

    def loss(self) -> None:
        """Forward and backward passes for the gradient of the weights."""
        self.trainer.backward(self.batches, self.targets, self.phase, awp=self.phase.awp)

    def update(self) -> None:
        """Clip the gradients and step along them."""
        self.trainer.update(0.0)


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Mean seconds of a call, over `repeats` consecutive calls."""
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / repeats


def in_turns(
    parts: dict[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Times of each part, each over two consecutive calls, so that the host can run ahead."""
    for part in parts.values():
        seconds(part, device)  # warm up
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            times[name].append(seconds(part, device, 2))
    return times


def matrix_rate(device: torch.device, bf16: bool, repeats: int) -> float:
    """The best rate of square matrix products on random data, in FLOP/s."""
    best, dtype = 0.0, torch.bfloat16 if bf16 else torch.float32
    for size in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        times = [seconds(lambda a=a, b=b: a @ b, device, 2) for _ in range(repeats)]  # type: ignore[misc]
        best = max(best, 2 * size**3 / min(times[1:] or times))
    return best


class Operations(TorchDispatchMode):
    """Counts the FLOP of matrix products and convolutions, with torch's formulas.

    torch's FlopCounterMode fails for a gradient with respect to the image alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def operations(recipe: Recipe, phase: Phase, n: int = 8) -> dict[str, float]:
    """FLOP per image of each kind of step, counted on the model without compiling."""
    recipe = replace(recipe, compile="off", precision="fp32", batch_size=n)
    steps = Steps(recipe, phase, torch.device("cpu"))
    counted = {}
    for name, run in {
        "forward": lambda: steps.trainer.model(steps.x),
        "attack_step": steps.attack_step,
        "clean_step": steps.clean_step,
        "adversarial_step": steps.adversarial_step,
        "attack_passes": steps.attack_passes,
        "loss": steps.loss,
    }.items():
        with Operations() as counter:
            run()
        counted[name] = counter.total / n
    return counted


def pipeline_rate(recipe: Recipe, phase: Phase, device: torch.device, count: int) -> float:
    """Images per second of `training.run.train`, in the second half of `count` steps."""
    n = recipe.batch_size * (count + 1)
    shape = n, 3, recipe.input_size, recipe.input_size
    dataset = Dataset(
        images=torch.randint(0, 256, shape, dtype=torch.uint8),
        labels=torch.arange(n) % CLASSES,
        classes=tuple(str(k) for k in range(CLASSES)),
        name="random",
    )
    times: list[float] = []

    def observe(progress: Progress) -> None:
        times.append(time.perf_counter())

    phases = (replace(phase, epochs=1, awp_from=0.0),)
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(
                replace(recipe, phases=phases, held_out=0.5 / (count + 1)),
                dataset,
                out=Path(folder) / "model.pt",
                device=device,
                observe=observe,
                should_stop=lambda: len(times) >= count,
            )
        except Stopped:
            pass
    half = times[len(times) // 2 - 1 :]
    return recipe.batch_size * (len(half) - 1) / (half[-1] - half[0])


def measure(
    recipe: Recipe, phase: Phase, device: torch.device, repeats: int, count: int
) -> dict[str, Any]:
    """All results, as JSON values."""
    steps, n = Steps(recipe, phase, device), recipe.batch_size
    whole = {
        "clean_step": steps.clean_step,
        "attack_step": steps.attack_step,
        "adversarial_step": steps.adversarial_step,
        "unread_step": steps.unread_step,
    }
    parts = {
        "augment": steps.augment,
        "attack_passes": steps.attack_passes,
        "attack": steps.attack,
        "loss": steps.loss,
        "update": steps.update,
        "average": steps.trainer.averaged.update,
    }
    times = in_turns({**whole, **parts}, device, repeats)
    flop, rate = operations(recipe, phase), matrix_rate(device, steps.trainer.bf16, repeats)
    rows = {
        name: {
            "seconds": median(times[name]),
            "least": min(times[name]),
            "most": max(times[name]),
            "images_per_second": n / median(times[name]),
            "flop_per_image": flop.get(name),
            "limit_images_per_second": rate / flop[name] if name in flop else None,
            "share": flop[name] * n / median(times[name]) / rate if name in flop else None,
        }
        for name in times
    }
    pipeline = pipeline_rate(recipe, phase, device, count)
    return {
        "hardware": hardware(device),
        "recipe": recipe.to_dict(),
        "phase": phase.name,
        "precision": "bf16" if steps.trainer.bf16 else "fp32",
        "compiled": steps.trainer.loss_model is not steps.trainer.model,
        "matrix_flop_per_second": rate,
        "forward_flop_per_image": flop["forward"],
        "rows": rows,
        "pipeline": {
            "images_per_second": pipeline,
            "share": pipeline * flop["adversarial_step"] / rate,
        },
    }


def tables(found: dict[str, Any]) -> str:
    """The two tables in Markdown."""
    rows, recipe = found["rows"], found["recipe"]
    rate = found["matrix_flop_per_second"]
    lines = [
        f"{found['hardware']}",
        "",
        f"Recipe {recipe['name']}, phase {found['phase']}: {recipe['arch']}, "
        f"{recipe['stem']} stem, {recipe['input_size']} pixels, "
        f"batch {recipe['batch_size']}, {found['precision']}"
        f"{', compiled' if found['compiled'] else ''}; a forward pass is "
        f"{found['forward_flop_per_image'] / 1e9:.3f} GFLOP an image. "
        f"Limit: {rate / 1e12:.3f} TFLOP/s, the best matrix product.",
        "",
        "| step | GFLOP an image | limit, images/s | images/s | share of the limit |",
        "|---|---|---|---|---|",
    ]
    names = {
        "clean_step": "clean training step",
        "attack_step": "step of the attack",
        "adversarial_step": "adversarial training step",
    }
    for key, name in names.items():
        row = rows[key]
        lines.append(
            f"| {name} | {row['flop_per_image'] / 1e9:.2f} | {row['limit_images_per_second']:.0f} "
            f"| {row['images_per_second']:.0f} | {100 * row['share']:.1f}% |"
        )
    row, pipeline = rows["adversarial_step"], found["pipeline"]
    lines.append(
        f"| the same in `robust train` | {row['flop_per_image'] / 1e9:.2f} "
        f"| {row['limit_images_per_second']:.0f} | {pipeline['images_per_second']:.0f} "
        f"| {100 * pipeline['share']:.1f}% |"
    )
    lines += ["", "| part of an adversarial step | ms | share of the step | of the limit |"]
    lines.append("|---|---|---|---|")
    for name, value, share in _parts(rows):
        of_step = 100 * value / row["seconds"]
        of_limit = f"{100 * share:.1f}%" if share else ""
        lines.append(f"| {name} | {1000 * value:.1f} | {of_step:.1f}% | {of_limit} |")
    return "\n".join(lines)


def _parts(rows: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """Name, seconds and share of the limit of each part of a step, and of the rest."""
    at = {name: row["seconds"] for name, row in rows.items()}
    parts = [
        ("passes of the attack", at["attack_passes"], rows["attack_passes"]["share"]),
        ("passes of the loss", at["loss"], rows["loss"]["share"]),
        ("attack: noise, steps, projection", at["attack"] - at["attack_passes"], None),
        ("augmentation", at["augment"], None),
        ("clipping and optimizer", at["update"] - at["average"], None),
        ("averaged weights", at["average"], None),
        ("waiting for the loss", at["adversarial_step"] - at["unread_step"], None),
    ]
    rest = at["adversarial_step"] - sum(value for _, value, _ in parts)
    return [*parts, ("rest, and overlap", rest, None)]


def profile(steps: Steps, repeats: int, rows: int = 15) -> str:
    """A Markdown table of the kernels of the attack, the loss and the whole step, by time."""
    on_cuda = steps.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    lines = []
    parts = {"attack": steps.attack, "loss": steps.loss, "whole step": steps.unread_step}
    for name, part in parts.items():
        seconds(part, steps.device, 2)  # warm up
        with torch.profiler.profile(activities=activities) as found:
            seconds(part, steps.device, repeats)
        events = found.key_averages()
        kind = torch.autograd.DeviceType.CUDA if on_cuda else torch.autograd.DeviceType.CPU
        kernels = [event for event in events if event.device_type == kind]
        field = "self_device_time_total" if on_cuda else "self_cpu_time_total"
        kernels.sort(key=lambda event: getattr(event, field), reverse=True)
        total = sum(getattr(event, field) for event in kernels)
        waits = sum(event.count for event in events if "Synchronize" in event.key)
        lines += [f"{name}: {total / 1000 / repeats:.1f} ms in kernels", ""]
        if on_cuda:
            lines[-1:] = [f"The host waits {(waits - 1) / repeats:.1f} times.", ""]
        lines += ["| kernel | calls | ms | share |", "|---|---|---|---|"]
        for event in kernels[:rows]:
            time_us = getattr(event, field)
            lines.append(
                f"| `{event.key[:80]}` | {event.count / repeats:.0f} "
                f"| {time_us / 1000 / repeats:.2f} | {100 * time_us / total:.1f}% |"
            )
        lines.append("")
    return "\n".join(lines)


def compare_folding(recipe: Recipe, phase: Phase, device: torch.device, repeats: int) -> str:
    """The speedup of the attack and of the step through folded weights, measured in turns.

    On the CPU in processor time, which other processes disturb less.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    plain, folded = (Steps(recipe, phase, device, fold=fold) for fold in (False, True))
    lines = []
    for name in ("attack", "unread_step"):
        ratios = []
        for k in range(repeats + 1):
            times = {}
            for steps in (plain, folded) if k % 2 else (folded, plain):
                began = clock()
                seconds(getattr(steps, name), device)
                times[steps is folded] = clock() - began
            ratios.append(times[False] / times[True])
        low, middle, high = quantiles(ratios[1:], n=4)  # the first warms up
        lines.append(
            f"{name.replace('unread_', '')}: {middle:.3f} times as fast (quartiles {low:.3f} to "
            f"{high:.3f}, n={repeats})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", help="default: gpu on CUDA, else cpu")
    parser.add_argument("--phase", help="name of an adversarial phase; default: the first")
    parser.add_argument(
        "--arch", choices=ARCHS, help="default: the recipe's, as for stem to compile"
    )
    parser.add_argument("--stem", choices=STEMS)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--compile", choices=("auto", "on", "off"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="steps of the whole pipeline")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--profile", action="store_true", help="print the kernels instead")
    parser.add_argument(
        "--compare-folding", action="store_true", help="time folded weights instead"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = resolve_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = named_recipe(args.recipe or ("gpu" if device.type == "cuda" else "cpu"))
    given = {"arch": args.arch, "stem": args.stem, "compile": args.compile}
    given |= {"batch_size": args.batch, "precision": args.precision}
    recipe = replace(recipe, **{name: value for name, value in given.items() if value})
    attacked_phases = {phase.name: phase for phase in recipe.phases if phase.is_adversarial}
    if args.phase and args.phase not in attacked_phases:
        parser.error(f"expected --phase out of {', '.join(attacked_phases)}, got {args.phase}")
    phase = attacked_phases[args.phase or next(iter(attacked_phases))]
    if args.profile:
        click.echo(profile(Steps(recipe, phase, device), args.repeats))
        return
    if args.compare_folding:
        click.echo(compare_folding(recipe, phase, device, args.repeats))
        return
    found = measure(recipe, phase, device, args.repeats, args.steps)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    click.echo(tables(found))


if __name__ == "__main__":
    main()

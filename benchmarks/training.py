"""How fast does training run against what the device can do, and what takes the rest?

    python -m benchmarks.training --recipe cpu
    python -m benchmarks.training --recipe gpu --device cuda --json training.json

The limit is the best rate of matrix products of the device in the precision of the run. What a
pass has to compute is counted on the model, an addition and a multiplication as two operations; a
share of the limit is those operations over time. A clean step, a step of the attack and an
adversarial training step are timed whole, the last then part by part; the parts take turns, so
that a machine that others use slows all of them. Given are medians, and the extremes in the JSON.
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
from statistics import median
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where it is not installed

from benchmarks.inference import hardware
from robust.attacks import frozen
from robust.classifier import ARCHS, STEMS, Architecture, Classifier, resolve_device
from robust.datasets import Dataset
from robust.threat_model import ThreatModel
from training.adversary import make_adversarial
from training.augment import augment, mixup
from training.awp import perturbed
from training.compiled import compiled, compiles
from training.ema import AveragedModel
from training.objective import attacked, objective
from training.optimise import autocast, make_optimizer, uses_bf16
from training.recipe import CLEAN, Augmentation, Phase, Recipe
from training.recipes import named_recipe
from training.run import Progress, Stopped, train

CLASSES = 10


class Steps:
    """A model in training on random images, and the parts of its steps."""

    def __init__(self, recipe: Recipe, phase: Phase, device: torch.device) -> None:
        self.recipe, self.phase, self.device = recipe, phase, device
        self.threat_model = ThreatModel(norm=recipe.norm, eps=recipe.eps)
        self.bf16 = uses_bf16(recipe, device)
        self.generator = torch.Generator(device).manual_seed(0)
        torch.manual_seed(0)
        model = Classifier(
            Architecture(
                arch=recipe.arch,
                stem=recipe.stem,
                activation=recipe.activation,
                num_classes=CLASSES,
                input_size=recipe.input_size,
            )
        )
        self.model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.averaged = AveragedModel(self.model, recipe.ema_decay)
        self.optimizer = make_optimizer(self.model, recipe)
        self.batch(recipe.batch_size)
        self.passes: nn.Module = self.model
        if compiles(recipe, device):
            self.passes = compiled(self.model, self.x, bf16=self.bf16, awp=phase.awp > 0)

    def batch(self, n: int) -> None:
        """Take n images from now on."""
        shape = n, 3, self.recipe.input_size, self.recipe.input_size
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        labels = torch.arange(n, device=self.device) % CLASSES
        self.targets = F.one_hot(labels, CLASSES).float()
        self.x = (self.images.float() / 255).contiguous(memory_format=torch.channels_last)
        self.batches = [self.x] * (1 if self.phase.split else max(1, len(self.phase.parts)))
        if self.phase.loss == "trades":
            self.batches = [self.x, (self.x + 0.01).clamp(0, 1)]

    def augment(self, settings: Augmentation | None = None) -> Tensor:
        """Bytes to augmented images."""
        settings = settings or self.phase.augmentation
        x = augment(self.images.float() / 255, settings, self.generator)
        if settings.mixup:
            x, _ = mixup(x, self.targets, settings.mixup, self.generator)
        return x.contiguous(memory_format=torch.channels_last)

    def attack(self, x: Tensor | None = None) -> list[Tensor]:
        """All that the attack does: passes, noise, steps and projections."""
        with autocast(self.bf16, self.device):
            return attacked(
                self.passes,
                self.x if x is None else x,
                self.targets,
                phase=self.phase,
                threat_model=self.threat_model,
                generator=self.generator,
            )

    def attack_step(self) -> None:
        """One gradient step of the attack on every image."""
        attack = next(part for part in self.phase.parts if part.kind != "clean")
        with autocast(self.bf16, self.device):
            make_adversarial(
                self.passes,
                self.x,
                self.targets,
                part=replace(attack, kind="pgd", steps=1),
                threat_model=self.threat_model,
                generator=self.generator,
            )

    def attack_passes(self) -> None:
        """The passes of the attack alone."""
        for part in self.phase.parts:
            n = round(part.share * len(self.x)) if self.phase.split else len(self.x)
            for _ in range(part.attack_steps):
                self._image_gradient(self.x[:n])
        if self.phase.loss == "trades":
            with torch.no_grad(), frozen(self.passes, self.device), self._cast():
                self.passes(self.x)

    def _image_gradient(self, x: Tensor) -> None:
        with frozen(self.passes, self.device), self._cast():
            x = x.detach().requires_grad_(True)
            torch.autograd.grad(self.passes(x).sum(), x)

    def _cast(self) -> Any:
        return autocast(self.bf16, self.device)

    def loss(self, batches: list[Tensor] | None = None, phase: Phase | None = None) -> Tensor:
        """Passes forward and backward for the gradient of the weights."""
        phase, batches = phase or self.phase, batches or self.batches

        def loss_of() -> Tensor:
            with self._cast():
                return objective(
                    self.passes,
                    batches,
                    self.targets,
                    phase=phase,
                    label_smoothing=self.recipe.label_smoothing,
                )

        self.optimizer.zero_grad(set_to_none=True)
        with perturbed(self.model, loss_of, gamma=phase.awp):
            loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def update(self) -> None:
        """Clip the gradient, and step."""
        if self.recipe.gradient_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_clip)
        self.optimizer.step()

    def average(self) -> None:
        """Follow the weights with their average."""
        self.averaged.update(self.model)

    def clean_step(self) -> None:
        """A whole step of a clean phase."""
        phase = Phase(name="clean", epochs=1, parts=CLEAN, augmentation=Augmentation())
        x = self.augment(phase.augmentation)
        self._finish(self.loss([x], phase))

    def adversarial_step(self, *, read: bool = True) -> None:
        """A whole step of the phase; `read` waits for its loss, as training does."""
        self._finish(self.loss(self.attack(self.augment())), read=read)

    def _finish(self, loss: Tensor, *, read: bool = True) -> None:
        if read:
            loss.item()
        self.update()
        self.average()

    def unread_step(self) -> None:
        """The same without reading the loss."""
        self.adversarial_step(read=False)


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Of one call, in a row of so many."""
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / repeats


def in_turns(
    parts: dict[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Times of each part; two calls in a row each time, so that a device can run ahead."""
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
    """Counts those of products and convolutions, by torch's own formulas.

    torch's FlopCounterMode does not bear a gradient to the image alone.
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
    """FLOP an image of each kind of step, counted on the model as it is, not compiled."""
    recipe = replace(recipe, compile="off", precision="fp32", batch_size=n)
    steps = Steps(recipe, phase, torch.device("cpu"))
    counted = {}
    for name, run in {
        "forward": lambda: steps.model(steps.x),
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
    """Images a second of `training.run.train` itself, in the second half of `count` steps."""
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
    """All figures, as JSON values."""
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
        "average": steps.average,
    }
    times = in_turns({**whole, **parts}, device, repeats)
    flop, rate = operations(recipe, phase), matrix_rate(device, steps.bf16, repeats)
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
        "precision": "bf16" if steps.bf16 else "fp32",
        "compiled": steps.passes is not steps.model,
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
    """Name, seconds and share of the limit; what the parts leave of the step is a part too."""
    at = {name: row["seconds"] for name, row in rows.items()}
    parts = [
        ("passes of the attack", at["attack_passes"], rows["attack_passes"]["share"]),
        ("passes of the loss", at["loss"], rows["loss"]["share"]),
        ("attack: noise, steps, projection", at["attack"] - at["attack_passes"], None),
        ("augmentation", at["augment"], None),
        ("clipping and optimizer", at["update"], None),
        ("averaged weights", at["average"], None),
        ("waiting for the loss", at["adversarial_step"] - at["unread_step"], None),
    ]
    rest = at["adversarial_step"] - sum(value for _, value, _ in parts)
    return [*parts, ("all else, and what overlaps", rest, None)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", help="default: gpu on CUDA, else cpu")
    parser.add_argument("--phase", help="name of an adversarial phase; default: the first")
    parser.add_argument("--arch", choices=ARCHS, help="default: the recipe's, as for the next")
    parser.add_argument("--stem", choices=STEMS)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--compile", choices=("auto", "on", "off"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of the pipeline itself")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = resolve_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = named_recipe(args.recipe or ("gpu" if device.type == "cuda" else "cpu"))
    given = {"arch": args.arch, "stem": args.stem, "compile": args.compile}
    given["batch_size"] = args.batch
    recipe = replace(recipe, **{name: value for name, value in given.items() if value})
    attacked_phases = {phase.name: phase for phase in recipe.phases if phase.is_adversarial}
    if args.phase and args.phase not in attacked_phases:
        parser.error(f"expected --phase out of {', '.join(attacked_phases)}, got {args.phase}")
    phase = attacked_phases[args.phase or next(iter(attacked_phases))]
    found = measure(recipe, phase, device, args.repeats, args.steps)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    click.echo(tables(found))


if __name__ == "__main__":
    main()

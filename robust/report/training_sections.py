"""The sections of a report on the training of the model."""

from __future__ import annotations

from typing import Any

from robust.report import plots
from robust.report.document import Block, Plot, Section, Table, Text
from robust.report.run import TrainingRun
from robust.report.words import count, decimal, duration, finite, listed, percent, significant
from robust.sidecar import Sidecar
from robust.threat_model import format_eps

MAX_EPOCHS = 40  # rows of the table of epochs, approximately
_SELECTED = {
    "pgd": "PGD-10 accuracy",
    "clean": "clean accuracy",
    "mean": "mean of clean and PGD-10 accuracy",
}
_SETTINGS = {
    "optimizer": "optimizer",
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "batch_size": "images in a batch",
    "label_smoothing": "label smoothing",
    "gradient_clip": "gradients clipped to norm",
    "ema_decay": "decay of the averaged weights",
    "zero_init_residual": "residual branches initialized to zero",
    "precision": "precision of training",
    "held_out": "share of the data held out",
    "monitor_limit": "held-out images scored after an epoch, at most",
}
_AUGMENTATIONS = {
    "crop_padding": "random crop, {} pixels of padding",
    "flip": "mirrored with probability {}",
    "rotation": "rotated by up to {} degrees",
    "jitter": "color jitter of {}",
    "cutout": "cutout of {} pixels",
    "mixup": "mixup with alpha {}",
}


def method(sidecar: Sidecar) -> Section:
    """Architecture, data and recipe."""
    network, data = sidecar.architecture, sidecar.data
    size, inside = network.input_size, " model"
    if network.stem != "own":
        inside = f" with the {network.stem} stem and {network.activation} activations"
    blocks: list[Block] = [
        Text(
            text=f"The {network.arch}{inside} classifies color images of {size} x {size} pixels "
            f"into {network.num_classes} classes: {listed(sidecar.classes[:100])}."
        )
    ]
    if data is not None:
        blocks.append(
            Text(text=f"It was trained on {data.name}: {count(data.count)} labeled images.")
        )
    recipe = sidecar.recipe
    if not recipe:
        blocks.append(Text(text="No training recipe was recorded."))
        return Section(title="Method and recipe", blocks=tuple(blocks))
    name = recipe.get("name", "unnamed")
    ball = ""
    if sidecar.threat_model is not None:
        ball = (
            f" Adversarial images are within {sidecar.threat_model.norm} "
            f"{format_eps(sidecar.threat_model.eps)} of the originals, for pixels in [0, 1]."
        )
    blocks.append(Text(text=f"The recipe is {name!r}.{ball}"))
    phases = [phase for phase in recipe.get("phases", ()) if isinstance(phase, dict)]
    if phases:
        blocks.append(_phases(phases))
    rows = [
        (label, _value(recipe[key]))
        for key, label in _SETTINGS.items()
        if recipe.get(key) not in (None, "")
    ]
    if rows:
        header = ("setting", "value")
        blocks.append(
            Table(
                caption="Settings of all phases" if len(phases) > 1 else "Settings",
                header=header,
                rows=tuple(rows),
            )
        )
    return Section(title="Method and recipe", blocks=tuple(blocks))


def _phases(phases: list[dict[str, Any]]) -> Table:
    rows = [
        (
            str(phase.get("name", "")),
            count(phase.get("epochs")),
            _parts(phase),
            _loss(phase),
            significant(phase.get("learning_rate")),
            f"{percent(phase.get('warmup'), 0)}%",
            _augmentation(phase.get("augmentation") or {}),
        )
        for phase in phases
    ]
    header = ("phase", "epochs", "images", "loss", "peak rate", "warm-up", "augmentation")
    return Table(caption="The phases of training", header=header, rows=tuple(rows))


def _parts(phase: dict[str, Any]) -> str:
    found = []
    for part in phase.get("parts", ()):
        steps = part.get("steps") or 1
        kind = f"{part.get('kind')}" + (f" with {steps} steps" if steps > 1 else "")
        share = finite(part.get("share"))
        found.append(kind if share in (None, 1.0) else f"{percent(share, 0)}% {kind}")
    return listed(found) or "clean"


def _loss(phase: dict[str, Any]) -> str:
    loss = str(phase.get("loss", ""))
    return f"{loss}, beta {significant(phase.get('trades_beta'))}" if loss == "trades" else loss


def _augmentation(values: dict[str, Any]) -> str:
    used = [text.format(values[key]) for key, text in _AUGMENTATIONS.items() if values.get(key)]
    return ", ".join(used) or "none"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def learning(run: TrainingRun | None, sidecar: Sidecar) -> Section:
    """Learning curves and the metrics of each epoch."""
    title = "Learning curves"
    if run is None or not run.epochs:
        return Section(
            title=title, blocks=(Text(text="The metrics of the training run are not available."),)
        )
    epochs, kept = run.epochs, sidecar.recipe.get("kept_epoch")
    kept = kept if isinstance(kept, int) else None
    selected = _SELECTED.get(str(sidecar.recipe.get("select")), "")
    n = count(epochs[-1].get("n"))
    text = (
        f"After each epoch {n} images held out from training were classified, clean and attacked "
        "with FGSM and PGD-10 in the model's ball. "
    )
    if kept is not None:
        best = f" It had the best {selected}." if selected else ""
        text += f"The checkpoint is epoch {kept} of {len(epochs)}.{best} "
    text += "Losses of different phases can't be compared: adversarial images are harder."
    if selected:
        text += (
            " The epoch was selected by these held-out images, so their accuracy is slightly "
            "optimistic; that of other images is not."
        )
    first, last = epochs[0], epochs[-1]
    accuracies = ", ".join(
        f"{label} from {percent(first.get(name), 1)}% to {percent(last.get(name), 1)}%"
        for name, label in (("clean", "clean"), ("fgsm", "FGSM"), ("pgd", "PGD-10"))
    )
    plot = Plot(
        caption="Held-out accuracy, training loss and learning rate after each epoch",
        alt=f"Curves over {len(epochs)} epochs. Accuracy: {accuracies}. The table has all numbers.",
        svg=plots.learning_curves(epochs, kept=kept),
    )
    return Section(title=title, blocks=(Text(text=text), plot, _epochs(run, kept)))


def _epochs(run: TrainingRun, kept: int | None) -> Table:
    every = -(-len(run.epochs) // MAX_EPOCHS)
    last = run.epochs[-1]["epoch"]
    shown = [r for r in run.epochs if r["epoch"] % every == 0 or r["epoch"] in (1, last, kept)]
    rows = [
        (
            f"{row['epoch']}{' (kept)' if row['epoch'] == kept else ''}",
            str(row.get("phase", "")),
            decimal(row.get("loss")),
            significant(row.get("learning_rate")),
            percent(row.get("clean"), 1),
            percent(row.get("fgsm"), 1),
            percent(row.get("pgd"), 1),
            decimal(row.get("images_per_second"), 0),
            duration(row.get("seconds")),
        )
        for row in shown
    ]
    header = (
        *("epoch", "phase", "loss", "learning rate", "clean %", "FGSM %", "PGD-10 %"),
        *("images/s", "time since the start"),
    )
    some = f": one in {every}, and the first, the last and the kept one" if every > 1 else ""
    return Table(caption=f"Epochs{some}", header=header, rows=tuple(rows))

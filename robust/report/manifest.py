"""The section of a report that identifies the model, the data and the software."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robust.checkpoint import Checkpoint
from robust.report.document import Block, Section, Subsection, Table
from robust.report.evaluations import Measurement
from robust.report.examples import Examples
from robust.report.words import count, duration, images_of

Row = tuple[str, str]


def manifest(
    checkpoint: Checkpoint,
    measurements: Sequence[Measurement],
    examples: Examples | None,
    *,
    made_with: Mapping[str, str],
) -> Section:
    """Hashes, seeds, versions, precision and devices of model, evaluations and report."""
    header = ("what", "value")
    blocks: list[Block] = [
        Table(caption="The checkpoint", header=header, rows=_filled(_checkpoint(checkpoint)))
    ]
    tables = [
        Table(caption=item.title, header=header, rows=rows)
        for item in measurements
        if (rows := _filled(_measurement(item)))
    ]
    if tables:
        blocks += [Subsection(title="Evaluations"), *tables]
    about = [("made with", _versions(made_with))]
    if examples is not None:
        about += [
            ("images shown", images_of(len(examples.data), examples.data.name)),
            ("SHA-256 of these images", examples.data.sha256),
            *(("changed in reading these images", change) for change in examples.data.changes),
            ("attack on them", f"{examples.settings.label}, seed {examples.settings.seed}"),
        ]
    blocks.append(Table(caption="This report", header=header, rows=_filled(about)))
    return Section(title="Manifest", blocks=tuple(blocks))


def _checkpoint(checkpoint: Checkpoint) -> list[Row]:
    sidecar, data = checkpoint.sidecar, checkpoint.sidecar.data
    network, threat_model = sidecar.architecture, sidecar.threat_model
    weights = sum(parameter.numel() for parameter in checkpoint.classifier.parameters())
    stem = "" if network.stem == "own" else f"{network.stem} stem"
    size = f"{count(weights)} weights" if weights else ""
    how = dict.fromkeys(checkpoint.guessed.values())
    names = {
        word: [name for name, value in checkpoint.guessed.items() if value == word] for word in how
    }
    return [
        ("file", checkpoint.path.name),
        ("SHA-256 of the weights", checkpoint.sha256),
        ("architecture", ", ".join(filter(None, (network.arch, stem, size)))),
        ("mean and std of pixels", f"{_numbers(network.mean)} and {_numbers(network.std)}"),
        *((word, ", ".join(found).replace("_", " ")) for word, found in names.items()),
        *(("on loading", note) for note in checkpoint.notes),
        ("threat model", "" if threat_model is None else str(threat_model)),
        ("training data", "" if data is None else f"{data.name}, {count(data.count)} images"),
        ("SHA-256 of the training data", "" if data is None else data.sha256),
        ("seed", "" if sidecar.seed is None else str(sidecar.seed)),
        ("device", sidecar.device),
        ("versions", _versions(sidecar.versions)),
        (
            "time",
            "" if sidecar.duration_seconds is None else duration(sidecar.duration_seconds),
        ),
    ]


def _measurement(item: Measurement) -> list[Row]:
    found, data = item.manifest, item.manifest.get("data", {})
    rows = [("data", _data(data)), ("SHA-256 of the data", str(data.get("sha256", "")))]
    rows.append(("type of the images", str(data.get("dtype", ""))))
    changes = data.get("changes", [])
    if isinstance(changes, list):
        rows += [("changed in reading", str(change)) for change in changes]
    scored = str(data.get("scored_sha256", ""))
    if scored != data.get("sha256"):
        rows.append(("SHA-256 of the images scored", scored))
    for result in item.attacks:
        settings = ", ".join(f"{k} {_number(v)}" for k, v in result.settings.items())
        rows.append((result.attack, ", ".join(filter(None, (result.ball, settings)))))
    rows += [
        (name, str(found[key]))
        for key, name in (("batch_size", "batch size"), ("precision", "precision"))
        if found.get(key)
    ]
    rows.append(("device", str(found.get("device", ""))))
    rows.append(("versions", _versions(found.get("versions", {}))))
    rows.append(("time", duration(found["seconds"]) if found.get("seconds") else ""))
    return rows


def _data(data: Mapping[str, Any]) -> str:
    if "scored" not in data:
        return str(data.get("name", ""))
    return f"{count(data['scored'])} of {images_of(data.get('count'), str(data.get('name')))}"


def _filled(rows: Sequence[Row]) -> tuple[Row, ...]:
    return tuple(row for row in rows if row[1])


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in versions.items())


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

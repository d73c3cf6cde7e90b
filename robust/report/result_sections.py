"""The sections of a report on the results of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from robust.evaluation import wilson_interval
from robust.evaluation.run import CURVE_ATTACK
from robust.report import plots
from robust.report.document import Block, Plot, Section, Subsection, Table, Text
from robust.report.evaluations import CLEAN, CurvePoint, Measurement, Result
from robust.report.words import NONE, count, decimal, duration, interval, listed, percent

MAX_CLASSES = 12  # classes of a confusion matrix that fits on a page
MAX_INDICES = 10  # indices of images in a table cell
MAX_CONFUSIONS = 20  # rows of the table that replaces a larger confusion matrix


def accuracies(measurements: Sequence[Measurement]) -> Table:
    """Every accuracy of every evaluation."""
    rows: list[tuple[str, ...]] = []
    for item in measurements:
        for result in (*item.results, *filter(None, (item.worst,))):
            rows.append(_row(item, result))
            rows += [
                _row(item, result, part=str(stage["attack"]), correct=int(stage["correct"]))
                for stage in result.stages
            ]
    header = ("attack", "ball", "accuracy %", "95% interval", "correct", "data", "evaluation")
    return Table(caption="All accuracies", header=header, rows=tuple(rows))


def _row(
    item: Measurement, result: Result, *, part: str = "", correct: int | None = None
) -> tuple[str, ...]:
    correct = result.correct if correct is None else correct
    return (
        f"after its {part}" if part else result.attack,
        result.ball or NONE,
        percent(correct / result.n),
        interval(wilson_interval(correct, result.n)),
        f"{count(correct)} of {count(result.n)}",
        item.data,
        item.source,
    )


def differences(measurements: Sequence[Measurement]) -> list[Table]:
    """Images that only one of two multi-stage attacks fooled, in the same or two evaluations."""
    found = [(item, result) for item in measurements for result in item.results]
    rows = []
    for (one, first), (other, second) in permutations(found, 2):
        if first.fooled is None or second.fooled is None or first.attack == second.attack:
            continue
        if one.scored and (one.scored, first.ball) == (other.scored, second.ball):
            only = sorted(set(first.fooled) - set(second.fooled))
            shown = ", ".join(map(count, only[:MAX_INDICES])) + " ..." * (len(only) > MAX_INDICES)
            names = (first.attack, second.attack, first.ball)
            rows.append((*names, f"{count(len(only))} of {count(first.n)}", shown or NONE))
    header = ("fooled by", "but not by", "ball", "images", "index, from 0")
    caption = "Images that only one of two attacks fooled"
    return [Table(caption=caption, header=header, rows=tuple(rows))] if rows else []


def against_eps(measurements: Sequence[Measurement], *, classes: int) -> Section:
    """Accuracy against eps: curves, and a marker for each attack."""
    title = "Accuracy against eps"
    norms = sorted({r.norm for m in measurements for r in m.attacks if r.eps is not None})
    if not norms:
        return Section(title=title, blocks=(Text(text="Nothing was measured under attack."),))
    text = (
        "No evaluation here has a curve, which would reveal a failing attack; "
        "robust evaluate --json computes one."
    )
    if all(item.without_gradients for item in measurements):
        text = "There is no curve, as its attack needs gradients, which this model does not give."
    if any(item.curve for item in measurements):
        text = (
            "A larger eps can only make an attack stronger, and at an eps that turns every image "
            "into the same gray no model is better than chance. A curve that stays high there, or "
            "rises, is a sign of a failing attack and not of a robust model. Lines are "
            f"{CURVE_ATTACK} at increasing eps; open markers are the attacks of the evaluation."
        )
    blocks: list[Block] = [Text(text=text)]
    for norm in norms:
        blocks += _curves(measurements, norm, classes)
    return Section(title=title, blocks=tuple(blocks))


def _curves(measurements: Sequence[Measurement], norm: str, classes: int) -> list[Block]:
    series, rows = [], []
    ticks = {0.0: "0"}
    for item in measurements:
        attacks = [r for r in item.attacks if r.norm == norm and r.eps is not None]
        # A curve is about the first attack's norm.
        points = item.curve if item.attacks and item.attacks[0].norm == norm else ()
        if points:
            series.append(
                plots.Series(
                    label=f"curve, {count(points[0].n)} images ({item.source})",
                    x=tuple(point.eps for point in points),
                    y=tuple(point.correct / point.n for point in points),
                    intervals=tuple(point.interval for point in points),
                )
            )
        for point in points:
            ticks[point.eps] = point.eps_text if point.eps else "0"
            rows.append(_eps_row(f"curve ({item.source})", point))
        for result in attacks:
            assert result.eps is not None
            ticks.setdefault(result.eps, result.eps_text)
            series.append(
                plots.Series(
                    label=f"{result.attack}, {count(result.n)} images",
                    x=(result.eps,),
                    y=(result.accuracy,),
                    intervals=(result.interval,),
                    joined=False,
                )
            )
            rows.append(_eps_row(f"{result.attack} ({item.source})", result))
    header = ("what", "eps", "accuracy %", "95% interval", "correct")
    table = Table(caption=f"Accuracy at each eps, {norm}", header=header, rows=tuple(rows))
    if not any(item.joined for item in series):
        return [table]
    svg = plots.accuracy_against_eps(
        series, ticks=dict(sorted(ticks.items())), chance=1 / classes, norm=norm
    )
    values = listed([f"{row[2]}% at {row[1]} ({row[0]})" for row in rows])
    plot = Plot(caption=f"Accuracy against eps, {norm}", alt=f"Accuracy: {values}.", svg=svg)
    return [plot, table]


def _eps_row(name: str, item: CurvePoint | Result) -> tuple[str, ...]:
    return (
        name,
        item.eps_text,
        percent(item.correct / item.n, 1),
        interval(item.interval),
        f"{count(item.correct)} of {count(item.n)}",
    )


def by_class(measurements: Sequence[Measurement], classes: Sequence[str]) -> Section:
    """Accuracy and predictions by class, clean and under the hardest attack."""
    blocks: list[Block] = []
    for item in measurements:
        results = [r for r in item.results if len(r.per_class) == len(classes)]
        if not results:
            continue
        blocks += [Subsection(title=item.title), *_classes(results, classes)]
        blocks += _confusions([r for r in (item.clean, item.hardest) if r], classes)
    if not blocks:
        blocks.append(Text(text="No evaluation here has accuracies by class."))
    return Section(title="By class", blocks=tuple(blocks))


def _classes(results: Sequence[Result], classes: Sequence[str]) -> list[Block]:
    sizes = [count(sum(row)) for row in results[0].confusion]
    rows = [
        (name, *sizes[k : k + 1], *(percent(result.per_class[k], 1) for result in results))
        for k, name in enumerate(classes)
    ]
    shown = [result for result in results if result.attack == CLEAN][:1]
    attacks = [result for result in results if result.attack != CLEAN]
    if attacks:
        shown.append(min(attacks, key=lambda result: result.accuracy))
    weakest = min(
        (k for k in range(len(classes)) if shown[-1].per_class[k] is not None),
        key=lambda k: shown[-1].per_class[k] or 0.0,
        default=0,
    )
    labels = [_title(result) for result in shown]
    plot = Plot(
        caption=f"Accuracy by class: {listed(labels)}",
        alt=f"Bars for {len(classes)} classes; {classes[weakest]} is the lowest under "
        f"{labels[-1]}, at {percent(shown[-1].per_class[weakest], 1)}%. The table has all numbers.",
        svg=plots.accuracy_by_class(
            classes, [(_title(result), result.per_class) for result in shown]
        ),
    )
    images = ("images",) if sizes else ()
    header = ("class", *images, *(f"{result.attack} %" for result in results))
    return [plot, Table(caption="Accuracy by class", header=header, rows=tuple(rows))]


def _title(result: Result) -> str:
    return f"{result.attack}, {result.ball}" if result.ball else result.attack


def _confusions(results: Sequence[Result], classes: Sequence[str]) -> list[Block]:
    found = [result for result in results if len(result.confusion) == len(classes)]
    if not found:
        return []
    blocks: list[Block] = []
    if len(classes) <= 100:
        confusions = "; ".join(f"{_title(r)}: {_most_common(r, classes)}" for r in found)
        blocks.append(
            Plot(
                caption="Percentage of each class (row) predicted as each class (column)",
                alt=f"Matrices of {len(classes)} classes. Most common confusions: {confusions}.",
                svg=plots.confusions(classes, [(_title(r), r.confusion) for r in found]),
            )
        )
    for result in found:
        fits = len(classes) <= MAX_CLASSES
        blocks.append(_matrix(result, classes) if fits else _most_common_table(result, classes))
    return blocks


def _matrix(result: Result, classes: Sequence[str]) -> Table:
    rows = [(name, *map(count, row)) for name, row in zip(classes, result.confusion, strict=True)]
    return Table(
        caption=f"Images of each class (row) predicted as each class (column), {_title(result)}",
        header=("class", *classes),
        rows=tuple(rows),
    )


def _pairs(result: Result) -> list[tuple[int, int, int]]:
    """Count, class and predicted class of each confusion; the most common first."""
    pairs = [
        (number, row, column)
        for row, numbers in enumerate(result.confusion)
        for column, number in enumerate(numbers)
        if row != column and number
    ]
    return sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))


def _most_common(result: Result, classes: Sequence[str]) -> str:
    pairs = _pairs(result)[:3]
    return listed([f"{n} {classes[a]} as {classes[b]}" for n, a, b in pairs]) or "none"


def _most_common_table(result: Result, classes: Sequence[str]) -> Table:
    rows = [(classes[a], classes[b], count(n)) for n, a, b in _pairs(result)[:MAX_CONFUSIONS]]
    return Table(
        caption=f"The most common confusions, {_title(result)}",
        header=("class", "predicted", "images"),
        rows=tuple(rows),
    )


def cost(measurements: Sequence[Measurement], training: Sequence[tuple[str, ...]]) -> Section:
    """The time of training and evaluation; `training` are rows as in `columns`."""
    blocks: list[Block] = []
    if training:
        columns = ("training", "epochs", "images/s", "time", "scoring time")
        blocks.append(Table(caption="Cost of training", header=columns, rows=tuple(training)))
    rows = [
        (
            result.attack,
            count(result.n),
            duration(result.seconds),
            decimal(_rate(result.n, result.seconds), 1),
            count(result.forwards),
            count(result.backwards),
            decimal(_rate(result.passes, result.n), 1),
            item.source,
        )
        for item in measurements
        for result in item.results
        if result.seconds is not None
    ]
    if rows:
        header = (
            *("attack", "images", "time", "images/s", "forward passes", "backward passes"),
            *("passes per image", "evaluation"),
        )
        text = (
            "A pass is one forward or backward pass of one image. An attack on an image ends once "
            "it is misclassified, and skips images that were misclassified before the attack."
        )
        blocks += [
            Text(text=text),
            Table(caption="Cost of evaluation", header=header, rows=tuple(rows)),
        ]
    for item in measurements:
        if item.times:
            spent = {name: decimal(seconds, 1) for name, seconds in item.times.items()}
            blocks.append(
                Text(
                    text=f"{item.source}: {spent['evaluation']} s in all, of which passes took "
                    f"{spent['passes']} s. At the rate of the fastest batch size, as many passes "
                    f"would take {spent['limit']} s."
                )
            )
    if not blocks:
        blocks.append(Text(text="No times were recorded."))
    return Section(title="Throughput and cost", blocks=tuple(blocks))


def _rate(amount: float | None, by: float | None) -> float | None:
    return amount / by if amount is not None and by else None

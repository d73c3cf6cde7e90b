"""The loop that all attacks share: it queries the model, batch by batch, until all images are done.

Fooled images leave the batch and others take their places. The rows of a batch may be at
different iterations, and no result depends on other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from robust.attacks.algorithm import Algorithm
from robust.attacks.best_runs import BestRuns, Finished
from robust.attacks.frozen import Model, frozen
from robust.attacks.passes import Meter, Passes
from robust.attacks.rows import Inputs, Rows
from robust.attacks.schedule import Schedule
from robust.attacks.scoring import Scorer

# Maximum speculative queries per row; each further guess is less likely to be right.
MAX_GUESSES = 3
# Largest pass on a CPU, current and speculative queries together, for which speculation pays: with
# three guesses Square takes 0.73 of the time on one image with a ResNet-50, but 1.04 on eight, and
# 1.5 on 25 with a tiny network.
MAX_SPECULATIVE_PASS = 4

# Returns the mask of cancelled images, bool (N,) on the CPU; called after each query.
Cancelled = Callable[[], Tensor]


def search(
    model: Model,
    algorithm: Algorithm[Any],
    x: Tensor,
    y: Tensor,
    *,
    eps: Tensor,
    target: Tensor | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    keep_failed: bool = True,
    confirm: Model | None = None,
    cancelled: Cancelled | None = None,
    meter: Meter | None = None,
    pulse: Callable[[], bool] = lambda: False,
) -> Iterator[Finished]:
    """Run `algorithm` on images float32 or uint8 (N, C, H, W), which may be on another device.

    `eps` float32 (N,), `y` and `target` int64 (N,) are on the device that computes. Yields each
    image once, as it finishes. `batch_size` None takes all at once. Without `keep_failed` an image
    that was not fooled is returned unchanged, with the logits of its best iterate. With `confirm` a
    success counts only if it fools that model too. A `cancelled` image is finished after its next
    query, with its best iterate so far. `meter` records every pass.
    If `pulse` returns True after a query, an empty Finished is yielded, so that the caller can
    report progress.

    Results depend on the batch size and on the order of the images only as far as the model's
    logits do; the passes spent on parallel runs and on speculation depend on both. Raises
    ValueError for labels or targets that the model has no class for, and ModelError.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
    if not len(x):
        return
    with torch.inference_mode(False):  # tensors changed in place can't be inference tensors
        loop = _QueryLoop(
            Passes(model, meter=meter),
            algorithm,
            Inputs(x=x.detach(), y=y, eps=eps.detach().float(), target=target, seed=seed),
            batch_size=batch_size or len(x),
            scorer=Scorer(
                algorithm,
                y,
                target,
                keep_failed=keep_failed,
                confirm=None if confirm is None else Passes(confirm, batch_size or 0, meter),
            ),
            cancelled=cancelled,
            pulse=pulse,
        )
    iterator = loop.run()
    while True:
        # Frozen only while computing: between yields the caller sees the model as it was.
        with frozen(model, y.device):
            try:
                finished = next(iterator)
            except StopIteration:
                return
        yield finished


class _QueryLoop:
    """Batches of rows, queried until all images are done."""

    def __init__(
        self,
        passes: Passes,
        algorithm: Algorithm[Any],
        inputs: Inputs,
        *,
        batch_size: int,
        scorer: Scorer,
        cancelled: Cancelled | None,
        pulse: Callable[[], bool],
    ) -> None:
        self.passes, self.algorithm, self.inputs = passes, algorithm, inputs
        self.pulse = pulse
        self.clean_logits: Tensor | None = None  # where the algorithm needs them
        self.batch_size, self.scorer, self.cancelled = batch_size, scorer, cancelled
        self.results = BestRuns(len(inputs.y), algorithm.norm)
        self.schedule = Schedule(
            len(inputs.y),
            max_runs=algorithm.runs,
            allow_parallel_runs=algorithm.allow_parallel_runs,
        )
        # Rows that wait for their next query, by whether it needs the gradient.
        self.waiting: dict[bool, Rows[Any] | None] = {True: None, False: None}

    def run(self) -> Iterator[Finished]:
        if self.algorithm.needs_clean_logits:
            yield from self._prepare_clean_logits()
        while True:
            self._start_runs()
            with_gradient = self._next_batch_needs_gradient()
            waiting = self.waiting[with_gradient]
            if waiting is None:
                return
            rows, rest = waiting, None
            if len(waiting) > self.batch_size:
                rows = waiting.take(slice(self.batch_size))
                rest = waiting.take(slice(self.batch_size, None))
            self.waiting[with_gradient] = rest
            room = self._room_to_speculate(len(rows))
            if with_gradient or not room:
                yield from self._route_rows(rows, self._query(rows, with_gradient=with_gradient))
            else:
                yield from self._query_with_speculation(rows, room)
            if self.pulse():
                yield self.results.of_rows(rows.take(slice(0)))

    def _prepare_clean_logits(self) -> Iterator[Finished]:
        clean_logits = []
        for part in torch.split(torch.arange(len(self.inputs.y)), self.batch_size):
            x = self.inputs.images(part)
            clean_logits.append(self.passes.logits(x))
            if self.pulse():
                yield self.results.none(x, clean_logits[-1])
        self.clean_logits = torch.cat(clean_logits)
        self.results.forwards += 1
        self.scorer.check_logits(self.clean_logits)
        # At most one run per other class.
        self.schedule.max_runs = min(self.schedule.max_runs, self.clean_logits.shape[1] - 1)

    # Which rows come next

    def _start_runs(self) -> None:
        """Start as many runs as the next batch has room for."""
        waiting = self.waiting[self.algorithm.uses_gradient]
        room = self.batch_size - (len(waiting) if waiting else 0)
        started = self.schedule.start_runs(room)
        if started:
            images, runs = torch.tensor(started).unbind(dim=1)
            rows = self.inputs.rows(images, runs, self.clean_logits)
            rows.state = self.algorithm.begin(rows)
            self._wait(rows)

    def _next_batch_needs_gradient(self) -> bool:
        """Whether the next batch takes queries with gradient: unless a batch without is full."""
        with_gradient, without = self.waiting[True], self.waiting[False]
        full = without is not None and len(without) >= self.batch_size
        return with_gradient is not None and not full

    def _route_rows(self, rows: Rows[Any], done: Tensor) -> Iterator[Finished]:
        """End the runs that are `done` and let the others wait for their next query."""
        if bool(done.any()):
            self._wait(rows.take(~done))
            yield from self._end_runs(rows.take(done))
        else:
            self._wait(rows)

    def _wait(self, rows: Rows[Any]) -> None:
        if not len(rows):
            return
        needs = self.algorithm.needs_gradient(rows)
        if bool(needs.all()):
            parts = {True: rows}
        elif bool(needs.any()):
            parts = {True: rows.take(needs), False: rows.take(~needs)}
        else:
            parts = {False: rows}
        for kind, part in parts.items():
            before = self.waiting[kind]
            self.waiting[kind] = part if before is None else before.join(part)

    # One query

    def _query(self, rows: Rows[Any], *, with_gradient: bool) -> Tensor:
        """Query the model once and advance; returns which rows are done, bool (N,)."""
        x_adv, gradient = rows.x_adv, None
        if with_gradient:

            def loss_of(logits: Tensor, part: slice) -> Tensor:
                whole = len(logits) == len(x_adv)
                return self.scorer.loss(logits, rows if whole else rows.take(part))

            logits, loss, gradient = self.passes.gradient(x_adv, loss_of)
        else:
            logits = self.passes.logits(x_adv)
            loss = self.scorer.loss(logits, rows)
        rows.forwards = rows.forwards + 1
        rows.backwards = rows.backwards + int(with_gradient)
        return self._advance(rows, logits, loss, gradient)

    def _room_to_speculate(self, rows: int) -> int:
        """How many speculative queries per row fit in a pass and save time."""
        if self.algorithm.allow_parallel_runs:
            return 0  # a run that ends drops others only if they are waiting
        most = self.batch_size
        if self.inputs.device.type == "cpu":
            most = min(most, MAX_SPECULATIVE_PASS)
        return max(0, min(most // rows - 1, MAX_GUESSES))

    def _query_with_speculation(self, rows: Rows[Any], room: int) -> Iterator[Finished]:
        """Query the model once for the current images and up to `room` guesses of later ones.

        A guess is used if its row then queries exactly those pixels.
        """
        tried = [rows.x_adv, *self.algorithm.speculate(rows, room)]
        answers = torch.split(self.passes.logits(torch.cat(tried)), len(rows))
        rows.forwards = rows.forwards + 1
        place = torch.arange(len(rows), device=self.inputs.device)
        for number, (x_adv, logits) in enumerate(zip(tried, answers, strict=True)):
            if number:
                right = (rows.x_adv == x_adv[place]).flatten(1).all(dim=1)
                self._wait(rows.take(~right))
                rows, place = rows.take(right), place[right]
            if not len(rows):
                return
            logits = logits[place]
            done = self._advance(rows, logits, self.scorer.loss(logits, rows))
            if not number:
                rows.forwards = rows.forwards + (len(tried) - 1)  # computed, right or wrong
            if bool(done.any()):
                yield from self._end_runs(rows.take(done))
                rows, place = rows.take(~done), place[~done]
        self._wait(rows)

    def _advance(
        self, rows: Rows[Any], logits: Tensor, loss: Tensor, gradient: Tensor | None = None
    ) -> Tensor:
        self.scorer.keep_best(rows, logits, loss)
        done = self.algorithm.advance(rows, logits, loss, gradient)
        if self.algorithm.early_stop:
            done = done | rows.fooled
        if self.cancelled is not None:
            cancelled = self.cancelled().to(self.inputs.device)[rows.image]
            for image in rows.image[cancelled].tolist():
                self.schedule.cancel(image)
            done = done | cancelled
        return done

    # The end of runs

    def _end_runs(self, rows: Rows[Any]) -> Iterator[Finished]:
        """Record finished runs and yield the images that need no further run."""
        self.results.count(rows)
        if self.schedule.max_runs == 1:
            yield self.results.of_rows(rows)
            return
        finished: list[int] = []
        columns = (rows.image, rows.run, rows.fooled, rows.best_score)
        values = zip(*(column.tolist() for column in columns), strict=True)
        for place, (image, run, fooled, score) in enumerate(values):
            ended = self.schedule.end_run(image, run, fooled=fooled)
            if ended is None:
                continue
            # The first run that fooled the model; if none did, the run with the highest score.
            rank = (fooled, 0.0 if fooled else score, -run)
            self.results.keep(image, rank, rows, place)
            if ended.drop_later_runs:
                self._drop_runs(image, after=run)
            if ended.finished:
                finished.append(image)
        if finished:
            yield self.results.take(finished)

    def _drop_runs(self, image: int, *, after: int) -> None:
        """Remove the runs that were started in parallel to a successful one."""
        for kind, rows in self.waiting.items():
            if rows is None:
                continue
            dropped = (rows.image == image) & (rows.run > after)
            if bool(dropped.any()):
                self.results.count(rows.take(dropped))
                self.waiting[kind] = None if bool(dropped.all()) else rows.take(~dropped)


def for_rows(cancelled: Cancelled | None, rows: Tensor) -> Cancelled | None:
    """`cancelled` for an attack on a subset of the images, int64 (M,)."""
    return None if cancelled is None else lambda: cancelled()[rows.cpu()]

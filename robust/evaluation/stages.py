"""One stage of an evaluation: run on some images, verified on the exact model, recorded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from robust.attacks import AttackSettings
from robust.attacks.best_runs import Finished
from robust.attacks.passes import Meter, Passes
from robust.attacks.rows import to_images
from robust.attacks.search import search
from robust.evaluation.journal import Journal, Row, attack_text
from robust.evaluation.models import Models, check_finite
from robust.evaluation.outcomes import Outcomes
from robust.evaluation.verify import rows_of, verify

RECORD_SECONDS = 5.0  # longest search before finished images are recorded, however few
SHOW_SECONDS = 0.5  # between progress reports, if no pass takes longer


class Stages:
    """Runs stages on images uint8 or float32 (N, C, H, W) with labels int64 (N,).

    Finished images are written to the `journal`, if any, and images in it are not run again.
    """

    def __init__(
        self,
        models: Models,
        images: Tensor,
        labels: Tensor,
        *,
        device: torch.device,
        batch_size: int,
    ) -> None:
        self.models, self.images, self.labels = models, images, labels
        self.device, self.batch_size = device, batch_size
        self.meter = Meter()
        self.exact = Passes(models.exact, batch_size, self.meter)
        self.journal: Journal | None = None
        self.progress = 0.0  # share of the current stage that is done
        self._shown = 0.0  # time of the last progress report

    def clean(self, outcomes: Outcomes, known: Tensor) -> Iterator[None]:
        """Classify the images; the predictions of the first ones are `known`.

        Yields after each batch.
        """
        done = self._resume(outcomes, "clean")
        left = (~done).nonzero().squeeze(1)
        for index in torch.split(left, self.batch_size) if len(left) else ():
            begin = time.perf_counter()
            new = index[index >= len(known)]
            predicted = known[index[index < len(known)]]
            if len(new):
                logits = self.exact.logits(self._x(new))
                check_finite(logits)
                predicted = torch.cat([predicted, logits.argmax(dim=1).cpu()])
            outcomes.seconds += time.perf_counter() - begin
            fooled = predicted != self.labels[index]
            columns = (index, fooled, predicted, torch.zeros(len(index)), 0, 1, 0)
            self._record(outcomes, "clean", rows_of(columns))
            yield

    def attack(self, outcomes: Outcomes, settings: AttackSettings, index: Tensor) -> Iterator[None]:
        """Attack the images `index` int64 (M,). Yields every SHOW_SECONDS and once recorded."""
        assert outcomes.settings is not None
        key = f"{attack_text(outcomes.settings)} {settings.label}"
        done = self._resume(outcomes, key)
        total, index = max(len(index), 1), index[~done[index]]
        left = len(index)  # images that are not recorded yet
        running = 0  # passes spent on images that are not finished
        pending: list[Finished] = []
        recorded = self._shown = time.perf_counter()
        before = self.meter.passes
        for finished in _timed(outcomes, self._search(settings, index)):
            result = finished.result
            spent, before = self.meter.passes - before, self.meter.passes
            running += spent - int(result.forwards.sum() + result.backwards.sum())
            if len(finished.index):
                pending.append(replace(finished, index=index[finished.index]))
            count = sum(len(item.index) for item in pending)
            late = time.perf_counter() - recorded > RECORD_SECONDS
            if pending and (count >= min(self.batch_size, left) or late):
                self._record(outcomes, key, self._verify(outcomes, settings, pending))
                left, count, pending, recorded = left - count, 0, [], time.perf_counter()
                before = self.meter.passes
            elif not self._is_due():
                continue
            self._shown = time.perf_counter()
            unfinished = left - count
            partial = min(running / settings.usual_cost, 0.99 * unfinished)  # in whole images
            self.progress = max(self.progress, 1 - (unfinished - partial) / total)
            yield
        assert not pending
        self.progress = 0.0

    def _is_due(self) -> bool:
        """Whether it is time to report progress."""
        return time.perf_counter() - self._shown > SHOW_SECONDS

    def _search(self, settings: AttackSettings, index: Tensor) -> Iterator[Finished]:
        if not len(index):
            return
        eps, algorithm = settings.threat_model.eps, settings.algorithm(early_stop=True)
        model, confirm = self.models.search, self.models.confirm
        if algorithm.needs_float32 and self.models.precision.bf16:
            model, confirm = self.models.fast, None
        yield from search(
            model,
            algorithm,
            self.images if len(index) == len(self.images) else self.images[index],
            self.labels[index].to(self.device),
            eps=torch.full((len(index),), eps, device=self.device),
            seed=settings.seed,
            batch_size=self.batch_size,
            keep_failed=False,
            confirm=confirm,
            meter=self.meter,
            pulse=self._is_due,
        )

    def _verify(
        self, outcomes: Outcomes, settings: AttackSettings, pending: Sequence[Finished]
    ) -> list[Row]:
        """Check every success on the exact model; returns the rows to record."""
        begin = time.perf_counter()
        at = torch.cat([finished.index for finished in pending])
        results = [finished.result for finished in pending]
        success = torch.cat([result.success for result in results])
        confirmed, distance = success.clone(), torch.zeros(len(at), device=self.device)
        predicted = self.labels[at].to(self.device)
        if bool(success.any()):
            verdict = verify(
                self.exact,
                torch.cat([result.x_adv for result in results])[success],
                self._x(at[success.cpu()]),
                y=predicted[success],
                ball=settings.threat_model,
            )
            confirmed[success], distance[success] = verdict.confirmed, verdict.distance
            predicted[confirmed] = verdict.predicted[verdict.confirmed]
        columns = (
            at,
            confirmed.cpu(),
            predicted.cpu(),
            distance.cpu(),
            (success & ~confirmed).cpu(),
            torch.cat([result.forwards for result in results]),
            torch.cat([result.backwards for result in results]),
        )
        outcomes.seconds += time.perf_counter() - begin
        return rows_of(columns)

    def _record(self, outcomes: Outcomes, key: str, rows: list[Row]) -> None:
        outcomes.add_rows(rows)
        if self.journal is not None:
            self.journal.write(key, rows, outcomes.seconds)

    def _resume(self, outcomes: Outcomes, key: str) -> Tensor:
        """Load the journal's rows of a stage; returns the mask of their images, bool (N,)."""
        done = torch.zeros(len(self.images), dtype=torch.bool)
        if self.journal is not None:
            rows, seconds = self.journal.read(key, images=len(self.images))
            outcomes.add_rows(rows)
            outcomes.seconds = max(outcomes.seconds, seconds)
            done[[row[0] for row in rows]] = True
        return done

    def _x(self, index: Tensor) -> Tensor:
        return to_images(self.images[index.to(self.images.device)].to(self.device))


def _timed(outcomes: Outcomes, finished: Iterator[Finished]) -> Iterator[Finished]:
    """`finished`, adding the time it takes to the seconds of `outcomes`."""
    while True:
        begin = time.perf_counter()
        try:
            item = next(finished)
        except StopIteration:
            return
        finally:
            outcomes.seconds += time.perf_counter() - begin
        yield item

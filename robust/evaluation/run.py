"""The evaluation itself: clean, attack after attack, every success asked again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from robust.attacks import AttackSettings, Model, frozen, resolve_attack
from robust.attacks.passes import Passes
from robust.attacks.search import Finished, search, to_images
from robust.classifier import Classifier
from robust.evaluation.checks import PROBED, probe
from robust.evaluation.flags import LARGE_EPS, find_flags
from robust.evaluation.journal import Journal, Row, data_digest, model_digest
from robust.evaluation.outcomes import Outcomes
from robust.evaluation.result import CurvePoint, Evaluation, StageAccuracy
from robust.geometry import distance
from robust.inference import for_inference
from robust.threat_model import TOLERANCE, ThreatModel

Precision = Literal["auto", "fp32", "bf16"]
CURVE = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of eps
CURVE_ATTACK = "pgd-20"


def evaluate(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    attacks: Sequence[AttackSettings],
    device: torch.device,
    batch_size: int = 100,
    curve: int = 0,
    precision: Precision = "auto",
    allow_probabilities: bool = False,
) -> Evaluation:
    """The last result of `evaluate_batches`."""
    *_, last = evaluate_batches(
        model,
        images,
        labels,
        num_classes=num_classes,
        attacks=attacks,
        device=device,
        batch_size=batch_size,
        curve=curve,
        precision=precision,
        allow_probabilities=allow_probabilities,
    )
    return last


def evaluate_batches(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    attacks: Sequence[AttackSettings],
    device: torch.device,
    batch_size: int = 100,
    curve: int = 0,
    precision: Precision = "auto",
    allow_probabilities: bool = False,
    fast: Model | None = None,
    journal: Path | None = None,
    model_id: str | None = None,
    watch: Callable[[], None] = lambda: None,
) -> Iterator[Evaluation]:
    """Score images uint8 (N, 3, H, W) with labels int64 (N,), attack after attack.

    Yields the result so far again and again, so that the caller can show it or stop; `watch` is
    called at each pass of the model besides. An image counts as robust if it is right when clean
    and at every iterate of the attack; images wrong when clean are not attacked. Every success
    is asked again of `model` itself in float32, its distance and range are checked, and what
    does not hold counts as right and is told. With `curve` so many images, picked at random, are
    attacked once more at growing eps.

    A `Classifier` is searched through a faster copy of the same function, and any other model
    through `fast` where that is given; `precision` bf16 searches in bfloat16 (`auto`: on CUDA) and
    takes a success only where float32 agrees. With `journal` what is finished is kept in that
    file, and the same evaluation goes on from there;
    `model_id` tells models apart that are no modules.

    Raises ValueError when there is nothing to score or a label does not fit the model, ModelError
    for a model that can't be evaluated, and JournalError for a journal of another evaluation.
    """
    _check_data(images, labels, num_classes)
    # Shuffled, always alike: in a set sorted by class no beginning is like the whole.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    run = _Run(
        model,
        images[order.to(images.device)],
        labels.cpu()[order],
        num_classes=num_classes,
        attacks=attacks,
        device=device,
    )
    run.batch_size, run.curve_images, run.watch = batch_size, min(curve, len(images)), watch
    run.fast = fast or run.fast
    run.set_precision(precision)
    if journal is not None:
        manifest = {
            "model": model_id or model_digest(model),
            "data": data_digest(images, labels),
            "attacks": [str(attack) for attack in attacks],
            "precision": run.precision,
        }
        run.journal = Journal(journal, manifest)
    run.count_stages()
    iterator = run.loop(allow_probabilities=allow_probabilities)
    try:
        while True:
            # Held only while computing: whoever takes a result has the model as it was.
            with frozen(model, device), _full_float32():
                try:
                    result = next(iterator)
                except StopIteration:
                    return
            yield result
    finally:
        iterator.close()
        if run.journal is not None:
            run.journal.close()


def _check_data(images: Tensor, labels: Tensor, num_classes: int) -> None:
    if images.ndim != 4 or images.dtype != torch.uint8 or len(images) != len(labels):
        raise ValueError(
            f"expected uint8 images (N, C, H, W) and N labels, got {images.dtype} "
            f"{tuple(images.shape)} and {len(labels)}"
        )
    if not len(images):
        raise ValueError("expected at least 1 image, got none")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"expected labels from 0 to {num_classes - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )


class _Run:
    """The parts of an evaluation and what is known so far; `evaluate_batches` is its caller."""

    def __init__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        num_classes: int,
        attacks: Sequence[AttackSettings],
        device: torch.device,
    ) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.num_classes, self.device = num_classes, device
        self.exact = Passes(model)
        self.fast: Model = model
        if isinstance(model, Classifier) and images.shape[2] == model.architecture.input_size:
            self.fast = for_inference(model, device)
        self.confirm: Model | None = None
        self.precision = "fp32"
        self.batch_size, self.curve_images = 100, 0
        self.watch: Callable[[], None] = lambda: None
        self.journal: Journal | None = None
        self.clean = Outcomes(None, self.labels, num_classes)
        self.outcomes = [Outcomes(attack, self.labels, num_classes) for attack in attacks]
        self.curve: list[CurvePoint] = []
        self.base = Evaluation(
            n=0, total=len(images), clean=self.clean.accuracy(), attacks=(), worst_correct=0
        )
        self.stage, self.stages_done, self.within = "", 0, 0.0
        self.stages = 1

    def set_precision(self, precision: Precision) -> None:
        if precision == "fp32" or (precision == "auto" and self.device.type != "cuda"):
            return
        fast = self.fast

        def in_bf16(x: Tensor) -> Tensor:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                return fast(x)

        self.fast, self.confirm = in_bf16, self.model
        self.precision = "bf16 search, fp32 verified"

    def count_stages(self) -> None:
        settings = [outcomes.settings for outcomes in self.outcomes if outcomes.settings]
        self.stages += sum(len(attack.stages) for attack in settings)
        if self.curve_images and settings:
            self.stages += len(_radii(settings[0].threat_model))

    def loop(self, *, allow_probabilities: bool) -> Generator[Evaluation]:
        first = slice(PROBED)
        probes = probe(
            self.model,
            to_images(self.images[first].to(self.device)),
            self.labels[first].to(self.device),
            num_classes=self.num_classes,
            allow_probabilities=allow_probabilities,
        )
        self.base = replace(self.base, probes=probes, precision=self.precision, notes=self._notes())
        shared = self._shared()
        if shared is None:
            yield from self._clean()
        else:
            yield from self._clean_and_single_step(shared)
        for outcomes in self.outcomes:
            if outcomes is not shared:
                outcomes.start_from(self.clean)
                yield from self._attack(outcomes)
        if self.curve_images and self.outcomes:
            yield from self._curve()
        result = replace(self._result(), done=1.0, stage="")
        yield replace(result, flags=find_flags(result))

    def _shared(self) -> Outcomes | None:
        """The single step that starts at the clean image, whose first pass is the clean one."""
        if self.confirm is not None:
            return None  # the clean accuracy is that of float32
        for outcomes in self.outcomes:
            assert outcomes.settings is not None
            if outcomes.settings.name == "fgsm" and outcomes.settings.threat_model.eps > 0:
                return outcomes
        return None

    def _clean(self) -> Iterator[Evaluation]:
        self.stage = "clean"
        done = self._resume(self.clean, "clean")
        for index in torch.split(done.logical_not().nonzero().squeeze(1), self.batch_size):
            if not len(index):
                continue
            begin = time.perf_counter()
            predicted = self.exact.logits(self._x(index)).argmax(dim=1).cpu()
            self.clean.seconds += time.perf_counter() - begin
            fooled = predicted != self.labels[index]
            columns = (index, fooled, predicted, torch.zeros(len(index)), 0, 1, 0)
            self._record(self.clean, "clean", _rows(columns))
            yield self._result()
        self.stages_done += 1

    def _clean_and_single_step(self, outcomes: Outcomes) -> Iterator[Evaluation]:
        """An image that is wrong leaves the search at its first pass, at distance 0."""
        assert outcomes.settings is not None
        everything = torch.arange(len(self.images))
        for _ in self._search(outcomes, outcomes.settings, everything):
            self.clean.share(outcomes)
            yield self._result()
        self.clean.share(outcomes)
        outcomes.forwards -= 1
        outcomes.attacked &= ~self.clean.fooled
        self.stages_done += 2

    def _attack(self, outcomes: Outcomes) -> Iterator[Evaluation]:
        """Each stage on what the ones before left standing."""
        assert outcomes.settings is not None
        stages = outcomes.settings.stages
        for stage in stages:
            standing = (~outcomes.fooled).nonzero().squeeze(1)
            before = outcomes.seconds
            if len(standing):
                yield from self._search(outcomes, stage, standing)
            if len(stages) > 1:
                outcomes.stages.append(
                    StageAccuracy(
                        attack=stage.label,
                        attacked=len(standing),
                        correct=int((~outcomes.fooled).sum()),
                        seconds=outcomes.seconds - before,
                    )
                )
            self.stages_done += 1

    def _search(
        self, outcomes: Outcomes, settings: AttackSettings, index: Tensor
    ) -> Iterator[Evaluation]:
        """Run one attack on the images of `index`, asking every success again."""
        assert outcomes.settings is not None
        key = f"{outcomes.settings} {settings.label}"
        self.stage = settings.label
        done = self._resume(outcomes, key)
        whole, index = max(len(index), 1), index[~done[index]]
        left = len(index)
        pending: list[tuple[Tensor, Finished]] = []
        for finished in self._timed(outcomes, self._finished(settings, index)):
            pending.append((index[finished.index], finished))
            if sum(len(at) for at, _ in pending) >= min(self.batch_size, left):
                self._settle(outcomes, settings, key, pending)
                left -= sum(len(at) for at, _ in pending)
                pending = []
                self.within = 1 - left / whole
                yield self._result()
        assert not pending
        self.within = 0.0

    def _finished(self, settings: AttackSettings, index: Tensor) -> Iterator[Finished]:
        if not len(index):
            return
        eps = settings.threat_model.eps
        if settings.name == "minimal":
            for part in torch.split(torch.arange(len(index)), self.batch_size):
                at = index[part]
                y = self.labels[at].to(self.device)
                result = settings.run(self._watched, self._x(at), y)
                yield Finished(index=part, result=result)
            return
        yield from search(
            self._watched,
            settings.algorithm(early_stop=True),
            self.images if len(index) == len(self.images) else self.images[index],
            self.labels[index].to(self.device),
            eps=torch.full((len(index),), eps, device=self.device),
            seed=settings.seed,
            batch_size=self.batch_size,
            keep_failed=False,
            confirm=self.confirm,
        )

    def _watched(self, x: Tensor) -> Tensor:
        self.watch()
        return self.fast(x)

    def _timed(self, outcomes: Outcomes, finished: Iterator[Finished]) -> Iterator[Finished]:
        while True:
            begin = time.perf_counter()
            try:
                item = next(finished)
            except StopIteration:
                return
            finally:
                outcomes.seconds += time.perf_counter() - begin
            yield item

    def _settle(
        self,
        outcomes: Outcomes,
        settings: AttackSettings,
        key: str,
        pending: list[tuple[Tensor, Finished]],
    ) -> None:
        """Ask the model itself about every adversarial image, and write down what holds."""
        begin = time.perf_counter()
        at = torch.cat([index for index, _ in pending])
        results = [finished.result for _, finished in pending]
        x_adv = torch.cat([result.x_adv for result in results])
        success = torch.cat([result.success for result in results])
        away = torch.cat([result.distance for result in results])
        predicted = torch.full_like(success, 0, dtype=torch.int64)
        holds = success.clone()
        if bool(success.any()):
            x, ball = self._x(at[success.cpu()]), settings.threat_model
            predicted[success] = self.exact.logits(x_adv[success]).argmax(dim=1)
            measured = distance(x_adv[success], x, ball.norm)
            inside = (x_adv[success] >= 0) & (x_adv[success] <= 1)
            labels = self.labels[at].to(self.device)[success]
            holds[success] = (
                (predicted[success] != labels)
                & (measured <= ball.eps + TOLERANCE)
                & inside.flatten(1).all(dim=1)
            )
            away[success] = measured
        held = holds.cpu()
        columns = (
            at,
            held,
            torch.where(held, predicted.cpu(), self.labels[at]),
            away.cpu(),
            success.cpu() & ~held,
            torch.cat([result.forwards for result in results]),
            torch.cat([result.backwards for result in results]),
        )
        outcomes.seconds += time.perf_counter() - begin
        self._record(outcomes, key, _rows(columns))

    def _record(self, outcomes: Outcomes, key: str, rows: list[Row]) -> None:
        outcomes.take(rows)
        if self.journal is not None:
            self.journal.write(key, rows, outcomes.seconds)

    def _resume(self, outcomes: Outcomes, key: str) -> Tensor:
        """Take over what the journal has of a stage; which images it is through with."""
        done = torch.zeros(len(self.images), dtype=torch.bool)
        if self.journal is not None:
            rows, seconds = self.journal.read(key)
            outcomes.take(rows)
            outcomes.seconds = max(outcomes.seconds, seconds)
            done[[row[0] for row in rows]] = True
        return done

    def _curve(self) -> Iterator[Evaluation]:
        """One attack at growing eps, each from the clean images on: so a curve can show a fault."""
        settings = self.outcomes[0].settings
        assert settings is not None
        ball = settings.threat_model
        n = self.curve_images
        self.curve.append(CurvePoint(eps=0.0, correct=int((~self.clean.fooled[:n]).sum()), n=n))
        for eps in _radii(ball):
            attack = resolve_attack(
                CURVE_ATTACK, ThreatModel(norm=ball.norm, eps=eps), seed=settings.seed
            )
            same = [outcomes for outcomes in self.outcomes if outcomes.settings == attack]
            outcomes = same[0] if same else Outcomes(attack, self.labels, self.num_classes)
            if not same:
                outcomes.start_from(self.clean)
                index = (~outcomes.fooled[:n]).nonzero().squeeze(1)
                yield from self._search(outcomes, attack, index)
            correct = int((~outcomes.fooled[:n]).sum())
            self.curve.append(CurvePoint(eps=eps, correct=correct, n=n))
            self.stages_done += 1

    def _result(self) -> Evaluation:
        attacks = tuple(outcomes.accuracy() for outcomes in self.outcomes)
        clean = self.clean.accuracy()
        n = min([clean.n, *(item.n for item in attacks)])
        fooled = self.clean.fooled.clone()
        for outcomes in self.outcomes:
            fooled |= outcomes.fooled
        return replace(
            self.base,
            n=n,
            clean=clean,
            attacks=attacks,
            worst_correct=int((~fooled[:n]).sum()),
            curve=tuple(self.curve),
            done=min((self.stages_done + self.within) / self.stages, 1.0),
            stage=self.stage,
        )

    def _notes(self) -> tuple[str, ...]:
        others, found = self.num_classes - 1, []
        names = {stage.name for o in self.outcomes if o.settings for stage in o.settings.stages}
        for name in ("apgd-t", "fab-t"):
            if name in names and others < 9:
                found.append(f"{name}: {others} other classes are there to lead to, not 9")
        if "apgd-t" in names and others < 3:
            found.append("apgd-t: climbs the margin, as its loss needs 4 classes")
        return tuple(found)

    def _x(self, index: Tensor) -> Tensor:
        return to_images(self.images[index].to(self.device))


def _radii(ball: ThreatModel) -> list[float]:
    """Of the curve, up to where every image must give way."""
    most = 1.0 if ball.norm == "linf" else math.inf
    radii = {min(ball.eps * factor, most) for factor in CURVE} | {LARGE_EPS[ball.norm]}
    return sorted(radius for radius in radii if radius > 0)


def _rows(columns: Sequence[Tensor | int]) -> list[Row]:
    n = next(len(column) for column in columns if isinstance(column, Tensor))
    lists = [column.tolist() if isinstance(column, Tensor) else [column] * n for column in columns]
    return [
        (int(i), int(f), int(p), float(d), int(u), int(fw), int(bw))
        for i, f, p, d, u, fw, bw in zip(*lists, strict=True)
    ]


@contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32: float32 means float32, and what the caller had is put back."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags

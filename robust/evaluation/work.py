"""One evaluation at work: its stages, and what is known so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from robust.attacks import AttackSettings, Model, ModelError, resolve_attack
from robust.attacks.passes import Passes
from robust.attacks.search import Finished, search, to_images
from robust.classifier import Classifier
from robust.evaluation.checks import PROBED, check_finite, probe
from robust.evaluation.flags import find_flags, large_eps
from robust.evaluation.journal import Journal, Row
from robust.evaluation.outcomes import Outcomes
from robust.evaluation.result import CurvePoint, Evaluation, StageAccuracy
from robust.evaluation.verify import rows_of, verify
from robust.inference import MANY, InferenceClassifier, at_least
from robust.ranks import ALONE, Ranks
from robust.threat_model import ThreatModel, format_eps

CURVE = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of eps
CURVE_ATTACK = "pgd-20"
SETTLE = 5.0  # seconds of search after which what is finished is written down, few as it may be
AGREE = 1e-3  # share of the largest logit by which a faster copy may differ to stand for the model


class Work:
    """The parts of an evaluation, made by `evaluate_batches`, which checks what goes in.

    `fast` is searched in float32 and `searched` where successes are confirmed, by `confirm` if
    given and at last by `model`. Of several `ranks` each has every W-th image, so that the first
    of all are the first of each, and in the end they put together what they found.
    """

    def __init__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        num_classes: int,
        attacks: Sequence[AttackSettings],
        device: torch.device,
        batch_size: int,
        curve: int,
        fast: Model,
        searched: Model,
        confirm: Model | None,
        watch: Callable[[], None],
        ranks: Ranks = ALONE,
    ) -> None:
        own = slice(ranks.rank, None, ranks.size)
        self.ranks, self.all_labels, self.probed = ranks, labels, images[:PROBED]
        self.model, self.images, self.labels = model, images[own], labels[own]
        self.num_classes, self.device, self.batch_size = num_classes, device, batch_size
        self.fast, self.searched, self.confirm, self.watch = fast, searched, confirm, watch
        self.exact = Passes(self._watched(model), batch_size)
        self.precision = "fp32" if confirm is None else "bf16 search, fp32 verified"
        self.open_journal: Callable[[], Journal] | None = None
        self.journal: Journal | None = None
        self.clean = self._outcomes(None)
        self.outcomes = [self._outcomes(attack) for attack in attacks]
        self.curve: list[CurvePoint] = []
        first = range(min(curve, len(images)) if attacks else 0)
        self.curve_images = len(first[own])
        self.radii = radii(attacks[0].threat_model, images[0]) if first else []
        self.base = Evaluation(
            n=0,
            total=len(self.images),
            clean=self.clean.accuracy(),
            attacks=(),
            worst_correct=0,
            precision=self.precision,
        )
        self.stage, self.stages_done, self.within = "", 0, 0.0
        self.stages = 1 + sum(len(attack.stages) for attack in attacks) + len(self.radii)

    def loop(self, *, allow_probabilities: bool) -> Generator[Evaluation]:
        """Do the work, handing out what is known after each piece."""
        self._probe(allow_probabilities=allow_probabilities)
        if self.open_journal is not None:
            self.journal = self.open_journal()  # not before: a refused model leaves no file
        shared = self._shared()
        if shared is None:
            yield from self._clean()
        else:
            yield from self._clean_and_single_step(shared)
        for outcomes in self.outcomes:
            if outcomes is not shared:
                outcomes.start_from(self.clean)
                yield from self._attack(outcomes)
        if self.radii:
            yield from self._curve()
        if self.ranks.size > 1:
            self._join()
        result = replace(self._result(), done=1.0, stage="")
        yield replace(result, flags=find_flags(result))

    def _outcomes(self, settings: AttackSettings | None) -> Outcomes:
        return Outcomes(
            settings, self.labels, num_classes=self.num_classes, batch_size=self.batch_size
        )

    def _probe(self, *, allow_probabilities: bool) -> None:
        settings = [outcomes.settings for outcomes in self.outcomes if outcomes.settings]
        stages = [stage for attack in settings for stage in attack.stages]
        self.stage = "probe"
        probes = probe(
            self.model,
            to_images(self.probed.to(self.device)),
            self.all_labels[:PROBED].to(self.device),
            num_classes=self.num_classes,
            allow_probabilities=allow_probabilities,
            differentiate=bool(self.radii) or any(stage.name != "square" for stage in stages),
            fast=None if self.fast is self.model else self._watched(self.fast),
            watch=self.watch,
            batch_size=self.batch_size,
        )
        self.base = replace(self.base, probes=probes, notes=notes(stages, self.num_classes))

    def _shared(self) -> Outcomes | None:
        """The single step that starts at the clean image, whose first pass is the clean one."""
        probes = self.base.probes
        assert probes is not None
        if self.confirm is not None or probes.search_difference > AGREE:
            return None  # the clean accuracy is that of the model itself, in float32
        for outcomes in self.outcomes:
            assert outcomes.settings is not None
            if outcomes.settings.name == "fgsm" and outcomes.settings.threat_model.eps > 0:
                return outcomes
        return None

    def _clean(self) -> Iterator[Evaluation]:
        self.stage = "clean"
        left = (~self._resume(self.clean, "clean")).nonzero().squeeze(1)
        for index in torch.split(left, self.batch_size) if len(left) else ():
            begin = time.perf_counter()
            logits = self.exact.logits(self._x(index))
            check_finite(logits)
            predicted = logits.argmax(dim=1).cpu()
            self.clean.seconds += time.perf_counter() - begin
            fooled = predicted != self.labels[index]
            columns = (index, fooled, predicted, torch.zeros(len(index)), 0, 1, 0)
            self._record(self.clean, "clean", rows_of(columns))
            yield self._result()
        self.stages_done += 1

    def _clean_and_single_step(self, outcomes: Outcomes) -> Iterator[Evaluation]:
        """An image that is wrong leaves the search at its first pass, at distance 0."""
        assert outcomes.settings is not None
        everything = torch.arange(len(self.images))
        for _ in self._search(outcomes, outcomes.settings, everything, shared=True):
            self.clean.share(outcomes)
            yield self._result()
        self.clean.share(outcomes)
        passes = len(everything) + int(outcomes.forwards.sum() + outcomes.backwards.sum())
        self.clean.seconds = outcomes.seconds * len(everything) / max(passes, 1)
        outcomes.seconds -= self.clean.seconds
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
        self, outcomes: Outcomes, settings: AttackSettings, index: Tensor, *, shared: bool = False
    ) -> Iterator[Evaluation]:
        """Run one attack on the images of `index`, asking every success again.

        Where its first pass is `shared` that one counts as another's.
        """
        self.stage = settings.label
        if outcomes not in self.outcomes:  # but of the curve
            self.stage += f" at {format_eps(settings.threat_model.eps)}"
        key = f"{outcomes.settings} {settings.label}" + " and clean" * shared
        done = self._resume(outcomes, key)
        whole, index = max(len(index), 1), index[~done[index]]
        left = len(index)
        pending: list[Finished] = []
        settled = time.perf_counter()
        for finished in self._timed(outcomes, self._finished(settings, index)):
            pending.append(replace(finished, index=index[finished.index]))
            count = sum(len(item.index) for item in pending)
            late = time.perf_counter() - settled > SETTLE
            if count >= min(self.batch_size, left) or late:
                rows = self._settle(outcomes, settings, pending, free=int(shared))
                self._record(outcomes, key, rows)
                left, pending, settled = left - count, [], time.perf_counter()
                self.within = 1 - left / whole
                yield self._result()
        assert not pending
        self.within = 0.0

    def _finished(self, settings: AttackSettings, index: Tensor) -> Iterator[Finished]:
        if not len(index):
            return
        if settings.name == "minimal":
            # In float32 even where others search in bfloat16: it ends where the answer changes.
            model = self._watched(self.fast)
            for part in torch.split(torch.arange(len(index)), self.batch_size):
                y = self.labels[index[part]].to(self.device)
                yield Finished(index=part, result=settings.run(model, self._x(index[part]), y))
            return
        eps = settings.threat_model.eps
        yield from search(
            self._watched(self.searched),
            settings.algorithm(early_stop=True),
            self.images if len(index) == len(self.images) else self.images[index],
            self.labels[index].to(self.device),
            eps=torch.full((len(index),), eps, device=self.device),
            seed=settings.seed,
            batch_size=self.batch_size,
            keep_failed=False,
            confirm=None if self.confirm is None else self._watched(self.confirm),
        )

    def _watched(self, model: Model) -> Model:
        """`model`, told of before each pass and refused once its answer is none."""
        padded = filled(model)

        def forward(x: Tensor) -> Tensor:
            self.watch()
            logits = padded(x)
            if isinstance(logits, Tensor) and bool(logits.isnan().any()):
                raise ModelError(f"expected finite logits, got NaN from the model in {self.stage}")
            return logits

        return forward

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
        self, outcomes: Outcomes, settings: AttackSettings, pending: list[Finished], *, free: int
    ) -> list[Row]:
        """Ask the model itself about every adversarial image; what there is to write down."""
        begin = time.perf_counter()
        at = torch.cat([finished.index for finished in pending])
        results = [finished.result for finished in pending]
        success = torch.cat([result.success for result in results])
        holds, away = success.clone(), torch.zeros(len(at), device=self.device)
        predicted = self.labels[at].to(self.device)
        if bool(success.any()):
            verdict = verify(
                self.exact,
                torch.cat([result.x_adv for result in results])[success],
                self._x(at[success.cpu()]),
                y=predicted[success],
                ball=settings.threat_model,
            )
            holds[success], away[success] = verdict.holds, verdict.distance
            predicted[holds] = verdict.predicted[verdict.holds]
        columns = (
            at,
            holds.cpu(),
            predicted.cpu(),
            away.cpu(),
            (success & ~holds).cpu(),
            torch.cat([result.forwards for result in results]) - free,
            torch.cat([result.backwards for result in results]),
        )
        outcomes.seconds += time.perf_counter() - begin
        return rows_of(columns)

    def _record(self, outcomes: Outcomes, key: str, rows: list[Row]) -> None:
        outcomes.take(rows)
        if self.journal is not None:
            self.journal.write(key, rows, outcomes.seconds)

    def _resume(self, outcomes: Outcomes, key: str) -> Tensor:
        """Take over what the journal has of a stage; which images it is through with."""
        done = torch.zeros(len(self.images), dtype=torch.bool)
        if self.journal is not None:
            rows, seconds = self.journal.read(key, images=len(self.images))
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
        for eps in self.radii:
            attack = resolve_attack(
                CURVE_ATTACK, ThreatModel(norm=ball.norm, eps=eps), seed=settings.seed
            )
            same = [outcomes for outcomes in self.outcomes if outcomes.settings == attack]
            outcomes = same[0] if same else self._outcomes(attack)
            if not same:
                outcomes.start_from(self.clean)
                index = (~outcomes.fooled[:n]).nonzero().squeeze(1)
                yield from self._search(outcomes, attack, index)
            correct = int((~outcomes.fooled[:n]).sum())
            self.curve.append(CurvePoint(eps=eps, correct=correct, n=n))
            self.stages_done += 1

    def _join(self) -> None:
        """Put what all ranks found in place of what this one did."""
        shares = self.ranks.gather((self.clean, self.outcomes, self.curve, self.base.probes))
        cleans, outcomes, curves, probes = zip(*shares, strict=True)
        self.labels = self.all_labels
        self.clean = self._joined(cleans)
        self.outcomes = [self._joined(parts) for parts in zip(*outcomes, strict=True)]
        self.curve = [
            CurvePoint(
                eps=points[0].eps,
                correct=sum(point.correct for point in points),
                n=sum(point.n for point in points),
            )
            for points in zip(*curves, strict=True)
        ]
        self.base = replace(self.base, total=len(self.labels), probes=probes[0])

    def _joined(self, shares: Sequence[Outcomes]) -> Outcomes:
        whole = self._outcomes(shares[0].settings)
        whole.join(shares)
        return whole

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

    def _x(self, index: Tensor) -> Tensor:
        return to_images(self.images[index.to(self.images.device)].to(self.device))


def filled(model: Model) -> Model:
    """A classifier whose small passes are filled up, so that an image has the same bits in all."""
    if isinstance(model, Classifier | InferenceClassifier):
        return at_least(MANY, model)
    return model


def notes(stages: Sequence[AttackSettings], num_classes: int) -> tuple[str, ...]:
    """What attacks have to do otherwise than usual, with so few classes."""
    others, names, found = num_classes - 1, {stage.name for stage in stages}, []
    for name in ("apgd-t", "fab-t"):
        if name in names and others < 9:
            found.append(f"{name}: {others} other classes are there to lead to, not 9")
    if "apgd-t" in names and others < 3:
        found.append("apgd-t: climbs the margin, as its loss needs 4 classes")
    return tuple(found)


def radii(ball: ThreatModel, image: Tensor) -> list[float]:
    """Of the curve around images like `image`, up to where every one must give way."""
    most = large_eps(ball.norm, image.shape)
    found = {min(ball.eps * factor, most) for factor in CURVE} | {ball.eps, most}
    return sorted(radius for radius in found if radius > 0)

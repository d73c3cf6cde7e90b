"""Runs an evaluation stage by stage and reports the result so far."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from robust.attacks import AttackSettings, resolve_attack
from robust.attacks.rows import to_images
from robust.distributed import SINGLE, World
from robust.evaluation.checks import PROBED, probe
from robust.evaluation.curve import CURVE_ATTACK, radii
from robust.evaluation.flags import class_notes, find_flags, notes
from robust.evaluation.forecast import Forecast, forecast, forecast_rest
from robust.evaluation.journal import Journal
from robust.evaluation.models import Models
from robust.evaluation.outcomes import Outcomes
from robust.evaluation.result import CurvePoint, Evaluation, StageAccuracy
from robust.evaluation.stages import Stages
from robust.threat_model import ThreatModel, format_eps


class Work:
    """Runs the stages of an evaluation; `evaluate_batches` checks the inputs and creates it.

    `positions` int64 (N,) are the indices of the images in its call.

    In a `world` of W processes each takes every W-th image, so that the first images overall are
    the first of each process; at the end they merge their results.
    """

    def __init__(
        self,
        models: Models,
        images: Tensor,
        labels: Tensor,
        *,
        positions: Tensor,
        num_classes: int,
        attacks: Sequence[AttackSettings],
        device: torch.device,
        batch_size: int,
        curve: int,
        image_dtype: str,
        on_forecast: Callable[[Forecast], None] = lambda _: None,
        world: World = SINGLE,
    ) -> None:
        own = slice(world.rank, None, world.size)
        self.world, self.all_labels, self.probed = world, labels, images[:PROBED]
        self.on_forecast = on_forecast
        self.all_positions, self.positions = positions, positions[own]
        self.models, self.images, self.labels = models, images[own], labels[own]
        self.num_classes, self.device, self.batch_size = num_classes, device, batch_size
        self.stages = Stages(models, self.images, self.labels, device=device, batch_size=batch_size)
        self.clean = self._outcomes(None)
        self.outcomes = [self._outcomes(attack) for attack in attacks]
        self.curve: list[CurvePoint] = []
        on_curve = range(min(curve, len(images)) if attacks else 0)
        self.curve_images = len(on_curve[own])
        self.radii = radii(attacks[0].threat_model, images[0]) if on_curve else []
        self.base = Evaluation(
            n=0,
            total=len(self.images),
            clean=self.clean.accuracy(),
            attacks=(),
            worst_correct=0,
            precision=str(models.precision),
            precision_reason=models.precision.reason,
            image_dtype=image_dtype,
        )
        self.stage, self.stages_done = "", 0
        self.costs = [len(self.images)]  # maximum passes of each stage, in order
        self.costs += [len(self.images) * s.usual_cost for attack in attacks for s in attack.stages]
        if self.radii:
            point = resolve_attack(CURVE_ATTACK, attacks[0].threat_model).cost
            self.costs += [self.curve_images * point] * len(self.radii)

    def loop(
        self, *, allow_probabilities: bool, open_journal: Callable[[], Journal | None]
    ) -> Generator[Evaluation]:
        """Run all stages; yields the result so far after each batch.

        The journal is opened after the model has passed the probes: a refused model leaves no file.
        """
        predicted = self._probe(allow_probabilities=allow_probabilities)
        self.stages.journal = open_journal()
        self.stage = "clean"
        for _ in self.stages.clean(self.clean, predicted):
            yield self._result()
        self.stages_done += 1
        for outcomes in self.outcomes:
            outcomes.start_from(self.clean)
            yield from self._attack(outcomes)
        if self.radii:
            yield from self._curve()
        if self.world.size > 1:
            self._merge()
        result = replace(self._result(), done=1.0, stage="")
        yield replace(result, flags=find_flags(result))

    def close(self) -> None:
        """Close the journal."""
        if self.stages.journal is not None:
            self.stages.journal.close()

    def _outcomes(self, settings: AttackSettings | None) -> Outcomes:
        return Outcomes(
            settings,
            self.labels,
            positions=self.positions,
            num_classes=self.num_classes,
            batch_size=self.batch_size,
        )

    def _probe(self, *, allow_probabilities: bool) -> Tensor:
        """Probe the model; returns its predictions for the first images of this process."""
        attacks = [outcomes.settings for outcomes in self.outcomes if outcomes.settings]
        stages = [stage for attack in attacks for stage in attack.stages]
        self.stage = "probe"
        probes, predicted, seconds = probe(
            self.models,
            to_images(self.probed.to(self.device)),
            self.all_labels[:PROBED].to(self.device),
            num_classes=self.num_classes,
            allow_probabilities=allow_probabilities,
            differentiate=any(stage.uses_gradient for stage in stages),
            batch_size=self.batch_size,
            meter=self.stages.meter,
        )
        noted = notes(stages, self.num_classes) + class_notes(
            len(self.all_labels), len(set(self.all_labels.tolist())), self.num_classes
        )
        if self.radii and not probes.differentiated:
            noted += (f"no curve: {CURVE_ATTACK} needs gradients, and the model gives none",)
            self.costs = self.costs[: -len(self.radii)]
            self.radii, self.curve_images = [], 0
        self.base = replace(self.base, probes=probes, notes=noted)
        self._report(forecast(self.images, attacks, self.curve_images, seconds_per_pass=seconds))
        return predicted[self.world.rank :: self.world.size]

    def _attack(self, outcomes: Outcomes) -> Iterator[Evaluation]:
        """Run each stage of an attack on the images that no earlier stage fooled."""
        assert outcomes.settings is not None
        stages = outcomes.settings.stages
        for number, stage in enumerate(stages):
            standing = (~outcomes.fooled).nonzero().squeeze(1)
            before = outcomes.seconds
            if len(standing):
                self.stage = stage.label
                for _ in self.stages.attack(outcomes, stage, standing):
                    yield self._result()
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
            self._forecast_rest(outcomes, stage, stages[number + 1 :])

    def _forecast_rest(
        self, outcomes: Outcomes, stage: AttackSettings, rest: Sequence[AttackSettings]
    ) -> None:
        """Report an upper bound on the time of the remaining stages, at the rate so far."""
        spent = int(outcomes.forwards.sum() + outcomes.backwards.sum())
        left = int((~outcomes.fooled).sum())
        if rest and left and spent:
            each = outcomes.seconds / spent
            self._report(forecast_rest(stage, rest, images=left, seconds_per_pass=each))

    def _report(self, forecast: Forecast) -> None:
        self.on_forecast(replace(forecast, processes=self.world.size))

    def _curve(self) -> Iterator[Evaluation]:
        """Attack at increasing eps, each time from the clean images: an accuracy that rises with
        eps then reveals a failing attack."""
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
                self.stage = f"{attack.label} at {format_eps(eps)}"
                index = (~outcomes.fooled[:n]).nonzero().squeeze(1)
                for _ in self.stages.attack(outcomes, attack, index):
                    yield self._result()
            correct = int((~outcomes.fooled[:n]).sum())
            self.curve.append(CurvePoint(eps=eps, correct=correct, n=n))
            self.stages_done += 1

    def _merge(self) -> None:
        """Replace this process's results by the merged results of all processes."""
        shards = self.world.gather((self.clean, self.outcomes, self.curve, self.base.probes))
        cleans, outcomes, curves, probes = zip(*shards, strict=True)
        self.labels, self.positions = self.all_labels, self.all_positions
        self.clean = self._merged(cleans)
        self.outcomes = [self._merged(parts) for parts in zip(*outcomes, strict=True)]
        self.curve = [
            CurvePoint(
                eps=points[0].eps,
                correct=sum(point.correct for point in points),
                n=sum(point.n for point in points),
            )
            for points in zip(*curves, strict=True)
        ]
        self.base = replace(self.base, total=len(self.labels), probes=probes[0])

    def _merged(self, shards: Sequence[Outcomes]) -> Outcomes:
        whole = self._outcomes(shards[0].settings)
        whole.merge(shards)
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
            done=self._done(),
            stage=self.stage,
        )

    def _done(self) -> float:
        """Fraction of the maximum number of passes that is done."""
        done = float(sum(self.costs[: self.stages_done]))
        if self.stages_done < len(self.costs):
            done += self.stages.progress * self.costs[self.stages_done]
        # A process has no images, and nothing to do, if there are fewer images than processes.
        return min(done / max(sum(self.costs), 1), 1.0)

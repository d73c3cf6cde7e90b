"""A training run: both phases through one loop, resumable at any step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust import files
from robust.attacks import resolve_attack
from robust.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from robust.classifier import Architecture, Classifier
from robust.datasets import Dataset, stratified_split
from robust.environment import device_in_words, versions
from robust.evaluation import evaluate
from robust.images import to_float
from robust.ranks import ALONE, Ranks
from robust.sidecar import DataRecord, Sidecar
from robust.threat_model import ThreatModel
from training.augment import augment, mixup
from training.awp import perturbed
from training.compiled import compiled, compiles
from training.distributed import Team
from training.ema import AveragedModel
from training.monitor import Board, score, warnings_for, write_metrics
from training.objective import attacked, objective, taught
from training.optimise import autocast, learning_rate, make_optimizer, uses_bf16
from training.recipe import Phase, Recipe
from training.state import Best, RunFolder, RunState, TrainingError, load_state, save_state

logger = logging.getLogger(__name__)

STATE_SECONDS = 300.0  # between saves of the state within an epoch


class Stopped(Exception):
    """The run was asked to stop; its state is saved."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One step done, for whoever shows it."""

    phase: Phase
    epoch: int  # from 1, over all phases
    epochs: int
    step: int  # from 1, within the epoch
    steps: int
    loss: float
    learning_rate: float
    images_per_second: float
    seconds_left: float  # of the whole run, scoring left out; infinite before the first step
    row: dict[str, Any] | None = None  # the epoch's metrics, once it is scored


Observer = Callable[[Progress], None]


def train(
    recipe: Recipe,
    dataset: Dataset,
    *,
    out: Path,
    device: torch.device,
    seed: int = 0,
    init: Checkpoint | None = None,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    observe: Observer = lambda progress: None,
    ranks: Ranks = ALONE,
) -> Sidecar:
    """Train, keep the best model on held-out images, and write the checkpoint `out` at the end.

    The run's own files go to ``runs/NAME`` beside it; the state there is saved after each epoch,
    every few minutes and when `should_stop` says so, after which Stopped is raised. With
    `resume` a run goes on from there; on the CPU its result is bit-equal to one that was never
    stopped. With `init` the weights begin as those of that checkpoint, under a new head where its
    classes are others. Raises TrainingError when another run holds the output, an unfinished run
    would be lost, `resume` meets another recipe, data, seed or beginning, the recipe's
    architecture is not that of `init`, the loss is no number, or the disk is full.

    Several `ranks` are each given the same arguments and share out every batch, see
    `training.distributed`; the first one alone reads and writes files.
    """
    folder = RunFolder.of(out)
    with ExitStack() as held:
        ranks.from_first(lambda: held.enter_context(folder.locked()))
        try:
            run = _Run(
                recipe,
                dataset,
                folder=folder,
                device=device,
                seed=seed,
                init=init,
                resume=resume,
                team=Team(ranks),
            )
            if run.finished:
                logger.info("%s: this run is finished; %s is its result", folder.path, out)
                return ranks.from_first(lambda: load_checkpoint(out).sidecar)
            run.start()
            run.loop(should_stop, observe)
            return run.finish(out)
        except BrokenPipeError:  # of an observer's output, not of the run's files
            raise
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise TrainingError(f"{folder.path}: could not be written: {reason}") from error


class _Run:
    """The parts of a run and its position; `train` is its only caller."""

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        *,
        folder: RunFolder,
        device: torch.device,
        seed: int,
        init: Checkpoint | None,
        resume: bool,
        team: Team,
    ) -> None:
        self.recipe, self.dataset, self.folder = recipe, dataset, folder
        self.team, self.ranks = team, team.ranks
        self.device, self.seed, self.init = device, seed, init
        self.threat_model = ThreatModel(norm=recipe.norm, eps=recipe.eps)
        self.bf16 = uses_bf16(recipe, device)
        self.num_classes = len(dataset.classes)
        self.manifest = self._manifest()
        self._check_ranks()
        self.state, self.finished = self.ranks.from_first(lambda: self._initial_state(resume))
        if self.finished:
            return
        size = recipe.input_size
        if dataset.images.shape[2:] != (size, size):
            raise TrainingError(
                f"{dataset.name}: expected images of {size} x {size} pixels, as the recipe's "
                f"input_size says, found {' x '.join(map(str, dataset.images.shape[2:]))}"
            )
        kept, held_out = stratified_split(dataset.labels, recipe.held_out, seed=seed)
        if len(kept) < recipe.batch_size:
            raise TrainingError(
                f"{dataset.name}: expected at least one batch of {recipe.batch_size} images to "
                f"train on, found {len(kept)} beside {len(held_out)} held out"
            )
        # Everything stays on the device as bytes; no loader has to keep up.
        self.images, self.labels = dataset.images[kept].to(device), dataset.labels[kept].to(device)
        self.held_images, self.held_labels = dataset.images[held_out], dataset.labels[held_out]
        count = recipe.monitor_limit or len(held_out)
        mixed = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))
        self.monitored = mixed[:count].sort().values  # data may be sorted by class
        self.steps = len(kept) // recipe.batch_size
        self._build()

    def _manifest(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed."""
        data = DataRecord(
            name=self.dataset.name, count=len(self.dataset), sha256=self.dataset.sha256
        )
        init = self.init and self.init.sha256
        return {
            "recipe": self.recipe.to_dict(),
            "data": vars(data),
            "seed": self.seed,
            "init": init,  # SHA-256 of the weights it begins with
        }

    def _check_ranks(self) -> None:
        """Raise TrainingError for ranks that can't work together."""
        for rank, manifest in enumerate(self.ranks.gather(self.manifest)):
            for key, value in manifest.items():
                if value != self.manifest[key]:
                    raise TrainingError(
                        f"expected the same recipe, data, seed and init for every process, found "
                        f"another {key} for process {rank + 1} of {self.ranks.size}"
                    )
        if self.recipe.batch_size < 2 * self.ranks.size:
            raise TrainingError(
                f"expected at least 2 images of a batch for each process, got a batch_size of "
                f"{self.recipe.batch_size} for {self.ranks.size}"
            )

    def _initial_state(self, resume: bool) -> tuple[RunState, bool]:
        folder = self.folder
        saved = folder.read_manifest()
        if resume and not saved and folder.state.exists():
            raise TrainingError(
                f"{folder.state}: expected {folder.manifest.name} beside it to say of which run "
                "it is, found none; remove that folder to start over"
            )
        if resume and saved:
            if self._began_here(saved):
                self.manifest["init"] = saved["init"]
            for key, value in files.from_json(files.to_json(self.manifest)).items():
                if saved.get(key) != value:
                    raise TrainingError(
                        f"{folder.path}: expected to resume with the same recipe, data, seed and "
                        f"init, found another {key}"
                    )
            if saved.get("finished"):
                return RunState(), True
            if folder.state.exists():
                return load_state(folder.state), False
        if folder.state.exists():
            raise TrainingError(
                f"{folder.path}: holds an unfinished run; pass --resume to go on with it, or "
                "remove that folder to start over"
            )
        return RunState(), False

    def _began_here(self, saved: dict[str, Any]) -> bool:
        """Whether `init` is this run's own result, in the place of the weights it began with."""
        return (
            self.init is not None
            and self.init.path.resolve() == self.folder.out.resolve()
            and saved.get("init") == self.init.sidecar.recipe.get("init")
            and saved.get("init") is not None
        )

    def _build(self) -> None:
        recipe = self.recipe
        architecture = Architecture(
            arch=recipe.arch,
            stem=recipe.stem,
            activation=recipe.activation,
            num_classes=self.num_classes,
            input_size=recipe.input_size,
            mean=recipe.mean,
            std=recipe.std,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.model = Classifier(architecture)
        if recipe.zero_init_residual:
            self.model.zero_residuals()
        if self.init is not None:
            _begin_with(self.model, self.init, self.dataset.classes)
            self._warn_of_seen_images(self.init.sidecar)
        self.model = self.model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = AveragedModel(self.model, recipe.ema_decay)
        self.optimizer = make_optimizer(self.model, recipe)
        if self.state.model:
            self.model.load_state_dict(self.state.model)
            self.averaged.module.load_state_dict(self.state.averaged)
            self.averaged.steps = self.state.averaged_steps
            self.optimizer.load_state_dict(self.state.optimizer)
        synced = self.ranks.size > 1 and recipe.batch_norm == "sync"
        if synced:  # not the averaged model, which never sees a batch
            self.team.with_global_norms(self.model)
        self.passes: nn.Module = self.model
        if compiles(recipe, self.device) and not synced:  # no graph has room for what ranks say
            x = to_float(self.images[: recipe.batch_size])
            x = self.team.share(len(x)).of(x).contiguous(memory_format=torch.channels_last)
            awp = any(phase.awp for phase in recipe.phases)
            self.passes = compiled(self.model, x, bf16=self.bf16, awp=awp)

    def _warn_of_seen_images(self, earlier: Sidecar) -> None:
        same_data = earlier.data is not None and earlier.data.sha256 == self.dataset.sha256
        if same_data and earlier.seed != self.seed:
            logger.warning(
                "the weights were trained on some of the images held out now; "
                "with --seed %s the same are held out again",
                earlier.seed,
            )

    def start(self) -> None:
        """Bring the run's files to the state, and open its reports."""
        self.clock = time.monotonic() - self.state.seconds
        self.board: Board | None = None
        if self.ranks.is_first:
            if not self.state.model:
                self.folder.put_aside()
            files.write_json(self.folder.manifest, {**self.manifest, "versions": versions()})
            write_metrics(self.folder.metrics, self.state.history)
            self.board = Board(self.folder.tensorboard, done=len(self.state.history))

    def loop(self, should_stop: Callable[[], bool], observe: Observer) -> None:
        """Run what is left of all phases."""
        state = self.state
        try:
            while state.phase < len(self.recipe.phases):
                phase = self.recipe.phases[state.phase]
                while state.epoch < phase.epochs:
                    self._epoch(phase, should_stop, observe)
                state.phase, state.epoch = state.phase + 1, 0
                self.optimizer = make_optimizer(self.model, self.recipe)
        finally:
            if self.board is not None:
                self.board.close()

    def _epoch(self, phase: Phase, should_stop: Callable[[], bool], observe: Observer) -> None:
        state, recipe = self.state, self.recipe
        order = torch.randperm(len(self.images), generator=self._generator("order", "cpu"))
        total, began, first = phase.epochs * self.steps, time.monotonic(), state.step
        saved = began

        def progress(rate: float, row: dict[str, Any] | None = None) -> Progress:
            seconds = time.monotonic() - began
            speed = (state.step - first) * recipe.batch_size / seconds
            return Progress(
                phase=phase,
                epoch=len(state.history) + (row is None),
                epochs=recipe.epochs,
                step=state.step,
                steps=self.steps,
                loss=state.epoch_loss / max(1, state.step),
                learning_rate=rate,
                images_per_second=speed,
                seconds_left=self._images_left(phase) / speed if speed else math.inf,
                row=row,
            )

        def rate_of(step: int) -> float:
            return learning_rate(phase, state.epoch * self.steps + step, total)

        while state.step < self.steps:
            rate = rate_of(state.step)
            batch = order[state.step * recipe.batch_size : (state.step + 1) * recipe.batch_size]
            state.epoch_loss += self._step(phase, batch.to(self.device), rate)
            state.step += 1
            observe(progress(rate))
            if self.team.any(should_stop()):
                self._save()
                raise Stopped
            if time.monotonic() - saved > STATE_SECONDS:
                self._save()
                saved = time.monotonic()
        rate = rate_of(self.steps - 1)  # also when resumed between the last step and the score
        speed = progress(rate).images_per_second
        row = self._score(phase, rate, speed)
        observe(progress(rate, row))
        state.epoch, state.step, state.epoch_loss = state.epoch + 1, 0, 0.0
        self._save()

    def _images_left(self, phase: Phase) -> float:
        """Images of the run still to come, each as so many of `phase` as it costs passes."""
        state, later = self.state, self.recipe.phases[self.state.phase + 1 :]
        steps = (phase.epochs - state.epoch) * self.steps - state.step
        further = sum(other.epochs * self.steps * other.passes / phase.passes for other in later)
        return (steps + further) * self.recipe.batch_size

    def _step(self, phase: Phase, batch: Tensor, rate: float) -> float:
        """One update of the weights; returns the loss."""
        recipe, generator = self.recipe, self._generator("step", self.device)
        x = augment(to_float(self.images[batch]), phase.augmentation, generator)
        targets = F.one_hot(self.labels[batch], self.num_classes).float()
        if phase.augmentation.mixup:
            x, targets = mixup(x, targets, phase.augmentation.mixup, generator)
        share = self.team.share(len(x))
        x, targets = share.of(x), share.of(targets)
        x = x.contiguous(memory_format=torch.channels_last)
        self.model.train()
        with autocast(self.bf16, self.device):
            targets = taught(targets, self.averaged.module, x, share=phase.teacher)
            batches = attacked(
                self.passes,
                x,
                targets,
                phase=phase,
                threat_model=self.threat_model,
                generator=generator,
                share=share,
            )

        def loss_of() -> Tensor:
            with autocast(self.bf16, self.device):
                loss = objective(
                    self.passes,
                    batches,
                    targets,
                    phase=phase,
                    label_smoothing=recipe.label_smoothing,
                )
            return share.weight * loss

        self.optimizer.zero_grad(set_to_none=True)
        with perturbed(self.model, loss_of, gamma=self._awp(phase), add_up=self.team.add_up):
            loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
        value = self.team.add_gradients(self.model, loss)
        if value != value or abs(value) == float("inf"):
            raise TrainingError(
                f"the loss became {value} in phase {phase.name}, epoch {self.state.epoch + 1}, "
                f"step {self.state.step + 1}; lower learning_rate or set gradient_clip"
            )
        if recipe.gradient_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.gradient_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.averaged.update(self.model)
        return value

    def _awp(self, phase: Phase) -> float:
        """How far the weights are perturbed at this step."""
        done = self.state.epoch * self.steps + self.state.step
        return phase.awp if done >= phase.awp_from * phase.epochs * self.steps else 0.0

    def _score(self, phase: Phase, rate: float, speed: float) -> dict[str, Any]:
        """Score the averaged weights on held-out images, keep them if they are the best."""
        state = self.state
        trained = time.monotonic() - self.clock
        accuracies = score(
            self.averaged.module,
            self.held_images[self.monitored],
            self.held_labels[self.monitored],
            num_classes=self.num_classes,
            threat_model=self.threat_model,
            device=self.device,
            ranks=self.ranks,
        )
        state.seconds = time.monotonic() - self.clock
        row: dict[str, Any] = {
            "epoch": len(state.history) + 1,
            "phase": phase.name,
            "adversarial": phase.is_adversarial,
            "loss": state.epoch_loss / self.steps,
            "learning_rate": rate,
            **accuracies,
            "n": len(self.monitored),
            "images_per_second": speed,
            "seconds": state.seconds,
            "scoring_seconds": state.seconds - trained,
        }
        state.history.append(row)
        for message in warnings_for(state.history):
            logger.warning("epoch %d: %s", row["epoch"], message)
        if row["adversarial"] or not self.recipe.is_adversarial:
            self._keep_if_best(row)
        if self.board is not None:
            self.board.add(row)
        return row

    def _keep_if_best(self, row: dict[str, Any]) -> None:
        value = row["pgd"]
        if self.recipe.select == "mean":
            value = (row["pgd"] + row["clean"]) / 2
        elif self.recipe.select == "last":
            value = float(row["epoch"])
        if self.state.best is None or value >= self.state.best.score:
            weights = {k: v.clone() for k, v in self.averaged.module.state_dict().items()}
            self.state.best = Best(score=value, epoch=row["epoch"], weights=weights)

    def _save(self) -> None:
        if not self.ranks.is_first:
            return
        state = self.state
        state.seconds = time.monotonic() - self.clock
        state.model = self.model.state_dict()
        state.averaged = self.averaged.module.state_dict()
        state.averaged_steps = self.averaged.steps
        state.optimizer = self.optimizer.state_dict()
        save_state(self.folder.state, state)
        write_metrics(self.folder.metrics, state.history)

    def _generator(self, purpose: str, device: torch.device | str) -> torch.Generator:
        """Random numbers that depend on seed and position only, so that resuming is exact."""
        state = self.state
        position = [self.seed, state.phase, state.epoch]
        position.append(state.step + 1 if purpose == "step" else 0)
        mixed = 0
        for number in position:
            mixed = (mixed * 1_000_003 + number + 1) % (2**63 - 25)
        return torch.Generator(device).manual_seed(mixed)

    def finish(self, out: Path) -> Sidecar:
        """Write the kept weights with their sidecar, scored as they are written."""
        best = self.state.best
        assert best is not None
        self.averaged.module.load_state_dict(best.weights)
        classifier = self.averaged.module
        assert isinstance(classifier, Classifier)
        sidecar = Sidecar(
            architecture=classifier.architecture,
            classes=self.dataset.classes,
            threat_model=self.threat_model,
            recipe={
                **self.recipe.to_dict(),
                "kept_epoch": best.epoch,
                "init": self.manifest["init"],
            },
            data=DataRecord(**self.manifest["data"]),
            seed=self.seed,
            versions=versions(),
            device=self.ranks.in_words(device_in_words(self.device)),
            duration_seconds=round(self.state.seconds, 1),
        )
        classifier.half().float()  # as it will be stored, so that the stored model is scored
        result = evaluate(
            classifier,
            self.held_images,
            self.held_labels,
            num_classes=self.num_classes,
            attacks=[
                resolve_attack("fgsm", self.threat_model),
                resolve_attack("pgd-20", self.threat_model),
            ],
            device=self.device,
            batch_size=250,
            ranks=self.ranks,
        )
        results = [{"data": "held out from training", **r.summary()} for r in result.accuracies]
        sidecar = replace(sidecar, evaluation=results)
        return self.ranks.from_first(lambda: self._write(out, classifier, sidecar))

    def _write(self, out: Path, classifier: Classifier, sidecar: Sidecar) -> Sidecar:
        sidecar = save_checkpoint(out, classifier, sidecar)
        manifest = {**self.manifest, "versions": versions(), "finished": True}
        files.write_json(self.folder.manifest, manifest)
        self.folder.state.unlink(missing_ok=True)
        return sidecar


def _begin_with(model: Classifier, init: Checkpoint, classes: tuple[str, ...]) -> None:
    """Take the weights of `init` over, its head only where the classes are the same."""
    weights, same_classes = init.classifier.state_dict(), init.sidecar.classes == classes
    expected = model.architecture
    found = replace(init.sidecar.architecture, num_classes=expected.num_classes)
    if found != expected:
        differing = {
            name: value for name, value in vars(found).items() if value != vars(expected)[name]
        }
        wanted = {name: vars(expected)[name] for name in differing}
        raise TrainingError(
            f"{init.path}: expected weights of the recipe's architecture, {wanted}, "
            f"found {differing}"
        )
    own = model.state_dict()
    head = {key for key in own if key.startswith("net.fc.")}
    assert head
    model.load_state_dict(
        {key: own[key] if key in head and not same_classes else weights[key] for key in own}
    )

"""The loop that all attacks share: fooled images leave it, and others fill the batch.

An attack is an `Algorithm`: what happens to an image between two queries of the model. Images
are independent of each other, so those in one batch may be at different steps, and what comes out
for one does not depend on the others.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robust.attacks.frozen import Model, frozen
from robust.attacks.noise import image_keys
from robust.attacks.passes import ModelError, Passes, check_classes
from robust.attacks.result import AttackResult
from robust.geometry import Norm, column, distance
from robust.images import to_float

GUESSES = 3  # queries guessed ahead; with each the chance falls that all before it were right

# Of which images nobody wants the result any more, bool (N,); asked after each query.
GivenUp = Callable[[], Tensor]
# Tensors by name, all with the same first dimension: one row for each image at work.
Rows = dict[str, Tensor]
# What is left of a run when it ends.
_KEPT = ("image", "run", "x", "best_x", "best_logits", "best_score", "fooled")


class Algorithm(Protocol):
    """One attack, between two queries. Rows hold, beside what it adds itself:

    `x` float32 (N, C, H, W), `y` and `target` int64 (N,) (equal where no target was asked for),
    `eps` float32 (N, 1, 1, 1), `key` and `run` int64 (N,), `clean` the logits of `x` (if
    `needs_clean`), and `x_adv`, the images to score next.
    """

    @property
    def norm(self) -> Norm:
        """How distance is measured."""
        ...

    @property
    def runs(self) -> int:
        """Restarts or targets, tried one after the other while the model withstands."""
        ...

    @property
    def ahead(self) -> bool:
        """Whether a run may begin before the one before it has failed, to fill a batch."""
        ...

    @property
    def needs_clean(self) -> bool:
        """Whether `begin` looks at the logits of the clean images."""
        ...

    @property
    def differentiates(self) -> bool:
        """Whether new rows want a gradient."""
        ...

    @property
    def early_stop(self) -> bool:
        """Whether an image leaves at its first success, or goes on to a better one."""
        ...

    def begin(self, rows: Rows) -> None:
        """Add the state of new rows and their first `x_adv`."""
        ...

    def wants_gradient(self, rows: Rows) -> Tensor:
        """Which rows need the gradient at `x_adv`, bool (N,); the others need its logits only."""
        ...

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        """What is climbed, (N,), differentiable."""
        ...

    def score(self, rows: Rows, logits: Tensor, loss: Tensor) -> Tensor:
        """How good `x_adv` is among those that fool the model alike, (N,); -inf: not allowed."""
        ...

    def guess(self, rows: Rows, most: int) -> list[Tensor]:
        """What `x_adv` may be after this query, and after the ones to come; at most so many."""
        ...

    def advance(self, rows: Rows, logits: Tensor, loss: Tensor, gradient: Tensor | None) -> Tensor:
        """Set the next `x_adv`; which rows have spent their budget, bool (N,)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Images that an attack is through with: their places, int64 (M,), and their results."""

    index: Tensor
    result: AttackResult


def search(
    model: Model,
    algorithm: Algorithm,
    x: Tensor,
    y: Tensor,
    *,
    eps: Tensor,
    target: Tensor | None = None,
    clean: Tensor | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    keep_failed: bool = True,
    confirm: Model | None = None,
    given_up: GivenUp | None = None,
) -> Iterator[Finished]:
    """Run `algorithm` on images float32 or uint8 (N, C, H, W), which may lie on another device.

    `eps` float32 (N,), `y` and `target` int64 (N,) and `clean` logits (N, K) lie where the work
    is done. Yields images as they finish, each once. `batch_size` None takes all at once. Where
    `keep_failed` is off, the result of an image that withstood is the image itself, with the
    logits of its best iterate. With `confirm` a success counts only where that model is fooled
    too. An image that is `given_up` leaves after its next query, with what it has found so far.
    What is found for others does not depend on the batch size or the order of the images, as far
    as the model's logits don't; passes spent on runs begun ahead and on guesses do. Raises
    ValueError for labels or targets that the model has no class for, and ModelError.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
    if not len(x):
        return
    with torch.inference_mode(False):  # what it keeps is changed in place
        work = _Search(model, algorithm, x, y, eps=eps, target=target, clean=clean, seed=seed)
    work.batch_size, work.keep_failed = batch_size or len(x), keep_failed
    work.confirm = None if confirm is None else Passes(confirm, batch_size or 0)
    work.given_up = given_up
    iterator = work.loop()
    while True:
        # Frozen only while computing: whoever takes the results has the model as it was.
        with frozen(model, y.device):
            try:
                finished = next(iterator)
            except StopIteration:
                return
        yield finished


class _Search:
    def __init__(
        self,
        model: Model,
        algorithm: Algorithm,
        x: Tensor,
        y: Tensor,
        *,
        eps: Tensor,
        target: Tensor | None,
        clean: Tensor | None,
        seed: int,
    ) -> None:
        self.passes, self.algorithm = Passes(model), algorithm
        self.x, self.y, self.eps, self.target = x.detach(), y, eps.detach().float(), target
        self.clean = None if clean is None else clean.detach()
        self.seed, self.device = seed, y.device
        self.batch_size, self.keep_failed = len(x), True
        self.confirm: Passes | None = None
        self.given_up: GivenUp | None = None
        n, runs = len(x), algorithm.runs
        self.queue = deque(range(n))  # images whose next run may begin
        self.next_run = [0] * n
        self.at_work: list[set[int]] = [set() for _ in range(n)]
        self.may_go_on: set[int] = set()  # images at work whose next run may begin ahead
        self.best: dict[int, Rows] = {}  # one row for each image between its runs
        self.fooled: set[int] = set()  # those of them that a run has fooled
        self.classes = 0  # unknown before the first logits
        self.spent = torch.zeros(n, 2, dtype=torch.int64)
        self.last = runs
        # Rows that wait for a gradient, and rows that wait for logits only.
        self.waiting: dict[bool, Rows] = {True: {}, False: {}}

    def loop(self) -> Iterator[Finished]:
        if self.algorithm.needs_clean:
            if self.clean is None:
                self.clean = self._clean_logits()
                self.spent[:, 0] += 1
            self._check_classes(self.clean)
            self.last = min(self.last, self.clean.shape[1] - 1)  # a run for each other class
        while True:
            self._fill()
            kind = self._kind()
            rows = self.waiting[kind]
            if not _count(rows):
                return
            self.waiting[kind] = _take(rows, slice(self.batch_size, None))
            rows = _take(rows, slice(self.batch_size))
            if kind or 2 * _count(rows) > self.batch_size:
                yield from self._sort(rows, self._step(rows, differentiate=kind))
            else:
                yield from self._step_ahead(rows)

    def _sort(self, rows: Rows, ended: Tensor) -> Iterator[Finished]:
        """Hand out the rows that have ended and let the others wait for their next query."""
        if bool(ended.any()):
            ended_rows = _take(rows, ended)
            self._wait(_take(rows, ~ended))
            yield from self._end(ended_rows)
        else:
            self._wait(rows)

    def _clean_logits(self) -> Tensor:
        parts = torch.split(torch.arange(len(self.x)), self.batch_size)
        return torch.cat([self.passes.logits(self._images(part)) for part in parts])

    def _images(self, index: Tensor) -> Tensor:
        return to_images(self.x[index.to(self.x.device)].to(self.device))

    def _kind(self) -> bool:
        """Whether to differentiate next: so that either kind of batch is as full as can be."""
        return _count(self.waiting[True]) > 0 and _count(self.waiting[False]) < self.batch_size

    def _wait(self, rows: Rows) -> None:
        if not _count(rows):
            return
        wants = self.algorithm.wants_gradient(rows)
        if bool(wants.all()):
            split = {True: rows}
        elif bool(wants.any()):
            split = {True: _take(rows, wants), False: _take(rows, ~wants)}
        else:
            split = {False: rows}
        for kind, part in split.items():
            self.waiting[kind] = _join(self.waiting[kind], part)

    def _fill(self) -> None:
        """Begin as many runs as there is room for; further ones of an image if no other waits."""
        room = self.batch_size - _count(self.waiting[self.algorithm.differentiates])
        images: list[int] = []
        runs: list[int] = []
        while len(images) < room and self.queue:
            image = self.queue.popleft()
            images.append(image)
            runs.append(self._start(image))
        for image in self._ahead(room - len(images)):
            images.append(image)
            runs.append(self._start(image))
        if images:
            self._wait(self._begin(torch.tensor(images), torch.tensor(runs)))

    def _start(self, image: int) -> int:
        run = self.next_run[image]
        self.next_run[image] += 1
        self.at_work[image].add(run)
        if self.algorithm.ahead and run + 1 < self.last:
            self.may_go_on.add(image)
        else:
            self.may_go_on.discard(image)
        return run

    def _ahead(self, room: int) -> list[int]:
        """Images at work, for runs to begin before the ones before them end; least far first."""
        heap = [(self.next_run[image], image) for image in self.may_go_on] if room else []
        heapq.heapify(heap)
        chosen: list[int] = []
        while heap and len(chosen) < room:
            run, image = heapq.heappop(heap)
            chosen.append(image)
            if run + 1 < self.last:
                heapq.heappush(heap, (run + 1, image))
        return chosen

    def _begin(self, images: Tensor, runs: Tensor) -> Rows:
        at = images.to(self.device)
        x, y = self._images(images), self.y[at]
        rows: Rows = {
            "image": at,
            "run": runs.to(self.device),
            "x": x,
            "y": y,
            "target": y if self.target is None else self.target[at],
            "eps": self.eps[at].view(-1, 1, 1, 1),
            "key": image_keys(x, self.seed),
            "forwards": torch.zeros_like(y),
            "backwards": torch.zeros_like(y),
        }
        if self.algorithm.needs_clean:
            assert self.clean is not None
            rows["clean"] = self.clean[at]
        self.algorithm.begin(rows)
        rows |= {
            "best_x": x,
            "best_score": torch.full_like(rows["eps"].flatten(), -torch.inf),
            "fooled": torch.zeros_like(y, dtype=torch.bool),
        }
        return rows

    def _step(self, rows: Rows, *, differentiate: bool) -> Tensor:
        """Query the model once and move on; which rows have ended, bool (N,)."""
        x_adv, gradient = rows["x_adv"], None
        if differentiate:

            def loss_of(logits: Tensor, part: slice) -> Tensor:
                whole = len(logits) == len(x_adv)
                return self._loss(logits, rows if whole else _take(rows, part))

            logits, loss, gradient = self.passes.gradient(x_adv, loss_of)
        else:
            logits = self.passes.logits(x_adv)
            loss = self._loss(logits, rows)
        rows["forwards"] = rows["forwards"] + 1
        rows["backwards"] = rows["backwards"] + int(differentiate)
        return self._move_on(rows, logits, loss, gradient)

    def _move_on(
        self, rows: Rows, logits: Tensor, loss: Tensor, gradient: Tensor | None = None
    ) -> Tensor:
        self._keep(rows, logits, loss)
        spent = self.algorithm.advance(rows, logits, loss, gradient)
        if self.algorithm.early_stop:
            spent = spent | rows["fooled"]
        if self.given_up is not None:
            spent = spent | self._let_go(rows, self.given_up().to(self.device)[rows["image"]])
        return spent

    def _let_go(self, rows: Rows, gone: Tensor) -> Tensor:
        """Begin no further run of the images that are `gone`."""
        for image in rows["image"][gone].tolist():
            self.next_run[image] = self.last
            self.may_go_on.discard(image)
        return gone

    def _step_ahead(self, rows: Rows) -> Iterator[Finished]:
        """Query the model once, with room left in the batch for guesses at the queries to come.

        A guess is of use where the row then asks for just those pixels.
        """
        room = min(self.batch_size // _count(rows) - 1, GUESSES)
        tried = [rows["x_adv"], *self.algorithm.guess(rows, room)]
        answers = torch.split(self.passes.logits(torch.cat(tried)), _count(rows))
        rows["forwards"] = rows["forwards"] + 1
        place = torch.arange(_count(rows), device=self.device)
        for number, (x_adv, logits) in enumerate(zip(tried, answers, strict=True)):
            if number:
                right = (rows["x_adv"] == x_adv[place]).flatten(1).all(dim=1)
                self._wait(_take(rows, ~right))
                rows, place = _take(rows, right), place[right]
            if not _count(rows):
                return
            logits = logits[place]
            ended = self._move_on(rows, logits, self._loss(logits, rows))
            if not number:
                rows["forwards"] = rows["forwards"] + (len(tried) - 1)  # right or wrong
            if bool(ended.any()):
                yield from self._end(_take(rows, ended))
                rows, place = _take(rows, ~ended), place[~ended]
        self._wait(rows)

    def _loss(self, logits: Tensor, rows: Rows) -> Tensor:
        self._check_classes(logits)
        return self.algorithm.loss(logits, rows)

    def _check_classes(self, logits: Tensor) -> None:
        """Before a label beyond the logits is looked up, which on a GPU ends the process."""
        found = logits.shape[1]
        if found == self.classes:
            return
        if self.classes:
            raise ModelError(f"expected logits of {self.classes} classes again, got {found}")
        self.classes = found
        check_classes(found, self.y, self.target)

    def _keep(self, rows: Rows, logits: Tensor, loss: Tensor) -> None:
        """Take `x_adv` where it is better: fooling before not fooling, then the higher score."""
        score = self.algorithm.score(rows, logits, loss)
        score = torch.where(score.isnan() | loss.isnan(), -torch.inf, score)
        fools = self._fools(rows, logits) & (score > -torch.inf)
        first = rows["forwards"] == 1
        if self.confirm is not None and bool(fools.any()):
            rows["forwards"] = rows["forwards"] + fools
            checked = _take(rows, fools)
            fools[fools.clone()] = self._fools(checked, self.confirm.logits(checked["x_adv"]))
        was, top = rows["fooled"], rows["best_score"]
        better = (fools & ~was) | ((fools == was) & (score > top))
        if "best_logits" not in rows:
            rows["best_logits"] = logits.clone()
        seen = better | first  # the first logits stand in where none is ever better
        rows["best_logits"] = torch.where(seen.unsqueeze(1), logits, rows["best_logits"])
        rows["best_score"] = torch.where(better, score, top)
        rows["fooled"] = was | fools
        taken = better if self.keep_failed else better & fools
        if bool(taken.any()):
            rows["best_x"] = torch.where(column(taken), rows["x_adv"], rows["best_x"])

    def _fools(self, rows: Rows, logits: Tensor) -> Tensor:
        predicted = logits.argmax(dim=1)
        return predicted != rows["y"] if self.target is None else predicted == rows["target"]

    def _end(self, rows: Rows) -> Iterator[Finished]:
        """Settle rows that have ended, and hand out the images that are through."""
        if self.last == 1:
            index = rows["image"].cpu()
            self.spent[index, 0] += rows["forwards"].cpu()
            self.spent[index, 1] += rows["backwards"].cpu()
            yield self._finished(rows, self.spent[index])
            return
        through: list[int] = []
        lists = (
            rows[name].tolist() for name in ("image", "run", "fooled", "forwards", "backwards")
        )
        kept = {name: rows[name] for name in _KEPT}
        for place, (image, run, fooled, forwards, backwards) in enumerate(zip(*lists, strict=True)):
            self.spent[image, 0] += forwards
            self.spent[image, 1] += backwards
            if run not in self.at_work[image]:
                continue  # a lower run of the image has succeeded in the same step
            self.at_work[image].discard(run)
            row = _take(kept, slice(place, place + 1))
            if image not in self.best or self._beats(row, self.best[image]):
                self.best[image] = {name: values.clone() for name, values in row.items()}
            if fooled:
                self.fooled.add(image)
                self.may_go_on.discard(image)
                self._drop(image, after=run)
            if self.at_work[image]:
                continue  # of lower runs one may succeed too; then its image is the one to give
            if image in self.fooled or self.next_run[image] == self.last:
                through.append(image)
            else:
                self.queue.append(image)
        if through:
            parts = [self.best.pop(image) for image in through]
            merged = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            yield self._finished(merged, self.spent[torch.tensor(through)])

    @staticmethod
    def _beats(new: Rows, old: Rows) -> bool:
        fooled, was = bool(new["fooled"]), bool(old["fooled"])
        if fooled and was:
            return bool(new["run"] < old["run"])
        if fooled != was:
            return fooled
        key = (float(new["best_score"]), -int(new["run"]))
        return key > (float(old["best_score"]), -int(old["run"]))

    def _drop(self, image: int, *, after: int) -> None:
        """End the runs of a fooled image that were begun ahead of the one that succeeded."""
        ahead = {run for run in self.at_work[image] if run > after}
        if not ahead:
            return
        self.at_work[image] -= ahead
        for kind, rows in self.waiting.items():
            gone = (rows["image"] == image) & (rows["run"] > after) if rows else None
            if gone is not None and bool(gone.any()):
                self.spent[image, 0] += rows["forwards"][gone].sum().item()
                self.spent[image, 1] += rows["backwards"][gone].sum().item()
                self.waiting[kind] = _take(rows, ~gone)

    def _finished(self, rows: Rows, spent: Tensor) -> Finished:
        x, x_adv = rows["x"], rows["best_x"]
        return Finished(
            index=rows["image"].cpu(),
            result=AttackResult(
                x_adv=x_adv,
                logits=rows["best_logits"],
                success=rows["fooled"],
                distance=distance(x_adv, x, self.algorithm.norm),
                forwards=spent[:, 0].to(self.device),
                backwards=spent[:, 1].to(self.device),
            ),
        )


def of_rows(given_up: GivenUp | None, rows: Tensor) -> GivenUp | None:
    """The same for an attack on some rows, int64 (M,), of the images."""
    return None if given_up is None else lambda: given_up()[rows.cpu()]


def to_images(x: Tensor) -> Tensor:
    """Images float32 in [0, 1] of images float32 or uint8."""
    return to_float(x) if x.dtype == torch.uint8 else x.float()


def _count(rows: Rows) -> int:
    return len(rows["image"]) if rows else 0


def _take(rows: Rows, which: Tensor | slice) -> Rows:
    if isinstance(which, slice) and (which.start or 0) == 0 and (which.stop or 0) >= _count(rows):
        return rows
    return {name: values[which] for name, values in rows.items()}


def _join(rows: Rows, more: Rows) -> Rows:
    if not _count(rows):
        return more
    for name in more.keys() - rows.keys():  # made at the first query
        rows[name] = more[name].new_zeros(len(rows["image"]), *more[name].shape[1:])
    for name in rows.keys() - more.keys():
        more[name] = rows[name].new_zeros(len(more["image"]), *rows[name].shape[1:])
    return {name: torch.cat([rows[name], more[name]]) for name in rows}

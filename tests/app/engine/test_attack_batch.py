"""Attacks of several requests share passes."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from app.engine.attack_batch import AttackItem, attack_in_batch
from app.engine.engine import MAX_SHARED, Engine
from app.engine.queue import Kind
from app.engine.served_model import ServedModel
from app.errors import DeadlineExceeded, InvalidParameters, Overloaded
from app.metrics import Metrics
from robust.attacks import AttackSettings, resolve_attack
from robust.classifier import Architecture, Classifier
from robust.inference import for_inference
from robust.prediction import AttackOutcome, predict
from robust.threat_model import ThreatModel
from tests.app.engine.test_engine import Brightness, Held, image, run, served, settled
from tests.support.serving import pixels

FGSM, PGD = (resolve_attack(name, ThreatModel()) for name in ("fgsm", "pgd-3"))
LONG = resolve_attack("pgd-100", ThreatModel())


class Crowd(Brightness):
    """Writes down how many different images each pass has: what fills it up is one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.different: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.different.append(len(x.flatten(1).unique(dim=0)))
        return super().__call__(x)


def attacked(
    engine: Engine,
    model: ServedModel,
    level: int,
    *attacks: AttackSettings,
    deadline: float | None = None,
    **item: Any,
) -> "asyncio.Task[list[AttackOutcome]]":
    work = AttackItem(image=image(level)[0], **item)
    return asyncio.create_task(
        attack_in_batch(engine, model, work, attacks or (PGD,), deadline=deadline)
    )


async def together(
    engine: Engine, start: Callable[[], list["asyncio.Task[list[AttackOutcome]]"]]
) -> list[Any]:
    """What comes out when all that `start` begins waits for the device at once."""
    held = Held(Kind.ATTACK)
    task = await held.start(engine, served(Brightness()))
    waiting = start()
    await settled()
    held.release.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    await task
    return results


def same(one: AttackOutcome, other: AttackOutcome) -> bool:
    tensors = all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("before", "after", "image", "perturbation")
    )
    return tensors and all(
        getattr(one, name) == getattr(other, name)
        for name in ("settings", "label", "target", "success", "linf", "l2")
    )


def test_attacks_with_the_same_settings_share_their_passes() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = Brightness()
        shared = served(model)
        results = await together(
            engine,
            lambda: [
                attacked(engine, shared, 40, FGSM, PGD),
                attacked(engine, shared, 80, FGSM, PGD),
                attacked(engine, shared, 120, label=0),
            ],
        )
        # Before and after, one step or three, and the look at the last.
        assert model.batches == [2] * 4 + [3] * 6
        assert [[item.settings.name for item in row] for row in results] == [
            ["fgsm", "pgd"],
            ["fgsm", "pgd"],
            ["pgd"],
        ]
        assert [row[-1].label for row in results] == [1, 1, 0]
        for row, level in zip(results[:2], (40, 80), strict=True):
            assert float(row[0].image.float().mean()) == level - 8
        count = metrics.registry.get_sample_value
        assert (count("robust_attack_images_count"), count("robust_attack_images_sum")) == (2, 5)

    run(test, queue_limit=1000)


def test_attacks_with_different_settings_do_not_share_passes() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = Brightness()
        shared = served(model)
        others = [
            replace(PGD, seed=1),
            replace(PGD, alpha=0.01),
            replace(PGD, threat_model=ThreatModel(eps=0.01)),
        ]
        await together(
            engine,
            lambda: [
                *(attacked(engine, shared, 40, other) for other in (PGD, *others)),
                attacked(engine, shared, 40, target=0),
            ],
        )
        assert model.batches == [1] * 6 * 5

    run(test, queue_limit=1000)


def test_batch_is_limited_to_max_shared_and_the_rest_follows() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = Brightness()
        shared = served(model)
        results = await together(
            engine, lambda: [attacked(engine, shared, 10 + i, FGSM) for i in range(MAX_SHARED + 1)]
        )
        assert model.batches == [MAX_SHARED] * 4 + [1] * 4
        assert [row[0].after.shape for row in results] == [(2,)] * (MAX_SHARED + 1)

    run(test, queue_limit=1000)


@pytest.mark.parametrize("name", ["fgsm", "pgd-3", "apgd-t-3", "square-30"])
def test_batching_changes_results_only_by_rounding(name: str) -> None:
    """A pass of one image rounds otherwise than one of eight: some signs of the gradient differ.

    What is reported is of the image that is returned, alone and in company.
    """
    torch.manual_seed(0)
    classifier = Classifier(Architecture(arch="resnet18", activation="silu")).eval()
    classifier.net.fc.weight.data.mul_(8)
    model = replace(served(classifier), fast=for_inference(classifier))
    settings, images = resolve_attack(name, ThreatModel(eps=4 / 255)), pixels(n=MAX_SHARED)

    async def test(engine: Engine, metrics: Metrics) -> None:
        def one(row: int) -> "asyncio.Task[list[AttackOutcome]]":
            work = AttackItem(image=images[row])
            return asyncio.create_task(attack_in_batch(engine, model, work, [settings]))

        (alone,) = await one(5)
        for company in (range(MAX_SHARED), (5, 2, 0)):
            found = await together(engine, lambda: [one(row) for row in company])  # noqa: B023
            (other,) = found[list(company).index(5)]
            torch.testing.assert_close(other.before, alone.before, rtol=0, atol=1e-4)
            torch.testing.assert_close(other.after, alone.after, rtol=0, atol=0.05)
            assert (other.label, other.success) == (alone.label, alone.success)
            same_pixels = (other.image == alone.image).float().mean()
            assert same_pixels > 0.9
            for outcome in (alone, other):
                exact = predict(model.logits, outcome.image[None].float() / 255)[0]
                torch.testing.assert_close(outcome.after, exact, rtol=0, atol=1e-4)
                assert outcome.linf <= 4 / 255 + 1e-6
        assert bool((alone.image != images[5]).any())

    run(test, queue_limit=100_000)


def test_cancelled_attack_leaves_the_batch_without_affecting_others() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        loop, model = asyncio.get_running_loop(), Crowd()
        shared = served(model)
        waiting: list[asyncio.Task[list[AttackOutcome]]] = []

        def hook() -> None:
            if len(model.batches) == 10:
                asyncio.run_coroutine_threadsafe(_cancel(waiting[1]), loop).result(280)

        def start() -> list["asyncio.Task[list[AttackOutcome]]"]:
            waiting.extend(attacked(engine, shared, level, LONG) for level in (40, 80, 120))
            return waiting

        model.hook = hook
        first, gone, last = await together(engine, start)
        assert isinstance(gone, asyncio.CancelledError)
        assert set(model.different[:10]) == {3}
        assert set(model.different[11:-1]) == {2}  # the last scores what was found
        assert len(model.batches) == 103
        for level, found in ((40, first), (120, last)):
            (again,) = await attacked(engine, shared, level, LONG)
            assert same(found[0], again)

    run(test, queue_limit=10_000)


async def _cancel(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.wait([task])


def test_attack_past_its_deadline_leaves_the_batch_and_others_finish() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = Crowd()
        model.hook = lambda: time.sleep(0.01)
        shared = served(model)
        deadline = time.monotonic() + 0.4
        late, good = await together(
            engine,
            lambda: [
                attacked(engine, shared, 40, LONG, deadline=deadline),
                attacked(engine, shared, 80, LONG),
            ],
        )
        assert isinstance(late, DeadlineExceeded)
        assert good[0].settings == LONG
        assert len(model.different) == 103
        assert model.different[-2] == 1

    run(test, queue_limit=10_000)


def test_device_is_free_at_the_next_step_when_all_attacks_expire() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = Crowd()
        model.hook = lambda: time.sleep(0.02)
        shared = served(model)
        deadline = time.monotonic() + 0.3
        results = await together(
            engine,
            lambda: [attacked(engine, shared, i, LONG, deadline=deadline) for i in (40, 80)],
        )
        assert [type(result) for result in results] == [DeadlineExceeded] * 2
        await engine.predict(served(Brightness()), image(1))
        assert len(model.batches) < 30

    run(test, queue_limit=10_000)


def test_failing_attack_does_not_fail_the_rest_of_its_batch() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        shared = served(Brightness())
        results = await together(
            engine, lambda: [attacked(engine, shared, level) for level in (40, 0, 80)]
        )
        assert isinstance(results[1], RuntimeError)
        for level, found in ((40, results[0]), (80, results[2])):
            (alone,) = await attacked(engine, shared, level)
            assert same(found[0], alone)

    run(test)


def test_only_the_attack_whose_target_is_its_prediction_is_rejected() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = Brightness()
        shared = served(model)
        good, bad, other = await together(
            engine,
            lambda: [
                attacked(engine, shared, 40, target=0),
                attacked(engine, shared, 80, target=1),
                attacked(engine, shared, 120, target=1, label=0),
            ],
        )
        assert isinstance(bad, InvalidParameters)
        assert (good[0].target, other[0].target) == (0, 1)
        assert len(model.batches) == 6  # nobody had to begin again

    run(test)


def test_predictions_run_between_the_steps_of_a_batched_attack() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        loop, log = asyncio.get_running_loop(), list[str]()
        urgent, model = Brightness(), Brightness()
        urgent.hook = lambda: log.append("predict")
        predicted: list[asyncio.Task[Tensor]] = []

        async def ask() -> None:
            predicted.append(asyncio.create_task(engine.predict(served(urgent), image(1))))
            await settled()

        def hook() -> None:
            log.append("step")
            if len(log) == 3:
                asyncio.run_coroutine_threadsafe(ask(), loop).result(280)

        model.hook = hook
        shared = served(model)
        await together(engine, lambda: [attacked(engine, shared, level) for level in (40, 80)])
        await asyncio.gather(*predicted)
        assert log == ["step"] * 3 + ["predict"] + ["step"] * 3

    run(test)


def test_attacks_queued_before_a_reload_run_on_the_old_model() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        old, new = Brightness(), Brightness()
        models = [served(old), served(new)]
        await together(
            engine, lambda: [attacked(engine, models[i], 40 + 40 * i) for i in (0, 1, 0, 1)]
        )
        assert old.batches == new.batches == [2] * 6

    run(test)


def test_attacks_of_one_request_are_admitted_all_or_none() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = Brightness()
        held = Held(Kind.ATTACK)
        task = await held.start(engine, served(Brightness()))
        fits, too_much = (
            attacked(engine, served(model), 40, *attacks) for attacks in ((FGSM,), (FGSM, PGD))
        )
        with pytest.raises(Overloaded):
            await too_much
        held.release.set()
        await asyncio.gather(task, fits)
        assert len(model.batches) == 4
        assert metrics.registry.get_sample_value("robust_queued_forwards", {"kind": "attack"}) == 0

    run(test, queue_limit=15)  # fgsm costs 3 and 2, pgd-3 7 and 2

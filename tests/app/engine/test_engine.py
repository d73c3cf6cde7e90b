"""Engine scheduling: priority, batching and admission."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
import torch
from torch import Tensor

from app.engine import queue
from app.engine.engine import Engine
from app.engine.queue import Kind, Work
from app.engine.runtime import TORCH, Runtime
from app.engine.runtime_plan import RuntimeChoice, RuntimePlan
from app.engine.served_model import ServedModel
from app.engine.session import Session
from app.errors import Cancelled, DeadlineExceeded, EngineStopped, OutOfMemory, Overloaded
from app.metrics import Metrics
from robust.classifier import Architecture
from robust.sidecar import Sidecar

SIDECAR = Sidecar(architecture=Architecture(num_classes=2), classes=("dark", "light"))


class Brightness:
    """Two logits: 0 and the mean of the image. Writes down each batch; a black image breaks it."""

    def __init__(self, log: list[str] | None = None) -> None:
        self.batches: list[int] = []
        self.log = [] if log is None else log
        self.hook: Callable[[], None] = lambda: None

    def __call__(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        self.log.append(f"batch of {len(x)}")
        self.hook()
        means = x.flatten(1).mean(dim=1)
        if bool((means == 0).any()):
            raise RuntimeError("a black image")
        return torch.stack([torch.zeros_like(means), means], dim=1)


def served(classifier: object) -> ServedModel:
    return ServedModel(
        classifier=classifier,  # type: ignore[arg-type]
        sidecar=SIDECAR,
        sha256="0",
        device=torch.device("cpu"),
        loaded=datetime.now(UTC),
    )


def image(level: int, n: int = 1) -> Tensor:
    return torch.full((n, 3, 4, 4), level, dtype=torch.uint8)


def light(level: int) -> float:
    return float(torch.sigmoid(torch.tensor(level / 255)))


def run(test: Callable[[Engine, Metrics], Coroutine[Any, Any, None]], **settings: int) -> None:
    metrics = Metrics()
    engine = Engine(
        **{"queue_limit": 100, "max_batch": 8, "threads": 1} | settings, metrics=metrics
    )
    engine.start()
    try:
        asyncio.run(test(engine, metrics))
    finally:
        engine.stop(60)
    assert not engine.alive


class Held:
    """Holds the device in the middle of a piece of work until released."""

    def __init__(self, kind: Kind = Kind.EVALUATE, steps: int = 1) -> None:
        self.kind, self.steps = kind, steps
        self.entered, self.release = threading.Event(), threading.Event()
        self.done = 0

    def __call__(self, session: Session) -> int:
        self.entered.set()
        assert self.release.wait(280)
        for _ in range(self.steps):
            session(torch.ones(1, 3, 4, 4))
            self.done += 1
        return self.done

    async def start(self, engine: Engine, model: ServedModel, **more: Any) -> "asyncio.Task[int]":
        task = asyncio.create_task(engine.run(self.kind, model, self, cost=1, **more))
        await asyncio.to_thread(self.entered.wait, 280)
        return task


async def settled() -> None:
    """Let the tasks that were just created run until they wait for the device."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_queued_predictions_share_batches_and_get_their_own_rows() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = Brightness()
        held = Held()
        task = await held.start(engine, served(Brightness()))
        waiting = [
            asyncio.create_task(engine.predict(shared, image(level)))
            for shared in [served(model)]
            for level in range(1, 13)
        ]
        await settled()
        held.release.set()
        for level, row in enumerate(await asyncio.gather(*waiting), start=1):
            assert row.shape == (1, 2)
            assert float(row[0, 1]) == pytest.approx(light(level), abs=1e-6)
        assert model.batches == [8, 4]
        await task

    run(test)


def planned(model: Brightness, images: int) -> ServedModel:
    """One for which passes of so many images and more are equally cheap for each."""
    runtime = Runtime(name=TORCH, logits=model)
    choice = RuntimeChoice(images=images, runtime=runtime, seconds=1.0)
    return replace(
        served(model), plan=RuntimePlan(choices=(choice,), torch=runtime, metrics=Metrics())
    )


@pytest.mark.parametrize(
    ("enough", "count", "batches"),
    [
        (8, 3, [3]),  # all that came together
        (8, 8, [8]),  # enough, whoever else is coming
        (1, 3, [1, 1, 1]),  # nothing would be gained
        (0, 3, [1, 2]),  # as on a GPU
    ],
)
def test_prediction_waits_for_images_being_decoded_only_if_batching_is_faster(
    enough: int, count: int, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "DECODE_WAIT_SECONDS", 60.0)

    async def test(engine: Engine, metrics: Metrics) -> None:
        model = Brightness()
        shared = planned(model, enough) if enough else served(model)
        entered, release = threading.Event(), threading.Event()

        def hook() -> None:
            entered.set()
            assert release.wait(280)

        model.hook = hook
        with engine.decoding():
            tasks = [asyncio.create_task(engine.predict(shared, image(1)))]
            if batches[0] == 1:
                await asyncio.to_thread(entered.wait, 280)
            tasks += [
                asyncio.create_task(engine.predict(shared, image(1))) for _ in range(count - 1)
            ]
            await settled()
            if count == enough:
                await asyncio.to_thread(entered.wait, 280)
            assert model.batches == ([] if count < enough else batches[:1])
            release.set()
        await asyncio.gather(*tasks)
        assert model.batches == batches

    run(test)


def test_prediction_does_not_wait_long_for_images_being_decoded() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = Brightness()
        with engine.decoding():
            await engine.predict(planned(model, 8), image(1))
        assert model.batches == [1]

    run(test)


def test_different_models_never_share_a_batch() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        one, other = Brightness(), Brightness()
        models = [served(one), served(other)]
        held = Held()
        task = await held.start(engine, served(Brightness()))
        waiting = [asyncio.create_task(engine.predict(models[i], image(1))) for i in (0, 0, 1, 0)]
        await settled()
        held.release.set()
        await asyncio.gather(*waiting, task)
        assert (one.batches, other.batches) == ([2, 1], [1])

    run(test)


def test_higher_priority_work_runs_between_steps() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        log: list[str] = []

        class Step(Brightness):
            def __init__(self, name: str) -> None:
                super().__init__()
                self.hook = lambda: log.append(name)

        model = {kind: served(Step(kind.label)) for kind in Kind}
        evaluation = Held(Kind.EVALUATE, steps=2)
        task = await evaluation.start(engine, model[Kind.EVALUATE])
        attack = Held(Kind.ATTACK, steps=2)
        attack.release.set()
        second = asyncio.create_task(engine.run(Kind.ATTACK, model[Kind.ATTACK], attack, cost=1))
        predicted = asyncio.create_task(engine.predict(model[Kind.PREDICT], image(9)))
        await settled()
        evaluation.release.set()
        assert await task == 2
        assert await second == 2
        await predicted
        assert log == ["predict", "attack", "attack", "evaluate", "evaluate"]

    run(test)


def test_steady_predictions_do_not_starve_an_attack() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        loop = asyncio.get_running_loop()
        model, flood = Brightness(), []
        most = 1000

        def another() -> None:
            if len(flood) < most:
                flood.append(asyncio.create_task(engine.predict(shared, image(1))))

        def hook() -> None:  # each prediction brings the next before it is done
            asyncio.run_coroutine_threadsafe(_call(another), loop).result(280)

        model.hook = hook
        shared = served(model)
        held = Held(Kind.ATTACK, steps=3)
        task = await held.start(engine, served(Brightness()))
        await _call(another)
        held.release.set()
        assert await task == 3
        assert 3 <= len(flood) < 100
        most = 0
        await asyncio.gather(*flood)

    run(test)


async def _call(function: Callable[[], None]) -> None:
    function()
    await settled()


def test_work_over_the_queue_limit_is_rejected_with_retry_after() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = served(Brightness())
        held = Held(Kind.ATTACK)
        task = await held.start(engine, model)  # costs 1
        full = asyncio.create_task(engine.run(Kind.ATTACK, model, held, cost=8))
        await settled()
        with pytest.raises(Overloaded) as caught:
            await engine.run(Kind.ATTACK, model, held, cost=2)
        assert caught.value.retry_after >= 1
        # Attacks that wait do not keep predictions out: those go ahead of them.
        fits = asyncio.create_task(engine.predict(model, image(1, n=10)))
        await settled()
        with pytest.raises(Overloaded):
            await engine.predict(model, image(1))
        held.release.set()
        await asyncio.gather(task, full, fits)
        assert (await engine.predict(model, image(1))).shape == (1, 2)
        rejected = metrics.registry.get_sample_value("robust_rejected_total", {"reason": "queue"})
        assert rejected == 2

    run(test, queue_limit=10)


def test_retry_after_is_the_queued_work_at_the_measured_speed() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = served(Brightness())
        await engine.run(Kind.ATTACK, model, lambda session: time.sleep(0.2), cost=1)
        held = Held(Kind.ATTACK)
        task = await held.start(engine, model)
        more = asyncio.create_task(engine.run(Kind.ATTACK, model, held, cost=39))
        await settled()
        # 40 forward passes at 0.2 s; the sleep may take longer on a busy machine, never less.
        assert 8 <= engine.retry_after(Kind.ATTACK) <= 300
        held.release.set()
        await asyncio.gather(task, more)

    run(test)


def test_work_that_would_miss_its_deadline_is_rejected_at_once() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = served(Brightness())
        await engine.run(Kind.ATTACK, model, lambda session: time.sleep(0.2), cost=1)
        held = Held(Kind.ATTACK)
        task = await held.start(engine, model)
        more = asyncio.create_task(engine.run(Kind.ATTACK, model, held, cost=49))
        await settled()
        now = time.monotonic()
        with pytest.raises(Overloaded):  # 50 forward passes at 0.2 s are ahead
            await engine.run(Kind.ATTACK, model, held, cost=1, deadline=now + 5)
        patient = asyncio.create_task(
            engine.run(Kind.ATTACK, model, held, cost=1, deadline=now + 500)
        )
        # Predictions go ahead of all that.
        urgent = asyncio.create_task(engine.predict(model, image(1), deadline=now + 60))
        await settled()
        held.release.set()
        await asyncio.gather(task, more, patient, urgent)

    run(test)


def test_work_whose_deadline_passes_in_the_queue_never_runs() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = Brightness()
        held = Held()
        task = await held.start(engine, served(Brightness()))
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await engine.predict(served(model), image(1), deadline=start + 0.05)
        assert time.monotonic() - start < 60  # told while the device is still held
        held.release.set()
        await task
        assert model.batches == []

    run(test)


def test_deadline_stops_an_attack_between_steps() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        held = Held(Kind.ATTACK, steps=1000)
        model, deadline = Brightness(), time.monotonic() + 2

        def hook() -> None:
            if len(model.batches) == 2:  # the deadline passes during the second step
                time.sleep(max(0.0, deadline + 0.01 - time.monotonic()))

        model.hook = hook
        held.release.set()
        with pytest.raises(DeadlineExceeded):
            await engine.run(Kind.ATTACK, served(model), held, cost=1, deadline=deadline)
        await engine.predict(served(Brightness()), image(1))  # the device is free again
        assert 0 < held.done < 100

    run(test)


def test_cancelled_work_is_dropped() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        queued, model = Brightness(), Brightness()
        held = Held(Kind.ATTACK, steps=3)
        task = await held.start(engine, served(model))
        gone = asyncio.create_task(engine.predict(served(queued), image(1)))
        await settled()
        for item in (gone, task):
            item.cancel()
        await asyncio.gather(gone, task, return_exceptions=True)
        assert metrics.registry.get_sample_value("robust_queued_forwards", {"kind": "predict"}) == 0
        held.release.set()
        await engine.predict(served(Brightness()), image(1))
        assert (queued.batches, model.batches, held.done) == ([], [], 0)

    run(test)


def test_bad_image_does_not_fail_the_rest_of_its_batch() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = served(Brightness())
        held = Held()
        task = await held.start(engine, model)
        waiting = [asyncio.create_task(engine.predict(model, image(i))) for i in (1, 0, 2)]
        await settled()
        held.release.set()
        first, bad, second = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(first, Tensor)
        assert isinstance(second, Tensor)
        assert float(second[0, 1]) == pytest.approx(light(2), abs=1e-6)
        assert isinstance(bad, RuntimeError)
        await task

    run(test)


class Cramped(Brightness):
    """Has memory for `room` images at a time; a black image alone takes more than there is."""

    def __init__(self, room: int, error: Callable[[], Exception]) -> None:
        super().__init__()
        self.room, self.error = room, error

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > self.room or bool((x.flatten(1).amax(dim=1) == 0).any()):
            self.batches.append(-len(x))
            raise self.error()
        return super().__call__(x)


def cuda_out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def device_lost() -> Exception:
    return torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def accelerator_out_of_memory() -> Exception:
    return torch.AcceleratorError("CUDA error: out of memory")


def cpu_out_of_memory() -> Exception:
    try:
        torch.empty(2**60, dtype=torch.uint8)  # what torch really says
    except RuntimeError as error:
        return error
    raise AssertionError("a machine with an exabyte")


def onednn_out_of_memory() -> Exception:
    return RuntimeError("could not create a primitive")


@pytest.mark.parametrize(
    "error",
    [
        cuda_out_of_memory,
        accelerator_out_of_memory,
        cpu_out_of_memory,
        onednn_out_of_memory,
        MemoryError,
    ],
)
def test_batch_is_halved_when_out_of_memory(error: Callable[[], Exception]) -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = Cramped(3, error)
        images = torch.cat([image(level) for level in range(1, 9)])
        for _ in range(2):
            probabilities = await engine.predict(served(model), images)
            assert probabilities[:, 1].tolist() == pytest.approx(
                [light(level) for level in range(1, 9)], abs=1e-6
            )
        # Halved from 8 until it fits; what fitted is remembered.
        assert model.batches == [-8, -4, *[2] * 8]
        counted = metrics.registry.get_sample_value("robust_out_of_memory_total")
        assert counted == 2
        for _ in range(23):  # the hundredth pass of 2 is the last
            await engine.predict(served(model), images)
        model.room = 4
        await engine.predict(served(model), images)
        assert model.batches[-3:] == [2, 4, 4]

    run(test)


def test_image_too_large_for_memory_fails_alone() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = served(Cramped(2, cuda_out_of_memory))
        held = Held()
        task = await held.start(engine, served(Brightness()))
        waiting = [asyncio.create_task(engine.predict(model, image(i))) for i in (1, 2, 0, 3)]
        await settled()
        held.release.set()
        first, second, bad, third = await asyncio.gather(*waiting, return_exceptions=True)
        for row, level in ((first, 1), (second, 2), (third, 3)):
            assert isinstance(row, Tensor)
            assert float(row[0, 1]) == pytest.approx(light(level), abs=1e-6)
        assert isinstance(bad, OutOfMemory)
        assert engine.alive
        await task

    run(test)


def test_attack_out_of_memory_is_reported() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = served(Cramped(0, cpu_out_of_memory))
        with pytest.raises(OutOfMemory):
            await engine.run(Kind.ATTACK, model, lambda s: s(torch.ones(1, 3, 4, 4)), cost=1)

    run(test)


def test_thread_count_follows_the_cgroup_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = served(Brightness())
        found = await engine.run(Kind.ATTACK, model, lambda _: torch.get_num_threads(), cost=0)
        assert found == expected

    monkeypatch.setattr("app.engine.cpu_limits.available_processors", lambda: 1)
    expected = 1
    run(test, threads=0)
    expected = 2
    run(test, threads=2)  # told so: nothing else counts


def test_dead_engine_thread_fails_queued_and_new_work() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = served(Brightness())

        entered, release = threading.Event(), threading.Event()

        def die(session: Session) -> None:
            entered.set()
            release.wait(280)
            raise SystemExit

        dying = asyncio.create_task(engine.run(Kind.ATTACK, model, die, cost=1))
        await asyncio.to_thread(entered.wait, 280)
        waiting = asyncio.create_task(engine.predict(model, image(1)))
        await settled()
        release.set()
        for result in await asyncio.gather(dying, waiting, return_exceptions=True):
            assert isinstance(result, EngineStopped)
        while engine.alive:
            await asyncio.sleep(0.01)
        refused = image(1)
        kept = weakref.ref(refused)
        with pytest.raises(EngineStopped):
            await engine.predict(model, refused)
        with pytest.raises(EngineStopped):
            engine.check_alive()
        del refused
        gc.collect()
        assert kept() is None  # no traceback of the error holds the request

    run(test)


@pytest.mark.parametrize("together", [1, 2])
def test_broken_device_ends_the_engine_thread_without_retries(together: int) -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model, broken = served(Brightness()), served(Cramped(0, device_lost))
        entered, release = threading.Event(), threading.Event()

        def wait(session: Session) -> None:
            entered.set()
            release.wait(280)
            session.pause()

        running = asyncio.create_task(engine.run(Kind.EVALUATE, model, wait, cost=1))
        await asyncio.to_thread(entered.wait, 280)
        waiting = [asyncio.create_task(engine.predict(broken, image(1))) for _ in range(together)]
        await settled()
        release.set()
        for result in await asyncio.gather(running, *waiting, return_exceptions=True):
            assert isinstance(result, EngineStopped)
        while engine.alive:
            await asyncio.sleep(0.01)
        assert broken.classifier.batches == [-together]  # type: ignore[union-attr]

    run(test)


def test_prediction_during_a_bfloat16_search_is_computed_in_float32() -> None:
    """An evaluation that searches in bfloat16 lends its precision to nobody."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(2, 48, generator=generator)
    image = torch.rand(1, 3, 4, 4, generator=generator)

    async def test(engine: Engine, metrics: Metrics) -> None:
        model = served(lambda x: x.flatten(1) @ weight.T)
        alone = await engine.predict(model, image)
        entered, release = threading.Event(), threading.Event()
        searched: list[torch.dtype] = []

        def search(session: Session) -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                entered.set()
                release.wait(280)
                searched.append(session(image).dtype)

        task = asyncio.create_task(engine.run(Kind.EVALUATE, model, search, cost=1))
        await asyncio.to_thread(entered.wait, 280)
        ahead = asyncio.create_task(engine.predict(model, image))
        await settled()
        release.set()
        assert torch.equal(await ahead, alone)
        await task
        assert searched == [torch.bfloat16]

    run(test)


def test_out_of_memory_batch_is_retried_one_by_one_after_freeing_memory() -> None:
    held: list[weakref.ref[Tensor]] = []

    async def test(engine: Engine, metrics: Metrics) -> None:
        model = served(Brightness())

        def attack(session: Session, items: list[int]) -> list[int]:
            rows = torch.ones(len(items), 3, 4, 4)
            if len(items) > 1:
                held.append(weakref.ref(rows))
                raise torch.OutOfMemoryError("CUDA out of memory.")
            assert held[0]() is None
            return items

        before = Held()
        task = await before.start(engine, model)
        works = [
            Work(kind=Kind.ATTACK, model=model, cost=1, function=attack, share="same", item=item)
            for item in (1, 2)
        ]
        results = asyncio.create_task(engine.run_shared(works))
        await settled()
        before.release.set()
        assert await results == [1, 2]
        await task

    run(test)


def test_stop_cancels_running_work_at_its_next_step() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        held = Held(Kind.EVALUATE, steps=10)
        task = await held.start(engine, served(Brightness()))
        stopping = asyncio.create_task(asyncio.to_thread(engine.stop, 60))
        while not all(work.abandoned for work in engine._queue.running):
            await asyncio.sleep(0.001)
        held.release.set()
        with pytest.raises(Cancelled):
            await task
        await stopping
        assert held.done == 0

    run(test)


def test_device_time_is_counted_once() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        slow, own = Brightness(), []
        slow.hook = lambda: time.sleep(0.2)
        held = Held(Kind.ATTACK)

        def attack(session: Session) -> None:
            held(session)  # the prediction that waits is served at this step
            own.append(session.seconds())

        start = time.monotonic()
        task = asyncio.create_task(engine.run(Kind.ATTACK, served(Brightness()), attack, cost=1))
        await asyncio.to_thread(held.entered.wait, 280)
        predicted = asyncio.create_task(engine.predict(served(slow), image(1)))
        await settled()
        held.release.set()
        await asyncio.gather(task, predicted)
        elapsed = time.monotonic() - start

        def seconds(kind: str) -> float:
            value = metrics.registry.get_sample_value("robust_device_seconds_total", {"kind": kind})
            assert value is not None
            return value

        assert seconds("predict") >= 0.2
        assert seconds("predict") + seconds("attack") <= elapsed + 0.01
        assert own[0] <= elapsed - 0.2

    run(test)

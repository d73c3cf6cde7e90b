"""Fair scheduling between clients, by the cost of their work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from app.engine.engine import Engine
from app.engine.queue import Kind, Work, WorkQueue, current_client
from app.engine.session import Session
from app.errors import DeadlineExceeded, EngineStopped, Overloaded
from app.metrics import Metrics
from tests.app.engine.test_engine import Brightness, image, run, served, settled

MODEL = served(Brightness())


@contextmanager
def asking(client: str) -> Iterator[None]:
    token = current_client.set(client)
    try:
        yield
    finally:
        current_client.reset(token)


def work(client: str, cost: int, kind: Kind = Kind.ATTACK, **named: float) -> Work:
    return Work(kind=kind, model=MODEL, cost=cost, client=client, **named)  # type: ignore[arg-type]


def queue(limit: int = 1000, share: float = 1.0) -> WorkQueue:
    return WorkQueue(limit, Metrics(), client_share=share)


def taken(queue: WorkQueue) -> list[tuple[str, int]]:
    found = []
    while item := queue.take():
        found.append((item.client, item.cost))
    return found


@pytest.mark.parametrize("kind", [Kind.PREDICT, Kind.ATTACK])
def test_clients_take_turns_by_cost(kind: Kind) -> None:
    waiting = queue()
    for item in [("a", 10)] * 3 + [("b", 4)] * 3 + [("c", 25)]:
        waiting.put(work(*item, kind=kind))
    assert taken(waiting) == [
        *[("b", 4)] * 2, ("a", 10), ("b", 4), ("a", 10), ("c", 25), ("a", 10),
    ]  # fmt: skip


def test_work_of_one_client_runs_in_order() -> None:
    waiting = queue()
    for cost in (50, 1, 30, 2):
        waiting.put(work("a", cost))
    assert [cost for _, cost in taken(waiting)] == [50, 1, 30, 2]


def test_small_work_overtakes_large_work_only_within_its_fair_share() -> None:
    waiting = queue()
    waiting.put(large := work("a", 40))
    order = []
    for _ in range(20):  # b sends one after the other, as fast as it is answered
        waiting.put(small := work("b", 4))
        order.append(taken_one := waiting.take())
        if taken_one is large:
            break
        small.abandon()
    assert order[-1] is large
    assert len(order) == 10  # after as much of the other's work as its own cost


def test_client_share_is_limited_and_returned_at_once() -> None:
    waiting = queue(100, share=0.5)
    waiting.put(first := work("a", 40))
    with pytest.raises(Overloaded, match="share"):
        waiting.put(work("a", 11))
    waiting.put(work("b", 50))
    with pytest.raises(Overloaded, match="full"):
        waiting.put(work("c", 11))
    assert waiting.take() is first
    first.future.set_running_or_notify_cancel()
    first.abandon()  # on the device still, but nobody waits for it
    waiting.put(work("a", 50))


def test_deadline_check_counts_only_work_that_runs_before() -> None:
    waiting = queue()
    waiting.measure(Kind.ATTACK, 1, 1.0)
    soon = time.monotonic() + 10
    waiting.put(work("a", 400))
    with pytest.raises(Overloaded):
        waiting.put(work("a", 4, deadline=soon))
    waiting.put(work("b", 4, deadline=soon))
    waiting.put(work("b", 4, deadline=soon))
    waiting.put(work("b", 4, deadline=soon))
    with pytest.raises(Overloaded, match="deadline"):
        waiting.put(work("b", 4, deadline=soon))


def test_small_attack_runs_between_the_steps_of_another_clients_large_one() -> None:
    order: list[str] = []

    def attack(name: str, steps: int) -> object:
        def function(session: Session) -> str:
            for _ in range(steps):
                session(torch.rand(1, 3, 4, 4, requires_grad=True)).sum().backward()
                order.append(name)
            return name

        return function

    async def test(engine: Engine, metrics: Metrics) -> None:
        model = Brightness()
        shared = served(model)
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()
        model.hook = lambda: (loop.call_soon_threadsafe(begun.set), time.sleep(0.01))[1]
        with asking("a"):
            large = asyncio.create_task(
                engine.run(Kind.ATTACK, shared, attack("large", 60), cost=60)  # type: ignore[arg-type]
            )
        await begun.wait()
        with asking("b"):
            small = asyncio.create_task(
                engine.run(Kind.ATTACK, shared, attack("small", 3), cost=3)  # type: ignore[arg-type]
            )
        with asking("a"):
            own = asyncio.create_task(
                engine.run(Kind.ATTACK, shared, attack("own", 3), cost=3)  # type: ignore[arg-type]
            )
        assert await small == "small"
        assert not large.done()
        await asyncio.gather(large, own)

    run(test, queue_limit=1000)
    assert order.index("small") < 60
    place = order.index("small")
    assert order[place : place + 3] == ["small"] * 3
    assert order[-3:] == ["own"] * 3


def test_closed_queue_hands_out_no_work() -> None:
    waiting, found = queue(), []
    first, second = work("a", 1), work("b", 2)
    first.future.add_done_callback(lambda _: found.append(waiting.take()))
    waiting.put(first)
    waiting.put(second)
    waiting.close("closed")
    assert found == [None]
    assert isinstance(second.future.exception(), EngineStopped)


def test_missed_deadline_frees_the_queue_at_once() -> None:
    async def test(engine: Engine, metrics: Metrics) -> None:
        model = Brightness()
        model.hook = lambda: time.sleep(0.3)

        def long(session: Session) -> None:
            for _ in range(1000):
                session(torch.rand(1, 3, 4, 4))

        with asking("a"):
            with pytest.raises(DeadlineExceeded):
                await engine.run(
                    Kind.ATTACK, served(model), long, cost=100, deadline=time.monotonic() + 0.1
                )
            assert (
                metrics.registry.get_sample_value("robust_queued_forwards", {"kind": "attack"}) == 0
            )
            await settled()
            await engine.predict(served(Brightness()), image(1))

    run(test)

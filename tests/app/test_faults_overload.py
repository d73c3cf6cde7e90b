"""Tenfold overload: the excess is rejected at once, the rest is answered in time."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from torch import Tensor

from app.service import Service
from app.settings import Settings
from tests.app.http.test_errors import assert_problem
from tests.support.faults import Peak, unharmed
from tests.support.serving import Running, png, serving

SECONDS_PER_IMAGE = 0.25  # of a device slow enough for any machine to ask ten times as much of it
QUEUE_LIMIT = 8
BATCH = 2


@contextmanager
def slowed(service: Service) -> Iterator[None]:
    """Let the device take so long for each image, and the model be the same."""
    models, current = service.models, service.models.current

    def slow(x: Tensor) -> Tensor:
        time.sleep(SECONDS_PER_IMAGE * len(x))
        return current.logits(x)

    models._current = replace(current, classifier=slow, fast=None, plan=None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        models._current = current


@pytest.fixture(scope="module")
def narrow(checkpoint: Path) -> Iterator[Running]:
    settings = Settings(
        checkpoint=checkpoint,
        threads=1,
        device="cpu",
        queue_limit=QUEUE_LIMIT,
        max_batch=BATCH,
        reload_seconds=3600,
    )
    with serving(settings) as running:
        yield running


Answers = list[tuple[float, httpx.Response]]


async def closed_loop(client: httpx.AsyncClient, seconds: float, clients: int) -> Answers:
    """So many clients, each asking again once it is answered."""
    end, answers = time.monotonic() + seconds, []

    async def ask() -> None:
        while time.monotonic() < end:
            answers.append(await timed(client))

    await asyncio.gather(*(ask() for _ in range(clients)))
    return answers


async def open_loop(client: httpx.AsyncClient, seconds: float, rate: float) -> Answers:
    """So many requests a second, however long the answers take."""
    began, asked = time.monotonic(), []
    for index in range(int(rate * seconds)):
        await asyncio.sleep(began + index / rate - time.monotonic())
        asked.append(asyncio.create_task(timed(client)))
    return list(await asyncio.gather(*asked))


async def timed(client: httpx.AsyncClient) -> tuple[float, httpx.Response]:
    began = time.monotonic()
    response = await client.post("/predict", content=png())
    return time.monotonic() - began, response


def run(running: Running, load: Callable[[httpx.AsyncClient], object]) -> tuple[Answers, float]:
    """The answers of a load and the seconds it took."""

    async def connected() -> Answers:
        # No connection is used again: it could be idle for just as long as the service keeps it.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=running.url, timeout=280, limits=limits) as client:
            answers: Answers = await load(client)  # type: ignore[misc]
            return answers

    began = time.monotonic()
    answers = asyncio.run(connected())
    return answers, time.monotonic() - began


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_tenfold_overload_is_rejected_and_the_service_survives(
    narrow: Running, seconds: int
) -> None:
    with unharmed(narrow), slowed(narrow.service):
        measured, took = run(narrow, lambda client: closed_loop(client, 2, BATCH))
        rate = len(measured) / took
        assert {response.status_code for _, response in measured} == {200}
        assert 0.2 < rate * SECONDS_PER_IMAGE < 1.1

        peak = Peak()
        answers, took = run(narrow, lambda client: open_loop(client, seconds, 10 * rate))
        assert peak.grown() < 200 * 2**20
    counted = Counter(response.status_code for _, response in answers)
    assert set(counted) == {200, 429}
    assert counted[429] > counted[200]
    # What is done is done at the rate of before, and nobody waits longer than a full queue takes.
    assert counted[200] / took > 0.3 * rate
    full = 2 + 2 * (QUEUE_LIMIT + 2 * BATCH) * took / counted[200]
    served = sorted(waited for waited, response in answers if response.status_code == 200)
    refused = sorted(waited for waited, response in answers if response.status_code == 429)
    assert served[-1] < full
    assert refused[len(refused) // 2] < served[len(served) // 2]
    for _, response in answers:
        if response.status_code == 429:
            assert_problem(response, 429)
            assert 1 <= int(response.headers["Retry-After"]) <= full + 1
    assert counted[200] + counted[429] == int(10 * rate * seconds)
    # And as soon as it is over there is room again.
    measured, _ = run(narrow, lambda client: closed_loop(client, 0.5, BATCH))
    assert {response.status_code for _, response in measured} == {200}

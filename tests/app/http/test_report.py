"""Reports are rendered one at a time in a thread and shared between requests.

A report that no client waits for is dropped.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from app.http import report
from app.http.report import CACHE_SIZE, Reports

MODEL: Any = SimpleNamespace(sha256="m")


def job(id: str) -> Any:
    return SimpleNamespace(id=id, state="done", model="m")


class Maker:
    """Stands in for `render_report`: notes what it makes, and makes it when `go` is set."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.at_once = self.most_at_once = 0
        self.go = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, job: Any, model: Any, *, pdf: bool) -> bytes:
        with self._lock:
            self.made.append(job.id)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        assert self.go.wait(280)
        with self._lock:
            self.at_once -= 1
        return f"{job.id} {pdf}".encode()


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Maker]:
    maker = Maker()
    monkeypatch.setattr(report, "render_report", maker)
    yield maker
    maker.go.set()


async def begun(maker: Maker, count: int) -> None:
    while len(maker.made) < count:
        await asyncio.sleep(0.001)


def test_cancelled_reports_are_not_started(maker: Maker) -> None:
    async def ask() -> list[bytes]:
        reports = Reports()
        asking = [asyncio.create_task(reports.get(job(f"{i}"), MODEL, pdf=True)) for i in range(24)]
        await begun(maker, 1)
        for task in asking[:22]:
            task.cancel()
        await asyncio.wait(asking[:22])
        maker.go.set()
        answers = [bytes((await task).body) for task in asking[22:]]
        reports.close()
        return answers

    assert asyncio.run(ask()) == [b"22 True", b"23 True"]
    # The one that had begun is finished; no thread can be ended.
    assert maker.made == ["0", "22", "23"]
    assert maker.most_at_once == 1


def test_report_is_rendered_once_and_cached(maker: Maker) -> None:
    async def ask() -> None:
        reports = Reports()
        asking = [asyncio.create_task(reports.get(job("a"), MODEL, pdf=False)) for _ in range(5)]
        await begun(maker, 1)
        asking[0].cancel()  # the first who asked; the others still wait
        maker.go.set()
        assert {bytes((await task).body) for task in asking[1:]} == {b"a False"}
        for name in ["a", "a", *(f"{i}" for i in range(CACHE_SIZE)), "a"]:
            await reports.get(job(name), MODEL, pdf=False)
        reports.close()

    asyncio.run(ask())
    assert maker.made == ["a", *(f"{i}" for i in range(CACHE_SIZE)), "a"]  # the oldest is dropped

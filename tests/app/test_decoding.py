"""Decode workers for large inputs: killed with their request, and replaced."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from app.decoding import pool as pools
from app.decoding import semaphores
from app.decoding.frames import unpack
from app.decoding.pool import DecodeFailed, WorkerPool
from app.decoding.semaphores import HALF_LIFE_SECONDS, Budget, FairSemaphore
from app.errors import DeadlineExceeded, NotReady
from robust.image_decoding import read_pixels
from tests.support import bombs
from tests.support.serving import labeled, png, until

MEMORY = 64 * 2**20


def image(data: bytes, **changed: object) -> dict[str, object]:
    return {"task": "image", "size": 8, "max_pixels": 50_000_000, **changed}


def use(
    work: Callable[[WorkerPool], Awaitable[object]],
    *,
    size: int = 1,
    memory: int = MEMORY,
    seconds: float = 60.0,
) -> object:
    """What `work` gives on a pool of its own."""

    async def run() -> object:
        pool = WorkerPool(size=size, budget=Budget(memory), seconds=seconds)
        try:
            return await work(pool)
        finally:
            pool.close()

    return asyncio.run(run())


async def ask(pool: WorkerPool, data: bytes, **named: object) -> bytes:
    given = {"client": "a", "memory": MEMORY, "most": 3 * 8 * 8} | named
    _, parts = await pool.run(image(data), [data], **given)  # type: ignore[arg-type]
    return bytes(parts[0])


def test_worker_decodes_like_a_thread_and_survives_a_bad_image() -> None:
    async def work(pool: WorkerPool) -> list[object]:
        first = await ask(pool, png())
        broken, _ = await pool.run(image(b""), [b"GIF89a"], client="a", memory=MEMORY, most=0)
        (worker,) = pool._idle
        assert await ask(pool, png()) == first
        assert pool._idle == [worker]
        return [first, broken["error"]]

    assert use(work) == [read_pixels(png(), 8).tobytes(), "unsupported"]


def test_killed_worker_fails_only_its_request() -> None:
    async def work(pool: WorkerPool) -> None:
        await ask(pool, png())
        os.kill(pool._idle[0]._process.pid, signal.SIGSTOP)
        asking = asyncio.create_task(ask(pool, png()))
        await asyncio.sleep(0.05)
        (busy,) = pool._busy
        os.kill(busy._process.pid, signal.SIGKILL)
        with pytest.raises(NotReady):  # it had not begun with the file
            await asking
        asking = asyncio.create_task(ask(pool, bombs.progressive_jpeg(4000)))  # a second
        while not any(worker.begun for worker in pool._busy):
            await asyncio.sleep(0.001)
        (busy,) = pool._busy
        os.kill(busy._process.pid, signal.SIGKILL)
        with pytest.raises(DecodeFailed) as failed:
            await asking
        assert failed.value.reason == "crash"
        assert len(await ask(pool, png())) == 192
        (idle,) = pool._idle
        idle.kill()  # and one that has nothing to do costs none
        assert idle._process.wait(280) < 0  # killed by a signal
        assert len(await ask(pool, png())) == 192

    use(work)


@pytest.mark.parametrize(
    ("named", "seconds", "error"),
    [({}, 0.1, NotReady), ({"deadline": 0.1}, 60.0, DeadlineExceeded)],
)
def test_worker_that_does_not_start_in_time_is_killed(
    named: dict[str, float], seconds: float, error: type[Exception]
) -> None:
    async def work(pool: WorkerPool) -> None:
        worker = pools._Worker()
        pool._idle.append(worker)
        os.kill(worker._process.pid, signal.SIGSTOP)
        given = {name: time.monotonic() + value for name, value in named.items()}
        with pytest.raises(error):
            await ask(pool, png(), **given)
        assert worker._process.wait(280) < 0  # killed by a signal
        assert (pool._idle, pool._busy) == ([], set())

    use(work, seconds=seconds)


def test_worker_decoding_too_long_is_killed() -> None:
    async def work(pool: WorkerPool) -> None:
        await ask(pool, png())  # so that there is a worker
        (worker,) = pool._idle

        async def decode_forever(*_: object, **__: object) -> None:
            worker.begun, worker.answered = True, False
            await asyncio.Event().wait()

        worker.ask = decode_forever  # type: ignore[method-assign,assignment]
        pool._seconds = 0.05
        with pytest.raises(DecodeFailed) as failed:
            await ask(pool, png())
        assert failed.value.reason == "seconds"
        assert worker._process.wait(280) < 0  # killed by a signal

    use(work)


@pytest.mark.parametrize(
    ("program", "reason"),
    [("/bin/false", "it exited with code 1"), ("/nowhere/python", "No such file")],
    ids=["ends at once", "can't be started"],
)
def test_failed_worker_start_is_reported_and_recovers(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    program: str,
    reason: str,
) -> None:
    async def work(pool: WorkerPool) -> None:
        made, pair = list[socket.socket](), socket.socketpair

        def socketpair() -> tuple[socket.socket, socket.socket]:
            made.extend(pair())
            return made[-2], made[-1]

        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", program)
            patch.setattr(socket, "socketpair", socketpair)
            with pytest.raises(NotReady):
                await ask(pool, png())
        assert reason in caplog.text
        assert (pool._idle, pool._busy) == ([], set())
        assert [item.fileno() for item in made] == [-1, -1]
        assert len(await ask(pool, png())) == 192

    use(work)


def test_cancelled_decoding_ends_at_once() -> None:
    async def work(pool: WorkerPool) -> None:
        worker = pools._Worker()
        pool._idle.append(worker)
        os.kill(worker._process.pid, signal.SIGSTOP)
        asking = asyncio.create_task(ask(pool, png()))
        waiting = asyncio.create_task(ask(pool, png(), client="b"))
        await asyncio.sleep(0.05)
        waiting.cancel()
        asking.cancel()
        await asyncio.wait([asking, waiting])
        assert asking.cancelled()
        assert waiting.cancelled()
        assert worker._process.wait(280) < 0  # killed by a signal

    use(work)


def test_worker_memory_is_limited() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((6000, 6000, 3), np.uint8)).save(buffer, "PNG")

    async def work(pool: WorkerPool) -> None:
        data, given = buffer.getvalue(), {"client": "a", "memory": 2**20, "most": 192}
        answer, _ = await pool.run(image(data), [data], **given)  # type: ignore[arg-type]
        assert answer["error"] == "too_large"
        with pytest.raises(DecodeFailed, match="in 64 MiB of memory"):
            await ask(pool, png(), memory=MEMORY + 1)

    use(work)


def test_dataset_is_decoded_exactly(tmp_path: Path) -> None:
    request = {"task": "set", "path": None, "size": 32, "max_images": 10, "max_pixels": 10**6}

    async def work(pool: WorkerPool) -> None:
        given = {"client": "a", "memory": MEMORY, "most": 10 * (3072 + 8)}
        about, (images, labels) = await pool.run(request, [labeled(10)], **given)  # type: ignore[arg-type]
        arrays = np.load(io.BytesIO(labeled(10)))
        assert images == arrays["images"].tobytes()
        assert labels == arrays["labels"].tobytes()
        assert about["images"] == 10
        refused, _ = await pool.run(request, [labeled(11)], **given)  # type: ignore[arg-type]
        assert refused["error"] == "set"
        assert "10" in refused["expected"]

    use(work, memory=4 * MEMORY)


def test_set_that_needs_more_memory_says_so() -> None:
    request = {"task": "set", "path": None, "size": 2000, "max_images": 10, "max_pixels": 10**6}

    async def work(pool: WorkerPool) -> None:
        with pytest.raises(DecodeFailed) as failed:  # 120 MB of pixels, which torch allocates
            await pool.run(request, [labeled(10)], client="a", memory=2**20, most=0)
        assert failed.value.reason == "memory"

    use(work)


def test_registered_set_without_a_limit_may_run_out_of_memory() -> None:
    async def work(pool: WorkerPool) -> None:
        await ask(pool, png())  # so that there is a worker
        (worker,) = pool._idle

        async def fail(*_: object, **__: object) -> tuple[dict[str, object], list[bytearray]]:
            return {"error": "memory"}, []

        worker.ask = fail  # type: ignore[method-assign,assignment]
        with pytest.raises(DecodeFailed, match="in the memory of the machine") as failed:
            await pool.run(image(b""), [], client="a", memory=MEMORY, most=0, trusted=True)
        assert failed.value.reason == "memory"

    use(work)


def test_idle_worker_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "IDLE_SECONDS", 0.0)

    async def work(pool: WorkerPool) -> None:
        await ask(pool, png())
        (worker,) = pool._idle
        await asyncio.sleep(0.01)
        assert pool._idle == []
        assert worker._process.wait(280) < 0  # killed by a signal

    use(work)


@pytest.mark.parametrize(
    "answer",
    [b"", b"{}", b"[]", b'{"blobs": [-1]}', b'{"blobs": [9]}', b'{"blobs": 1}', b"[" * 10**5],
)
def test_malformed_worker_response_is_rejected(answer: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        unpack(answer, most=8)


def test_cpu_time_limit_has_its_own_error() -> None:
    async def work(pool: WorkerPool) -> None:
        data = bombs.deep_color_png(2000)  # 0.1 s
        pool._cpu_seconds = 0.01
        with pytest.raises(DecodeFailed, match=r"within 0.01 s") as failed:
            await ask(pool, data)
        assert failed.value.reason == "cpu"
        assert pool._idle == []
        pool._cpu_seconds = 60.0
        assert len(await ask(pool, data)) == 192

    use(work)


def test_slots_go_to_the_client_with_the_least_recent_use(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(semaphores, "time", SimpleNamespace(monotonic=lambda: now))

    async def run() -> list[str]:
        slots, order, queued = FairSemaphore(1, per_client=1), [], asyncio.Event()

        async def use(client: str, seconds: float) -> None:
            nonlocal now
            async with slots.hold(client):
                order.append(client)
                now += seconds
                await queued.wait()

        queued.set()
        await use("expensive", 0.2)
        await use("cheap", 0.01)
        queued.clear()
        current = asyncio.create_task(use("other", 0.0))
        await asyncio.sleep(0)
        names = ("expensive", "cheap", "new")
        waiting = [asyncio.create_task(use(client, 0.0)) for client in names]
        await asyncio.sleep(0)
        queued.set()
        await asyncio.wait([current, *waiting])
        assert slots._recent_use("expensive", now) == pytest.approx(0.2, rel=0.01)
        half = slots._recent_use("expensive", now + HALF_LIFE_SECONDS)
        assert half == pytest.approx(slots._recent_use("expensive", now) / 2)
        return order[3:]

    assert asyncio.run(run()) == ["new", "cheap", "expensive"]


def test_clients_with_little_use_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semaphores, "_MAX_CLIENTS", 10)

    async def run() -> None:
        slots = FairSemaphore(1, per_client=1)
        for client in range(1000):
            async with slots.hold(client):
                pass
        assert len(slots._used) <= 11

    asyncio.run(run())


def test_slots_go_to_the_client_holding_the_fewest() -> None:
    order: list[str] = []

    async def run() -> None:
        slots, first = FairSemaphore(2, per_client=1), asyncio.Event()

        async def use(client: str, name: str) -> None:
            async with slots.hold(client):
                order.append(name)
                await first.wait()

        tasks = [asyncio.create_task(use("a", f"a{i}")) for i in range(3)]
        tasks.append(asyncio.create_task(use("b", "b0")))
        tasks.append(asyncio.create_task(use("c", "c0")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert order == ["a0", "b0"]
        tasks[1].cancel()
        first.set()
        await asyncio.wait(tasks)
        assert not slots._held
        assert not slots._waiting

    asyncio.run(run())
    assert order == ["a0", "b0", "c0", "a2"]


def test_budget_is_never_exceeded_and_served_in_order() -> None:
    left: list[int] = []

    async def run() -> None:
        budget = Budget(10)

        async def use(amount: int) -> None:
            async with budget.hold(amount):
                left.append(budget._left)
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(use(amount)) for amount in (6, 9, 1, 4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.wait(tasks)
        assert budget._left == 10

    asyncio.run(run())
    assert left == [4, 5, 5]


def test_a_worker_gets_none_of_the_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("ROBUST_API_KEYS", "ROBUST_ADMIN_KEYS", "ROBUST_DATABASE_URL", "PGPASSWORD")
    for name in secrets:
        monkeypatch.setenv(name, "sEcReT")
    worker = pools._Worker()
    try:
        place = Path(f"/proc/{worker._process.pid}/environ")
        until(lambda: b"OMP_NUM_THREADS=1" in place.read_bytes())  # empty while it is started
        environment = place.read_bytes()
    finally:
        worker.close()
        worker.exit_code()
    assert b"sEcReT" not in environment

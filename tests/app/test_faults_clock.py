"""A clock set back or forward: all timing uses the monotonic clock."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.engine.queue import Kind
from app.settings import Settings
from tests.app.conftest import write_checkpoint
from tests.app.http.test_errors import assert_problem
from tests.support.faults import connect, prediction, unharmed, waiting
from tests.support.serving import Running, gated, labeled, png, serving, until

YEAR = 365 * 86400.0
SECONDS = 3.0  # until the deadline of a prediction, or until a slow sender is cut off


@pytest.mark.parametrize("jump", [-YEAR, YEAR], ids=["back", "forward"])
def test_setting_the_clock_changes_no_deadline_or_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    path = tmp_path / "robust_model.pt"
    write_checkpoint(path, seed=1)
    settings = Settings(
        checkpoint=path,
        threads=1,
        device="cpu",
        deadline_seconds=120,
        upload_seconds=SECONDS,
        queue_limit=50,
        reload_seconds=0.05,
    )
    with serving(settings) as running:
        with unharmed(running):
            work_while_it_is_set(running, monkeypatch, jump)
        # A checkpoint is seen all the same.
        sha256 = write_checkpoint(path, seed=2)
        until(lambda: prediction(running)["model_sha256"] == sha256)


def work_while_it_is_set(running: Running, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    client = running.client
    prediction(running)
    slow = connect(running)
    slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
    with gated(running.service) as gate:
        job = client.post("/evaluate?attack=fgsm", content=labeled(5)).json()["id"]
        until(lambda: gate.waiting)

        # From here on the clock is wrong, with work in hand and timers running.
        now, now_ns = time.time, time.time_ns
        monkeypatch.setattr(time, "time", lambda: now() + jump)
        monkeypatch.setattr(time, "time_ns", lambda: now_ns() + int(jump * 10**9))
        assert abs(time.time() - now()) > YEAR / 2

        # A prediction is given up when its time is over, no sooner and no later.
        with monkeypatch.context() as patched:
            short = running.service.settings.model_copy(update={"deadline_seconds": SECONDS})
            patched.setattr(running.service, "settings", short)
            began = time.monotonic()
            assert_problem(client.post("/predict", content=png()), 504)
            assert SECONDS <= time.monotonic() - began < 100
        assert slow.recv(12) == b"HTTP/1.1 408"
        slow.close()
        # One that finds no room is told of seconds, not of years.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(client.post, "/predict", files=[("file", png())] * 25)
            until(lambda: waiting(running, Kind.PREDICT))
            full = client.post("/predict", content=png())
            assert_problem(full, 429)
            assert 1 <= int(full.headers["Retry-After"]) <= 60
            gate.open.set()
    # The evaluation ends and is kept; nothing expires for a clock's sake.
    until(lambda: client.get(f"/evaluate/{job}").json()["state"] == "done")
    assert len(client.get("/evaluate").json()) == 1
    assert not waiting(running, Kind.EVALUATE)
    # Predictions and attacks are let in as before, and timed by what they took.
    prediction(running)
    attack = client.post("/attack?attack=fgsm", content=png()).json()
    assert 0 <= attack["results"][0]["seconds"] < 100

"""Model card, probes, logs and metrics."""

import asyncio
import re
from pathlib import Path

import pytest

from app.engine.queue import Kind
from app.errors import EngineStopped
from app.settings import Settings
from robust.checkpoint import load_checkpoint
from tests.support.serving import CLASSES, Running, anew, labeled, png, serving, until


def test_model_card_is_the_sidecar(running: Running, checkpoint) -> None:
    card = running.client.get("/model").json()
    loaded = load_checkpoint(checkpoint)
    assert card["sha256"] == loaded.sha256
    assert card["classes"] == list(CLASSES)
    assert card["differentiable"] is True
    assert (card["device"], card["input_size"]) == ("cpu", 32)
    assert card["card"]["architecture"]["arch"] == "wide_resnet10_1"
    assert card["card"]["weights_sha256"] == loaded.sha256


def test_probes(running: Running) -> None:
    assert running.client.get("/livez").json() == {"status": "ok"}
    assert running.client.get("/readyz").json() == {"status": "ready"}


@pytest.mark.parametrize(("device", "warned"), [("auto", True), ("cpu", False)])
def test_log_names_the_device_and_an_unusable_gpu(
    checkpoint: Path,
    device: str,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("app.service.unused_gpu", lambda _: True)
    caplog.set_level("INFO")
    with serving(Settings(checkpoint=checkpoint, threads=1, device=device)):
        messages = "\n".join(caplog.messages)
    assert "serving on" in messages
    assert ("its driver too old" in messages) == warned


def test_dead_engine_thread_fails_the_probes(checkpoint) -> None:
    with serving(Settings(checkpoint=checkpoint, threads=1, device="cpu")) as running:

        def die(_: object) -> None:
            raise SystemExit

        engine, model = running.service.engine, running.service.models.current
        with pytest.raises(EngineStopped):
            asyncio.run(engine.run(Kind.ATTACK, model, die, cost=1))
        until(lambda: not engine.alive)
        for path in ("/livez", "/readyz"):
            assert running.client.get(path).status_code == 503
        assert running.client.post("/predict", content=png()).status_code == 503


def test_docs_page_needs_no_network(running: Running) -> None:
    response = running.client.get("/docs")
    links = re.findall(r'(?:src|href)="([^"]+)"', response.text)
    assert len(links) == 4  # its assets, and back to the playground
    for link in links:
        assert not link.startswith(("http:", "https:", "//"))
        assert running.client.get(f"/{link}").status_code == 200
    assert not re.search(r"https?://", response.text)


def metrics(running: Running) -> dict[str, float]:
    lines = running.client.get("/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_metrics_count_requests_and_work(running: Running) -> None:
    active = ("queued", "running")  # such as what a test before this one left
    until(lambda: not any(job["state"] in active for job in running.client.get("/evaluate").json()))
    before = metrics(running)
    running.client.post("/predict", files=[("file", png(1)), ("file", png(2))])
    running.client.post("/attack?attack=fgsm", content=png())
    running.client.post("/predict", content=b"no image")
    headers = {"Prefer": "wait=120"} | anew()
    done = running.client.post("/evaluate", files={"file": labeled(5)}, headers=headers)
    assert done.status_code == 200
    running.client.get("/an/unknown/path")
    after = metrics(running)

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0)

    def requests(route: str, method: str, status: int) -> float:
        return grew(f'robust_requests_total{{method="{method}",route="{route}",status="{status}"}}')

    assert requests("/predict", "POST", 200) == 1
    assert requests("/predict", "POST", 415) == 1
    assert requests("/attack", "POST", 200) == 1
    assert requests("unmatched", "GET", 404) == 1
    assert grew("robust_batch_images_sum") == 2
    assert grew('robust_queue_wait_seconds_count{kind="predict"}') == 1
    for kind in ("predict", "attack", "evaluate"):
        assert grew(f'robust_device_seconds_total{{kind="{kind}"}}') > 0
    assert grew('robust_jobs{state="done"}') == 1
    sha256 = running.service.models.current.sha256
    (info,) = (name for name in after if name.startswith("robust_model_info"))
    assert re.search(r'arch="wide_resnet10_1",device="cpu \(1 thread\)"', info)
    assert f'sha256="{sha256}"' in info
    assert after['robust_queued_forwards{kind="predict"}'] == 0
    assert not any("unknown/path" in name for name in after)


def test_metrics_of_an_idle_service_report_zero_wait_and_the_thread_count(
    checkpoint: Path,
) -> None:
    with serving(Settings(checkpoint=checkpoint, threads=3, device="cpu")) as running:
        text = running.client.get("/metrics").text
    for kind in ("predict", "evaluate"):
        assert f'robust_queue_wait_seconds_count{{kind="{kind}"}} 0.0' in text
    assert 'device="cpu (3 threads)"' in text

"""A new checkpoint is loaded without dropping a request; a broken one is rejected."""

import gc
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from weakref import ref

import pytest

from app.settings import Settings
from robust.checkpoint import sidecar_path
from tests.app.conftest import write_checkpoint
from tests.support.onnx_file import write_onnx
from tests.support.serving import Running, gated, labeled, png, serving, until


@pytest.fixture
def reloading(tmp_path: Path) -> Iterator[Running]:
    path = tmp_path / "robust_model.pt"
    write_checkpoint(path, seed=1)
    settings = Settings(checkpoint=path, threads=1, device="cpu", reload_seconds=0.05)
    with serving(settings) as running:
        yield running


def reloads(running: Running, result: str) -> float:
    value = running.service.metrics.registry.get_sample_value(
        "robust_reloads_total", {"result": result}
    )
    assert value is not None
    return value


def served(running: Running) -> str:
    sha256: str = running.client.get("/model").json()["sha256"]
    return sha256


def test_reload_drops_no_request_and_each_response_names_its_model(reloading: Running) -> None:
    path = reloading.service.settings.checkpoint
    known = {served(reloading): 1}
    probabilities: dict[str, list[float]] = {}
    with ThreadPoolExecutor(4) as pool:
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                response = reloading.client.post("/predict", content=png())
                assert response.status_code == 200
                body = response.json()
                assert body["model_sha256"] == response.headers["X-Model-SHA256"]
                found = probabilities.setdefault(body["model_sha256"], [])
                found.append(body["results"][0]["probability"])

        asking = [pool.submit(ask) for _ in range(4)]
        try:
            for seed in (2, 3):
                sha256 = write_checkpoint(path, seed=seed)
                known[sha256] = seed
                until(lambda new=sha256: new in probabilities or any(a.done() for a in asking))
        finally:
            stop.set()
        for future in asking:
            future.result()
    assert set(probabilities) == set(known)
    # Each model has one answer to one image: no answer carries the name of another model.
    answers = sorted((min(values), max(values)) for values in probabilities.values())
    assert all(most - least < 5e-4 for least, most in answers)
    assert all(most + 2e-3 < least for (_, most), (least, _) in pairwise(answers))
    assert (reloads(reloading, "ok"), reloads(reloading, "failed")) == (2, 0)


def test_running_work_finishes_on_the_model_it_started_with(reloading: Running) -> None:
    old = served(reloading)
    with gated(reloading.service) as gate:
        job = reloading.client.post("/evaluate", files={"file": labeled(10)}).json()
        until(lambda: gate.waiting)
        new = write_checkpoint(reloading.service.settings.checkpoint, seed=2)
        gate.open.set()
        until(lambda: served(reloading) == new)
        until(lambda: _job(reloading, job["id"])["state"] == "done")
        assert _job(reloading, job["id"])["model_sha256"] == old != new
        reloading.service.models.reload()  # the gate puts the old model back; look again


def _job(running: Running, id: str) -> dict[str, str]:
    found: dict[str, str] = running.client.get(f"/evaluate/{id}").json()
    return found


@pytest.mark.parametrize("how", ["truncated", "empty", "other weights", "gone"])
def test_broken_checkpoint_is_rejected_and_the_old_model_stays(
    reloading: Running, how: str
) -> None:
    path, old = reloading.service.settings.checkpoint, served(reloading)
    good = path.read_bytes()
    if how == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "other weights":
        write_checkpoint(path.with_name("other.pt"), seed=5)
        path.write_bytes(path.with_name("other.pt").read_bytes())  # not those of the sidecar
    else:
        path.unlink()
    until(lambda: reloads(reloading, "failed"))
    assert served(reloading) == old
    assert reloading.client.post("/predict", content=png()).status_code == 200
    assert reloading.client.get("/readyz").status_code == 200
    new = write_checkpoint(path, seed=2)
    until(lambda: served(reloading) == new)
    assert sidecar_path(path).is_file()


def test_new_weights_beside_an_onnx_file_are_loaded(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "new").mkdir()
    write_onnx(tmp_path / "model.onnx", weights_beside=True)
    write_onnx(tmp_path / "new" / "model.onnx", seed=1, weights_beside=True)
    settings = Settings(
        checkpoint=tmp_path / "model.onnx", threads=1, device="cpu", reload_seconds=0.05
    )
    with serving(settings) as running:
        old = served(running)
        os.replace(tmp_path / "new" / "model.onnx.data", tmp_path / "model.onnx.data")
        until(lambda: served(running) != old)
        assert reloads(running, "ok") == 1


def test_unchanged_checkpoint_is_not_reloaded(reloading: Running) -> None:
    path = reloading.service.settings.checkpoint
    for kind in (path, sidecar_path(path)):
        os.utime(kind)
        time.sleep(0.3)  # six looks at the files
    assert (reloads(reloading, "ok"), reloads(reloading, "failed")) == (0, 0)


def test_explicit_reload_reads_unchanged_files_again(reloading: Running) -> None:
    reloading.service.models.reload()
    until(lambda: reloads(reloading, "ok") == 1)


def test_reload_requested_during_a_check_is_not_lost(
    reloading: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = reloading.service.models
    signature = models._read_signature
    asked = False

    def look() -> object:
        nonlocal asked
        if not asked:
            models.reload()
            asked = True
        return signature()

    monkeypatch.setattr(models, "_read_signature", look)
    until(lambda: reloads(reloading, "ok") == 1)


def test_old_models_are_garbage_collected(tmp_path: Path) -> None:
    path = tmp_path / "robust_model.pt"
    write_checkpoint(path, seed=1)
    settings = Settings(checkpoint=path, threads=1, device="cpu", reload_seconds=0.05)
    with serving(settings) as running:
        first = ref(running.service.models.current)
        sha256 = write_checkpoint(path, seed=2)
        until(lambda: served(running) == sha256)
        second = ref(running.service.models.current)
        assert running.client.post("/predict", content=png()).status_code == 200
        until(lambda: gc.collect() >= 0 and first() is None)
    gc.collect()
    assert second() is None

"""POST /evaluate and its jobs: the library's result, while predictions are served."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import robust
from app.http import sets
from app.http.sets import registered
from app.jobs.store import Unreachable
from app.settings import Settings
from robust.attacks import resolve_attack
from robust.checkpoint import load_checkpoint
from robust.datasets import Dataset
from robust.evaluation import evaluate
from robust.matching import match_classes
from robust.threat_model import ThreatModel
from robust_cli import run
from tests.support.serving import (
    CLASSES,
    Gate,
    Running,
    anew,
    gated,
    labeled,
    pixels,
    png,
    serving,
    until,
)

ATTACKS = {"attack": ["fgsm", "pgd-2"], "eps": "2/255"}


def library_result(checkpoint: Path, n: int) -> dict[str, Any]:
    loaded = load_checkpoint(checkpoint)
    return evaluate(
        loaded.classifier,
        pixels(0, n),
        torch.arange(n) % 10,
        num_classes=10,
        attacks=[
            resolve_attack(name, ThreatModel(norm="linf", eps=2 / 255))
            for name in ATTACKS["attack"]
        ],
        device=torch.device("cpu"),
    ).to_dict()


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert (found["n"], found["total"]) == (expected["n"], expected["total"])
    for mine, theirs in zip(found["results"], expected["results"], strict=True):
        assert {name: mine[name] for name in theirs} == theirs | {"seconds": mine["seconds"]}
    assert found["worst_case"] == expected["worst_case"]


def start(running: Running, data: bytes, **parameters: Any) -> dict[str, Any]:
    response = running.client.post(
        "/evaluate", files={"file": data}, data=ATTACKS | parameters, headers=anew()
    )
    assert response.status_code == 202, response.text
    status: dict[str, Any] = response.json()
    assert response.headers["Location"] == f"/evaluate/{status['id']}"
    return status


def status(running: Running, id: str) -> dict[str, Any]:
    found: dict[str, Any] = running.client.get(f"/evaluate/{id}").json()
    return found


def finish(running: Running, id: str) -> dict[str, Any]:
    until(lambda: status(running, id)["state"] not in ("queued", "running"))
    return status(running, id)


def test_result_equals_the_librarys(running: Running, checkpoint: Path) -> None:
    job = start(running, labeled(30))
    assert (job["state"], job["images"]) == ("queued", 30)
    assert [attack["attack"] for attack in job["attacks"]] == ["fgsm", "pgd-2"]
    done = finish(running, job["id"])
    assert done["state"] == "done"
    assert done["model_sha256"] == running.service.models.current.sha256
    assert_same(done["evaluation"], library_result(checkpoint, 30))
    assert done["evaluation"]["results"][0]["correct"] > 0  # else nothing was attacked
    assert done["finished"] >= done["created"]


def test_prefer_wait_returns_the_result(running: Running, checkpoint: Path) -> None:
    response = running.client.post(
        "/evaluate",
        files={"file": labeled(10)},
        data=ATTACKS,
        headers={"Prefer": "respond-async, wait=120"} | anew(),
    )
    assert response.status_code == 200
    assert response.headers["Preference-Applied"] == "wait=120"
    assert_same(response.json()["evaluation"], library_result(checkpoint, 10))


def test_prefer_wait_times_out_with_202(running: Running) -> None:
    with gated(running.service):
        begun = time.monotonic()
        response = running.client.post(
            "/evaluate",
            files={"file": labeled(9)},
            data=ATTACKS,
            headers={"Prefer": "wait=1"} | anew(),
        )
        assert 0.9 < time.monotonic() - begun < 100  # unbounded, it would be the deadline's 120
        assert response.status_code == 202
        running.client.delete(response.headers["Location"])


def test_limit_sets_the_number_of_images(running: Running) -> None:
    done = finish(running, start(running, labeled(30), limit="7")["id"])
    assert done["images"] == done["evaluation"]["total"] == 7


def test_predictions_are_served_during_an_evaluation(running: Running) -> None:
    job = start(running, labeled(500), attack="pgd-200")  # far longer than the requests below
    until(lambda: status(running, job["id"])["state"] == "running")
    for seed in range(5):
        assert running.client.post("/predict", content=png(seed)).status_code == 200
    assert running.client.post("/attack?steps=2", content=png()).status_code == 200
    assert status(running, job["id"])["state"] == "running"
    assert running.client.delete(f"/evaluate/{job['id']}").json()["state"] == "cancelled"


def test_cancelling_stops_at_the_next_step(running: Running) -> None:
    with gated(running.service) as gate:
        job = start(running, labeled(10), attack="pgd-100")
        until(lambda: gate.waiting)
        response = running.client.delete(f"/evaluate/{job['id']}")
        assert (response.status_code, response.json()["state"]) == (200, "cancelled")
        gate.open.set()
        until(lambda: not gate.waiting)
        assert running.client.post("/predict", content=png()).status_code == 200
        assert gate.calls == 2  # the step it was in, and the prediction
    assert status(running, job["id"])["state"] == "cancelled"


def test_finished_job_can_be_deleted(running: Running) -> None:
    done = finish(running, start(running, labeled(10))["id"])
    assert running.client.delete(f"/evaluate/{done['id']}").json() == done
    assert running.client.get(f"/evaluate/{done['id']}").status_code == 404


@pytest.mark.parametrize("id", ["%00", "A" * 32, "0" * 31, "%C3%A9", "0" * 32 + "%0A"])
def test_text_that_is_no_id_is_not_looked_up(
    running: Running, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: str) -> None:  # as PostgreSQL does for text with a zero byte
        raise Unreachable("it can't be looked up")

    monkeypatch.setattr(running.service.jobs._store, "get", fail)
    for method, ending in (("GET", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/report")):
        assert running.client.request(method, f"/evaluate/{id}{ending}").status_code == 404


def events(running: Running, id: str) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    name = ""
    with running.client.stream("GET", f"/evaluate/{id}/events") as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            if line.startswith("data: "):
                found.append((name, json.loads(line.removeprefix("data: "))))
    return found


def test_events_report_progress_and_the_result(running: Running, checkpoint: Path) -> None:
    with gated(running.service) as gate:
        job = start(running, labeled(250), attack="fgsm")
        gate.open.set()
        found = events(running, job["id"])
    assert {name for name, _ in found[:-1]} == {"progress"}
    name, last = found[-1]
    assert (name, last["state"]) == ("done", "done")
    assert last == status(running, job["id"])
    sizes = [item["evaluation"]["n"] for _, item in found if item["evaluation"]]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 250
    for _, item in found:
        for result in (item["evaluation"] or {"results": []})["results"]:
            low, high = result["interval"]
            assert (result["accuracy"] is None) == (result["n"] == 0)
            assert 0 <= low <= (result["accuracy"] or low) <= high <= 1
    assert [name for name, _ in events(running, job["id"])] == ["done"]  # a late watcher


def test_slow_watcher_still_sees_the_end(running: Running) -> None:
    async def seen(id: str, gate: Gate) -> list[str]:
        jobs = running.service.jobs
        states = []
        async for item in jobs.watch(await jobs.get(id)):
            states.append(item.state)
            if len(states) == 1:
                gate.open.set()
                await jobs.ended(item, 280)
        return states

    with gated(running.service) as gate:
        job = start(running, labeled(9))
        until(lambda: gate.waiting)
        states = running.begin(seen(job["id"], gate)).result(280)
    assert states == ["running", "done"]


def test_event_streams_per_client_are_limited(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = running.service.shares
    monkeypatch.setattr(shares, "client_slots", 1)
    with gated(running.service):
        job = start(running, labeled(11))
        path = f"/evaluate/{job['id']}/events"
        with running.client.stream("GET", path) as stream:
            lines = stream.iter_lines()
            assert next(lines)
            refused = running.client.get(path)
            assert refused.status_code == 429
            assert "your share" in refused.json()["detail"]
        until(lambda: not shares._watching)
        with running.client.stream("GET", path) as stream:
            assert stream.status_code == 200
        running.client.delete(f"/evaluate/{job['id']}")


def test_events_of_a_cancelled_job_end(running: Running) -> None:
    with gated(running.service):
        job = start(running, labeled(10))
        running.client.delete(f"/evaluate/{job['id']}")
        assert [name for name, _ in events(running, job["id"])] == ["cancelled"]


def test_jobs_are_limited_and_expire(checkpoint: Path) -> None:
    settings = Settings(
        checkpoint=checkpoint, threads=1, device="cpu", max_jobs=2, job_expiry_seconds=0.2
    )
    with serving(settings) as running, gated(running.service) as gate:
        jobs = [start(running, labeled(n)) for n in (10, 11)]
        response = running.client.post("/evaluate", files={"file": labeled(12)})
        assert response.status_code == 429
        assert int(response.headers["Retry-After"]) >= 1
        gate.open.set()
        for job in jobs:
            until(lambda id=job["id"]: running.client.get(f"/evaluate/{id}").status_code == 404)
        assert running.client.post("/evaluate", files={"file": labeled(10)}).status_code == 202


def test_registered_dataset_is_evaluated_by_name(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    folder.mkdir()
    (folder / "held-out.npz").write_bytes(labeled(20))
    (tmp_path / "secret.npz").write_bytes(labeled(20))
    settings = Settings(
        checkpoint=checkpoint, threads=1, device="cpu", datasets=folder, deadline_seconds=120
    )
    with serving(settings) as running:
        response = running.client.post(
            "/evaluate", data=ATTACKS | {"dataset": "held-out"}, headers={"Prefer": "wait=120"}
        )
        assert response.status_code == 200, response.text
        assert_same(response.json()["evaluation"], library_result(checkpoint, 20))
        assert str(tmp_path) not in response.text
        for name in ("../secret", str(tmp_path / "secret.npz"), "secret", "digits", ""):
            response = running.client.post("/evaluate", data={"dataset": name})
            assert response.status_code == 422
            (error,) = response.json()["errors"]
            assert error["field"] == "dataset"
            assert "held-out" in error["expected"]
            assert "secret" not in response.text


@pytest.mark.parametrize("cheap", [True, False])
def test_upload_that_waits_for_another_past_its_deadline_gets_504(
    checkpoint: Path, cheap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sets, "is_cheap", lambda _: cheap)
    settings = Settings(checkpoint=checkpoint, threads=1, device="cpu", deadline_seconds=0.2)
    with serving(settings) as running:
        slots = running.service.cheap_set_slots if cheap else running.service.set_slots
        with held(running, slots.hold("another")):
            response = running.client.post("/evaluate", content=labeled(2))
        assert response.status_code == 504


def test_registered_set_reserves_no_memory_of_the_images(checkpoint: Path, tmp_path: Path) -> None:
    for name in CLASSES:
        (tmp_path / "sets" / "photos" / name).mkdir(parents=True)
        (tmp_path / "sets" / "photos" / name / "1.png").write_bytes(png())
    settings = Settings(checkpoint=checkpoint, threads=1, device="cpu", datasets=tmp_path / "sets")
    with serving(settings) as running:
        budget = running.service.image_workers._budget
        with held(running, budget.hold(budget.total)):
            response = running.client.post("/evaluate", data=ATTACKS | {"dataset": "photos"})
        assert response.status_code == 202


@contextmanager
def held(running: Running, semaphore: AbstractAsyncContextManager[None]) -> Iterator[None]:
    """Hold a semaphore of the service while the block runs."""
    running.begin(semaphore.__aenter__()).result(280)
    try:
        yield
    finally:
        running.begin(semaphore.__aexit__(None, None, None)).result(280)


def test_large_sets_are_matched_off_the_event_loop(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def match(dataset: Dataset, classes: Sequence[str]) -> Dataset:
        threads.append(threading.current_thread().name)
        return match_classes(dataset, classes)

    monkeypatch.setattr(sets, "match_classes", match)
    finish(running, start(running, labeled(2))["id"])
    (name,) = threads
    assert name.startswith("asyncio_")


def test_failed_evaluation_reveals_no_details(running: Running) -> None:
    class Broken:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("a secret path /root")

    with gated(running.service) as gate:
        gate.inner = Broken()
        gate.open.set()
        failed = finish(running, start(running, labeled(10))["id"])
    assert failed["state"] == "failed"
    assert "secret" not in json.dumps(failed)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a set",
        labeled(0, labels=np.zeros(0, dtype=np.int64)),
        labeled(5, labels=np.arange(4)),
        labeled(5, labels=np.array([0, 1, 2, 3, 10])),
        labeled(5, labels=np.array([0, 1, 2, 3, -1])),
        labeled(5, images=np.full((5, 3, 32, 32), np.nan, dtype=np.float32)),
        labeled(5)[:-200],
    ],
    ids="empty text no-images lengths too-high negative nan truncated".split(),
)
def test_unusable_datasets_are_rejected(running: Running, data: bytes) -> None:
    response = running.client.post("/evaluate", files={"file": data})
    assert response.status_code == 422, response.text
    (error,) = response.json()["errors"]
    assert error["field"] == "file"


@pytest.mark.parametrize("labels", [[3], [3, 3], [0, 9]])
def test_http_command_line_and_library_agree(
    labels: list[int], running: Running, checkpoint: Path, tmp_path: Path
) -> None:
    """One image, one class, and fewer classes than the model knows, without their names."""
    images, path = pixels(0, len(labels)), tmp_path / "few.npz"
    np.savez(path, images=images.numpy(), labels=np.array(labels))
    job = start(running, path.read_bytes())
    arguments = ["--model", str(checkpoint), "--data", str(path), "--eps", "2/255", "--curve", "0"]
    attacks = [f"--attack={name}" for name in ATTACKS["attack"]]
    assert run(["evaluate", *arguments, *attacks, "--json", str(tmp_path / "told.json")]) == 0
    expected = robust.evaluate(
        robust.load_model(checkpoint),
        images,
        labels,
        attacks=ATTACKS["attack"],
        eps="2/255",
        curve=0,
        progress=False,
    ).to_dict()
    told = json.loads((tmp_path / "told.json").read_text())
    for found in (told, finish(running, job["id"])["evaluation"]):
        assert found["n"] == len(labels)
        for mine, theirs in zip(found["results"], expected["results"], strict=True):
            for name in ("attack", "correct", "n", "per_class", "interval", "accuracy"):
                assert mine[name] == theirs[name]


def test_unknown_class_is_rejected_everywhere(
    running: Running, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, path = pixels(0, 1), tmp_path / "eleven.npz"
    np.savez(path, images=images.numpy(), labels=np.array([10]))
    answer = running.client.post("/evaluate", files={"file": path.read_bytes()}, data=ATTACKS)
    assert answer.status_code == 422
    arguments = ["--model", str(checkpoint), "--data", str(path), "--attack", "fgsm"]
    assert run(["evaluate", *arguments]) == 2
    assert "10" in capsys.readouterr().err
    with pytest.raises(ValueError, match="labels from 0 to 9, got 10 to 10"):
        robust.evaluate(robust.load_model(checkpoint), images, [10], attacks="fgsm", progress=False)


def test_two_sets_of_one_name_keep_their_suffixes(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz", "b.pt", "c.npz", "README.md", "t10k-images-idx3-ubyte"):
        (tmp_path / name).touch()
    (tmp_path / "c").mkdir()
    found = registered(Settings(datasets=tmp_path))
    names = ("a", "b.npz", "b.pt", "c", "c.npz", "t10k-images-idx3-ubyte")
    assert sorted(found) == sorted(names)
    assert found["b.pt"] == tmp_path / "b.pt"

"""POST /evaluate and its jobs: the library's result, while predictions go on."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.settings import Settings
from robust.attacks import resolve_attack
from robust.checkpoint import load_checkpoint
from robust.evaluation import evaluate
from robust.threat_model import ThreatModel
from tests.app.serving import Gate, Running, gated, labelled, pixels, png, serving, until

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
    response = running.client.post("/evaluate", files={"file": data}, data=ATTACKS | parameters)
    assert response.status_code == 202, response.text
    status: dict[str, Any] = response.json()
    assert response.headers["Location"] == f"/evaluate/{status['id']}"
    return status


def status(running: Running, id: str) -> dict[str, Any]:
    found: dict[str, Any] = running.client.get(f"/evaluate/{id}").json()
    return found


def finish(running: Running, id: str) -> dict[str, Any]:
    until(lambda: status(running, id)["state"] not in ("queued", "running"), 60)
    return status(running, id)


def test_the_result_is_the_librarys(running: Running, checkpoint: Path) -> None:
    job = start(running, labelled(30))
    assert (job["state"], job["images"]) == ("queued", 30)
    assert [attack["attack"] for attack in job["attacks"]] == ["fgsm", "pgd-2"]
    done = finish(running, job["id"])
    assert done["state"] == "done"
    assert done["model_sha256"] == running.service.models.current.sha256
    assert_same(done["evaluation"], library_result(checkpoint, 30))
    assert done["evaluation"]["results"][0]["correct"] > 0  # else nothing was attacked
    assert done["finished"] >= done["created"]


def test_prefer_wait_answers_with_the_result(running: Running, checkpoint: Path) -> None:
    response = running.client.post(
        "/evaluate",
        files={"file": labelled(10)},
        data=ATTACKS,
        headers={"Prefer": "respond-async, wait=20"},
    )
    assert response.status_code == 200
    assert response.headers["Preference-Applied"] == "wait=20"
    assert_same(response.json()["evaluation"], library_result(checkpoint, 10))


def test_prefer_wait_gives_up_in_time(running: Running) -> None:
    with gated(running.service):
        begun = time.monotonic()
        response = running.client.post(
            "/evaluate", files={"file": labelled(9)}, data=ATTACKS, headers={"Prefer": "wait=1"}
        )
        assert 0.9 < time.monotonic() - begun < 10
        assert response.status_code == 202
        running.client.delete(response.headers["Location"])


def test_limit_scores_that_many(running: Running) -> None:
    done = finish(running, start(running, labelled(30), limit="7")["id"])
    assert done["images"] == done["evaluation"]["total"] == 7


def test_predictions_get_through_while_an_evaluation_runs(running: Running) -> None:
    job = start(running, labelled(300), attack="pgd-40")
    until(lambda: status(running, job["id"])["state"] == "running")
    for seed in range(5):
        assert running.client.post("/predict", content=png(seed)).status_code == 200
    assert running.client.post("/attack?steps=2", content=png()).status_code == 200
    assert status(running, job["id"])["state"] == "running"
    assert running.client.delete(f"/evaluate/{job['id']}").json()["state"] == "cancelled"


def test_cancelling_stops_at_the_next_step(running: Running) -> None:
    with gated(running.service) as gate:
        job = start(running, labelled(10), attack="pgd-100")
        until(lambda: gate.waiting)
        response = running.client.delete(f"/evaluate/{job['id']}")
        assert (response.status_code, response.json()["state"]) == (200, "cancelled")
        gate.open.set()
        until(lambda: not gate.waiting)
        assert running.client.post("/predict", content=png()).status_code == 200
        assert gate.calls == 2  # the step it was in, and the prediction
    assert status(running, job["id"])["state"] == "cancelled"


def test_what_has_ended_can_be_forgotten(running: Running) -> None:
    done = finish(running, start(running, labelled(10))["id"])
    assert running.client.delete(f"/evaluate/{done['id']}").json() == done
    assert running.client.get(f"/evaluate/{done['id']}").status_code == 404


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


def test_events_tell_progress_and_the_end(running: Running, checkpoint: Path) -> None:
    with gated(running.service) as gate:
        job = start(running, labelled(250), attack="fgsm")
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


def test_a_watcher_sees_the_end_also_when_it_comes_while_it_is_busy(running: Running) -> None:
    async def seen(id: str, gate: Gate) -> list[str]:
        jobs = running.service.jobs
        states = []
        async for item in jobs.watch(await jobs.get(id)):
            states.append(item.state)
            if len(states) == 1:
                gate.open.set()
                await jobs.ended(item, 30)
        return states

    with gated(running.service) as gate:
        job = start(running, labelled(9))
        until(lambda: gate.waiting)
        states = running.begin(seen(job["id"], gate)).result(60)
    assert states == ["running", "done"]


def test_events_of_a_cancelled_job_end(running: Running) -> None:
    with gated(running.service):
        job = start(running, labelled(10))
        running.client.delete(f"/evaluate/{job['id']}")
        assert [name for name, _ in events(running, job["id"])] == ["cancelled"]


def test_jobs_are_bounded_and_expire(checkpoint: Path) -> None:
    settings = Settings(
        checkpoint=checkpoint, threads=1, device="cpu", max_jobs=2, job_expiry_seconds=0.2
    )
    with serving(settings) as running, gated(running.service) as gate:
        jobs = [start(running, labelled(n)) for n in (10, 11)]
        response = running.client.post("/evaluate", files={"file": labelled(12)})
        assert response.status_code == 429
        assert int(response.headers["Retry-After"]) >= 1
        gate.open.set()
        for job in jobs:
            until(lambda id=job["id"]: running.client.get(f"/evaluate/{id}").status_code == 404)
        assert running.client.post("/evaluate", files={"file": labelled(10)}).status_code == 202


def test_a_registered_set_is_known_by_name(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    folder.mkdir()
    (folder / "held-out.npz").write_bytes(labelled(20))
    (tmp_path / "secret.npz").write_bytes(labelled(20))
    settings = Settings(checkpoint=checkpoint, threads=1, device="cpu", datasets=folder)
    with serving(settings) as running:
        response = running.client.post(
            "/evaluate", data=ATTACKS | {"dataset": "held-out"}, headers={"Prefer": "wait=20"}
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


def test_a_failed_evaluation_says_so_and_tells_nothing(running: Running) -> None:
    class Broken:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("a secret path /root")

    with gated(running.service) as gate:
        gate.inner = Broken()
        gate.open.set()
        failed = finish(running, start(running, labelled(10))["id"])
    assert failed["state"] == "failed"
    assert "secret" not in json.dumps(failed)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a set",
        labelled(0, labels=np.zeros(0, dtype=np.int64)),
        labelled(5, labels=np.arange(4)),
        labelled(5, labels=np.array([0, 1, 2, 3, 10])),
        labelled(5, labels=np.array([0, 1, 2, 3, -1])),
        labelled(5, images=np.full((5, 3, 32, 32), np.nan, dtype=np.float32)),
        labelled(5)[:-200],
    ],
    ids="empty text no-images lengths too-high negative nan truncated".split(),
)
def test_unusable_sets(running: Running, data: bytes) -> None:
    response = running.client.post("/evaluate", files={"file": data})
    assert response.status_code == 422, response.text
    (error,) = response.json()["errors"]
    assert error["field"] == "file"

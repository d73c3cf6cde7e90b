"""The client returns the service's results without importing torch."""

import io
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from app.settings import Settings
from robust import client as module
from robust.client import Client, ServiceError
from tests.support.serving import CLASSES, Running, labeled, pixels, png, serving


@pytest.fixture
def client(running: Running) -> Any:
    with Client(running.url, timeout=280) as client:
        yield client


def test_client_needs_no_torch() -> None:
    code = (
        "import sys, robust.client; "
        "print({'torch', 'numpy', 'fastapi', 'pydantic'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_predictions(client: Client, running: Running, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(png(1))
    given = [png(0), str(tmp_path / "image.png"), tmp_path / "image.png"]
    first, second, third = client.predict(*given, top_k=3)
    raw = running.client.post("/predict?top_k=3", content=png(1)).json()["results"][0]
    assert second == third != first
    assert (second.label, second.index) == (raw["label"], raw["index"])
    assert second.probability == pytest.approx(raw["probability"], abs=2e-4)
    assert [item.index for item in second.top] == [item["index"] for item in raw["top"]]
    assert second.top[0].probability == second.probability


def test_attacks(client: Client) -> None:
    fgsm, pgd = client.attack(png(), ["fgsm", "pgd"], eps="4/255", steps=2, seed=1)
    assert (fgsm.name, pgd.name) == ("fgsm", "pgd-2")
    assert pgd.parameters["eps_text"] == "4/255"
    assert pgd.linf <= 4 / 255 + 1e-9
    (alone,) = client.predict(png())  # by another runtime, perhaps, than attacks
    assert (pgd.before.label, pgd.before.index) == (alone.label, alone.index)
    assert pgd.before.probability == pytest.approx(alone.probability, abs=1e-4)
    assert pgd.success == (pgd.after.index != pgd.before.index)
    assert Image.open(io.BytesIO(pgd.image)).size == (32, 32)
    assert client.predict(pgd.image)[0].index == pgd.after.index
    (same,) = client.attack(png(), ["pgd-2"], eps=4 / 255, seed=1, norm="linf")
    assert same.image == pgd.image


def test_evaluations(client: Client, tmp_path: Path) -> None:
    (tmp_path / "set.npz").write_bytes(labeled(8))
    job = client.evaluate(tmp_path / "set.npz", ["fgsm"], limit=6, wait=120)
    assert (job.state, job.images, job.active) == ("done", 6, False)
    assert job.evaluation is not None
    assert job.evaluation["n"] == 6
    assert client.job(job.id) == job
    assert list(client.watch(job.id))[-1] == job
    assert client.cancel(job.id) == job
    for ask in (client.job, client.cancel, lambda id: next(client.watch(id))):
        with pytest.raises(ServiceError, match="404 Not found"):
            ask(job.id)


def test_registered_dataset_is_requested_by_name(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.npz").write_bytes(labeled(4))
    settings = Settings(
        checkpoint=checkpoint,
        threads=1,
        device="cpu",
        datasets=tmp_path,
        api_keys="right",
        deadline_seconds=120,
    )
    with serving(settings) as running:
        with Client(running.url, key="right", timeout=280) as client:
            assert client.evaluate(dataset="mine", attacks=["fgsm"], wait=120).images == 4
            assert client.ready()
        with Client(running.url, key="wrong") as client:
            assert client.ready()
            with pytest.raises(ServiceError) as caught:
                client.model()
            assert caught.value.status == 401
    with Client(running.url) as client:
        assert not client.ready()
        with pytest.raises(ServiceError) as caught:
            client.model()
        assert (caught.value.status, caught.value.retry_after) == (0, None)


def test_model_card(client: Client) -> None:
    assert client.model()["classes"] == list(CLASSES)


def test_errors_name_the_field(client: Client) -> None:
    with pytest.raises(ServiceError, match="422 Invalid parameters: eps: expected") as caught:
        client.attack(png(), eps=-1)
    assert caught.value.errors[0]["field"] == "eps"
    assert caught.value.request_id in str(caught.value)
    with pytest.raises(ServiceError, match="415"):
        client.predict(b"GIF89a")
    with pytest.raises(FileNotFoundError):
        client.predict("no/such/file.png")


@pytest.mark.parametrize(("failures", "answered"), [(0, True), (2, True), (3, False)])
def test_rejected_work_is_retried_if_requested(
    monkeypatch: pytest.MonkeyPatch, failures: int, answered: bool
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    bodies: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(request.read())
        if len(bodies) <= failures:
            after = {"Retry-After": "7" if len(bodies) == 1 else "99999"}
            return httpx.Response(429, json={"title": "Overloaded"}, headers=after)
        return httpx.Response(200, json={"results": []})

    with Client("http://x", transport=httpx.MockTransport(answer)) as client:
        if answered:
            assert client.predict(png()) == []
        else:
            with pytest.raises(ServiceError) as caught:
                client.predict(png())
            assert caught.value.retry_after == 99999
    assert slept == [7, 30][: min(failures, 2)]
    assert all(png() in body for body in bodies)


def test_other_errors_are_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("slept"))
    page = httpx.MockTransport(lambda _: httpx.Response(502, text="<html>a proxy</html>"))
    with Client("http://x", transport=page) as client, pytest.raises(ServiceError) as caught:
        client.predict(pixels().numpy().tobytes())
    assert (caught.value.status, caught.value.title) == (502, "Bad Gateway")


def test_single_attack_by_name(running: Running) -> None:
    with Client(running.url) as client:
        (attack,) = client.attack(png(), "fgsm")
        assert attack.name == "fgsm"
        assert attack.outcome in ("broken", "withstood")


def job(state: str) -> dict[str, Any]:
    return {
        "id": "1", "state": state, "model_sha256": "a", "images": 1, "evaluation": None,
        "error": None,
    }  # fmt: skip


def events(*states: str) -> httpx.Response:
    text = "".join(f"event: x\ndata: {json.dumps(job(state))}\n\n" for state in states)
    return httpx.Response(200, text=text, headers={"Content-Type": "text/event-stream"})


def refused(_: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused")


@pytest.mark.parametrize(
    ("answers", "seen", "status"),
    [
        ([httpx.Response(429), events("running", "done")], ["running", "done"], None),
        # The service stops, is gone for a moment, loads its model, and continues the job.
        (
            [events("running"), refused, httpx.Response(503), events("running", "done")],
            ["running", "running", "done"],
            None,
        ),
        ([events("running"), httpx.Response(404)], ["running"], 404),
        ([events("running"), refused, refused, refused], ["running"], 0),
        ([refused], [], 0),
        ([events()], [], 0),
        ([httpx.Response(503)] * 3, [], 503),
    ],
)
def test_a_watch_goes_on_over_a_restart(
    monkeypatch: pytest.MonkeyPatch, answers: list[Any], seen: list[str], status: int | None
) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    left = iter(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/evaluate/1/events"
        found = next(left)
        return found if isinstance(found, httpx.Response) else found(request)

    states: list[str] = []
    fails = nullcontext() if status is None else pytest.raises(ServiceError, match=f"^{status} ")
    with Client("http://x", transport=httpx.MockTransport(answer)) as client, fails:
        for found in client.watch("1"):
            states.append(found.state)
    assert (states, list(left)) == (seen, [])


@pytest.mark.parametrize(
    ("wait", "sent"), [(0, "0"), (0.5, "1"), (30, "30"), (1e6, "999999"), (float("inf"), "999999")]
)
def test_the_service_reads_how_long_to_wait(wait: float, sent: str) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["Prefer"] == f"wait={sent}"
        return httpx.Response(202, json=job("queued"))

    with Client("http://x", transport=httpx.MockTransport(answer)) as client:
        assert client.evaluate(b"npz", wait=wait).active


@pytest.mark.parametrize(("wait", "timeout"), [(0, 60), (50, 60), (119.5, 130)])
def test_a_request_that_waits_has_a_longer_timeout(wait: float, timeout: float) -> None:
    timeouts = []

    def answer(request: httpx.Request) -> httpx.Response:
        timeouts.append(request.extensions["timeout"]["read"])
        return httpx.Response(202, json=job("queued"))

    with Client("http://x", transport=httpx.MockTransport(answer)) as client:
        client.evaluate(b"npz", wait=wait)
        client.job("1")
    assert timeouts == [timeout, 60]


def test_negative_retries_are_refused() -> None:
    with pytest.raises(ValueError, match="expected retries of at least 0, got -1"):
        Client("http://x", retries=-1)


@pytest.mark.parametrize("text", ["<html>log in</html>", "[]"])
def test_an_answer_that_is_no_json_object_is_an_error(text: str) -> None:
    page = httpx.MockTransport(lambda _: httpx.Response(200, text=text))
    with Client("http://x", transport=page) as client:
        for ask in (client.model, lambda: client.job("1"), lambda: client.predict(png())):
            with pytest.raises(ServiceError, match="200 Not JSON: expected a JSON object"):
                ask()

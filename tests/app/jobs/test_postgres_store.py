"""Evaluation jobs in PostgreSQL: any replica serves them, and another resumes what one loses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr

from app.engine.queue import Kind
from app.jobs import postgres_pool, postgres_rows
from app.jobs import postgres_store as shared
from app.jobs.postgres_pool import Database
from app.jobs.store import StoreError
from app.metrics import Metrics
from app.settings import Settings
from benchmarks.private_postgres import PrivatePostgres, why_not
from tests.app.jobs.test_owners import check_owners
from tests.app.jobs.test_service import (
    ATTACKS,
    end_device_thread,
    finish,
    submit,
    without_seconds,
)
from tests.support.serving import Brake, Gate, Running, gated, labeled, png, serving, until

Pair = tuple[Running, Running]


@pytest.fixture(scope="module")
def postgres() -> Iterator[PrivatePostgres]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with PrivatePostgres() as postgres:
        yield postgres


@pytest.fixture(scope="module")
def settings(checkpoint: Path, postgres: PrivatePostgres) -> Settings:
    return Settings(
        checkpoint=checkpoint,
        threads=1,
        device="cpu",
        database_url=SecretStr(postgres.database()),
        max_jobs=3,
    )


@pytest.fixture(scope="module")
def pair(settings: Settings) -> Iterator[Pair]:
    """Two replicas on one database."""
    with serving(settings) as one, serving(settings) as other:
        yield one, other


def query(settings: Settings, text: str) -> list[tuple[Any, ...]]:
    assert settings.database_url is not None
    url = settings.database_url.get_secret_value()
    with psycopg.connect(url, autocommit=True, options="-c search_path=robust") as db:
        cursor = db.execute(text)
        return cursor.fetchall() if cursor.description else []


def state(running: Running, id: str) -> str:
    found: str = running.client.get(f"/evaluate/{id}").json()["state"]
    return found


@contextmanager
def both_gated(pair: Pair) -> Iterator[tuple[Gate, Gate]]:
    with ExitStack() as stack:
        one, other = (stack.enter_context(gated(running.service)) for running in pair)
        yield one, other


def running_at(pair: Pair, gates: tuple[Gate, Gate]) -> tuple[Running, Running, Gate, Gate]:
    """The replica that runs the one job there is, the other one, and their gates."""
    until(lambda: gates[0].waiting or gates[1].waiting)
    first = 0 if gates[0].waiting else 1
    return pair[first], pair[1 - first], gates[first], gates[1 - first]


def events(running: Running, id: str) -> list[str]:
    with running.client.stream("GET", f"/evaluate/{id}/events") as stream:
        lines = list(stream.iter_lines())
    return [line.removeprefix("event: ") for line in lines if line.startswith("event:")]


def test_any_replica_serves_any_job(pair: Pair) -> None:
    one, other = pair
    job = submit(one, 12, curve="6")
    assert other.client.get(f"/evaluate/{job['id']}").json()["id"] == job["id"]
    assert events(other, job["id"])[-1] == "done"
    done = finish(other, job["id"])
    assert done == one.client.get(f"/evaluate/{job['id']}").json()
    assert done["evaluation"]["n"] == 12
    assert [item["id"] for item in other.client.get("/evaluate").json()] == [job["id"]]
    other.client.delete(f"/evaluate/{job['id']}")
    assert one.client.get(f"/evaluate/{job['id']}").status_code == 404
    assert one.client.get("/evaluate").json() == []


def test_identical_requests_to_any_replica_share_one_job(pair: Pair) -> None:
    one, other = pair
    with both_gated(pair):
        first = submit(one, 13)
        assert submit(other, 13)["id"] == first["id"]
        named = submit(other, 13, key="mine")
        assert named["id"] != first["id"]
        assert submit(one, 13, key="mine")["id"] == named["id"]
        response = one.client.post(
            "/evaluate",
            files={"file": labeled(14)},
            data=ATTACKS,
            headers={"Idempotency-Key": "mine"},
        )
        assert response.status_code == 422
        assert response.json()["errors"][0]["field"] == "Idempotency-Key"
        submit(one, 15)
        response = other.client.post("/evaluate", files={"file": labeled(16)}, data=ATTACKS)
        assert (response.status_code, "3 evaluations" in response.text) == (429, True)
        assert int(response.headers["Retry-After"]) >= 1
        for job in one.client.get("/evaluate").json():
            assert other.client.delete(f"/evaluate/{job['id']}").json()["state"] == "cancelled"
        # What was cancelled is not what somebody who asks again wants.
        again = submit(one, 13)
        assert again["id"] != first["id"]
        other.client.delete(f"/evaluate/{again['id']}")
        forget_all(pair)


def forget_all(pair: Pair) -> None:
    for running in pair:
        for job in running.client.get("/evaluate").json():
            running.client.delete(f"/evaluate/{job['id']}")
    assert pair[0].client.get("/evaluate").json() == []


def test_job_can_be_cancelled_at_another_replica(pair: Pair, settings: Settings) -> None:
    with both_gated(pair) as gates:
        job = submit(pair[0], 17)
        runner, asked, gate, _ = running_at(pair, gates)
        calls = gate.calls
        assert asked.client.delete(f"/evaluate/{job['id']}").json()["state"] == "cancelled"
        assert events(runner, job["id"]) == ["cancelled"]
        engine = runner.service.engine
        until(lambda: engine._queue._pending[Kind.EVALUATE] == 0)  # given back at once
        gate.open.set()
        until(lambda: not engine._running_kinds)
        assert gate.calls == calls  # not one step more
    assert not query(settings, "SELECT 1 FROM images")
    forget_all(pair)


def expected_result(pair: Pair, n: int) -> dict[str, Any]:
    job = finish(pair[0], submit(pair[0], n)["id"])
    forget_all(pair)
    evaluation: dict[str, Any] = without_seconds(job["evaluation"])
    return evaluation


def undisturbed(running: Running, n: int) -> tuple[dict[str, Any], int]:
    """The result of an evaluation, and the passes of the model that it takes."""
    with gated(running.service) as gate:
        gate.open.set()
        job = finish(running, submit(running, n, key="undisturbed")["id"])
    return without_seconds(job["evaluation"]), gate.calls


def test_job_of_a_lost_replica_resumes_elsewhere(
    settings: Settings, postgres: PrivatePostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared.SharedStore, "journal_seconds", 0.0)
    monkeypatch.setattr(shared.SharedStore, "show_seconds", 0.0)
    own = settings.model_copy(update={"database_url": SecretStr(postgres.database())})
    with serving(own) as runner:
        expected, passes = undisturbed(runner, 120)
        with gated(runner.service) as gate:
            brake = Brake(gate, passes - 2)
            job = submit(runner, 120)
            until(brake.waiting.is_set)
            until(lambda: query(own, "SELECT 1 FROM evaluations WHERE length(journal) > 0"))
            with serving(own) as heir, gated(heir.service) as other:
                other.open.set()
                judge(heir, silent=runner)
                found = finish(heir, job["id"])
                # The one that was only silent wakes up, and writes over nothing.
                brake.released.set()
                until(lambda: runner.service.engine._queue._pending[Kind.EVALUATE] == 0)
                assert runner.client.get(f"/evaluate/{job['id']}").json() == found
    assert (found["id"], found["created"], found["state"]) == (job["id"], job["created"], "done")
    assert without_seconds(found["evaluation"]) == expected
    assert other.calls < passes  # without the journal it would be all of them again


def judge(running: Running, *, silent: Running | None = None) -> list[list[str]]:
    """Have the replica look for lost jobs, as after having reported for long.

    It takes `silent` for one that reported for the last time an hour ago: in the same transaction,
    as that one goes on reporting. Returns the replicas that are held for lost, of each job.
    """
    upkeep = store(running)._maintenance

    async def work() -> list[list[str]]:
        async with store(running)._database.connection() as db:
            if silent is not None:
                await db.execute(SILENCE, (store(silent)._replica,))
            await upkeep._requeue_lost_jobs(db)
            found = await db.execute("SELECT lost_by FROM evaluations")
            return [row["lost_by"] for row in await found.fetchall()]

    return running.begin(work()).result(280)


SILENCE = "UPDATE replicas SET seen = now() - interval '1h' WHERE id = %s"


def store(running: Running) -> shared.SharedStore:
    found = running.service.jobs._store
    assert isinstance(found, shared.SharedStore)
    return found


def test_stopping_replica_hands_its_job_over_at_once(
    settings: Settings, postgres: PrivatePostgres
) -> None:
    url = SecretStr(postgres.database())
    # Nobody is taken for lost while this test runs.
    own = settings.model_copy(update={"database_url": url, "lost_seconds": 600})
    with serving(own) as leaving:
        expected, passes = undisturbed(leaving, 120)
        with gated(leaving.service) as gate:
            brake = Brake(gate, passes - 2)
            job = submit(leaving, 120)
            until(brake.waiting.is_set)
            with serving(own) as heir, gated(heir.service) as other:
                other.open.set()
                handing = leaving.begin(leaving.service.jobs.hand_over())
                until(leaving.evaluation_cancelled)
                brake.released.set()
                handing.result(280)
                found = finish(heir, job["id"])
                assert leaving.client.get(f"/evaluate/{job['id']}").json() == found
    assert without_seconds(found["evaluation"]) == expected
    assert other.calls < passes  # without the journal it would be all of them again
    assert query(own, "SELECT lost_by FROM evaluations WHERE key IS NULL") == [([],)]


def test_impossible_job_fails_with_a_reason(pair: Pair, settings: Settings) -> None:
    with both_gated(pair) as gates:
        unserved, deadly, damaged = (submit(pair[0], n)["id"] for n in (20, 21, 22))
        until(lambda: gates[0].waiting and gates[1].waiting)
        query(settings, f"UPDATE images SET content = '' WHERE evaluation = '{damaged}'")
        query(settings, f"UPDATE evaluations SET lost_by = '{{a,b,c}}' WHERE id = '{deadly}'")
        query(
            settings,
            "UPDATE evaluations SET state = 'queued', model = 'another', "
            f"changed = now() - interval '1h' WHERE id = '{unserved}'",
        )
        judge(pair[0])
        for gate in gates:
            gate.open.set()
        errors = [finish(pair[1], id)["error"] for id in (unserved, deadly, damaged)]
    assert errors == [
        "The model it was started with is no longer served.",
        "3 replicas were lost while running it, without progress in between.",
        "Its images were lost while the service was down.",
    ]
    forget_all(pair)


def test_images_stored_in_parts_are_read_back(
    pair: Pair, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_rows, "PART_BYTES", 5000)
    expected = expected_result(pair, 23)
    with both_gated(pair):
        submit(pair[0], 23, key="parts")
        ((parts,),) = query(settings, "SELECT count(*) FROM images")
        assert parts == 1 + -(-23 * 3 * 32 * 32 // 5000)
    (job,) = pair[1].client.get("/evaluate").json()
    found = without_seconds(finish(pair[1], job["id"])["evaluation"])
    # Another function searched, that of the gate, so that the probes differ a little.
    assert found["results"] == expected["results"]
    forget_all(pair)


def test_finished_jobs_expire(pair: Pair, settings: Settings) -> None:
    id = finish(pair[0], submit(pair[0], 24)["id"])["id"]
    query(settings, "UPDATE evaluations SET finished = finished - interval '2h'")
    assert pair[1].client.get(f"/evaluate/{id}").status_code == 404
    assert pair[1].client.get("/evaluate").json() == []
    again = submit(pair[0], 24)["id"]
    assert again != id
    forget_all(pair)


def test_stored_bytes_are_limited_across_replicas(pair: Pair, settings: Settings) -> None:
    with both_gated(pair):
        submit(pair[0], 25)
        query(settings, f"UPDATE evaluations SET bytes = {settings.jobs_bytes - 1000}")
        response = pair[1].client.post("/evaluate", files={"file": labeled(26)}, data=ATTACKS)
        assert (response.status_code, "no room" in response.text) == (429, True)
        assert len(query(settings, "SELECT 1 FROM evaluations")) == 1
        forget_all(pair)
    forget_all(pair)


def test_predictions_continue_without_postgresql(
    pair: Pair, settings: Settings, postgres: PrivatePostgres
) -> None:
    expected = expected_result(pair, 27)
    one, other = pair
    job = submit(one, 27)
    postgres.stop()
    try:
        assert one.client.post("/predict", content=png()).status_code == 200
        assert one.client.post("/attack", content=png()).status_code == 200
        assert one.client.get("/readyz").status_code == 200
        for response in (
            one.client.post("/evaluate", files={"file": labeled(28)}, data=ATTACKS),
            other.client.get("/evaluate"),
            other.client.get(f"/evaluate/{job['id']}"),
            other.client.delete(f"/evaluate/{job['id']}"),
        ):
            assert response.status_code == 503
            assert int(response.headers["Retry-After"]) >= 1
            assert "can't be reached" in response.json()["detail"]
            assert "postgres" not in response.text.lower()
        until(lambda: "robust_store_up 0.0" in one.client.get("/metrics").text)
    finally:
        postgres.start()
    until(lambda: all(item.client.get("/evaluate").status_code == 200 for item in pair))
    found = finish(other, job["id"])
    assert without_seconds(found["evaluation"]) == expected
    until(lambda: "robust_store_up 1.0" in one.client.get("/metrics").text)
    forget_all(pair)


def test_replica_starts_without_postgresql(checkpoint: Path) -> None:
    settings = Settings(
        checkpoint=checkpoint,
        threads=1,
        device="cpu",
        database_url=SecretStr("postgresql://nobody@127.0.0.1:1/none"),
    )
    with serving(settings) as running:
        assert running.client.post("/predict", content=png()).status_code == 200
        assert running.client.get("/evaluate").status_code == 503


def test_invalid_database_url_is_reported_without_its_password() -> None:
    with pytest.raises(ValueError, match="ROBUST_DATABASE_URL") as caught:
        Database("postgresql://me:secret@host/x?nonsense=1", Metrics().store_up)
    assert "secret" not in str(caught.value)


# Outages and other tables


def upkeep(running: Running) -> None:
    """One round of the replica's upkeep, failed or not."""
    with suppress(StoreError):
        running.begin(store(running)._maintenance.once()).result(280)


def test_database_outage_marks_no_replica_lost(
    pair: Pair, settings: Settings, postgres: PrivatePostgres
) -> None:
    with both_gated(pair) as gates:
        job = submit(pair[0], 31)
        runner, other, gate, _ = running_at(pair, gates)
        for _ in range(3):
            postgres.stop()
            upkeep(other)
            postgres.start()
            until(lambda: other.client.get("/evaluate").status_code == 200)
            silent = f"'{store(runner)._replica}'"  # as if it had lasted an hour
            query(settings, SILENCE % silent)
            upkeep(other)
        assert query(settings, "SELECT state, run, lost_by FROM evaluations") == [
            ("running", 1, [])
        ]
        gate.open.set()
        done = finish(other, job["id"])
        assert done["state"] == "done"
        assert query(settings, "SELECT run FROM evaluations") == [(1,)]  # it was never repeated
    forget_all(pair)


def test_result_finished_during_an_outage_is_kept(
    pair: Pair, settings: Settings, postgres: PrivatePostgres
) -> None:
    with both_gated(pair) as gates:
        job = submit(pair[0], 32)
        runner, other, gate, _ = running_at(pair, gates)
        postgres.stop()
        try:
            gate.open.set()
            until(lambda: runner.service.engine._queue._pending[Kind.EVALUATE] == 0)
        finally:
            postgres.start()
        until(lambda: other.client.get("/evaluate").status_code == 200)
        assert finish(other, job["id"])["state"] == "done"
        assert query(settings, "SELECT run FROM evaluations") == [(1,)]
    forget_all(pair)


def test_replica_that_heartbeats_again_is_not_lost(pair: Pair, settings: Settings) -> None:
    with both_gated(pair) as gates:
        submit(pair[0], 33)
        runner, other, _, _ = running_at(pair, gates)
        assert judge(other, silent=runner) == [[store(runner)._replica]]
        upkeep(runner)
        assert query(settings, "SELECT lost_by FROM evaluations") == [([],)]
        forget_all_active(pair)


def test_a_replica_whose_device_thread_ended_counts_as_lost(
    pair: Pair, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(settings) as third, gated(third.service) as gate, monkeypatch.context() as patched:
        for running in pair:  # so that the third replica claims the job
            patched.setattr(store(running), "_serving", lambda: None)
        job = submit(third, 35)
        until(lambda: gate.waiting)
        end_device_thread(third, gate)
        submit(pair[0], 36)
        time.sleep(3)  # longer than the third replica would wait before it claims the next job
        replica = store(third)._replica
        rows = query(settings, "SELECT state, replica FROM evaluations ORDER BY created")
        assert rows == [("running", replica), ("queued", None)]
        seen = query(settings, f"SELECT seen FROM replicas WHERE id = '{replica}'")
        upkeep(third)
        assert query(settings, f"SELECT seen FROM replicas WHERE id = '{replica}'") == seen
        assert [replica] in judge(pair[0], silent=third)
        patched.undo()
        assert finish(pair[0], job["id"])["state"] == "done"
    forget_all_active(pair)


def forget_all_active(pair: Pair) -> None:
    for job in pair[0].client.get("/evaluate").json():
        pair[0].client.delete(f"/evaluate/{job['id']}")
    forget_all(pair)


def test_failed_schema_check_does_not_block_requests(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, database = pair[0], store(pair[0])._database

    async def fail(*_: object) -> None:
        raise psycopg.OperationalError("couldn't get a connection")

    with monkeypatch.context() as patched:
        patched.setattr(postgres_pool, "_version", fail)
        with pytest.raises(StoreError):
            one.begin(database.prepare()).result(280)
        assert one.client.get("/evaluate").status_code == 200


def test_unresponsive_postgresql_times_out_after_three_seconds(
    pair: Pair, postgres: PrivatePostgres
) -> None:
    one = pair[0]
    with postgres.frozen():
        begun = time.monotonic()
        assert one.client.get("/evaluate").status_code == 503
        answered = time.monotonic() - begun
        until(lambda: "robust_store_up 0.0" in one.client.get("/metrics").text)
        response = one.client.post("/evaluate", files={"file": labeled(34)}, data=ATTACKS)
        assert "can't be reached" in response.json()["detail"]
    assert answered < 10  # 3 on a machine that does nothing else; without a deadline never
    until(lambda: one.client.get("/evaluate").status_code == 200)
    until(lambda: "robust_store_up 1.0" in one.client.get("/metrics").text)


def test_schema_version_change_is_noticed_while_running(pair: Pair, settings: Settings) -> None:
    one = pair[0]
    query(settings, "UPDATE robust_version SET version = version + 1")
    upkeep(one)
    try:
        assert one.client.get("/evaluate").status_code == 503
        assert "robust_store_up 0.0" in one.client.get("/metrics").text
        assert one.client.post("/predict", content=png()).status_code == 200
    finally:
        query(settings, "UPDATE robust_version SET version = version - 1")
        upkeep(one)
    assert one.client.get("/evaluate").status_code == 200
    assert "robust_store_up 1.0" in one.client.get("/metrics").text


def test_query_finishing_after_a_schema_change_does_not_report_the_store_up(
    pair: Pair, settings: Settings
) -> None:
    one, database = pair[0], store(pair[0])._database

    async def query_across(begun: asyncio.Event, end: asyncio.Event) -> None:
        async with database.connection():
            begun.set()
            await end.wait()

    async def check() -> None:
        begun, end = asyncio.Event(), asyncio.Event()
        slow = asyncio.create_task(query_across(begun, end))
        await begun.wait()
        with suppress(StoreError):
            await store(one)._maintenance.once()
        end.set()
        await slow

    query(settings, "UPDATE robust_version SET version = version + 1")
    try:
        one.begin(check()).result(280)
        assert "robust_store_up 0.0" in one.client.get("/metrics").text
    finally:
        query(settings, "UPDATE robust_version SET version = version - 1")
        upkeep(one)
    assert "robust_store_up 1.0" in one.client.get("/metrics").text


def test_owners_share_a_database(pair: Pair) -> None:
    with gated(pair[1].service):  # so that no job is done before it is asked for
        check_owners(pair[0])
    forget_all(pair)

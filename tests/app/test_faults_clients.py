"""Clients that disconnect, send slowly or never read: all their resources are released."""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from app.settings import Settings
from tests.support.faults import connect, prediction, statuses, unharmed, vanish
from tests.support.serving import Running, gated, labeled, png, serving, until

AT_ONCE = 50
UPLOAD_SECONDS = 2.0
HEAD = b"%s HTTP/1.1\r\nHost: x\r\n"
BUNDLE = b"GET /docs/assets/swagger-ui-bundle.js"  # larger than what sockets hold
PREDICT, ATTACK = b"POST /predict", b"POST /attack?attack=pgd"
SET = labeled(100)


@pytest.fixture(scope="module")
def patient(checkpoint: Path) -> Iterator[Running]:
    settings = Settings(
        checkpoint=checkpoint, threads=1, device="cpu", upload_seconds=UPLOAD_SECONDS
    )
    with serving(settings) as running:
        yield running


def whole(start: bytes, body: bytes) -> bytes:
    return HEAD % start + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunked(start: bytes, body: bytes) -> bytes:
    return HEAD % start + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body


def form(body: bytes) -> bytes:
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    return part + body + b"\r\n--b--"


def uploads() -> list[bytes]:
    body = form(png())
    multipart = HEAD % PREDICT + b"Content-Type: multipart/form-data; boundary=b\r\n"
    return [
        whole(PREDICT, png()),
        whole(ATTACK, png()),
        whole(b"POST /evaluate?attack=pgd-100", SET),
        whole(b"POST /v2/models/robust/infer", bytes(20_000)),
        chunked(PREDICT, png()),
        multipart + b"Content-Length: %d\r\n\r\n" % len(body) + body,
    ]


@pytest.mark.parametrize("n", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_clients_disconnecting_while_sending(
    patient: Running, n: int, caplog: pytest.LogCaptureFixture
) -> None:
    random, requests = Random(0), uploads()
    with unharmed(patient):
        before = statuses(patient)
        for _ in range(n // AT_ONCE):
            connections = [connect(patient) for _ in range(AT_ONCE)]
            for connection in connections:
                request = random.choice(requests)
                connection.sendall(request[: random.randrange(len(request))])
            for connection in connections:
                vanish(connection, reset=random.random() < 0.5)
        # Nothing that was never whole became work, or is waited for until the time is over.
        assert not patient.client.get("/evaluate").json()
    assert_no_failures(patient, before, caplog)


@pytest.mark.parametrize("n", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_clients_disconnecting_before_the_response(
    patient: Running, n: int, caplog: pytest.LogCaptureFixture
) -> None:
    random = Random(1)
    with unharmed(patient):
        before = statuses(patient)
        job = patient.client.post("/evaluate?attack=pgd-3&eps=1/255", content=SET).json()["id"]
        requests = [
            whole(PREDICT, png()),
            whole(PREDICT, png()),
            whole(ATTACK, png()),
            whole(b"GET /evaluate/%s/events" % job.encode(), b""),
            whole(BUNDLE, b"") * 3,
        ]
        for _ in range(n // AT_ONCE):
            connections = [connect(patient, receive_buffer=4096) for _ in range(AT_ONCE)]
            for connection in connections:
                connection.sendall(random.choice(requests))
            time.sleep(random.choice((0, 0.01, 0.05)))
            for connection in connections:
                if random.random() < 0.2:
                    assert connection.recv(1)  # in the middle of it
                vanish(connection, reset=random.random() < 0.5)
        # The evaluation is nobody's connection: it goes on, and loses no image.
        until(lambda: patient.client.get(f"/evaluate/{job}").json()["state"] == "done")
        assert patient.client.delete(f"/evaluate/{job}").json()["evaluation"]["n"] == 100
        assert statuses(patient)["499"] > before["499"]
    assert_no_failures(patient, before, caplog)


def test_attack_of_a_disconnected_client_stops_at_its_next_step(patient: Running) -> None:
    with unharmed(patient), gated(patient.service) as gate:
        connection = connect(patient)
        connection.sendall(whole(b"POST /attack?attack=pgd-200", png()))
        until(lambda: gate.waiting)
        vanish(connection, reset=True)
        until(lambda: not patient.service.in_flight.count)
        gate.open.set()
        until(lambda: not gate.waiting)
        assert patient.client.get("/livez").status_code == 200
        assert gate.calls == 1


def test_slow_senders_time_out_while_others_are_served(patient: Running) -> None:
    half = [request[: len(request) // 2] for request in uploads()]
    with unharmed(patient):
        before = statuses(patient)
        connections = [connect(patient) for _ in range(200)]
        for index, connection in enumerate(connections):
            connection.sendall(half[index % len(half)] if index % 2 else HEAD % PREDICT)
        began, answered = time.monotonic(), 0
        while time.monotonic() - began < UPLOAD_SECONDS:
            prediction(patient)
            answered += 1
            for connection in connections[::4]:  # a byte now and then buys no time
                drop(connection)
        until(lambda: not patient.service.in_flight.count)
        assert answered > 0
        assert statuses(patient)["408"] - before["408"] == 100
        for connection in connections:
            wait_for_close(connection)
            connection.close()


def test_clients_that_never_read_are_disconnected(patient: Running) -> None:
    with unharmed(patient):
        connections = [connect(patient, receive_buffer=4096) for _ in range(20)]
        for connection in connections:
            connection.sendall(whole(BUNDLE, b"") * 8)
        until(lambda: patient.service.in_flight.count == len(connections))
        until(lambda: not patient.service.in_flight.count)
        for connection in connections:
            connection.close()


def test_slow_reader_gets_the_whole_response(patient: Running) -> None:
    expected = patient.client.get(BUNDLE.decode().split()[1]).content
    with unharmed(patient), connect(patient, receive_buffer=65536) as connection:
        connection.sendall(HEAD % BUNDLE + b"Connection: close\r\n\r\n")
        answer, began = b"", time.monotonic()
        while piece := connection.recv(8192):
            answer += piece
            time.sleep(2.5 * UPLOAD_SECONDS * len(piece) / len(expected))
        assert time.monotonic() - began > 2 * UPLOAD_SECONDS
        assert answer.partition(b"\r\n\r\n")[2] == expected


def test_malformed_chunked_body_ends_its_request_quietly(
    patient: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with unharmed(patient), gated(patient.service) as gate:
        before = statuses(patient)
        for sent in (
            chunked(PREDICT, png()) + b"garbage",
            chunked(b"GET /livez", b"abc") + b"garbage",
        ):
            with connect(patient) as connection:
                connection.sendall(sent)
                assert connection.recv(12)[9:] in (b"400", b"200")
                wait_for_close(connection)
        gate.open.set()
        # An answer that has begun can only be ended.
        with connect(patient) as connection:
            connection.sendall(HEAD % b"GET /livez" + b"Transfer-Encoding: chunked\r\n\r\n")
            assert connection.recv(12)[9:] == b"200"
            connection.sendall(b"garbage\r\n")
            wait_for_close(connection)
    assert_no_failures(patient, before, caplog)


def assert_no_failures(
    running: Running, before: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    """No 5xx response and no logged error since `before`."""
    failed = {status: n for status, n in (statuses(running) - before).items() if status >= "5"}
    logged = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert (failed, logged) == ({}, [])


def drop(connection: socket.socket) -> None:
    try:
        connection.send(b"x")
    except OSError:  # cut off by now
        pass


def wait_for_close(connection: socket.socket) -> None:
    """Read until the service closes the connection; raises TimeoutError if it doesn't."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass

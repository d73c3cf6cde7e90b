"""Unusual and malformed requests over a bare connection."""

import asyncio
import json
import socket
import time
from contextlib import suppress

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from app.http.connection import (
    MAX_HEAD_BYTES,
    MAX_PIPELINED,
    SLICE_BYTES,
    OpenConnections,
    connection_class,
)
from app.http.trust import trusted_addresses
from tests.support.faults import connect, unharmed
from tests.support.serving import Running, gated, png, until

HEAD = b"%s HTTP/1.1\r\nHost: x\r\n"
FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%s\r\n--b--'


def exchange(running: Running, sent: bytes) -> bytes:
    """All that the service answers before it ends the connection."""
    with connect(running) as connection:
        connection.sendall(sent)
        return read_to_end(connection)


def read_to_end(connection: socket.socket) -> bytes:
    answer = b""
    while piece := connection.recv(65536):
        answer += piece
    return answer


@pytest.mark.parametrize(
    "sent",
    [
        b"garbage\r\n\r\n",
        b"BREW /livez HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
        HEAD % b"GET /livez" + b"Host: y\r\n\r\n",
        HEAD % b"GET /livez" + b"A: " + MAX_HEAD_BYTES * b"a",
        HEAD % b"GET /livez" + (MAX_HEAD_BYTES // 6 + 1) * b"A: b\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        HEAD % b"POST /predict" + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
    ids=[
        "garbage",
        "method",
        "no host",
        "two hosts",
        "a long header",
        "many headers",
        "tunnel",
        "two sizes",
    ],
)
def test_malformed_request_gets_400_and_close(running: Running, sent: bytes) -> None:
    with unharmed(running):
        head, _, body = exchange(running, sent).partition(b"\r\n\r\n")
        lines = head.decode().splitlines()
        headers = dict(line.lower().split(": ", 1) for line in lines[1:])
        problem = json.loads(body)
        assert (lines[0], problem["status"]) == ("HTTP/1.1 400 Bad Request", 400)
        assert headers["content-type"] == "application/problem+json"
        assert headers["x-request-id"] == problem["request_id"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["connection"] == "close"
        assert int(headers["content-length"]) == len(body)


def test_head_of_the_maximum_length_is_accepted(running: Running) -> None:
    head = HEAD % b"GET /livez" + b"Connection: close\r\n"
    filled = head + b"A: " + (MAX_HEAD_BYTES - len(head) - 7) * b"a" + b"\r\n\r\n"
    assert len(filled) == MAX_HEAD_BYTES
    assert exchange(running, filled).startswith(b"HTTP/1.1 200")


def test_garbage_after_a_request_does_not_lose_its_response(running: Running) -> None:
    image = png()
    request = HEAD % b"POST /predict" + b"Content-Length: %d\r\n\r\n" % len(image) + image
    with unharmed(running), gated(running.service) as gate, connect(running) as connection:
        connection.sendall(request + b"garbage\r\n\r\n")
        gate.open.set()
        answer = read_to_end(connection)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.count(b"HTTP/1.1") == 1


def test_pipelined_requests_are_answered_in_order(running: Running) -> None:
    one = HEAD % b"GET /livez" + b"X-Request-ID: %s\r\n"
    sent = b"".join(one % name + b"\r\n" for name in (b"a", b"b")) + one % b"c"
    answer = exchange(running, sent + b"Connection: close\r\n\r\n")
    ids = [line for line in answer.split(b"\r\n") if line.lower().startswith(b"x-request-id")]
    assert [line[-1:] for line in ids] == [b"a", b"b", b"c"]


def test_chunked_trailers_are_not_headers(running: Running) -> None:
    image = png()
    sent = HEAD % b"POST /predict" + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    sent += b"%x\r\n%s\r\n0\r\nX-Request-ID: smuggled\r\n\r\n" % (len(image), image)
    answer = exchange(running, sent)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"smuggled" not in answer


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_unsupported_upgrade_is_ignored(running: Running, protocol: bytes, pieces: int) -> None:
    body = FORM % png()
    head = HEAD % b"POST /predict" + b"Connection: Upgrade, Close\r\nUpgrade: %s\r\n" % protocol
    head += b"Content-Type: multipart/form-data; boundary=b\r\n"
    sent = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    step = -(-len(sent) // pieces)
    with unharmed(running), connect(running) as connection:
        for begin in range(0, len(sent), step):
            connection.sendall(sent[begin : begin + step])
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"HTTP/1.1") == 1


def chunked(path: bytes, sent: bytes) -> bytes:
    return HEAD % (b"POST " + path) + b"Transfer-Encoding: chunked\r\n\r\n" + sent


def test_pipelined_requests_are_limited(running: Running) -> None:
    with unharmed(running), gated(running.service) as gate, connect(running) as connection:
        image = png()
        head = HEAD % b"POST /predict" + b"Content-Length: %d\r\n\r\n" % len(image)
        connection.sendall(head + image + 100 * (HEAD % b"GET /livez" + b"\r\n"))
        gate.open.set()
        assert read_to_end(connection).count(b"HTTP/1.1 200") == 1 + MAX_PIPELINED


@pytest.mark.parametrize("trailer", [b"A: ", b"A: b\r\n"])
def test_chunked_trailers_are_limited(running: Running, trailer: bytes) -> None:
    filled = trailer + 2 * MAX_HEAD_BYTES // len(trailer) * (
        trailer if trailer.endswith(b"\n") else b"aaa"
    )
    sent = chunked(b"/predict", b"3\r\nabc\r\n0\r\n" + filled)
    with unharmed(running), connect(running) as connection:
        connection.sendall(sent)
        assert connection.recv(12)[9:] == b"400"


def test_broken_body_does_not_lose_the_previous_response(running: Running) -> None:
    image = png()
    request = HEAD % b"POST /predict" + b"Content-Length: %d\r\n\r\n" % len(image) + image
    with unharmed(running), gated(running.service) as gate, connect(running) as connection:
        connection.sendall(request + chunked(b"/predict", b"ZZ\r\n"))
        gate.open.set()
        answer = read_to_end(connection)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.count(b"HTTP/1.1") == 1


def test_request_answered_before_its_body_gets_one_response(running: Running) -> None:
    with connect(running) as connection:
        connection.sendall(chunked(b"/nowhere", b""))
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 404")
        connection.sendall(b"ZZ\r\n")
        assert b"HTTP/1.1" not in read_to_end(connection)


def test_body_is_not_counted_toward_the_next_head(running: Running) -> None:
    body = 3 * MAX_HEAD_BYTES * b"a"
    sent = HEAD % b"POST /predict" + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with connect(running) as connection:
        connection.sendall(sent + b"GET /livez HTTP/1.1\r\n")
        time.sleep(0.3)
        connection.sendall(b"Host: x\r\nConnection: close\r\n\r\n")
        answer = read_to_end(connection)
        assert (answer.count(b"HTTP/1.1 200"), answer.count(b"HTTP/1.1")) == (1, 2)


@pytest.mark.parametrize("before", [b"", HEAD % b"GET /livez" + b"\r\n"])
def test_disconnect_after_pipelined_requests_is_noticed(
    running: Running, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    service = running.service
    patient = service.settings.model_copy(update={"deadline_seconds": 3600.0})
    monkeypatch.setattr(service, "settings", patient)
    image = png()
    request = HEAD % b"POST /predict" + b"Content-Length: %d\r\n\r\n" % len(image) + image
    with gated(running.service) as gate:
        with connect(running) as connection:
            connection.sendall(before + 2 * request)
            until(lambda: gate.waiting == 1)
        in_flight = running.service.in_flight
        # Though the gate is still closed, and long before the deadline would end it.
        until(lambda: in_flight.posts == 0)


@pytest.mark.parametrize(
    ("target", "answered"), [(b"http://x/livez", True), (b"http://y/livez", False)]
)
def test_absolute_target_must_match_the_host_header(
    running: Running, target: bytes, answered: bool
) -> None:
    with connect(running) as connection:
        connection.sendall(HEAD % (b"GET " + target) + b"\r\n")
        assert connection.recv(12)[9:] == (b"200" if answered else b"400")


@pytest.mark.parametrize(("size", "refused"), [(1, True), (100, False)])
def test_body_in_tiny_chunks_is_rejected(running: Running, size: int, refused: bool) -> None:
    sent = chunked(b"/predict", b"%x\r\n%s\r\n" % (size, size * b"a") * (500_000 // size))
    with unharmed(running), connect(running) as connection:
        try:
            connection.sendall(sent + b"0\r\n\r\n")
            answer = connection.recv(12)
        except OSError:  # it is closed while we write
            answer = b"HTTP/1.1 413"
        assert answer == (b"HTTP/1.1 413" if refused else b"HTTP/1.1 415")


def test_request_after_a_large_body_is_counted_separately(running: Running) -> None:
    # In one slice of what arrives, the first ends and the second's body has begun.
    sizes = SLICE_BYTES * 16 + 100, 2 * SLICE_BYTES
    requests = [
        HEAD % b"POST /predict" + b"Content-Length: %d\r\n\r\n" % size + bytes(size)
        for size in sizes
    ]
    with unharmed(running), connect(running) as connection:
        connection.sendall(b"".join(requests))
        answers = b""
        while answers.count(b"HTTP/1.1 ") < 2 and (piece := connection.recv(65536)):
            answers += piece
        assert answers.count(b"HTTP/1.1 415") == 2, answers


def test_connections_per_address_are_limited() -> None:
    connections = OpenConnections(4, share=0.5, proxies=trusted_addresses(["10.0.0.0/8"]))
    asked = ["a", "a", "a", "10.0.0.1", "10.0.0.1", "b"]
    assert [connections.admit(address) for address in asked] == [
        True,
        True,
        False,
        True,
        True,
        False,
    ]
    connections.leave("a")
    assert connections.admit("b")
    for address in ("a", "b", "10.0.0.1", "10.0.0.1"):
        connections.leave(address)
    assert not connections._open


def test_connection_over_the_limit_is_closed_at_once(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unharmed(running):
        with connect(running) as first:
            first.sendall(HEAD % b"GET /livez" + b"\r\n")
            assert first.recv(12)[9:] == b"200"
            monkeypatch.setattr(OpenConnections, "admit", lambda *_: False)
            with connect(running) as second, suppress(ConnectionResetError):
                second.sendall(HEAD % b"GET /livez" + b"\r\n")
                assert second.recv(12) == b""
            first.sendall(HEAD % b"GET /livez" + b"\r\n")
            assert first.recv(12)
        monkeypatch.undo()


async def answer_50_kilobytes(scope: Scope, receive: Receive, send: Send) -> None:
    headers = [(b"content-length", b"50000")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": bytes(50_000)})


@pytest.mark.parametrize("header", [b"Connection: close\r\n", b""])
def test_closing_does_not_wait_for_a_client_that_reads_nothing(header: bytes) -> None:
    """Though what it does not read is too little for asyncio to pause the response."""

    async def run() -> None:
        config = uvicorn.Config(answer_50_kilobytes, lifespan="off", log_config=None)
        config.timeout_keep_alive = 0  # seconds
        config.load()
        state, loop = ServerState(), asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

        def make() -> asyncio.Protocol:
            made: asyncio.Protocol = connection_class(0.2)(
                config=config, server_state=state, app_state={}
            )
            return made

        with theirs:
            await loop.create_connection(make, sock=ours)
            theirs.sendall(HEAD % b"GET /" + header + b"\r\n")
            async with asyncio.timeout(280):
                while not state.total_requests:
                    await asyncio.sleep(0.01)
                while state.connections:
                    await asyncio.sleep(0.01)

    asyncio.run(run())

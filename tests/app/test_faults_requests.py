"""Malformed requests over bare sockets: each gets a response, none a 5xx."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.settings import Settings
from tests.support.broken_requests import broken_requests
from tests.support.faults import unharmed
from tests.support.serving import Running, serving

AT_ONCE = 32


async def answers(running: Running, requests: Iterator[bytes]) -> list[tuple[bytes, bytes]]:
    """What comes back for each request, until the service closes or has answered it whole."""
    host, port = running.url.removeprefix("http://").split(":")
    found: list[tuple[bytes, bytes]] = []

    async def ask() -> None:
        for request in requests:
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                async with asyncio.timeout(280):  # past it: a hang
                    writer.write(request)
                    found.append((request, await _answer(reader)))
            finally:
                writer.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(ask())
    return found


async def _answer(reader: asyncio.StreamReader) -> bytes:
    answer = b""
    try:
        while not _complete(answer):
            piece = await reader.read(65536)
            if not piece:
                break
            answer += piece
    except ConnectionResetError:  # closed on what we still had to say
        pass
    return re.sub(rb"^(HTTP/1\.1 1\d\d [^\r]*\r\n(.+\r\n)*\r\n)+", b"", answer)


def _complete(answer: bytes) -> bool:
    head, separator, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    return bool(
        separator and length and len(body) >= int(length[1]) and b"connection: close" not in head
    )


@pytest.fixture(scope="module")
def fuzzed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = Settings(
        checkpoint=checkpoint,
        threads=1,
        device="cpu",
        upload_seconds=1,
        jobs=tmp_path_factory.mktemp("fuzzed") / "jobs",
    )
    with serving(settings) as running:
        yield running


@pytest.mark.parametrize("n", [2000, pytest.param(40_000, marks=pytest.mark.slow)])
def test_mutated_requests_never_bring_a_5xx(fuzzed: Running, n: int) -> None:
    with unharmed(fuzzed):
        found = asyncio.run(answers(fuzzed, broken_requests(n, seed=n)))
    assert len(found) == n
    statuses = Counter(int(answer[9:12]) if answer else 0 for _, answer in found)
    assert max(statuses) < 500, statuses
    # Of each kind of fault some got as far as that, and hardly any was left without a word.
    assert {200, 400, 404, 405, 408, 413, 415, 422} <= set(statuses), statuses
    assert statuses[0] < n / 20, statuses
    for _, answer in found:
        head, _, body = answer.partition(b"\r\n\r\n")
        if b"application/problem+json" in head and body:
            length = int(re.findall(rb"content-length: (\d+)", head)[0])
            assert json.loads(body[:length])["status"] == int(answer[9:12])

"""Allowed hosts, other origins, proxies, HEAD, and evaluations of other keys."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.errors import Forbidden, UnknownHost
from app.http.trust import LOOPBACK_HOSTS, check_host, check_origin, client_address
from app.settings import Settings
from tests.app.http.test_errors import assert_problem
from tests.support.faults import connect, unharmed
from tests.support.serving import Running, gated, labeled, png, serving, until

KEYS = {name: {"X-API-Key": f"key-of-{name}"} for name in ("ann", "bob", "admin")}


@pytest.fixture(scope="module")
def shared(checkpoint: Path) -> Iterator[Running]:
    settings = Settings(
        checkpoint=checkpoint,
        threads=1,
        device="cpu",
        api_keys="key-of-ann,key-of-bob",
        admin_keys="key-of-admin",
    )
    with serving(settings) as running:
        yield running


@pytest.fixture(scope="module")
def local(checkpoint: Path) -> Iterator[Running]:
    settings = Settings(
        checkpoint=checkpoint, threads=1, device="cpu", allowed_hosts=",".join(LOOPBACK_HOSTS)
    )
    with serving(settings) as running:
        yield running


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost:8000", True), ("LOCALHOST", True), ("a.localhost", True), ("127.0.0.1", True),
        ("127.0.0.9:80", True), ("[::1]:8000", True), ("evil.example", False), ("", False),
        ("127.0.0.1.evil.example", False), ("localhost.evil.example", False), ("[::2]", False),
        ("localhost:8000@evil.example", False), ("127.0.0.1:80:90", False), ("localhost, x", False),
    ],
)  # fmt: skip
def test_only_loopback_hosts_are_allowed(host: str, allowed: bool) -> None:
    try:
        check_host({b"host": host.encode()}, LOOPBACK_HOSTS)
    except UnknownHost:
        assert not allowed
    else:
        assert allowed


@pytest.mark.parametrize(
    ("method", "headers", "allowed"),
    [
        ("POST", {}, True),
        ("GET", {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}, True),
        ("POST", {"origin": "https://evil.example"}, False),
        ("DELETE", {"origin": "null"}, False),
        ("POST", {"sec-fetch-site": "cross-site"}, False),
        ("POST", {"sec-fetch-site": "same-site", "origin": "http://other.here:8000"}, False),
        ("POST", {"sec-fetch-site": "same-origin", "origin": "https://public.example"}, True),
        ("POST", {"sec-fetch-site": "none"}, True),
        ("POST", {"origin": "http://here:8000"}, True),
        ("POST", {"origin": "http://here:9000"}, False),
        ("POST", {"origin": "http://["}, False),
        ("POST", {"origin": "https://friend.example", "sec-fetch-site": "cross-site"}, True),
    ],
)
def test_cross_origin_writes_are_rejected(
    method: str, headers: dict[str, str], allowed: bool
) -> None:
    fields = {"host": "here:8000"} | headers
    given = {name.encode(): value.encode() for name, value in fields.items()}
    try:
        check_origin(method, given, ["https://friend.example"])
    except Forbidden:
        assert not allowed
    else:
        assert allowed


def test_rejected_origin_or_host_gets_no_model_header(local: Running) -> None:
    for headers, status in (
        ({"Origin": "https://evil.example"}, 403),
        ({"Host": "evil.example"}, 400),
    ):
        response = local.client.post("/predict", content=png(), headers=headers)
        assert_problem(response, status)
        assert "X-Model-SHA256" not in response.headers
    assert local.client.get("/model", headers={"Host": "evil.example"}).status_code == 400
    assert local.client.post("/predict", content=png()).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/v2/models/robust/ready"],
)
def test_probes_work_with_any_host_and_name_no_model(local: Running, path: str) -> None:
    response = local.client.get(path, headers={"Host": "10.1.2.3:8000"})
    assert response.status_code == 200
    assert "X-Model-SHA256" not in response.headers
    assert "X-Model-SHA256" in local.client.get(path).headers


def test_bare_prefix_serves_the_page(checkpoint: Path) -> None:
    settings = Settings(
        checkpoint=checkpoint, threads=1, device="cpu", api_keys="key", root_path="/robust"
    )
    with serving(settings) as running:
        assert running.client.get("/robust").headers["Location"] == "/robust/"
        assert running.client.get("/robust", follow_redirects=True).status_code == 200


def test_bodies_of_other_methods_than_post_are_dropped(running: Running) -> None:
    packed, in_flight = gzip.compress(bytes(2**20)), running.service.in_flight
    head = (
        b"GET /evaluate/%s/events HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\n"
        b"Content-Length: %d\r\n\r\n"
    )
    with unharmed(running), gated(running.service), connect(running) as connection:
        id = running.client.post("/evaluate?attack=fgsm", content=labeled(40)).json()["id"]
        connection.sendall(head % (id.encode(), len(packed) + 1) + packed)
        assert connection.recv(12) == b"HTTP/1.1 200"
        until(lambda: in_flight.count == 1)
        time.sleep(0.2)  # the body arrives, though not all of it
        assert running.service.shares.bytes == 0
        running.client.delete(f"/evaluate/{id}")


def test_redirects_stay_on_the_host(running: Running) -> None:
    response = running.client.get("/docs/", headers={"Host": "evil.example"})
    assert response.status_code == 307
    assert response.headers["Location"] == "/docs"
    prefix = {"X-Forwarded-Prefix": "/robust"}
    assert running.client.get("/docs/", headers=prefix).headers["Location"] == "/robust/docs"


@pytest.mark.parametrize(
    "path",
    ["/", "/docs", "/openapi.json", "/livez", "/readyz", "/model", "/limits", "/metrics",
     "/evaluate", "/v2", "/v2/health/live", "/v2/models/robust", "/playground/page.css"],
)  # fmt: skip
def test_head_matches_get(running: Running, path: str) -> None:
    got, head = running.client.get(path), running.client.head(path)
    assert head.status_code == got.status_code
    assert head.content == b""
    differ = {"x-request-id", "date", "content-length"}
    assert {k: v for k, v in head.headers.items() if k not in differ} == {
        k: v for k, v in got.headers.items() if k not in differ
    }


def test_head_of_an_event_stream_ends_at_once(running: Running) -> None:
    job = running.client.post("/evaluate?attack=pgd-100", content=labeled(100)).json()["id"]
    head = running.client.head(f"/evaluate/{job}/events")
    assert head.headers["Content-Type"].startswith("text/event-stream")
    assert running.client.get(f"/evaluate/{job}").json()["state"] in ("queued", "running")
    running.client.delete(f"/evaluate/{job}")
    until(lambda: not running.service.in_flight.count)
    assert running.client.head("/predict").status_code == 405


def test_response_without_a_key_has_no_model_header(shared: Running) -> None:
    response = shared.client.get("/model")
    assert_problem(response, 401)
    assert "X-Model-SHA256" not in response.headers
    assert "X-Model-SHA256" in shared.client.get("/model", headers=KEYS["ann"]).headers


def test_evaluations_belong_to_the_key_that_started_them(shared: Running) -> None:
    def ask(method: str, who: str, path: str = "/evaluate", **named: object) -> httpx.Response:
        return shared.client.request(method, path, headers=KEYS[who], **named)  # type: ignore[arg-type]

    body = {"content": labeled(4), "params": {"attack": "fgsm"}}
    first, second = (ask("POST", who, **body).json()["id"] for who in ("ann", "bob"))
    assert first != second
    assert [item["id"] for item in ask("GET", "ann").json()] == [first]
    assert [item["id"] for item in ask("GET", "bob").json()] == [second]
    assert {item["id"] for item in ask("GET", "admin").json()} == {first, second}
    for path in (f"/evaluate/{first}", f"/evaluate/{first}/events", f"/evaluate/{first}/report"):
        assert_problem(ask("GET", "bob", path), 404)
    assert_problem(ask("DELETE", "bob", f"/evaluate/{first}"), 404)
    until(lambda: ask("GET", "admin", f"/evaluate/{first}").json()["state"] == "done")
    assert ask("DELETE", "admin", f"/evaluate/{first}").status_code == 200


def test_service_works_behind_a_path_prefix(running: Running) -> None:
    prefix = {"X-Forwarded-Prefix": "/lab/robust"}
    response = running.client.post(
        "/evaluate?attack=fgsm", content=labeled(3, seed=5), headers=prefix
    )
    place = response.headers["Location"]
    assert place.startswith("/lab/robust/evaluate/")
    # Whether the proxy takes the prefix off or not.
    for path in (place, place.removeprefix("/lab/robust")):
        assert running.client.get(path, headers=prefix).status_code == 200
    document = running.client.get("/openapi.json", headers=prefix).json()
    assert document["servers"] == [{"url": "/lab/robust"}]
    assert "servers" not in running.client.get("/openapi.json").json()
    for path in ("/lab/robust/predict", "/predict"):
        assert running.client.post(path, content=png(), headers=prefix).status_code == 200
    for bad in ("//evil.example", "/a b", "evil", "/x?y"):
        odd = running.client.get("/docs/", headers={"X-Forwarded-Prefix": bad})
        assert odd.headers["Location"] == "/docs"
    running.client.delete(place, headers=prefix)


def test_forwarded_headers_need_a_trusted_proxy(checkpoint: Path) -> None:
    settings = Settings(
        checkpoint=checkpoint, threads=1, device="cpu", trusted_proxies="10.0.0.0/8", root_path="/r"
    )
    with serving(settings) as running:
        headers = {"X-Forwarded-Prefix": "/evil", "X-Forwarded-For": "192.0.2.1"}
        response = running.client.get("/docs/", headers=headers)
        assert response.headers["Location"] == "/r/docs"


def test_client_is_an_ipv4_address_or_an_ipv6_64_network() -> None:
    found = [client_address({"client": (host, 1)}) for host in ("192.0.2.1", "2001:db8::1", "x:y")]
    assert found == ["192.0.2.1", "2001:db8::/64", "x:y"]
    mapped = {client_address({"client": (f"::ffff:192.0.2.{n}", 1)}) for n in (1, 2)}
    assert mapped == {"192.0.2.1", "192.0.2.2"}


def test_hosts_and_origins_are_compared_as_browsers_send_them() -> None:
    given = "Example.ORG:8080, *.example.net, [::1]:80, [::2], ::3, 127.0.0.1"
    settings = Settings(allowed_hosts=given, cors_origins="https://Example.ORG")
    assert settings.cors_origins == ("https://example.org",)
    for host in ("example.org", "a.example.net", "[::1]:8000", "[::2]", "[::3]", "127.0.0.1"):
        check_host({b"host": host.encode()}, settings.allowed_hosts)
    for host in ("https://example.org", "a b", "exa*mple.org"):
        with pytest.raises(ValueError, match="comma-separated hosts"):
            Settings(allowed_hosts=host)


@pytest.mark.parametrize("name", ["api_keys", "admin_keys", "allowed_hosts", "cors_origins"])
@pytest.mark.parametrize("value", [" ", ",", " , "])
def test_empty_list_disables_no_protection(name: str, value: str) -> None:
    with pytest.raises(ValueError, match="at least one value"):
        Settings(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/predict", {"top_k": "1_0"}),
        ("/attack", {"steps": "2_0"}),
        ("/attack", {"steps": "٣"}),
        ("/attack", {"eps": "1_0/255"}),
        ("/attack", {"eps": "1/inf"}),
        ("/attack", {"eps": "٨/255"}),
        ("/attack", {"seed": "1e1"}),
        ("/attack", {"attack": "pgd-1_0"}),
        ("/attack", {"attack": "pgd-٣"}),
        ("/attack", {"restarts": "0x1"}),
    ],
)
def test_numbers_must_be_plain_ascii(running: Running, path: str, query: dict[str, str]) -> None:
    assert_problem(running.client.post(path, content=png(), params=query), 422)

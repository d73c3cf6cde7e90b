"""API keys, origins and the headers of every response."""

import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.errors import ServeError, Unauthorized
from app.http import auth
from app.server import read_settings
from app.settings import Settings
from tests.app.http.test_errors import assert_problem
from tests.support.serving import Running, png, serving, until

KEYS = ("first-key-of-two", "second-key")
ORIGIN = "https://pages.example"


def settings(checkpoint: Path, **more: Any) -> Settings:
    return Settings(
        checkpoint=checkpoint,
        threads=1,
        device="cpu",
        api_keys=", ".join(KEYS),
        cors_origins=ORIGIN,
        max_body_bytes=50_000,
        **more,
    )


@pytest.fixture(scope="module")
def locked(checkpoint: Path) -> Iterator[Running]:
    with serving(settings(checkpoint)) as running:
        yield running


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", ["Authorization", "X-API-Key"])
def test_any_of_the_keys_is_accepted(locked: Running, key: str, name: str) -> None:
    value = f"Bearer {key}" if name == "Authorization" else key
    response = locked.client.post("/predict", content=png(), headers={name: value})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": KEYS[0]},
        {"Authorization": f"Basic {KEYS[0]}"},
        {"Authorization": f"Bearer {KEYS[0][:-1]}"},
        {"Authorization": f"Bearer {KEYS[0]}x"},
        {"Authorization": "Bearer wrong", "X-API-Key": KEYS[0]},
        {"X-API-Key": ",".join(KEYS)},
        {"X-API-Key": b"\xff"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/predict"), ("GET", "/model"), ("GET", "/no/such/route")]
)
def test_missing_or_wrong_key_returns_401(
    locked: Running, method: str, path: str, headers: dict[str, Any]
) -> None:
    response = locked.client.request(method, path, headers=headers)
    assert_problem(response, 401)
    assert response.headers["WWW-Authenticate"].startswith("Bearer")


def test_every_key_digest_is_compared_also_after_a_match(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return left == right

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    keys = auth.Keys(["a", "bb", "c" * 1000], ["admin"])
    for given, fits in (("a", True), ("c" * 1000, True), ("no", False), ("", False)):
        compared.clear()
        scope = {"path": "/predict", "headers": [(b"x-api-key", given.encode())]}
        try:
            keys.identify(scope, "/predict")
        except Unauthorized:
            assert not fits
        else:
            assert fits
        assert compared == [(32, 32)] * 4


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/docs", "/openapi.json", "/"])
def test_probes_and_pages_need_no_key(locked: Running, path: str) -> None:
    assert locked.client.get(path, follow_redirects=True).status_code == 200


@pytest.mark.parametrize("path", ["/livez/", "/LIVEZ", "/docs/assets", "/playgroundx", "/metrics"])
def test_other_paths_need_a_key(locked: Running, path: str) -> None:
    assert locked.client.get(path).status_code == 401


@pytest.mark.parametrize(
    ("prefix", "method", "path", "status"),
    [
        # The prefix alone is the page, whatever it is called: a redirect to the same with a slash.
        ("/predict", "POST", "/predict", 307), ("/evaluate", "GET", "/evaluate", 307),
        ("/evaluate", "POST", "/evaluate", 307), ("/metrics", "GET", "/metrics", 307),
        ("/predict", "POST", "/predict/", 405), ("/predict", "GET", "/predict/", 200),
        # Below it, the rest of the path decides, whether the proxy took the prefix off or not.
        ("/predict", "POST", "/predict/predict", 401), ("/livez", "GET", "/livez/model", 401),
        ("/docs/assets", "GET", "/docs/assets/model", 401),
        ("/playground", "POST", "/playground/predict", 401), ("/x", "GET", "/x/livez", 200),
        ("/x", "POST", "/predict", 401), ("/x", "POST", "/x/predict", 401),
        ("/x", "GET", "/x/docs", 200), ("/x", "GET", "/livez", 200), ("/x", "GET", "/xlivez", 401),
        ("/pre", "POST", "/predict", 401), ("/x", "GET", "/x/x/livez", 401),
        # Other ways to write a path.
        ("", "POST", "//predict", 401), ("", "POST", "/predict/", 401),
        ("", "POST", "/%70redict", 401), ("", "POST", "/playground/%2e%2e/predict", 405),
        ("", "GET", "/playground/%2e%2e/model", 404), ("", "GET", "/docs/assets/%2e%2e/model", 404),
    ],
)  # fmt: skip
def test_key_is_required_by_the_path_that_is_routed(
    locked: Running, prefix: str, method: str, path: str, status: int
) -> None:
    url, headers = f"{locked.url}{path}", {"X-Forwarded-Prefix": prefix}
    response = locked.client.request(method, url, headers=headers)
    assert response.status_code == status


def test_key_is_checked_before_the_body_is_read(locked: Running) -> None:
    host, port = locked.url.removeprefix("http://").split(":")
    for head in (b"Content-Length: 40000", b"Transfer-Encoding: chunked"):
        with socket.create_connection((host, int(port)), timeout=120) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 401"


def test_keys_are_never_logged(locked: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        locked.client.get("/model", headers={"X-API-Key": KEYS[0]})
        locked.client.get("/model", headers={"X-API-Key": "wrong-key"})
    assert not any(key in caplog.text for key in (*KEYS, "wrong-key"))
    assert not any(key in repr(locked.service.settings) for key in KEYS)


@pytest.mark.parametrize("name", ["api_keys", "cors_origins"])
@pytest.mark.parametrize("value", ["two words", "ключ"])
def test_malformed_lists_are_rejected(name: str, value: str) -> None:
    with pytest.raises(ValueError, match="comma-separated") as caught:
        Settings(**{name: value})
    assert caught.value.errors()[0]["loc"] == (name,)  # type: ignore[attr-defined]


def test_lists_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().api_keys == Settings().cors_origins == ()
    monkeypatch.setenv("ROBUST_API_KEYS", " a, b,,")
    monkeypatch.setenv("ROBUST_CORS_ORIGINS", "https://a.example,http://b.example:8080")
    settings = Settings()
    assert [key.get_secret_value() for key in settings.api_keys] == ["a", "b"]
    assert settings.cors_origins == ("https://a.example", "http://b.example:8080")
    monkeypatch.setenv("ROBUST_API_KEYS", "")
    assert Settings().api_keys == ()


# Origins


def test_cors_rejects_other_origins(running: Running, locked: Running) -> None:
    for service, origin in ((running, ORIGIN), (locked, "https://other.example")):
        response = service.client.get("/livez", headers={"Origin": origin})
        assert "Access-Control-Allow-Origin" not in response.headers


def test_cors_allows_a_configured_origin(locked: Running) -> None:
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    # A browser sends no key with what it asks before.
    before = locked.client.options(
        "/predict", headers=asked | {"Access-Control-Request-Headers": "x-api-key"}
    )
    assert before.status_code == 200
    assert "x-api-key" in before.headers["Access-Control-Allow-Headers"]
    for key, status in ((KEYS[0], 200), ("wrong", 401)):
        response = locked.client.post(
            "/predict", content=png(), headers={"Origin": ORIGIN, "X-API-Key": key}
        )
        assert response.status_code == status
        assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert "Access-Control-Allow-Credentials" not in response.headers


# Headers


EVERY = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/docs"),
        ("GET", "/docs/assets/swagger-ui.css"),
        ("GET", "/openapi.json"),
        ("GET", "/livez"),
        ("GET", "/metrics"),
        ("GET", "/no/such/route"),
        ("DELETE", "/predict"),
        ("POST", "/predict"),
    ],
)
def test_every_response_has_the_security_headers(running: Running, method: str, path: str) -> None:
    response = running.client.request(method, path)
    for name, value in EVERY.items():
        assert response.headers[name] == value
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in policy
    assert "base-uri 'none'" in policy
    assert not re.search(r"https?:|\*|'unsafe-eval'", policy)
    scripts = re.search(r"script-src ([^;]*)", policy)
    assert "'unsafe-inline'" not in (scripts[1] if scripts else "")
    assert ("no-store" in response.headers.get("Cache-Control", "")) == (
        "ETag" not in response.headers
    )


def test_docs_page_policy_allows_its_own_script(running: Running) -> None:
    from base64 import b64encode
    from hashlib import sha256

    response = running.client.get("/docs")
    (inline,) = re.findall(r"<script>(.*?)</script>", response.text, re.DOTALL)
    digest = b64encode(sha256(inline.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in response.headers["Content-Security-Policy"]
    # Nothing else is inline but one style sheet.
    assert response.text.count("<style>") == 1
    assert not re.search(r"\son\w+=|\sstyle=|javascript:", response.text)


# Slow senders


@pytest.fixture(scope="module")
def hasty(checkpoint: Path) -> Iterator[Running]:
    """The same, but a request must arrive within a second."""
    with serving(settings(checkpoint, upload_seconds=1)) as running:
        yield running


def connected(running: Running) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=120)


def answered(connection: socket.socket) -> bytes:
    answer = b""
    while not answer.endswith(b"}"):
        answer += connection.recv(65536)
    return answer


@pytest.mark.parametrize("sent", [b"", b"GET /livez HTT", b"GET /livez HTTP/1.1\r\nHost: x\r\nA"])
def test_incomplete_request_head_closes_the_connection(hasty: Running, sent: bytes) -> None:
    with connected(hasty) as connection:
        connection.sendall(sent)
        assert connection.recv(1000) == b""


def closed_while_sending(connection: socket.socket, drop: bytes) -> bool:
    """Whether the other side ends a connection on which `drop` is sent again and again."""
    connection.settimeout(0.1)
    for _ in range(300):
        try:
            connection.sendall(drop)
            if not connection.recv(65536):
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


def test_slowly_sent_head_closes_the_connection(hasty: Running) -> None:
    with connected(hasty) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\n")
        assert closed_while_sending(connection, b"A: b\r\n")


def test_connection_may_be_idle_between_requests(hasty: Running) -> None:
    head = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
    with connected(hasty) as connection:
        for _ in range(3):
            connection.sendall(head)
            connection.sendall(b"\r\n")
            assert answered(connection).startswith(b"HTTP/1.1 200")
        until(lambda: hasty.service.in_flight.count == 0)
        connection.settimeout(1.5)  # idle between two requests for longer than a head may take
        with pytest.raises(TimeoutError):
            connection.recv(1000)
        connection.sendall(head + b"\r\n")
        assert answered(connection).startswith(b"HTTP/1.1 200")


def test_endless_body_after_the_response_closes_the_connection(hasty: Running) -> None:
    with connected(hasty) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 40000\r\n\r\nabc")
        assert connection.recv(12) == b"HTTP/1.1 401"
        assert closed_while_sending(connection, b"d")


def test_invalid_api_keys_setting_is_not_echoed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUST_API_KEYS", "my secret key")
    with pytest.raises(ServeError, match=r"ROBUST_API_KEYS: expected .*keys of visible") as caught:
        read_settings()
    assert "my secret key" not in str(caught.value)

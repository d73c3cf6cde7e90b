"""Two replicas behind nginx, one killed: what `benchmarks/replicas.py` shows, in small."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.replicas import CONFIGURATION, missing
from tests.app.conftest import write_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_killed_replica_loses_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model.pt")
    command = [sys.executable, "benchmarks/replicas.py", "--checkpoint", str(tmp_path / "model.pt")]
    command += ["--images", "100", "--eps", "1/255", "--clients", "2", "--lost-seconds", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same result: yes" in done.stdout


def test_nginx_retries_safe_requests() -> None:
    text = CONFIGURATION.read_text()
    places = {part.split()[0]: part for part in text.split("location ")[1:]}
    assert set(places) == {"/", "/evaluate"}
    assert all("non_idempotent" in part for part in places.values())
    # Its 503 is PostgreSQL's absence, and must not put a replica out of service for predictions.
    assert "http_503" in places["/"].split("location")[0]
    assert "http_503" not in places["/evaluate"]


def test_nginx_replaces_the_headers_that_the_service_trusts() -> None:
    # In the server's block; a location with a header of its own would inherit none of them.
    server, *locations = CONFIGURATION.read_text().split("location ")
    for header in ("X-Forwarded-For $remote_addr", "X-Forwarded-Proto $scheme"):
        assert f"proxy_set_header {header};" in server
    assert 'proxy_set_header X-Forwarded-Prefix "";' in server
    assert not any("proxy_set_header" in part for part in locations)

"""The check for known vulnerabilities never passes without a response."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SAFE = {"name": "a", "version": "1", "vulns": []}
VULNERABLE = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "status", "told"),
    [
        ([SAFE], 0, "0 known vulnerabilities in 1 packages"),
        ([SAFE, VULNERABLE], 1, "b 2 has CVE-1, fixed in 2.1"),
        ([SAFE, UNKNOWN], 0, "no data on c"),
        ([UNKNOWN, UNKNOWN], 75, "not done"),
        ([], 75, "not done"),
    ],
)
def test_reports(
    audit: ModuleType,
    packages: list[dict[str, Any]],
    status: int,
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert audit.judge({"dependencies": packages}) == status
    assert told in capsys.readouterr().out


def test_no_response_is_reported_and_does_not_pass(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Done:
        stdout, stderr = "", "a traceback\nConnectionError: no such host\n"

    monkeypatch.setattr(audit.subprocess, "run", lambda *_, **__: Done)
    assert audit.main() == 75
    assert "not done" in (line := capsys.readouterr().out)
    assert "no such host" in line


def test_make_check_passes_only_without_a_response() -> None:
    rule = re.search(r"^check: test.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert rule is not None
    assert ".ci/audit.py || [ $$? -eq 75 ]" in rule[1]

"""Checks the pinned packages of constraints.txt for known vulnerabilities, with pip-audit.

Exits with 0 if there are none, 1 if there are, and UNANSWERED if the database did not answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
UNANSWERED = 75  # EX_TEMPFAIL of sysexits.h: a retry may succeed
SECONDS = 300


def main() -> int:
    """Run the check, print its result, and return the exit status."""
    try:
        report = ask()
    except (ValueError, subprocess.TimeoutExpired) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else "no answer"
        return _say(
            f"audit: not done, the vulnerability database did not answer ({reason[:200]})",
            UNANSWERED,
        )
    return judge(report)


def ask() -> dict[str, Any]:
    """pip-audit's report. Raises ValueError with its error output if it has none."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(ROOT / "constraints.txt")]
    command += ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if not done.stdout.strip():
        raise ValueError(done.stderr)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def judge(report: dict[str, Any]) -> int:
    """Print a report and return the exit status."""
    packages = report["dependencies"]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    found = [
        f"audit: {package['name']} {package['version']} has {item['id']}, fixed in "
        f"{', '.join(item['fix_versions']) or 'no version yet'}"
        for package in packages
        for item in package.get("vulns", [])
    ]
    if len(unknown) == len(packages):  # a mirror with files but no vulnerability data
        return _say(
            "audit: not done, the vulnerability database knows none of the packages", UNANSWERED
        )
    for line in found:
        _say(line, 1)
    if unknown:
        _say(f"audit: no data on {', '.join(unknown)}", 0)
    asked = len(packages) - len(unknown)
    return _say(f"audit: {len(found)} known vulnerabilities in {asked} packages", int(bool(found)))


def _say(line: str, status: int) -> int:
    sys.stdout.write(line + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())

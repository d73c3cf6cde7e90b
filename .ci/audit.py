"""Looks for known holes in the pinned set of constraints.txt, with pip-audit.

Exits with 0 when there are none, 1 when there are, and UNANSWERED when nobody could be asked.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
UNANSWERED = 75  # as sysexits.h has it: a failure that may be over next time
SECONDS = 300


def main() -> int:
    """Ask, tell, and return the exit status."""
    try:
        report = ask()
    except (ValueError, subprocess.TimeoutExpired) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else "no answer"
        return _tell(
            f"audit: not done, the service could not be asked ({reason[:200]})", UNANSWERED
        )
    return judge(report)


def ask() -> dict[str, Any]:
    """pip-audit's report. Raises ValueError with what it said when it has none."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(ROOT / "constraints.txt")]
    command += ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if not done.stdout.strip():
        raise ValueError(done.stderr)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def judge(report: dict[str, Any]) -> int:
    """The exit status for a report, told in lines."""
    packages = report["dependencies"]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    holes = [
        f"audit: {package['name']} {package['version']} has {hole['id']}, mended in "
        f"{', '.join(hole['fix_versions']) or 'no version yet'}"
        for package in packages
        for hole in package.get("vulns", [])
    ]
    if len(unknown) == len(packages):  # a mirror of the registry that has files and nothing else
        return _tell("audit: not done, the service knew none of the packages", UNANSWERED)
    for line in holes:
        _tell(line, 1)
    if unknown:
        _tell(f"audit: nothing is known of {', '.join(unknown)}", 0)
    asked = len(packages) - len(unknown)
    return _tell(f"audit: {len(holes)} known holes in {asked} packages", int(bool(holes)))


def _tell(line: str, status: int) -> int:
    sys.stdout.write(line + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())

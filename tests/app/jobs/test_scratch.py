"""Scratch folders are removed with their process, or when the next one starts."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app.jobs.disk import JobFolder
from app.jobs.scratch import remove_abandoned, scratch_folder

HOLD = """
import sys
from app.jobs.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "journal").write_text("much")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_scratch_folder_of_a_killed_process_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    jobs = tmp_path / "robust-jobs"  # no scratch folder of ours
    JobFolder(jobs).close()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with scratch_folder() as own, process.stdin, process.stdout:
        theirs = Path(process.stdout.readline().strip())
        assert theirs.parent == own.parent == tmp_path
        remove_abandoned()
        assert own.is_dir()
        assert theirs.is_dir()  # its process lives
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert theirs.is_dir()
        remove_abandoned()
        assert own.is_dir()
        assert not theirs.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["robust-jobs"]
    assert (jobs / "jobs.sqlite").is_file()

import errno
import hashlib
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pytest

from robust import files

ROOT = Path(__file__).parents[2]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the kernel refuse more than `size` bytes in a file, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def names(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir()}


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.bin"
    for content in (b"first", b"second"):
        files.write_atomic(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert names(path.parent) == {"a.bin"}


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        files.write_json(tmp_path / "a.json", {})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


def test_write_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with largest_file(1000), pytest.raises(OSError, match="too large") as caught:
        files.write_atomic(path, lambda file: file.write(b"x" * 100_000))
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"a.bin"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_any_failing_call_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(OSError, match="No space left"):
            files.write_atomic(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"a.bin"}


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def write(file: IO[bytes]) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(tmp_path / "a.bin", write)
    assert names(tmp_path) == set()


STAGE = """
import sys, time
from pathlib import Path
from robust import files

def write(file):
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(280)

path = Path(sys.argv[1])
if sys.argv[2] == "staged":
    files.stage(path, lambda file: file.write(b"whole"))
    print("staged", flush=True)
    time.sleep(280)
files.write_atomic(path, write)
"""


@pytest.mark.parametrize("moment", ["writing", "staged"])
def test_temporary_file_of_a_killed_process_is_removed_by_the_next_write(
    tmp_path: Path, moment: str
) -> None:
    path = tmp_path / "model [1].pt"
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE, path, moment], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == f"{moment}\n"
        (tmp_path / ".other.pt.abcdefgh.tmp").write_bytes(b"of another file")
        files.write_atomic(path, lambda file: file.write(b"mine"))
        left = names(tmp_path) - {path.name, ".other.pt.abcdefgh.tmp"}
        assert len(left) == 1  # the living process may still need it
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    files.write_atomic(path, lambda file: file.write(b"mine"))
    assert names(tmp_path) == {path.name, ".other.pt.abcdefgh.tmp"}
    assert path.read_bytes() == b"mine"


def open_in(folder: Path) -> list[str]:
    """Files in that folder that this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # of another thread, and closed meanwhile
            found.append(os.readlink(link))
    return [name for name in found if name.startswith(str(folder))]


def test_staged_file_is_kept_during_other_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    staged = files.stage(path, lambda file: file.write(b"first"))
    files.write_atomic(path, lambda file: file.write(b"second"))
    files.commit(staged, path)
    assert path.read_bytes() == b"first"
    files.discard(files.stage(path, lambda file: file.write(b"third")))
    assert names(tmp_path) == {"a.bin"}
    assert not open_in(tmp_path)


def test_json_is_read_back(tmp_path: Path) -> None:
    value = {"name": "Katze, ü", "numbers": [1, 2.5, None]}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    with pytest.raises(ValueError, match="nested too deep"):
        files.from_json(b"[" * 200_000)
    assert files.to_json(value).endswith(b"\n")
    assert "ü".encode() in files.to_json(value)


def test_non_finite_json_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", float("nan"))
    assert names(tmp_path) == set()


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()

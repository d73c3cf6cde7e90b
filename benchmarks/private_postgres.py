"""A private PostgreSQL server in a temporary folder, with a socket in that folder."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OPTIONS = "-c listen_addresses='' -c fsync=off -c max_connections=200"


def find_programs() -> Path | None:
    """The folder of PostgreSQL's programs, which are not on the PATH in Debian."""
    if found := shutil.which("pg_ctl"):
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    return folders[-1].parent if folders else None


def why_not() -> str | None:
    """Why no server can be started here, or None."""
    if find_programs() is None:
        return "PostgreSQL is not installed"
    if os.geteuid() == 0 and _owner() is None:
        return "PostgreSQL does not run as root, and there is no user postgres"
    return None


class PrivatePostgres:
    """A cluster that runs during the block. Raises RuntimeError if none can be started."""

    def __enter__(self) -> PrivatePostgres:
        if reason := why_not():
            raise RuntimeError(reason)
        programs = find_programs()
        assert programs is not None
        self._programs, self._databases = programs, 0
        self.folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # socket paths must be short
        if owner := _owner():
            shutil.chown(self.folder, owner)
        self.folder.chmod(0o711)
        self._run("initdb", "-D", "data", "-U", "robust", "-A", "trust", "--no-sync")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def start(self) -> None:
        """Start the server and wait until it is ready."""
        options = f"{OPTIONS} -k {self.folder}"
        self._run("pg_ctl", "-D", "data", "-l", "log", "-w", "-o", options, "start")

    def stop(self) -> None:
        """Stop the server immediately, as in a crash."""
        self._run("pg_ctl", "-D", "data", "-m", "immediate", "-w", "stop")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Suspend all its processes during the block, so that it is up but does not respond."""
        processes = self._processes()
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)

    def _processes(self) -> list[int]:
        """The ids of the server process and its children."""
        server = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        return [server, *map(int, children)]

    def log(self) -> str:
        """The server's log."""
        return (self.folder / "log").read_text()

    def database(self) -> str:
        """The URL of a new, empty database."""
        self._databases += 1
        name = f"robust{self._databases}"
        self._run("createdb", "-h", str(self.folder), "-U", "robust", name)
        return f"postgresql://robust@/{name}?host={self.folder}"

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._programs / program, *arguments],
            cwd=self.folder,
            user=_owner(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr}")


def _owner() -> str | None:
    """The user to run as if this is root, which PostgreSQL refuses; otherwise None."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        return None

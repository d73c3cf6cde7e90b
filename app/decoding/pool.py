"""A pool of decoding processes: started on demand, and killed if their request ends first."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Literal

from app.decoding.frames import BEGUN, PREFIX, Header, header_length, pack, unpack
from app.decoding.semaphores import Budget, FairSemaphore
from app.errors import DeadlineExceeded, NotReady

logger = logging.getLogger(__name__)

Reply = tuple[Header, list[bytearray]]

_READ_BYTES = 2**18  # at a time

NICENESS = 10  # so that predictions get the CPU first
SECRET_PREFIXES = ("ROBUST_", "OTEL_", "PG")  # variables that may hold keys and passwords
IDLE_SECONDS = 60.0  # after which an idle worker is killed


class DecodeFailed(Exception):
    """A file could not be decoded; `expected` and `found` are safe to return to the client.

    `reason` is `memory`, `seconds` (wall-clock), `cpu` (CPU seconds) or `crash`.
    """

    def __init__(
        self, reason: Literal["memory", "seconds", "cpu", "crash"], *, expected: str, found: str
    ) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.reason, self.expected, self.found = reason, expected, found


class WorkerPool:
    """Up to `size` decoding processes, each with one task at a time.

    A worker is killed when its task exceeds `seconds`, the CPU time `cpu_seconds` or its memory, or
    when its task is cancelled. All tasks take their memory from `budget`.
    """

    def __init__(
        self,
        *,
        size: int,
        budget: Budget,
        seconds: float,
        cpu_seconds: float | None = None,
        niceness: int = NICENESS,
    ) -> None:
        self._slots = FairSemaphore(size, per_client=max(size - 1, 1))
        self._budget, self._seconds = budget, seconds
        # The wall-clock limit comes first, unless the service has died and can't enforce it.
        self._cpu_seconds = cpu_seconds or seconds + 2
        self._niceness = niceness
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._killed: list[_Worker] = []  # perhaps not reaped yet
        self._closed = False

    async def run(
        self,
        request: Header,
        blobs: Sequence[bytes],
        *,
        client: Hashable,
        memory: int,
        most: int,
        deadline: float | None = None,
        trusted: bool = False,
    ) -> Reply:
        """A worker's reply to `request`, of at most `most` bytes.

        The task may use `memory` bytes in addition to `blobs`; for a `trusted` task neither memory
        nor time is limited. Raises DecodeFailed, NotReady if no worker can be started, or
        DeadlineExceeded past `deadline` on the monotonic clock. Cancelling kills the worker
        immediately.
        """
        if memory > self._budget.total:
            raise _needs_more_memory(self._budget.total)
        try:
            async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                async with self._slots.hold(client), self._budget.hold(memory):
                    limits = {"memory": memory, "cpu_seconds": self._cpu_seconds}
                    return await self._ask(request | ({} if trusted else limits), blobs, most)
        except TimeoutError:
            raise DeadlineExceeded("The image or dataset was not decoded in time.") from None

    async def _ask(self, header: Header, blobs: Sequence[bytes], most: int) -> Reply:
        worker, seconds = self._take_worker(), self._seconds if "memory" in header else None
        try:
            async with asyncio.timeout(seconds):
                answer, parts = await worker.ask(header, blobs, most=most)
        except TimeoutError:
            if not worker.begun:
                raise _not_started(f"it did not start in {seconds} s") from None
            raise _too_slow(seconds) from None
        except (OSError, EOFError, ValueError) as error:
            if not worker.begun and not self._closed:
                raise _not_started(f"it exited with code {worker.exit_code()}") from None
            if worker.exit_code() == -signal.SIGPROF:
                raise _too_slow(self._cpu_seconds, "cpu") from None
            if not self._closed:
                logger.warning("a decode worker failed and is replaced: %r", error)
            raise _crashed() from None
        finally:
            self._put_back(worker)
        if answer.get("error") == "memory":
            raise _needs_more_memory(header.get("memory"))
        if answer.get("error") == "failed":
            logger.warning("a decode worker raised %s", answer.get("text"))
            raise _crashed()
        return answer, parts

    def _take_worker(self) -> _Worker:
        self._reap()
        while self._idle and self._idle[-1].has_exited():  # such as killed by the system
            self._kill(self._idle.pop())
        try:
            worker = self._idle.pop() if self._idle else _Worker(self._niceness)
        except OSError as error:
            raise _not_started(error) from None
        worker.keep_alive()
        self._busy.add(worker)
        return worker

    def _put_back(self, worker: _Worker) -> None:
        """Keep a worker that has replied; kill one that was interrupted."""
        self._busy.discard(worker)
        if worker.answered and not self._closed:
            self._idle.append(worker)
            worker.retire_after(IDLE_SECONDS, self._retire)
        else:
            self._kill(worker)

    def _retire(self, worker: _Worker) -> None:
        self._idle.remove(worker)
        self._kill(worker)

    def _kill(self, worker: _Worker) -> None:
        worker.close()
        self._killed.append(worker)
        self._reap()

    def _reap(self) -> None:
        self._killed = [worker for worker in self._killed if not worker.has_exited()]

    def close(self) -> None:
        """Kill all workers, whatever they are doing."""
        self._closed = True
        while self._idle:
            self._kill(self._idle.pop())
        for worker in self._busy:
            worker.kill()  # which closes its end of the socket, and so wakes the waiting task
        for worker in self._killed:
            worker.exit_code()


def _needs_more_memory(most: int | None) -> DecodeFailed:
    limit = "the memory of the machine" if most is None else f"{most // 2**20} MiB of memory"
    expected = f"a file that can be decoded in {limit}"
    return DecodeFailed("memory", expected=expected, found="one that needs more")


def _too_slow(seconds: float | None, reason: Literal["seconds", "cpu"] = "seconds") -> DecodeFailed:
    expected = f"a file that can be decoded within {seconds} s"
    return DecodeFailed(reason, expected=expected, found="one that takes longer")


def _crashed() -> DecodeFailed:
    expected, found = "a file that can be decoded", "one that the decoder fails on"
    return DecodeFailed("crash", expected=expected, found=found)


def _not_started(reason: object) -> NotReady:
    logger.error("a decode worker can't start: %s", reason)
    return NotReady("The service can't start a process to decode the file now; try again.")


class _Worker:
    """A worker process and the socket to it. Raises OSError if it can't be started."""

    def __init__(self, niceness: int = NICENESS) -> None:
        self.begun = False  # whether it has started to decode the last request's file
        self.answered = True  # whether it has replied to all requests
        self._timer: asyncio.TimerHandle | None = None
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        # It finds the same modules as this process, uses one thread, and knows no secrets.
        known = {k: v for k, v in os.environ.items() if not k.startswith(SECRET_PREFIXES)}
        environment = {
            **known,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
        }
        arguments = [str(theirs.fileno()), str(niceness)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app.decoding.worker", *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError:
            self._socket.close()
            raise
        finally:
            theirs.close()

    async def ask(self, header: Header, blobs: Sequence[bytes], *, most: int) -> Reply:
        """Send a request and return the reply.

        Raises EOFError if the worker died, and ValueError for an invalid reply.
        """
        loop = asyncio.get_running_loop()
        self.answered = self.begun = False
        await loop.sock_sendall(self._socket, pack(header, blobs))
        for blob in blobs:
            await loop.sock_sendall(self._socket, blob)
        await self._receive(len(BEGUN))
        self.begun = True
        length = header_length(await self._receive(PREFIX.size))
        answer, lengths = unpack(await self._receive(length), most=most)
        parts = [await self._receive(length) for length in lengths]
        self.answered = True
        return answer, parts

    async def _receive(self, length: int) -> bytearray:
        loop, data = asyncio.get_running_loop(), bytearray()
        while len(data) < length:
            more = await loop.sock_recv(self._socket, min(length - len(data), _READ_BYTES))
            if not more:
                raise EOFError("it exited before it replied")
            data += more
        return data

    def retire_after(self, seconds: float, retire: Callable[[_Worker], None]) -> None:
        """Call `retire` with this worker after that time, unless `keep_alive` is called before."""
        self._timer = asyncio.get_running_loop().call_later(seconds, retire, self)

    def keep_alive(self) -> None:
        """Cancel `retire_after`: the worker is in use again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def kill(self) -> None:
        """Kill the process, which has nothing to clean up."""
        self._process.kill()

    def close(self) -> None:
        """Kill the process and close its socket, which no task waits for."""
        self.keep_alive()
        self.kill()
        self._socket.close()

    def exit_code(self) -> int:
        """Kill the process if it still runs, and return its exit code: minus the signal."""
        self.kill()
        return self._process.wait()

    def has_exited(self) -> bool:
        """Whether the process has exited; reaps it if so."""
        return self._process.poll() is not None

"""A worker process: decodes one file after another, until its socket is closed.

Run as `python -m app.decoding.worker FD NICENESS`. Images don't need torch, so a new worker starts
quickly; the first dataset imports it.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from app.decoding.frames import BEGUN, PREFIX, Header, header_length, pack, unpack

SPARE_BYTES = 64 * 2**20  # in addition to a task's memory, for the allocator
MAX_REQUEST = 2**40  # no limit in practice: a worker trusts the service, but not vice versa

Answer = tuple[Header, list[bytes]]
Task = Callable[[Header, list[bytes]], Answer]


def main(descriptor: int, niceness: int) -> None:
    """Reply to the requests from the socket with that file descriptor."""
    # Ctrl-C sends these to all processes of the terminal; the service kills its workers itself.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(niceness)
    with socket.socket(fileno=descriptor) as connection:
        connection.setblocking(True)
        while request := _receive(connection):
            prepare, task = TASKS[request[0]["task"]]
            prepare()
            connection.sendall(BEGUN)
            header, blobs = _answer(task, *request)
            connection.sendall(pack(header, blobs))
            for blob in blobs:
                connection.sendall(blob)


def _answer(task: Task, header: Header, blobs: list[bytes]) -> Answer:
    try:
        if "memory" in header:
            _limit_memory(header["memory"])
            # After this CPU time SIGPROF kills the process.
            signal.setitimer(signal.ITIMER_PROF, header["cpu_seconds"])
        return task(header, blobs)
    except MemoryError:
        return {"error": "memory"}, []
    except Exception as error:
        return {"error": "failed", "text": type(error).__name__}, []
    finally:
        _remove_limits()


def _limit_memory(memory: int) -> None:
    """Limit the address space to `memory` bytes more than it has now."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = _address_space() + memory + SPARE_BYTES
    soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _remove_limits() -> None:
    signal.setitimer(signal.ITIMER_PROF, 0)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _address_space() -> int:
    """Bytes of address space in use."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # not Linux: the peak memory so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()


def _receive(connection: socket.socket) -> tuple[Header, list[bytes]] | None:
    prefix = _receive_exactly(connection, PREFIX.size)
    if not prefix:
        return None
    header, lengths = unpack(_receive_exactly(connection, header_length(prefix)), most=MAX_REQUEST)
    return header, [_receive_exactly(connection, length) for length in lengths]


def _receive_exactly(connection: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view, got = memoryview(data), 0
    while got < length:
        more = connection.recv_into(view[got:])
        if not more:
            return b""
        got += more
    return bytes(data)


def _prepare_images() -> None:
    import robust.image_decoding  # noqa: F401


def _read_image(header: Header, blobs: list[bytes]) -> Answer:
    """Decode an image to pixels at the model's input size."""
    from robust.image_decoding import read_pixels
    from robust.image_headers import ImageError

    try:
        pixels = read_pixels(blobs[0], header["size"], max_pixels=header["max_pixels"])
    except ImageError as error:
        return {"error": error.kind, "expected": error.expected, "found": error.found}, []
    return {}, [pixels.tobytes()]


def _prepare_sets() -> None:
    import torch

    import robust.datasets
    import robust.memory  # noqa: F401

    torch.set_num_threads(1)


def _read_set(header: Header, blobs: list[bytes]) -> Answer:
    """Read a dataset, uploaded or from a path, at the model's input size."""
    from robust.datasets import DatasetError, load_dataset, load_upload
    from robust.memory import is_out_of_memory

    size = header["size"]
    try:
        if header["path"] is not None:
            dataset = load_dataset(Path(header["path"]), size=size, train=False)
        else:
            dataset = load_upload(
                blobs[0],
                None,
                size=size,
                max_images=header["max_images"],
                max_pixels=header["max_pixels"],
            )
    except DatasetError as error:
        texts = {"source": error.source, "expected": error.expected, "found": error.found}
        return {"error": "set", **texts}, []
    except RuntimeError as error:  # as torch raises it
        if is_out_of_memory(error):
            raise MemoryError from None
        raise
    about = {
        "name": dataset.name,
        "classes": list(dataset.classes),
        "changes": list(dataset.changes),
        "dtype": dataset.dtype,
        "images": len(dataset),
    }
    return about, [dataset.images.numpy().tobytes(), dataset.labels.numpy().tobytes()]


# What to import before the limits apply, and what to do.
TASKS: dict[str, tuple[Callable[[], None], Task]] = {
    "image": (_prepare_images, _read_image),
    "set": (_prepare_sets, _read_set),
}

if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

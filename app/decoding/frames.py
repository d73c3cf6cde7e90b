"""Messages between the service and its decode workers: a JSON header, then raw bytes.

Nothing is pickled: a worker that a malicious file has taken over can return wrong pixels, but can't
make the service run code.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

BEGUN = b"."  # a worker sends it before it decodes; a failure before it is not the file's fault
PREFIX = struct.Struct(">I")
MAX_HEADER_BYTES = 2**20

Header = dict[str, Any]


def pack(header: Header, blobs: Sequence[bytes | memoryview]) -> bytes:
    """The start of a message, up to its blobs: the header with the length of each blob."""
    text = json.dumps({**header, "blobs": [len(blob) for blob in blobs]}).encode()
    return PREFIX.pack(len(text)) + text


def header_length(prefix: bytes | bytearray) -> int:
    """The length of the header. Raises ValueError if it is too long."""
    (length,) = PREFIX.unpack(prefix)
    if length > MAX_HEADER_BYTES:
        raise ValueError("the header is too long")
    return int(length)


def unpack(text: bytes | bytearray, *, most: int) -> tuple[Header, list[int]]:
    """The header, and the lengths of the blobs that follow.

    Raises ValueError for an invalid header, or one that declares over `most` bytes.
    """
    try:
        header = json.loads(text)
    except RecursionError:
        raise ValueError("the header is nested too deeply") from None
    lengths = header.pop("blobs", None) if isinstance(header, dict) else None
    if not isinstance(lengths, list) or not all(type(n) is int and n >= 0 for n in lengths):
        raise ValueError("the header has no valid list of blobs")
    if sum(lengths) > most:
        raise ValueError("the blobs are larger than expected")
    return header, lengths

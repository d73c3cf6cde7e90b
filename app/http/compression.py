"""Decompresses request bodies in small pieces."""

from __future__ import annotations

import zlib

from app.errors import BadRequest, UnsupportedEncoding

PIECE_BYTES = 256 * 2**10
ENCODINGS = ("gzip", "x-gzip", "deflate")


class Inflater:
    """Decompresses one body in pieces. Raises UnsupportedEncoding unless it is gzip or deflate."""

    def __init__(self, encoding: str) -> None:
        if encoding not in ENCODINGS:
            raise UnsupportedEncoding("Content-Encoding: expected gzip or deflate, or none")
        self._gzip = encoding != "deflate"
        self._stream: zlib._Decompress | None = None
        self.waiting = b""
        """Compressed bytes for the next call, which comes before more of the body is read."""

    def inflate(self, data: bytes) -> bytes:
        """Decompress at most PIECE_BYTES from `waiting` and `data`. Raises BadRequest."""
        data = self.waiting + data
        if self._stream is None:
            if not data:
                return b""
            self._stream = zlib.decompressobj(self._window(data))
        if self._stream.eof and data:
            raise BadRequest("There are bytes after the end of the compressed body.")
        try:
            piece = self._stream.decompress(data, PIECE_BYTES)
        except zlib.error:
            raise BadRequest("The body does not match its Content-Encoding.") from None
        self.waiting = self._stream.unconsumed_tail or self._stream.unused_data
        return piece

    def _window(self, data: bytes) -> int:
        if self._gzip:
            return 16 + zlib.MAX_WBITS
        # Clients send both zlib's format and raw deflate as "deflate". The first byte tells which,
        # and there may be only one yet: zlib's ends in 8, which raw deflate would only have in a
        # stored block with nonzero padding.
        return zlib.MAX_WBITS if data[0] & 15 == 8 else -zlib.MAX_WBITS

    @property
    def complete(self) -> bool:
        """Whether the compressed data ended, or there was none."""
        return self._stream is None or self._stream.eof

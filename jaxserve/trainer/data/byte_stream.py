"""Byte streams of source files: digested as they pass, decompressed by ending."""

from __future__ import annotations

import gzip
import io
from typing import IO, Any, Protocol

BUFFER_BYTES = 1 << 20
COMPRESSIONS = (".gz", ".zst")
_ZSTD_FEED_BYTES = 1 << 12
"""Compressed bytes decoded at once, which bounds what they can grow to."""


class Digest(Protocol):
    """What hashlib's objects are."""

    def update(self, data: bytes, /) -> None: ...


class HashingFile(io.RawIOBase):
    """A file that is read once, front to back: counts and digests what passes.

    Attributes:
        bytes_read: so far.
    """

    def __init__(self, file: IO[bytes], digest: Digest) -> None:
        super().__init__()
        self._file = file
        self._digest = digest
        self.bytes_read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._digest.update(data)
        self.bytes_read += len(data)
        return len(data)


def decompressed(file: HashingFile, suffix: str) -> io.BufferedReader:
    """`file`'s content, decompressed where `suffix` is one of COMPRESSIONS.

    Reading it raises OSError, zlib.error or EOFError for damaged or cut-off data.
    """
    if suffix.lower() == ".gz":
        buffered = io.BufferedReader(file, BUFFER_BYTES)
        return io.BufferedReader(gzip.GzipFile(fileobj=buffered), BUFFER_BYTES)
    if suffix.lower() == ".zst":
        return io.BufferedReader(_ZstdFile(file), BUFFER_BYTES)
    return io.BufferedReader(file, BUFFER_BYTES)


class _ZstdFile(io.RawIOBase):
    """Zstandard frames, one after the other. Unlike the library's own stream reader it
    does not take a cut-off frame for the end of the file."""

    def __init__(self, file: HashingFile) -> None:
        super().__init__()
        import zstandard  # only for files of this kind

        self._file = file
        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._is_inside = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._file.read(_ZSTD_FEED_BYTES) or b""
            if not data:
                if self._is_inside:
                    raise EOFError("the compressed data is cut off")
                return 0
            self._ready = memoryview(self._decode(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decode(self, data: bytes) -> bytes:
        parts = []
        try:
            while data:
                parts.append(self._frame.decompress(data))
                data = self._frame.unused_data if self._frame.eof else b""
                self._is_inside = not self._frame.eof
                if self._frame.eof:
                    self._frame = self._new_frame()
        except self._error as error:
            raise OSError(f"damaged Zstandard data: {error}") from None
        return b"".join(parts)

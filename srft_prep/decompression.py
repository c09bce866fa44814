"""Plain, gzip or zstd bytes -> a stream of plain bytes, bounded: a bomb is damage, not an answer.

Whatever is wrong with compressed data comes out as `DamageError` where it is met, all that came
before it being given already. Memory: one chunk of output, at most 128 MiB of a zstd bomb.
"""

import gzip
import io
import zlib
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_EXPANSION: Final = 1000
"""Most plain bytes for a compressed one, on the whole. Files that hold every prompt of a run anew
reach some hundreds with zstd, gzip cannot exceed 1032."""
FREE_BYTES: Final = 64 << 20
"""Plain bytes that may come out of any file, however small."""

ZSTD_CHUNK_BYTES: Final = 4096
"""Compressed bytes that are decompressed at a time: never to more than 128 MiB."""
_BUFFER_BYTES: Final = 1 << 17


class DamageError(Exception):
    """Compressed data that cannot be read further, and why."""


def decompressed(raw: BinaryIO, magic: bytes) -> BinaryIO:
    """Return a stream of the plain bytes of a file that begins with `magic`, at its beginning."""
    if magic[:2] == b"\x1f\x8b":
        stream = cast(io.RawIOBase, gzip.GzipFile(fileobj=raw))
    elif magic == b"\x28\xb5\x2f\xfd":
        stream = _ZstdStream(raw)
    else:
        return raw
    return io.BufferedReader(_Bounded(raw, stream), buffer_size=_BUFFER_BYTES)


class _Bounded(io.RawIOBase):
    """A decompressed stream whose every end but the right one is a DamageError."""

    def __init__(self, raw: BinaryIO, stream: io.RawIOBase) -> None:
        self._raw, self._stream = raw, stream
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        try:
            size = self._stream.readinto(buffer) or 0
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            reason = f"compressed data is cut short or damaged from here on: {error}"
            raise DamageError(reason) from None
        self._num_bytes += size
        if self._num_bytes > max(FREE_BYTES, MAX_EXPANSION * self._raw.tell()):
            raise DamageError(
                f"expands to more than {MAX_EXPANSION} times its size, as no runs do; if these do, "
                "decompress the file first"
            )
        return size


class _ZstdStream(io.RawIOBase):
    """Frames of zstd, decompressed; unlike zstandard's own reader it raises where one is cut."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: Any = None
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        while not self._output:
            chunk = self._frame.unused_data if self._frame and self._frame.eof else b""
            chunk = chunk or self._raw.read(ZSTD_CHUNK_BYTES)
            if not chunk:
                if self._frame and not self._frame.eof:
                    raise EOFError("the last zstd frame is cut short")
                return 0
            self._output = memoryview(self._decompress(chunk))
        view = memoryview(buffer)
        size = min(len(view), len(self._output))
        view[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _decompress(self, chunk: bytes) -> bytes:
        from zstandard import ZstdDecompressor, ZstdError

        if self._frame is None or self._frame.eof:
            self._frame = ZstdDecompressor().decompressobj()
        try:
            output: bytes = self._frame.decompress(chunk)
        except ZstdError as error:
            raise EOFError(str(error)) from None
        return output

"""Messages between a critic and its worker processes: JSON values over a socket.

A frame is the length of its JSON in 4 bytes, then the JSON. Neither side blocks on the other: what
cannot be sent yet waits in a buffer, and half a frame that has come waits for its rest.
"""

import socket
import struct
from typing import Any, Final

import orjson

_LENGTH: Final = struct.Struct("<I")
_READ_BYTES: Final = 1 << 20


class Channel:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over a connected socket."""
        connection.setblocking(False)
        self._socket = connection
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self.is_open = True
        """Whether the other side is there, as far as is known."""

    def fileno(self) -> int:
        """Return the file descriptor, for `selectors`."""
        return self._socket.fileno()

    @property
    def unsent_bytes(self) -> int:
        """What waits to be sent."""
        return len(self._outgoing)

    def send(self, frame: bytes) -> None:
        """Send a frame as far as it goes at once."""
        self._outgoing += frame
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as it goes at once."""
        try:
            while self._outgoing and self.is_open:
                del self._outgoing[: self._socket.send(self._outgoing)]
        except BlockingIOError:
            return
        except OSError:
            self.is_open = False

    def receive(self) -> list[Any]:
        """Return the messages that have come; after the last one `is_open` may be False."""
        try:
            while self.is_open:
                data = self._socket.recv(_READ_BYTES)
                self._incoming += data
                self.is_open = bool(data)
        except BlockingIOError:
            pass
        except OSError:
            self.is_open = False
        messages: list[Any] = []
        start = 0
        while len(self._incoming) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._incoming, start)
            end = start + _LENGTH.size + length
            if end > len(self._incoming):
                break
            messages.append(orjson.loads(memoryview(self._incoming)[start + _LENGTH.size : end]))
            start = end
        del self._incoming[:start]
        return messages

    def close(self) -> None:
        """Close the connection."""
        self.is_open = False
        self._socket.close()


def frame_of(message: Any) -> bytes:
    """Return a message as it is sent."""
    data = orjson.dumps(message)
    return _LENGTH.pack(len(data)) + data

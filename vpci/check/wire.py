"""The other end of a network interface's wire: `target` gives a server one, cases send and receive frames on it."""

from __future__ import annotations

import select
import socket
import struct
from collections import deque
from pathlib import Path

from vpci.check.cases import Wedged

FRAME_BYTES = 1 << 17
TIMEVAL = struct.Struct("qq")


class Wire:
    """A UNIX datagram socket at `path`, a frame a datagram; the interface's own is at `to`."""

    def __init__(self, path: str, to: str) -> None:
        self._path, self._to = path, to
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(path)
        self._frames: deque[bytes] = deque()

    def close(self) -> None:
        self._socket.close()
        Path(self._path).unlink(missing_ok=True)

    def look(self) -> None:
        """Take what is there off the socket, so that nobody waits for us."""
        while True:
            try:
                self._frames.append(self._socket.recv(FRAME_BYTES, socket.MSG_DONTWAIT))
            except BlockingIOError:
                return

    def forget(self) -> None:
        """What an earlier case sent is none of the next one's business."""
        self.look()
        self._frames.clear()

    def frames(self) -> list[bytes]:
        """All that came since the last look."""
        self.look()
        found = list(self._frames)
        self._frames.clear()
        return found

    def receive(self, timeout: float, what: str) -> bytes:
        """The next frame. Raises Wedged."""
        self.look()
        if not self._frames:
            select.select([self._socket], [], [], timeout)
            self.look()
        if not self._frames:
            raise Wedged(f"not in time: a frame, {what}")
        return self._frames.popleft()

    def send(self, frame: bytes, timeout: float) -> None:
        """To the interface. Raises Wedged when it takes nothing."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, TIMEVAL.pack(*_parts(timeout)))
        try:
            self._socket.sendto(frame, self._to)
        except BlockingIOError as error:
            raise Wedged("not in time: room for a frame to the interface") from error

    def offer(self, frame: bytes) -> bool:
        """Whether there was room for it at once."""
        try:
            self._socket.sendto(frame, socket.MSG_DONTWAIT, self._to)
        except BlockingIOError:
            return False
        return True


def _parts(seconds: float) -> tuple[int, int]:
    """Seconds and microseconds."""
    return divmod(max(1, int(seconds * 1_000_000)), 1_000_000)

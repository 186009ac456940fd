"""QEMU's control channel: machine hands it one end of a socket pair and QMP commands, qemu.qmp speaks the protocol."""

import asyncio
import contextlib
import socket
from typing import Any

from qemu.qmp import ConnectError, QMPClient, QMPError

from vpci.guest.errors import MachineError

CONNECT_TIMEOUT = 30.0  # seconds


class Monitor:
    """A blocking QMP client with an event loop of its own; use it from one thread at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._runner = asyncio.Runner()
        self._client = QMPClient("vpci")
        try:
            self._runner.run(asyncio.wait_for(self._client.connect(connection), CONNECT_TIMEOUT))
        except (ConnectError, TimeoutError) as error:
            self._runner.close()
            raise MachineError(f"QEMU's monitor does not answer: {error}") from error

    def execute(self, command: str, arguments: dict[str, Any], timeout: float) -> Any:
        """The command's return value. Raises MachineError with QEMU's words."""
        try:
            return self._runner.run(asyncio.wait_for(self._client.execute(command, arguments), timeout))
        except (QMPError, TimeoutError) as error:
            raise MachineError(f"QMP {command}: {error or 'no answer'}") from error

    def close(self) -> None:
        """End the session; QEMU may be gone already."""
        with contextlib.suppress(QMPError, OSError, EOFError):
            self._runner.run(self._client.disconnect())
        self._runner.close()

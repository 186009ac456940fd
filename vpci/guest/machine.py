"""A running guest: commands and tests say which devices, it boots QEMU with them and runs commands in Linux.

The guest's console, SeaBIOS' log and QEMU's messages go to unnamed files, the command port and QMP to socket
pairs: nothing is left behind, and QEMU dies with the thread that started it.
"""

import contextlib
import ctypes
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from vpci.guest import initramfs
from vpci.guest.cache import Progress, quiet
from vpci.guest.errors import GuestFailed, GuestTimeout, MachineError
from vpci.guest.kernel import ensure_kernel
from vpci.guest.link import Link, Result
from vpci.guest.loader import environment
from vpci.guest.qemu import Qemu, ensure_qemu
from vpci.guest.qemu_args import SocketPath, memory_args, qemu_device_args

if TYPE_CHECKING:
    from vpci.guest.monitor import Monitor

_T = TypeVar("_T")

START_TIMEOUT = 60.0  # seconds; a boot takes 2 to 3 on an idle machine
_TAIL = 2000  # bytes of a log that an error message shows
_PANIC = b"Kernel panic - not syncing"
# The ciphers' self-tests cost a sixth of the boot. The TSC's watchdog of a current Linux with several processors hangs
# it for ever on a busy host: watchdog_check_skew() waits for those that stop_machine() holds, which waits for it.
_APPEND = "console=ttyS0 quiet cryptomgr.notests tsc=nowatchdog"
_PR_SET_PDEATHSIG = 1
_BARE = ["-nodefaults", "-no-user-config", "-display", "none"]
_libc = ctypes.CDLL(None)


class Log:
    """What a process writes to an unnamed file of ours; readable at any time, also after `close`."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._last = b""

    def content(self) -> bytes:
        """All bytes so far, read beside the writer's position."""
        if self.file.closed:
            return self._last
        return os.pread(self.file.fileno(), os.fstat(self.file.fileno()).st_size, 0)

    def close(self) -> None:
        """Keep the bytes, give the file back."""
        self._last = self.content()
        self.file.close()


class Guest:
    """A Linux guest with vfio-user devices; a context manager that starts it and leaves nothing behind.

    `sockets`: paths of the vfio-user servers, one device each, in order. `share`: RAM is shared with the servers.
    `boot`: "kernel" boots our kernel and its command loop; "disk" lets SeaBIOS boot from the first device, and then
    only `console`, `wait_console` and the control methods are of use. `append` goes to the kernel's command line,
    `extra_args` to QEMU's, `properties` to each vfio-user-pci device. `files`: absolute guest path -> bytes or host
    path. `interactive`: the guest's console is the caller's terminal (a shell; leaving it powers off; Ctrl-A x kills).
    Start it from a thread that lives as long as the guest: QEMU is killed when that thread ends.
    """

    def __init__(
        self,
        kernel: str = "6.1",
        machine: str = "q35",
        memory_mib: int = 256,
        smp: int = 1,
        sockets: Sequence[SocketPath] = (),
        share: bool = True,
        append: str = "",
        extra_args: Sequence[str] = (),
        boot: Literal["kernel", "disk"] = "kernel",
        interactive: bool = False,
        files: Mapping[str, initramfs.Content] | None = None,
        progress: Progress = quiet,
        accel: str = "tcg",
        properties: Mapping[str, object] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.kernel = kernel
        self.boot = boot
        self.interactive = interactive
        self.qemu: Qemu | None = None
        self.argv: list[str] = []  # QEMU's command line, once it was started
        self._words = ["-smp", str(smp), "-accel", accel, *extra_args]
        self._words += memory_args(machine, memory_mib, share)
        self._words += qemu_device_args(sockets, properties, 1 if boot == "disk" else None)
        self._append = append
        self._files = dict(files or {})
        self._pass_fds = list(pass_fds)
        self._progress = progress
        self._open = contextlib.ExitStack()
        self._console, self._firmware, self._stderr = (self._log() for _ in range(3))
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self._booting = True
        self._monitor: Monitor | None = None
        self._panic_from = 0  # a panic before the last reset is over

    # life

    def start(self, timeout: float = START_TIMEOUT) -> Self:
        """Boot; return when the guest takes commands (boot="disk": when QEMU runs).

        Raises MachineError or GuestTimeout, with the tail of the console, and ProvisionError.
        """
        if self._process is not None:
            raise MachineError("this guest was started already: make another one")
        try:
            self._launch()
            if self.boot == "kernel":
                self.wait_ready(timeout)
        except BaseException:
            self.close()
            raise
        return self

    def wait_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Wait until the guest's command loop starts (again); `start` has done it once."""
        self._booting = True
        self._with_logs(lambda: self._linked.wait_ready(timeout))
        self._booting = False

    def poweroff(self, timeout: float = 30.0) -> int:
        """Shut down cleanly, drivers included, and wait for QEMU to end. Returns QEMU's exit status."""
        self._linked.send("sync; poweroff -f")
        return self.wait(timeout)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until QEMU ends by itself. Returns its exit status. Raises GuestTimeout."""
        try:
            return self._running.wait(timeout)
        except subprocess.TimeoutExpired:
            raise GuestTimeout(f"QEMU did not end within {timeout:g} s{self._logs()}") from None

    def kill(self) -> None:
        """Kill QEMU with SIGKILL, as a crash would; the console stays readable."""
        self._running.kill()
        self._running.wait()

    def close(self) -> None:
        """Kill QEMU if it runs and close everything. May be called twice."""
        if self._process is not None:
            self.kill()
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        self._open.close()

    def __enter__(self) -> Self:
        return self if self._process is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # commands

    def run(self, command: str, timeout: float = 60.0) -> Result:
        """Run `command` with the guest's sh, in /root, as root; its output may be any bytes."""
        return self._with_logs(lambda: self._linked.run(command, timeout))

    def check(self, command: str, timeout: float = 60.0) -> Result:
        """Like `run`. Raises GuestFailed, with the output, when the exit status is not 0."""
        result = self.run(command, timeout)
        if result.status:
            raise GuestFailed(f"in the guest, {command!r} ended with {result.status}:\n{result.text}")
        return result

    def read_file(self, path: str, timeout: float = 60.0) -> bytes:
        """The bytes of a file in the guest."""
        return self.check(f"cat {shlex.quote(path)}", timeout).output

    def write_file(self, path: str, content: initramfs.Content, timeout: float = 60.0) -> None:
        """Make or replace a file in the guest, and the folders above it: bytes, or a file on the host.

        It is executable by the rule of `files`. The serial port takes some 100 KB/s: hand over what is large with
        `files`. `timeout` holds for each 16 KiB; a guest that did not take them in time takes no more commands. Raises
        GuestFailed when the guest cannot write the file.
        """
        data = content.read_bytes() if isinstance(content, Path) else content
        mode = 0o755 if initramfs.is_executable(content, data) else 0o644
        result = self._with_logs(lambda: self._linked.put(path, data, mode, timeout))
        if result.status:
            raise GuestFailed(f"in the guest, {path} of {len(data)} bytes could not be written:\n{result.text}")

    # control

    def qmp(self, command: str, timeout: float = 30.0, **arguments: Any) -> Any:
        """A QMP command's return value. Raises MachineError with QEMU's words, or when QEMU is gone."""
        self._check_alive()
        if self._monitor is None:
            from vpci.guest.monitor import Monitor  # asyncio is slow to import

            self._monitor = Monitor(self._monitor_end)
        return self._monitor.execute(command, arguments, timeout)

    def system_reset(self, timeout: float = START_TIMEOUT) -> None:
        """Press reset and wait until the guest takes commands again."""
        self.press_reset()
        if self.boot == "kernel":
            self.wait_ready(timeout)

    def reboot(self, timeout: float = START_TIMEOUT) -> None:
        """Reboot from inside, without a shutdown of drivers' own, and wait until the guest takes commands again."""
        self._panic_from = len(self.console)
        self._linked.send("sync; reboot -f")
        self.wait_ready(timeout)

    def press_reset(self) -> None:
        """Press reset and do not wait."""
        self._linked.forget()
        self._panic_from = len(self.console)
        self.qmp("system_reset")

    def wait_console(self, pattern: str | bytes, timeout: float = START_TIMEOUT) -> bytes:
        """Wait until the console shows `pattern` (a regular expression); returns what matched."""
        return self._wait_log("the console", lambda: self.console, pattern, timeout)

    def wait_firmware(self, pattern: str | bytes, timeout: float = START_TIMEOUT) -> bytes:
        """The same of SeaBIOS' own log."""
        return self._wait_log("SeaBIOS", lambda: self.firmware_log, pattern, timeout)

    def _wait_log(self, who: str, log: Callable[[], bytes], pattern: str | bytes, timeout: float) -> bytes:
        regex = re.compile(pattern.encode() if isinstance(pattern, str) else pattern)
        deadline = time.monotonic() + timeout
        while not (found := regex.search(log())):
            if time.monotonic() > deadline:
                raise GuestTimeout(f"{who} did not show {pattern!r} within {timeout:g} s{self._logs()}")
            self._check_alive()
        return found[0]

    @property
    def console(self) -> bytes:
        """What the guest wrote to its first serial port so far (nothing when interactive)."""
        return self._console.content()

    @property
    def firmware_log(self) -> bytes:
        """SeaBIOS' own log so far."""
        return self._firmware.content()

    @property
    def messages(self) -> bytes:
        """What QEMU itself wrote to stderr so far (nothing when interactive)."""
        return self._stderr.content()

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._running.pid

    @property
    def returncode(self) -> int | None:
        """QEMU's exit status, negative for a signal; None while it runs."""
        return self._running.poll()

    # starting QEMU

    def _launch(self) -> None:
        self.qemu = ensure_qemu(self._progress)
        boot_words = self._kernel_words() if self.boot == "kernel" else []
        link_end, link_fd = self._pair()
        self._monitor_end, qmp_fd = self._pair()
        words = self._console_words() + self._port_words(link_fd.fileno(), qmp_fd.fileno())
        self.argv = [*self.qemu.argv_prefix, *_BARE, *words, *boot_words, *self._words]
        what = f"Linux {self.kernel}" if self.boot == "kernel" else "the disk"
        self._progress(f"booting {what} in QEMU {self.qemu.version}")
        self._process = self._spawn([link_fd.fileno(), qmp_fd.fileno(), self._firmware.file.fileno()])
        link_fd.close()
        qmp_fd.close()
        self._link = Link(link_end, self._check_alive)

    def _kernel_words(self) -> list[str]:
        kernel = ensure_kernel(self.kernel, self._progress)
        archive = self._open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - it is one
        archive.write(initramfs.build(kernel, self._files))
        archive.flush()
        self._pass_fds.append(archive.fileno())
        append = [_APPEND, initramfs.INTERACTIVE if self.interactive else "", self._append]
        return [
            "-kernel", str(kernel.vmlinuz), "-initrd", f"/proc/self/fd/{archive.fileno()}",
            "-append", " ".join(word for word in append if word),
        ]  # fmt: skip

    def _console_words(self) -> list[str]:
        if not self.interactive:
            return ["-chardev", "stdio,id=console,signal=off"]
        return ["-chardev", "stdio,id=console,mux=on,signal=off", "-monitor", "chardev:console"]

    def _port_words(self, link_fd: int, qmp_fd: int) -> list[str]:
        """The ports, in the order of ttyS0 and ttyS1; SeaBIOS logs to its debug port."""
        return [
            "-serial", "chardev:console",
            "-chardev", f"socket,id=link,fd={link_fd}", "-serial", "chardev:link",
            "-chardev", f"socket,id=qmp,fd={qmp_fd}", "-qmp", "chardev:qmp",
            "-chardev", f"file,id=firmware,path=/proc/self/fd/{self._firmware.file.fileno()},append=on",
            "-device", "isa-debugcon,iobase=0x402,chardev=firmware",
        ]  # fmt: skip

    def _spawn(self, fds: list[int]) -> "subprocess.Popen[bytes]":
        terminal = self.interactive
        try:
            return subprocess.Popen(
                self.argv,
                stdin=None if terminal else subprocess.DEVNULL,
                stdout=None if terminal else self._console.file,
                stderr=None if terminal else self._stderr.file,
                pass_fds=[*fds, *self._pass_fds],
                env=environment(),
                start_new_session=not terminal,
                preexec_fn=_die_with(os.getpid()),  # only two system calls: no lock is taken
            )
        except OSError as error:
            raise MachineError(f"QEMU did not start: {self.argv[0]}: {error.strerror}") from error

    def _log(self) -> Log:
        return self._open.enter_context(contextlib.closing(Log()))

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        return self._open.enter_context(ours), self._open.enter_context(theirs)

    # health

    @property
    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            raise MachineError("this guest was not started")
        return self._process

    @property
    def _linked(self) -> Link:
        if self._link is None:
            raise MachineError("this guest was not started")
        return self._link

    def _check_alive(self) -> None:
        """Raise MachineError when QEMU ended or the kernel panicked; else wait a moment."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._running.wait(0.02)
            raise MachineError(f"QEMU ended with {status}{self._logs()}")
        if _PANIC in self.console[self._panic_from :]:
            raise MachineError(f"the guest's kernel panicked{self._logs()}")

    def _with_logs(self, act: Callable[[], _T]) -> _T:
        try:
            return act()
        except GuestTimeout as error:
            raise GuestTimeout(f"{error}{self._logs()}") from None

    def account(self) -> str:
        """For a person whose test failed: the ends of what the guest and QEMU said so far."""
        how = "not started" if self._process is None else "running" if self.returncode is None else "ended"
        return f"Linux {self.kernel}, {how}{self._logs()}"

    def _logs(self) -> str:
        """The tails of what the guest, QEMU and (when Linux did not say anything yet) SeaBIOS said."""
        firmware = self.firmware_log if self._booting and not self.console else b""
        named = {"console": self.console, "QEMU": self.messages, "SeaBIOS": firmware}
        tails = {name: log[-_TAIL:].decode(errors="replace").strip() for name, log in named.items()}
        shown = [f"\n--- {name}:\n{tail}" for name, tail in tails.items() if tail]
        return "".join(shown) or "; nothing was written to the console"


def _die_with(parent: int) -> Callable[[], None]:
    """For the new process: be killed when the starting thread ends, however it ends."""

    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before we asked
            sys.exit(1)

    return prepare

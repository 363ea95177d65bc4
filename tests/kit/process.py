"""A child process under test: started, waited for, logged, always reaped.

`Process` is a context manager. Leaving it ends the child with SIGTERM, then SIGKILL, and checks nothing: a test that
cares about the exit code calls `Process.stop` or `Process.wait`. Its whole output goes to one file, which every
failure here quotes, because what the child said last is what explains the failure.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class ProcessFailed(AssertionError):
    """The child did not become ready, did not end, or ended badly. The text quotes its log."""


class Process:
    """One child process.

    Parameters
    ----------
    arguments: the command line.
    log: file for what the child prints on stdout and stderr.
    cwd, environment: as in `subprocess`; ``environment`` is added to the test's own.
    inherit: descriptors that the child inherits under the same numbers.
    stdin: ``subprocess.PIPE`` to type into the child; by default it reads nothing.
    """

    def __init__(
        self,
        arguments: Sequence[str | os.PathLike[str]],
        *,
        log: Path,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        inherit: Sequence[int] = (),
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        self.arguments = [os.fspath(a) for a in arguments]
        self.log = log
        self.started = time.monotonic()
        with log.open("ab") as output:
            self.child: subprocess.Popen[bytes] = subprocess.Popen(
                self.arguments,
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, **(environment or {})},
                pass_fds=inherit,
                # A group of its own, so that Ctrl-C at the terminal reaches pytest, which then ends the child in
                # order.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.child.pid

    @property
    def running(self) -> bool:
        return self.child.poll() is None

    def output(self) -> str:
        """Everything the child has printed so far."""
        return self.log.read_text(errors="backslashreplace")

    def describe(self) -> str:
        state = "running" if self.running else f"exit code {self.child.returncode}"
        return f"{' '.join(self.arguments)}\n{state}\n--- output\n{self.output()}"

    def wait_until(self, ready: Callable[[], Any], what: str, *, timeout: float = 20) -> Any:
        """Poll ``ready`` until it gives something true, and return that.

        Raises `ProcessFailed` when the child ends first or ``timeout`` (seconds) passes.
        """
        deadline = time.monotonic() + timeout
        while True:
            alive = self.running
            if found := ready():
                return found
            if not alive:
                raise ProcessFailed(f"ended before {what}: {self.describe()}")
            if time.monotonic() > deadline:
                raise ProcessFailed(f"not within {timeout} s: {what}: {self.describe()}")
            time.sleep(0.005)

    def wait_for_socket(self, path: Path, *, bound_as: str | None = None, timeout: float = 20) -> None:
        """Wait until the child listens on a Unix socket, without connecting to it: a QMP server would take that for
        its client.

        ``bound_as`` is how the child names the path, if it was told a relative one.
        """
        name = bound_as or os.fspath(path)
        self.wait_until(lambda: path.exists() and _listening(name), f"listening on {path}", timeout=timeout)

    def wait_for_port(self, port: int, host: str = "127.0.0.1", *, timeout: float = 20) -> None:
        """Wait until the child accepts TCP connections."""
        self.wait_until(lambda: _connectable(host, port), f"listening on {host}:{port}", timeout=timeout)

    def wait_for_output(self, text: str, *, timeout: float = 20) -> None:
        self.wait_until(lambda: text in self.output(), f"printing {text!r}", timeout=timeout)

    def wait(self, *, expect: int | None = 0, timeout: float = 20) -> int:
        """Wait for the child's own end; returns its exit code (negative: the signal). ``expect=None`` takes any."""
        try:
            code = self.child.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(f"did not end within {timeout} s: {self.describe()}") from None
        if expect is not None and code != expect:
            raise ProcessFailed(f"ended with {code} instead of {expect}: {self.describe()}")
        return code

    def signal(self, number: signal.Signals) -> None:
        if self.running:
            self.child.send_signal(number)

    def stop(self, *, expect: int | None = 0, timeout: float = 20) -> int:
        """Ask the child to end with SIGTERM and wait for it."""
        self.signal(signal.SIGTERM)
        return self.wait(expect=expect, timeout=timeout)

    def kill(self) -> None:
        """``kill -9``, as a crash test does; the child gets no chance to write anything."""
        self.signal(signal.SIGKILL)
        self.child.wait()

    def resident_bytes(self) -> int:
        """Resident memory now, in bytes."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.running:
            self.signal(signal.SIGTERM)
            try:
                self.child.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        if self.child.stdin is not None:
            self.child.stdin.close()
        if error is not None and not isinstance(error, ProcessFailed):
            error.add_note(self.describe())


def _listening(name: str) -> bool:
    # Columns of /proc/net/unix: Num RefCount Protocol Flags Type St Inode Path; flag 0x10000 is SO_ACCEPTCON.
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        columns = line.split(maxsplit=7)
        if len(columns) == 8 and columns[7] == name and int(columns[3], 16) & 0x10000:
            return True
    return False


def _connectable(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True

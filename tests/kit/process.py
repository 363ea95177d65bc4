"""A child process under test: started, waited for, logged, always reaped.

`Process` is a context manager. Leaving it ends the child with SIGTERM, then SIGKILL, and checks nothing: a test that
cares about the exit code calls `Process.stop` or `Process.wait`. Its whole output goes to one file, which every
failure here quotes, because what the child said last is what explains the failure.
"""

from __future__ import annotations

import contextlib
import os
import signal
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
        self.cwd = cwd or Path.cwd()
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

    def wait_for_socket(self, path: Path, *, timeout: float = 20) -> None:
        """Wait until the child listens on a Unix socket, which it may have been told relative to its folder."""
        self.wait_until(lambda: path in self._unix_sockets(), f"listening on {path}", timeout=timeout)

    def wait_for_port(self, port: int, *, timeout: float = 20) -> None:
        """Wait until the child listens on a TCP port, at whatever address."""
        self.wait_until(lambda: port in self._tcp_ports(), f"listening on port {port}", timeout=timeout)

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

    # Whether the child listens is looked up, never tried: a QMP server would take that for its client. And the sockets must be
    # the child's own: others that run beside this test have sockets of the same relative name.

    def _unix_sockets(self) -> set[Path]:
        # Columns: Num RefCount Protocol Flags Type St Inode Path; flag 0x10000 is SO_ACCEPTCON.
        rows = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
        own = self._inodes()
        return {self.cwd / row[7] for row in rows if len(row) == 8 and int(row[3], 16) & 0x10000 and row[6] in own}

    def _tcp_ports(self) -> set[int]:
        # Columns: sl local_address rem_address st ... inode (the tenth); state 0A is TCP_LISTEN.
        tables = [table for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if table.exists()]
        rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
        own = self._inodes()
        return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in own}

    def _inodes(self) -> set[str]:
        """Of the child's open sockets; none when it has ended."""
        found = set()
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{self.pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    found.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
        return found

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

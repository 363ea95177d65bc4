"""What a daemon does about its process: log, background, pid file, event loop.

Into the background, as QEMU goes: fork before anything is opened, let the child set everything up, and let the parent
return only then, so that a script may use the daemon at once. Messages of the start still reach the terminal; after
that the child has the root directory and no terminal. Source: QEMU ``system/os-posix.c`` (os_daemonize,
os_setup_post), ``util/oslib-posix.c`` (qemu_write_pidfile).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from livedisk.emulator.errors import LiveDiskError


class _Line(logging.Formatter):
    """``livedisk: text``, with the level only where it is a problem."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"livedisk: {level}{text}"


def log_to_stderr() -> None:
    """Send our log, from INFO up, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Line())
    root = logging.getLogger("livedisk")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False


def run_loop(main: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run the coroutine on uvloop; returns what it returns."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


class Background:
    """``-daemonize``. Entered, the process is two, if it was asked for: see `is_parent`."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.is_parent = False
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> Background:
        if self.wanted:
            self._pipe = os.pipe()
            sys.stdout.flush()
            self.is_parent = os.fork() != 0
            os.close(self._pipe[1 if self.is_parent else 0])
            if not self.is_parent:
                os.setsid()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pipe is not None:
            with contextlib.suppress(OSError):
                os.close(self._pipe[0 if self.is_parent else 1])

    def wait_for_child(self) -> int:
        """The parent's exit code: 0 once the child is `ready`, 1 if it ended before."""
        assert self._pipe is not None
        return 0 if os.read(self._pipe[0], 1) else 1

    def ready(self) -> None:
        """Everything is set up: let the parent return, let go of the folder and the terminal."""
        if not self.wanted:
            return
        assert self._pipe is not None
        os.chdir("/")
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        os.close(nothing)
        os.write(self._pipe[1], b"\0")


class PidFile:
    """A file with the process id, locked while the process runs, removed at its end."""

    def __init__(self, path: str) -> None:
        # Kept absolute: the process may leave its folder.
        self._path = os.path.abspath(path)
        self._shown = path
        self._descriptor = -1

    def write(self) -> None:
        """Create, lock and fill it. Raises LiveDiskError, in QEMU's words, also where a living process holds it."""
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._failure("create", error) from None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        except OSError as error:
            os.close(descriptor)
            taken = error.errno in (errno.EAGAIN, errno.EACCES)
            raise self._failure("lock" if taken else "write", error) from None
        self._descriptor = descriptor

    def _failure(self, verb: str, error: OSError) -> LiveDiskError:
        return LiveDiskError(f"cannot create PID file: Could not {verb} '{self._shown}': {error.strerror}")

    def remove(self) -> None:
        """Remove it, if this process wrote it."""
        if self._descriptor >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            os.close(self._descriptor)
            self._descriptor = -1

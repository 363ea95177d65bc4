"""Standard input and output as a character device (``-monitor stdio``, ``-qmp stdio``).

A terminal is taken out of its line mode, because the human monitor edits lines itself, and put back at the end. Input
that has ended closes the connection; the emulator goes on. Source: QEMU ``chardev/char-stdio.c``.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import queue
import select
import stat
import sys
import termios
import threading
from collections.abc import Callable
from typing import Final

from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp.chardev import StdioChardev
from livedisk.emulator.qmp.monitor import Frontend
from livedisk.emulator.qmp.server import CHUNK, UNREAD_LIMIT

log = logging.getLogger(__name__)

_IN: Final = 0
_OUT: Final = 1

_taken = False


class _Writer:
    """Writes to standard output without holding up the event loop.

    Standard output is shared with whoever started us, so it must not be made non-blocking. What surely fits is
    written at once, the rest by a thread of its own, in order.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._pending = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def write(self, data: bytes) -> int:
        """Write or queue. Returns the bytes that are queued."""
        if not self._pending and len(data) <= select.PIPE_BUF and select.select([], [_OUT], [], 0)[1]:
            self._put(data)
            return 0
        with self._lock:
            self._pending += len(data)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="stdout", daemon=True)
            self._thread.start()
        self._queue.put(data)
        return self._pending

    def drain(self) -> None:
        """Wait until all is written, a second at most."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(1)
            self._thread = None

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            self._put(data)
            with self._lock:
                self._pending -= len(data)

    def _put(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(_OUT, rest) :]
            except BlockingIOError:
                # Whoever started us made it non-blocking.
                select.select([], [_OUT], [])
            except OSError:
                # Nobody reads any more; the emulator goes on.
                return


class StdioDevice:
    """Standard input and output; there is one, so only one character device may be this. It is also its own
    `Port`."""

    def __init__(self, options: StdioChardev) -> None:
        global _taken
        if _taken:
            raise LiveDiskError("cannot use stdio by multiple character devices")
        _taken = True
        self.label = options.id
        self.options = options
        self.filename = "stdio"
        self._signal = options.signal
        self._frontend: Frontend | None = None
        self._restore: Callable[[], None] | None = None
        self._reading = False
        self._open = True
        self._writer = _Writer()

    def attach(self, frontend: Frontend) -> None:
        self._frontend = frontend
        sys.stdout.flush()
        if os.isatty(_IN):
            self._take_terminal()
        frontend.opened(self)
        self.set_reading(True)

    async def close(self) -> None:
        global _taken
        self._end()
        await asyncio.to_thread(self._writer.drain)
        if self._restore is not None:
            self._restore()
            atexit.unregister(self._restore)
            self._restore = None
        _taken = False

    # -- the frontend's side
    # ------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if not self._open:
            return
        if self._writer.write(data) > UNREAD_LIMIT:
            log.warning("standard output leaves %d bytes unread: closing the monitor", UNREAD_LIMIT)
            self._end()

    def take_descriptor(self) -> None:
        """Only sockets carry descriptors."""

    def set_reading(self, on: bool) -> None:
        if on == self._reading or not self._open:
            return
        self._reading = on
        loop = asyncio.get_running_loop()
        if _always_ready():
            if on:
                loop.call_soon(self._read)
        elif on:
            loop.add_reader(_IN, self._read)
        else:
            loop.remove_reader(_IN)

    # -- inside
    # -------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        if not self._reading:
            return
        try:
            data = os.read(_IN, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        assert self._frontend is not None
        self._frontend.received(data)
        if self._reading and _always_ready():
            asyncio.get_running_loop().call_soon(self._read)

    def _end(self) -> None:
        """No more input, no more output."""
        if not self._open:
            return
        self.set_reading(False)
        self._open = False
        if self._frontend is not None:
            self._frontend.closed()

    def _take_terminal(self) -> None:
        """Character by character, without echo; ``signal`` leaves Ctrl-C to the terminal (QEMU: term_stdio_init)."""
        before = termios.tcgetattr(_IN)
        mode = termios.tcgetattr(_IN)
        mode[0] &= ~(termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP)
        mode[0] &= ~(termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON)
        mode[1] |= termios.OPOST
        mode[2] = mode[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
        if not self._signal:
            mode[3] &= ~termios.ISIG
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(_IN, termios.TCSANOW, mode)
        self._restore = lambda: termios.tcsetattr(_IN, termios.TCSANOW, before)
        atexit.register(self._restore)


def _always_ready() -> bool:
    """A regular file or /dev/null, which the event loop cannot watch and which never blocks."""
    mode = os.fstat(_IN).st_mode
    return stat.S_ISREG(mode) or (stat.S_ISCHR(mode) and not os.isatty(_IN))

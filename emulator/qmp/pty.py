"""A pseudo terminal as a character device: somebody opens its other end with a terminal program.

Whether somebody has it open is not told by an event: it is looked at every `POLL` seconds, as QEMU does. What is written
meanwhile is lost, as on a line without anybody at its end. ``path`` becomes a link to the terminal.

Source: QEMU ``chardev/char-pty.c``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import termios
import tty
from typing import Final

from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp.chardev import PtyChardev
from livedisk.emulator.qmp.monitor import Frontend
from livedisk.emulator.qmp.server import CHUNK, UNREAD_LIMIT

log = logging.getLogger(__name__)
POLL: Final = 1.0


class PtyDevice:
    """The master's side; also its own `Port`. ``terminal``: the path of the other side."""

    def __init__(self, options: PtyChardev) -> None:
        self.label = options.id
        self.options = options
        self._link = options.path
        try:
            self._master, slave = os.openpty()
        except OSError as error:
            raise LiveDiskError(f"Failed to create PTY: {error.strerror}") from None
        try:
            self.terminal = os.ttyname(slave)
            tty.setraw(slave, termios.TCSANOW)
            os.set_blocking(self._master, False)
            if self._link is not None:
                os.symlink(self.terminal, self._link)
        except OSError as error:
            os.close(self._master)
            raise LiveDiskError(f"Failed to create PTY symlink: {error.strerror}") from None
        finally:
            os.close(slave)
        self.filename = f"pty:{self.terminal}"
        self._frontend: Frontend | None = None
        self._connected = False
        self._wanted = True
        self._reading = False
        self._unsent = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self._look()

    def attach(self, frontend: Frontend) -> None:
        self._frontend = frontend
        if self._connected:
            frontend.opened(self)
            self._watch()

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._hang_up()
        os.close(self._master)
        if self._link is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._link)

    # -- the frontend's side -----------------------------------------------------------------------------------------
    def write(self, data: bytes) -> None:
        if not self._connected:
            return
        rest = memoryview(data)
        if not self._unsent:
            rest = rest[self._send(rest) :]
        if rest:
            self._unsent += rest
            asyncio.get_running_loop().add_writer(self._master, self._writable)
        if len(self._unsent) > UNREAD_LIMIT:
            log.warning("chardev %s: %d bytes are left unread, and dropped", self.label, len(self._unsent))
            self._unsent.clear()

    def set_reading(self, on: bool) -> None:
        self._wanted = on
        self._watch()

    def take_descriptor(self) -> None:
        """Only sockets carry descriptors."""

    # -- inside ------------------------------------------------------------------------------------------------------
    def _look(self) -> None:
        """Whether somebody has the terminal open."""
        poll = select.poll()
        poll.register(self._master, 0)
        if any(events & select.POLLHUP for _, events in poll.poll(0)):
            self._hang_up()
        elif not self._connected:
            self._connected = True
            if self._frontend is not None:
                self._frontend.opened(self)
            self._watch()
        self._timer = asyncio.get_running_loop().call_later(POLL, self._look)

    def _hang_up(self) -> None:
        if not self._connected:
            return
        self._connected = False
        self._watch()
        if self._unsent:
            self._unsent.clear()
            asyncio.get_running_loop().remove_writer(self._master)
        self._wanted = True
        if self._frontend is not None:
            self._frontend.closed()

    def _watch(self) -> None:
        reading = self._connected and self._wanted and self._frontend is not None
        if reading == self._reading:
            return
        self._reading = reading
        loop = asyncio.get_running_loop()
        if reading:
            loop.add_reader(self._master, self._readable)
        else:
            loop.remove_reader(self._master)

    def _readable(self) -> None:
        try:
            data = os.read(self._master, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # EIO: nobody has the other side open any more
        if not data:
            self._hang_up()
            return
        assert self._frontend is not None
        self._frontend.received(data)

    def _writable(self) -> None:
        del self._unsent[: self._send(memoryview(bytes(self._unsent[:CHUNK])))]
        if not self._unsent:
            asyncio.get_running_loop().remove_writer(self._master)

    def _send(self, data: memoryview) -> int:
        try:
            return os.write(self._master, data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)  # nobody there: lost

"""``logfile``: a copy in a file of all that a frontend writes to a character device.

What comes in is not in it. The file may be one of a set of descriptors (``/dev/fdset/N``). Source: QEMU ``chardev/char.c``
(qemu_chr_write_log, qemu_char_open).
"""

from __future__ import annotations

import logging
import os

from livedisk.emulator.block.descriptors import open_file
from livedisk.emulator.errors import BlockError, LiveDiskError
from livedisk.emulator.qmp.chardev import Chardev
from livedisk.emulator.qmp.monitor import Frontend, Port

log = logging.getLogger(__name__)


class Log:
    """The file. Raises LiveDiskError, in QEMU's words, where it cannot be had."""

    def __init__(self, options: Chardev) -> None:
        path = options.logfile or ""
        how = os.O_APPEND if options.logappend else os.O_TRUNC
        try:
            self._fd, lease = open_file(path, os.O_WRONLY | os.O_CREAT | how, 0o666)
        except OSError as error:
            raise LiveDiskError(f"Could not create '{path}': {os.strerror(error.errno or 0)}") from None
        except BlockError as error:
            raise LiveDiskError(f"Could not create '{path}': {error}", hint=error.hint) from None
        if lease is not None:
            lease.release()
        self._label = options.id

    def add(self, data: bytes) -> None:
        """What cannot be written is told, and lost: the device itself goes on."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            log.warning("chardev %s: %d bytes are not in its log: %s", self._label, len(view), error.strerror)

    def close(self) -> None:
        os.close(self._fd)


class Logged:
    """A frontend whose output goes to a log as well."""

    def __init__(self, frontend: Frontend, log: Log) -> None:
        self._frontend = frontend
        self._log = log

    def opened(self, port: Port) -> None:
        self._frontend.opened(_LoggedPort(port, self._log))

    def received(self, data: bytes) -> None:
        self._frontend.received(data)

    def closed(self) -> None:
        self._frontend.closed()


class _LoggedPort:
    def __init__(self, port: Port, log: Log) -> None:
        self._port = port
        self._log = log
        self.set_reading = port.set_reading
        self.take_descriptor = port.take_descriptor

    def write(self, data: bytes) -> None:
        self._log.add(data)
        self._port.write(data)

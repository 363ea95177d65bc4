"""Character devices that are no connections: a file that takes output, a pair of pipes, a ring in memory.

Source: QEMU ``chardev/char-file.c``, ``chardev/char-pipe.c``, ``chardev/char-ringbuf.c``; messages asked from QEMU 10.0.2.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Final

from livedisk.emulator.block.descriptors import open_file
from livedisk.emulator.errors import BlockError, LiveDiskError
from livedisk.emulator.qmp.chardev import FileChardev, PipeChardev, RingbufChardev
from livedisk.emulator.qmp.monitor import Frontend

log = logging.getLogger(__name__)
_CHUNK: Final = 64 << 10


def _open(path: str, flags: int) -> int:
    """The name may be one of a set of descriptors (``/dev/fdset/N``). Nothing is locked: the copy is the device's alone."""
    try:
        fd, lease = open_file(path, flags, 0o666)
    except OSError as error:
        raise LiveDiskError(f"Could not open '{path}': {os.strerror(error.errno or 0)}") from error
    except BlockError as error:
        raise LiveDiskError(f"Could not open '{path}': {error}", hint=error.hint) from error
    if lease is not None:
        lease.release()
    return fd


class _Descriptors:
    """The port of a device that has descriptors: what a frontend writes goes to one, what comes is read from the other."""

    def __init__(self, label: str, reads_from: int | None, writes_to: int) -> None:
        self.label = label
        self.reads_from = reads_from
        self.writes_to = writes_to
        self._frontend: Frontend | None = None

    def attach(self, frontend: Frontend) -> None:
        self._frontend = frontend
        frontend.opened(self)
        self.set_reading(True)

    def write(self, data: bytes) -> None:
        """A file takes it at once; a pipe that is full loses what does not fit, as there is nobody to wait for it."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.writes_to, view) :]
        except OSError as error:
            log.warning("chardev %s: %d bytes were lost: %s", self.label, len(view), error.strerror)

    def take_descriptor(self) -> None:
        """Only sockets carry descriptors."""

    def set_reading(self, on: bool) -> None:
        if self.reads_from is None:
            return
        loop = asyncio.get_running_loop()
        if on and self._frontend is not None:
            loop.add_reader(self.reads_from, self._readable)
        else:
            loop.remove_reader(self.reads_from)

    def _readable(self) -> None:
        assert self.reads_from is not None
        assert self._frontend is not None
        try:
            data = os.read(self.reads_from, _CHUNK)
        except BlockingIOError:
            return
        if data:
            self._frontend.received(data)
        else:
            asyncio.get_running_loop().remove_reader(self.reads_from)

    async def close(self) -> None:
        for fd in {self.reads_from, self.writes_to} - {None}:
            assert fd is not None
            if fd == self.reads_from and self._frontend is not None:
                asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)


class FileDevice(_Descriptors):
    """A file that output is written to, and another that input may come from."""

    filename = "file"

    def __init__(self, options: FileChardev) -> None:
        self.options = options
        how = os.O_APPEND if options.append else os.O_TRUNC
        writes_to = _open(options.path, os.O_WRONLY | os.O_CREAT | how)
        try:
            reads_from = None
            if options.input_path is not None:
                reads_from = _open(options.input_path, os.O_RDONLY | os.O_NONBLOCK)
        except BaseException:
            os.close(writes_to)
            raise
        super().__init__(options.id, reads_from, writes_to)

    def set_reading(self, on: bool) -> None:
        """The end of a file is always readable: it is read once, from here."""
        if on and self.reads_from is not None and self._frontend is not None:
            asyncio.get_running_loop().call_soon(self._read_all)

    def _read_all(self) -> None:
        assert self.reads_from is not None
        assert self._frontend is not None
        while data := os.read(self.reads_from, _CHUNK):
            self._frontend.received(data)

    async def close(self) -> None:
        self._frontend = None
        await super().close()


class PipeDevice(_Descriptors):
    """Named pipes NAME.in and NAME.out, or one file NAME for both ways."""

    filename = "pipe"

    def __init__(self, options: PipeChardev) -> None:
        self.options = options
        name, opened = options.path, list[int]()
        try:
            opened += [_open(f"{name}.in", os.O_RDWR | os.O_NONBLOCK)]
            opened += [_open(f"{name}.out", os.O_RDWR | os.O_NONBLOCK)]
        except LiveDiskError:  # not both: then it is one file
            for fd in opened:
                os.close(fd)
            opened = [_open(name, os.O_RDWR | os.O_NONBLOCK)]
        super().__init__(options.id, opened[0], opened[-1])


class RingbufDevice:
    """A ring in memory: the last ``size`` bytes that were written and not read yet."""

    filename = "ringbuf"

    def __init__(self, options: RingbufChardev) -> None:
        if options.size <= 0 or options.size & (options.size - 1):
            raise LiveDiskError("size of ringbuf chardev must be power of two")
        self.label = options.id
        self.options = options
        self._data = bytearray()

    def attach(self, frontend: Frontend) -> None:
        frontend.opened(self)

    def write(self, data: bytes) -> None:
        """The oldest bytes give way."""
        self._data += data
        del self._data[: max(len(self._data) - self.options.size, 0)]

    def take(self, size: int) -> bytes:
        """Up to ``size`` bytes, the oldest first; they are gone then."""
        found = bytes(self._data[:size])
        del self._data[:size]
        return found

    def take_descriptor(self) -> None:
        """Only sockets carry descriptors."""

    def set_reading(self, on: bool) -> None:
        """Nothing comes from a ring."""

    async def close(self) -> None:
        self._data.clear()

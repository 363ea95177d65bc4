"""A Unix stream socket that takes descriptors in beside bytes (SCM_RIGHTS), as an asyncio transport.

Neither asyncio's nor uvloop's own transports receive ancillary data: the kernel closes what was sent. This one is written
on ``add_reader`` and ``add_writer``, and does what `server.Connection` needs of a transport: writing is buffered, with
`pause_writing` above `HIGH` bytes and `resume_writing` below `LOW`; reading can be paused; `close` sends what is
buffered first, `abort` does not.

Descriptors that nobody took are closed when the next ones come, and in the end (QEMU: tcp_chr_recv, tcp_get_msgfds).
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
from typing import Any, Final

CHUNK: Final = 64 << 10
DESCRIPTORS: Final = 16
"""Descriptors with one message; more are closed by the kernel (QEMU: SOCKET_MAX_FDS)."""
HIGH: Final = 64 << 10
LOW: Final = 16 << 10


class RightsTransport(asyncio.Transport):
    """One connection; it owns ``sock``, which must not block. ``protocol`` hears of it in the next turn of the loop."""

    def __init__(self, sock: socket.socket, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._socket = sock
        self._protocol = protocol
        self._received: list[int] = []
        self._buffer = bytearray()
        self._paused = False
        self._reading = False
        self._writing = False
        self._stalled = False
        self._closing = False
        self._gone = False
        self._loop.call_soon(self._begin)

    def take_descriptor(self) -> int | None:
        """The first descriptor of the message read last; the caller's then. Others of the message are closed."""
        if not self._received:
            return None
        first, *rest = self._received
        self._received = []
        for fd in rest:
            os.close(fd)
        return first

    # -- asyncio's transport -----------------------------------------------------------------------------------------
    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._socket if name == "socket" else default

    def is_closing(self) -> bool:
        return self._closing

    def get_write_buffer_size(self) -> int:
        return len(self._buffer)

    def pause_reading(self) -> None:
        self._paused = True
        self._watch()

    def resume_reading(self) -> None:
        self._paused = False
        self._watch()

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self._gone or self._closing:
            return
        rest = memoryview(data)
        if not self._buffer:
            try:
                rest = rest[self._socket.send(rest) :]
            except (BlockingIOError, InterruptedError):
                pass  # full: the rest waits
            except OSError as error:
                self._end(error)
                return
        self._buffer += rest
        self._watch()
        if len(self._buffer) > HIGH and not self._stalled:
            self._stalled = True
            self._protocol.pause_writing()

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._watch()
        if not self._buffer:
            self._end(None)

    def abort(self) -> None:
        self._closing = True
        self._end(None)

    # -- inside ------------------------------------------------------------------------------------------------------
    def _begin(self) -> None:
        if not self._gone:
            self._protocol.connection_made(self)
            self._watch()

    def _watch(self) -> None:
        """Listen to the loop for what is wanted now, and nothing else."""
        fd = self._socket.fileno()
        reading = not (self._paused or self._closing or self._gone)
        if reading != self._reading:
            self._reading = reading
            if reading:
                self._loop.add_reader(fd, self._readable)
            else:
                self._loop.remove_reader(fd)
        writing = bool(self._buffer) and not self._gone
        if writing != self._writing:
            self._writing = writing
            if writing:
                self._loop.add_writer(fd, self._writable)
            else:
                self._loop.remove_writer(fd)

    def _readable(self) -> None:
        try:
            space = socket.CMSG_SPACE(DESCRIPTORS * array.array("i").itemsize)
            data, ancillary, _, _ = self._socket.recvmsg(CHUNK, space, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(error)
            return
        fds = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if fds:
            self._drop_received()
            self._received = list(fds)
        if data:
            self._protocol.data_received(data)
        elif not self._protocol.eof_received():
            self.close()
        else:
            self.pause_reading()

    def _writable(self) -> None:
        try:
            del self._buffer[: self._socket.send(self._buffer)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(error)
            return
        self._watch()
        if self._stalled and len(self._buffer) < LOW:
            self._stalled = False
            self._protocol.resume_writing()
        if self._closing and not self._buffer:
            self._end(None)

    def _end(self, error: OSError | None) -> None:
        if self._gone:
            return
        self._gone = self._closing = True
        self._buffer.clear()
        self._watch()
        self._drop_received()
        self._loop.call_soon(self._finish, error)

    def _finish(self, error: OSError | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            self._socket.close()

    def _drop_received(self) -> None:
        for fd in self._received:
            os.close(fd)
        self._received = []

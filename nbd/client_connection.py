"""One connection of a client: a stream, the two client cores, and futures. The raw socket's shell, made for throughput.

* Requests made in one turn of the event loop leave in one system call: header and payload are queued, never copied, and sent
  by `sendmsg` at the end of the turn. What the socket does not take waits there, and so do the callers: what is queued is
  bounded by what they have under way.
* A payload may stand in files (`file_payload.py`), where the stream is a plain socket.
* Replies are received into one large buffer that all connections share, many at a time. The data of a long read is
  received straight into the caller's buffer.

The stream is a non-blocking socket or what looks like one (`Stream`): TLS is a function that turns the one into the other
during the handshake (`Secure`), and nothing else here knows of it.

The end: a connection that is lost, whatever for, fails every request under way with ConnectionError, and every later one. When
a server answers a WRITE whose payload it did not read yet, the caller gets its buffer back and we send a copy of the rest.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import Final, Protocol, cast

from .buffers import fresh
from .client_handshake import ClientHandshake, ExportInfo, NegotiationFailed
from .client_transmission import NO_FLAGS, ClientTransmission, Pending, ProtocolError
from .constants import Command, CommandFlag, ReplyMode
from .file_payload import FilePayload, Sending
from .poller import UPSTREAM
from .readiness import readable, writable

Buffer = bytes | bytearray | memoryview

_RECEIVE: Final = 256 << 10
"""Bytes received at once, where they do not go to a caller's buffer."""
_STRAIGHT: Final = 16 << 10
"""Bytes from which on a read's data is received in place: below, a system call costs more than the copy."""
_HEADER: Final = 36
"""Bytes received at first while a long read is under way: any reply's head, and little of what should be received in place."""
_TURNS: Final = 16
"""Receives in a row before others get their turn."""
_PIECES: Final = 256
"""Buffers in one system call; Linux takes 1024."""
_IN_A_ROW: Final = 4 << 20
"""Bytes sent in a row before others get their turn: a server that takes all at once would have us send all there is."""
_SOCKET_BUFFER: Final = 4 << 20
"""Bytes asked for, so that a large request can be sent at once where the kernel allows it."""

_shared = fresh(_RECEIVE)


class Stream(Protocol):
    """What a connection is made of: a non-blocking socket's methods.

    ``recv_into`` and ``sendmsg`` raise BlockingIOError where they would wait. A stream that keeps received data back (TLS
    does) has an attribute ``more`` that says so.
    """

    def fileno(self) -> int: ...

    def recv_into(self, buffer: memoryview, /) -> int: ...

    def sendmsg(self, buffers: Sequence[Buffer], /) -> int: ...

    def close(self) -> None: ...


Secure = Callable[[socket.socket], Awaitable[Stream]]
"""Does the TLS handshake on a connected, non-blocking socket. Raises OSError (ssl.SSLError is one); whoever called closes the
socket then."""


async def open_connection(
    sock: socket.socket,
    name: str = "",
    *,
    contexts: Sequence[str] = (),
    best: ReplyMode = ReplyMode.EXTENDED,
    secure: Secure | None = None,
) -> ClientConnection:
    """Negotiate the export ``name`` on a connected socket, which is the connection's from now on; with ``secure`` in TLS.

    Raises `NegotiationFailed` if the server refuses or is none, OSError if the connection breaks.
    """
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
    handshake = ClientHandshake(name, contexts=contexts, best=best, tls=secure is not None)
    stream: Stream = sock
    try:
        done = False
        while True:
            await _send_all(stream, handshake.take_output())
            if done:
                return ClientConnection(stream, handshake.info, handshake.leftover)
            if handshake.starting_tls:
                assert secure is not None
                stream = await secure(sock)
                handshake.secured()
                continue
            data = await _receive_some(stream)
            if not data:
                raise NegotiationFailed("Server closed the connection during negotiation")
            done = handshake.receive(data)
    except BaseException:
        stream.close()
        raise


async def _send_all(stream: Stream, data: bytes) -> None:
    while data:
        try:
            data = data[stream.sendmsg((data,)) :]
        except (BlockingIOError, InterruptedError):
            await writable(stream.fileno())


async def _receive_some(stream: Stream) -> bytes:
    room = bytearray(1 << 16)
    while True:
        try:
            return bytes(room[: stream.recv_into(memoryview(room))])
        except (BlockingIOError, InterruptedError):
            await readable(stream.fileno())


class ClientConnection:
    """A connection in the transmission phase. ``info``: the export. ``error``: why it was lost, or None.

    ``bytes``: what the requests under way carry, both ways. ``on_lost`` is called once, when the connection is gone.
    """

    def __init__(self, stream: Stream, info: ExportInfo, leftover: bytes) -> None:
        self.info = info
        self.error: Exception | None = None
        self.bytes = 0
        self.on_lost: Callable[[ClientConnection], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._stream = stream
        self._descriptor = stream.fileno()
        self._core = ClientTransmission(info)
        self._plain = stream if isinstance(stream, socket.socket) else None
        self._out: deque[Buffer | Sending] = deque()
        self._files = 0  # of `_out`, those that stand in files
        self._flush_soon: asyncio.Handle | None = None
        self._blocked = False
        self._long_reads = 0
        self._queued = self._sent = self._received = 0  # bytes
        self._passed_on = 0  # requests of `start` under way
        self._emptied: asyncio.Future[None] | None = None
        self._loop.add_reader(self._descriptor, self._readable)
        if leftover:
            self._take(lambda: self._core.receive(leftover))

    @property
    def in_flight(self) -> int:
        """Requests without a complete reply."""
        return self._core.in_flight

    def request(
        self,
        command: Command,
        offset: int,
        length: int,
        *,
        flags: CommandFlag = NO_FLAGS,
        target: memoryview | None = None,
        payload: Buffer | FilePayload = b"",
    ) -> asyncio.Future[Pending]:
        """Send a request; the future of its outcome, whose ``error`` may be the server's. The buffers, or
        files, are the connection's until then. The future, or this call, raises ConnectionError where the connection is gone."""
        if self.error is not None:
            raise lost(self.error)
        pending = self._send(command, offset, length, flags, target, payload)
        pending.waiter = self._loop.create_future()
        return pending.waiter

    def start(
        self,
        command: Command,
        offset: int,
        length: int,
        ended: Callable[[Pending | None], None],
        *,
        target: memoryview | None = None,
        payload: Buffer = b"",
    ) -> None:
        """As `request`, without a future: ``ended`` is called with the outcome, or with None where the connection is lost."""
        if self.error is not None:
            raise lost(self.error)
        self._send(command, offset, length, NO_FLAGS, target, payload).ended = ended
        self._passed_on += 1
        UPSTREAM[self] = None

    def _send(
        self,
        command: Command,
        offset: int,
        length: int,
        flags: CommandFlag,
        target: memoryview | None,
        payload: Buffer | FilePayload,
    ) -> Pending:
        header, pending = self._core.request(command, offset, length, flags=flags, target=target)
        self._out.append(header)
        if payload:
            pending.payload = payload
            if isinstance(payload, FilePayload):
                self._files += 1
                self._out.append(Sending(payload))
            else:
                self._out.append(payload)
        self._queued += len(header) + len(payload)
        pending.sent_by = self._queued
        if command == Command.READ or payload:
            self.bytes += length
            if length >= _STRAIGHT and not payload:
                self._long_reads += 1
        if self._flush_soon is None and not self._blocked:
            self._flush_soon = self._loop.call_soon(self._flush)
        return pending

    def poll(self) -> bool:
        """What the pollers of servers in this process call while requests of `start` are under way (see `poller`)."""
        if self.error is not None:
            return False
        moved = bool(self._out) and not self._blocked
        if moved:
            self._flush()
        before = self._received
        if self.error is None:
            self._readable()
        return moved or self._received != before

    # Sending.

    def _flush(self) -> None:
        if self._flush_soon is not None:
            self._flush_soon.cancel()
            self._flush_soon = None
        if self.error is not None:
            return
        out, stop = self._out, self._sent + _IN_A_ROW
        try:
            while out:
                if self._sent >= stop:
                    raise BlockingIOError  # go on in the loop's next turn
                if self._files:
                    self._send_with_files()
                    continue
                self._send_buffers(tuple(islice(cast("deque[Buffer]", out), _PIECES)))
        except (BlockingIOError, InterruptedError):
            if not self._blocked:
                self._blocked = True
                self._loop.add_writer(self._descriptor, self._flush)
            return
        except OSError as error:
            self._fail(error)
            return
        if self._blocked:
            self._blocked = False
            self._loop.remove_writer(self._descriptor)

    def _send_buffers(self, pieces: tuple[Buffer, ...]) -> None:
        out = self._out
        sent = self._stream.sendmsg(pieces)
        self._sent += sent
        for piece in pieces:
            if sent < len(piece):
                out[0] = memoryview(piece)[sent:]
                break
            sent -= len(piece)
            out.popleft()

    def _send_with_files(self) -> None:
        """Send a payload that stands in files, or what comes before the next one."""
        first, ahead = self._out[0], list[Buffer]()
        if not isinstance(first, Sending):
            for piece in islice(self._out, _PIECES):
                if isinstance(piece, Sending):
                    break
                ahead.append(piece)
            self._send_buffers(tuple(ahead))
            return
        assert self._plain is not None
        self._sent += first.send(self._plain)
        if first.over:
            self._out.popleft()
            self._files -= 1

    def _keep_payload(self, payload: Buffer | FilePayload) -> None:
        """The caller gets this buffer back: go on with a copy of what is not sent, or zeroes for what stands in files: the server
        has answered, and does not look at it."""
        if isinstance(payload, FilePayload):
            for piece in self._out:
                if isinstance(piece, Sending) and piece.payload is payload:
                    piece.forget_files()
            return
        owner = memoryview(payload).obj
        for place, piece in enumerate(self._out):
            if isinstance(piece, memoryview) and piece.obj is owner:
                self._out[place] = bytes(piece)

    # Receiving.

    def _readable(self) -> None:
        stream, core = self._stream, self._core
        for _ in range(_TURNS):
            wanted = core.wanted
            straight = wanted is not None and len(wanted) >= _STRAIGHT
            if straight:
                assert wanted is not None
                room = wanted
            else:
                room = _shared[:_HEADER] if self._long_reads and wanted is None else _shared
            try:
                count = stream.recv_into(room)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._fail(error)
                return
            if not count:
                self._fail(ConnectionResetError(errno.ECONNRESET, "NBD server closed the connection"))
                return
            self._received += count
            if straight:
                self._take(lambda: core.arrived(count))  # noqa: B023  called at once
            else:
                self._take(lambda: core.receive(room[:count]))  # noqa: B023
            if self.error is not None or (count < len(room) and not getattr(stream, "more", False)):
                return
        if getattr(stream, "more", False):
            self._loop.call_soon(self._again)

    def _again(self) -> None:
        if self.error is None:
            self._readable()

    def _take(self, receive: Callable[[], list[Pending]]) -> None:
        try:
            finished = receive()
        except ProtocolError as error:
            self._fail(error)
            return
        for pending in finished:
            self._end(pending)
        if self._emptied is not None and not self._core.in_flight and not self._emptied.done():
            self._emptied.set_result(None)

    def _end(self, pending: Pending) -> None:
        payload = pending.payload
        if payload is not None:
            self.bytes -= pending.length
            if pending.sent_by > self._sent:
                self._keep_payload(payload)
        elif pending.command == Command.READ:
            self.bytes -= pending.length
            if pending.length >= _STRAIGHT:
                self._long_reads -= 1
        if pending.ended is not None:
            self._passed_on -= 1
            if not self._passed_on:
                UPSTREAM.pop(self, None)
            pending.ended(pending)
        elif pending.waiter is not None and not pending.waiter.done():
            pending.waiter.set_result(pending)

    # The end.

    async def disconnect(self) -> None:
        """Say goodbye and close. Requests under way are answered first by a server that keeps to the protocol."""
        if self.error is None:
            header, _ = self._core.request(Command.DISCONNECT, 0, 0)
            self._out.append(header)
            self._queued += len(header)
            self._flush()
            if self._core.in_flight or self._out:
                self._emptied = self._loop.create_future()
                await self._emptied
        self.abort()

    def abort(self, why: str = "NBD connection was closed") -> None:
        """Drop the connection without a word. ``why``: what the requests under way fail with."""
        self._fail(ConnectionAbortedError(errno.ECONNABORTED, why))

    def _fail(self, error: Exception) -> None:
        if self.error is not None:
            return
        self.error = error
        self._loop.remove_reader(self._descriptor)
        if self._blocked:
            self._loop.remove_writer(self._descriptor)
        if self._flush_soon is not None:
            self._flush_soon.cancel()
        self._stream.close()
        self._out.clear()
        UPSTREAM.pop(self, None)
        on_lost, self.on_lost = self.on_lost, None
        if on_lost is not None:
            on_lost(self)
        for pending in self._core.abandon():
            if pending.ended is not None:
                pending.ended(None)
            elif pending.waiter is not None and not pending.waiter.done():
                pending.waiter.set_exception(lost(error))
        if self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)


def lost(error: Exception) -> ConnectionError:
    """What a request gets whose connection failed with ``error``."""
    if isinstance(error, ConnectionError):
        return type(error)(*error.args)
    return ConnectionError(errno.ECONNABORTED, f"NBD connection failed: {error}")

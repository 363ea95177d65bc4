"""A small asyncio NBD client: connect, many requests in flight, disconnect. A thin shell around the two client cores.

Use::

    client = await NbdClient.connect_unix("/run/disk.sock", contexts=("base:allocation",))
    await client.write(0, b"..." , fua=True)
    data = await client.read(0, 4096)
    extents = await client.block_status(0, client.info.size)      # {"base:allocation": [Extent, ...]}
    await client.disconnect()

Requests may be made concurrently from any number of tasks. Offsets and lengths are bytes. Whatever the server
refuses is an OSError with its errno and the server's text; a lost connection is ConnectionError for every request under way and
all later ones.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from typing import Final, cast

from .client_handshake import ClientHandshake, ExportInfo, NegotiationFailed
from .client_transmission import NO_FLAGS, ClientTransmission, Pending, ProtocolError
from .constants import Command, CommandFlag, ReplyMode, TransmissionFlag
from .export import Extent

_BUFFER: Final = 256 << 10


class _Wire(asyncio.BufferedProtocol):
    """Feeds received bytes to the handshake, then to the transmission core, and wakes who waits for the outcome."""

    def __init__(self, handshake: ClientHandshake) -> None:
        loop = asyncio.get_running_loop()
        self._buffer = memoryview(bytearray(_BUFFER))
        self._handshake: ClientHandshake | None = handshake
        self.core: ClientTransmission | None = None
        self.transport: asyncio.Transport | None = None
        self.ready: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.error: Exception | None = None
        self.waiting: dict[int, asyncio.Future[Pending]] = {}
        self._may_write = asyncio.Event()
        self._may_write.set()

    async def writable(self) -> None:
        """Wait while the server is slower at reading than we are at writing."""
        await self._may_write.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's own class is one in all but name

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        assert self.transport is not None
        data = self._buffer[:nbytes]
        try:
            if self._handshake is not None:
                self._negotiate(self._handshake, data)
            else:
                self._take(data)
        except (NegotiationFailed, ProtocolError) as error:
            self.error = error
            self.transport.abort()

    def _negotiate(self, handshake: ClientHandshake, data: memoryview) -> None:
        assert self.transport is not None
        done = handshake.receive(data)
        output = handshake.take_output()
        if output:
            self.transport.write(output)
        if done:
            self._handshake = None
            self.core = ClientTransmission(handshake.info)
            if not self.ready.done():
                self.ready.set_result(None)
            self._take(memoryview(handshake.leftover))

    def _take(self, data: memoryview) -> None:
        assert self.core is not None
        for pending in self.core.receive(data):
            future = self.waiting.pop(pending.cookie)
            if not future.done():
                future.set_result(pending)

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def connection_lost(self, error: Exception | None) -> None:
        if self.error is None:
            self.error = error or ConnectionResetError(errno.ECONNRESET, "NBD server closed the connection")
        if not self.ready.done():
            self.ready.set_exception(self.error)
        for future in self.waiting.values():
            if not future.done():
                future.set_exception(_lost(self.error))
        self.waiting.clear()
        self._may_write.set()
        if not self.closed.done():
            self.closed.set_result(None)


def _lost(error: Exception) -> ConnectionError:
    if isinstance(error, ConnectionError):
        return error
    return ConnectionError(errno.ECONNABORTED, f"NBD connection failed: {error}")


class NbdClient:
    """A connection to one export; made by `connect_unix` or `connect_tcp`. ``info`` describes the export."""

    def __init__(self, wire: _Wire, info: ExportInfo) -> None:
        self._wire = wire
        self.info = info

    @classmethod
    async def connect_unix(
        cls, path: str, name: str = "", *, contexts: Sequence[str] = (), best: ReplyMode = ReplyMode.EXTENDED
    ) -> NbdClient:
        """Connect over a unix socket. Raises OSError if nobody is there, `NegotiationFailed` if the server refuses."""
        handshake = ClientHandshake(name, contexts=contexts, best=best)
        loop = asyncio.get_running_loop()
        _, wire = await loop.create_unix_connection(lambda: _Wire(handshake), path)
        return await cls._negotiated(wire, handshake)

    @classmethod
    async def connect_tcp(
        cls,
        host: str,
        port: int,
        name: str = "",
        *,
        contexts: Sequence[str] = (),
        best: ReplyMode = ReplyMode.EXTENDED,
    ) -> NbdClient:
        """Connect over TCP. Raises as `connect_unix`."""
        handshake = ClientHandshake(name, contexts=contexts, best=best)
        loop = asyncio.get_running_loop()
        _, wire = await loop.create_connection(lambda: _Wire(handshake), host, port)
        return await cls._negotiated(wire, handshake)

    @classmethod
    async def _negotiated(cls, wire: _Wire, handshake: ClientHandshake) -> NbdClient:
        try:
            await wire.ready
        except BaseException:
            assert wire.transport is not None
            wire.transport.abort()
            raise
        return cls(wire, handshake.info)

    @property
    def in_flight(self) -> int:
        """Requests without a complete reply."""
        return len(self._wire.waiting)

    async def _request(
        self,
        command: Command,
        offset: int,
        length: int,
        *,
        flags: CommandFlag = NO_FLAGS,
        target: memoryview | None = None,
        payload: bytes | memoryview = b"",
    ) -> Pending:
        wire = self._wire
        await wire.writable()
        if wire.error is not None:
            raise _lost(wire.error)
        assert wire.core is not None
        assert wire.transport is not None
        header, pending = wire.core.request(command, offset, length, flags=flags, target=target)
        future: asyncio.Future[Pending] = asyncio.get_running_loop().create_future()
        wire.waiting[pending.cookie] = future
        wire.transport.write(header)
        if len(payload):
            wire.transport.write(payload)
        await future
        if pending.error is not None:
            raise pending.error
        return pending

    def _need(self, flag: TransmissionFlag, what: str) -> None:
        if not self.info.flags & flag:
            raise OSError(errno.EOPNOTSUPP, f"NBD server does not support {what}")

    async def read(self, offset: int, length: int) -> bytes:
        """The ``length`` bytes at ``offset``. Raises OSError."""
        data = bytearray(length)
        await self.read_into(offset, memoryview(data))
        return bytes(data)

    async def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes at ``offset``. Raises OSError."""
        await self._request(Command.READ, offset, len(target), target=target)

    async def write(self, offset: int, data: bytes | memoryview, *, fua: bool = False) -> None:
        """Write ``data`` at ``offset``; with ``fua`` return when it is on stable storage. Raises OSError."""
        flags = CommandFlag.FUA if fua else NO_FLAGS
        await self._request(Command.WRITE, offset, len(data), flags=flags, payload=data)

    async def flush(self) -> None:
        """Put all completed writes on stable storage. Raises OSError."""
        self._need(TransmissionFlag.SEND_FLUSH, "flush")
        await self._request(Command.FLUSH, 0, 0)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Discard a range. Raises OSError."""
        self._need(TransmissionFlag.SEND_TRIM, "trim")
        await self._request(Command.TRIM, offset, length, flags=CommandFlag.FUA if fua else NO_FLAGS)

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, may_unmap: bool = True, fast: bool = False
    ) -> None:
        """Zero a range. With ``fast`` OSError(ENOTSUP) where it would be no faster than writing. Raises OSError."""
        self._need(TransmissionFlag.SEND_WRITE_ZEROES, "write zeroes")
        flags = CommandFlag.FUA if fua else NO_FLAGS
        if not may_unmap:
            flags |= CommandFlag.NO_HOLE
        if fast:
            self._need(TransmissionFlag.SEND_FAST_ZERO, "fast zero")
            flags |= CommandFlag.FAST_ZERO
        await self._request(Command.WRITE_ZEROES, offset, length, flags=flags)

    async def cache(self, offset: int, length: int) -> None:
        """Ask the server to prefetch a range. Raises OSError."""
        self._need(TransmissionFlag.SEND_CACHE, "cache")
        await self._request(Command.CACHE, offset, length)

    async def block_status(self, offset: int, length: int, *, one: bool = False) -> dict[str, list[Extent]]:
        """Extents from ``offset`` on, by context name; they may cover less than was asked. Raises OSError."""
        flags = CommandFlag.REQ_ONE if one else NO_FLAGS
        pending = await self._request(Command.BLOCK_STATUS, offset, length, flags=flags)
        return pending.extents

    async def disconnect(self) -> None:
        """Say goodbye and close. Requests under way are answered first by a server that keeps to the protocol."""
        wire = self._wire
        assert wire.transport is not None
        if wire.error is None and wire.core is not None:
            header, _ = wire.core.request(Command.DISCONNECT, 0, 0)
            wire.transport.write(header)
            while wire.waiting:
                await asyncio.wait(tuple(wire.waiting.values()))
        wire.transport.close()
        await wire.closed

    def abort(self) -> None:
        """Drop the connection without a word."""
        assert self._wire.transport is not None
        self._wire.transport.abort()

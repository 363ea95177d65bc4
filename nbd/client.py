"""A small asyncio NBD client: connect, many requests in flight, disconnect. A thin face on
`client_connection`.

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
import socket
from collections.abc import Sequence

from .client_connection import ClientConnection, open_connection
from .client_handshake import ExportInfo
from .client_transmission import NO_FLAGS, Pending
from .constants import Command, CommandFlag, ReplyMode, TransmissionFlag
from .export import Extent
from .tls import ClientTls


class NbdClient:
    """A connection to one export; made by `connect_unix` or `connect_tcp`. ``info`` describes the export."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self.info: ExportInfo = connection.info

    @classmethod
    async def connect_unix(
        cls,
        path: str,
        name: str = "",
        *,
        contexts: Sequence[str] = (),
        best: ReplyMode = ReplyMode.EXTENDED,
        tls: ClientTls | None = None,
    ) -> NbdClient:
        """Connect over a unix socket. Raises OSError if nobody is there, `NegotiationFailed` if the server refuses.

        With ``tls`` it is TLS or nothing.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, path)
        except BaseException:
            sock.close()
            raise
        secure = None if tls is None else tls.secure
        return cls(await open_connection(sock, name, contexts=contexts, best=best, secure=secure))

    @classmethod
    async def connect_tcp(
        cls,
        host: str,
        port: int,
        name: str = "",
        *,
        contexts: Sequence[str] = (),
        best: ReplyMode = ReplyMode.EXTENDED,
        tls: ClientTls | None = None,
    ) -> NbdClient:
        """Connect over TCP. ``tls``, and what it raises: as `connect_unix`."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for number, (family, kind, proto, _, address) in enumerate(found):
            sock = socket.socket(family, kind, proto)
            sock.setblocking(False)
            try:
                await loop.sock_connect(sock, address)
            except OSError:
                sock.close()
                if number == len(found) - 1:
                    raise
            except BaseException:
                sock.close()
                raise
            else:
                break
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        secure = None if tls is None else tls.secure
        return cls(await open_connection(sock, name, contexts=contexts, best=best, secure=secure))

    @property
    def in_flight(self) -> int:
        """Requests without a complete reply."""
        return self._connection.in_flight

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
        pending = await self._connection.request(command, offset, length, flags=flags, target=target, payload=payload)
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
        await self._connection.disconnect()

    def abort(self) -> None:
        """Drop the connection without a word."""
        self._connection.abort()

"""An export that is somewhere else, and may move: a `livedisk.nbd.export.Export` on a client's `Link`.

Requests go to whichever of several servers has the export now. Where the connection is lost they wait, are sent again to the
server that has it then, and only after ``delay`` seconds fail. Sending twice is harmless: what was not answered had not been
acknowledged to anybody.

Source: proto.md; what a server does not offer is not offered here either.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from livedisk.nbd.client_connection import ClientConnection
from livedisk.nbd.client_handshake import ExportInfo, NegotiationFailed
from livedisk.nbd.client_link import Link
from livedisk.nbd.client_transmission import NO_FLAGS
from livedisk.nbd.constants import BASE_ALLOCATION, Command, CommandFlag, TransmissionFlag
from livedisk.nbd.export import MISS, Extent

log = logging.getLogger(__name__)

Connect = Callable[[], Awaitable[ClientConnection]]
_LONGEST: Final = (1 << 32) - (1 << 20)
"""Bytes in one request without payload."""


class Servers:
    """Ways to the export, by name; the one that worked last is tried first."""

    def __init__(self, ways: Sequence[tuple[str, Connect]]) -> None:
        self._ways = list(ways)
        self.current = ""

    async def connect(self) -> ClientConnection:
        """A connection to the first server that has the export. Raises what the last one raised."""
        problem: Exception | None = None
        for place, (name, way) in enumerate(list(self._ways)):
            try:
                connection = await way()
            except (OSError, NegotiationFailed) as error:
                log.debug("%s: %s", name, error)
                problem = error
                continue
            if name != self.current:
                log.info("the export is at %s", name)
            self.current = name
            self._ways.insert(0, self._ways.pop(place))
            return connection
        assert problem is not None, "there is one way at least"
        raise problem


class Relay:
    """The export. Make it, then `open` it."""

    def __init__(self, name: str, servers: Servers, delay: float) -> None:
        self.name = name
        self.description = ""
        self.read_only = True
        self.can_multi_conn = False
        self.can_fast_zero = False
        self.min_block, self.preferred_block, self.max_payload = 1, 4096, 32 << 20
        self.try_read: Callable[[int, memoryview], int] = _declines
        self.try_write: Callable[[int, memoryview], int] = _declines
        self._link = Link(servers.connect, self._check, reconnect_delay=delay, where=f"export '{name}'")
        self._contexts: tuple[str, ...] = ()

    async def open(self, timeout: float) -> None:
        """Connect, trying for ``timeout`` seconds. Raises OSError or `NegotiationFailed`."""
        await self._link.open(timeout)
        info = self._link.info
        self.description = info.description
        self.read_only = bool(info.flags & TransmissionFlag.READ_ONLY)
        self.can_multi_conn = bool(info.flags & TransmissionFlag.CAN_MULTI_CONN)
        self.can_fast_zero = self._offers(TransmissionFlag.SEND_FAST_ZERO)
        self.min_block, self.preferred_block = info.min_block, info.preferred_block
        self.max_payload = min(info.max_payload, 32 << 20)
        self._contexts = (BASE_ALLOCATION,) if BASE_ALLOCATION in info.contexts.values() else ()

    async def close(self) -> None:
        """Nothing is under way any more: say goodbye."""
        await self._link.close()

    def _check(self, info: ExportInfo) -> None:
        """Whether the export at another place is the same one."""
        if info.size != self._link.info.size:
            raise NegotiationFailed(f"the export there has {info.size} bytes, not {self._link.info.size}")
        if info.flags & TransmissionFlag.READ_ONLY and not self.read_only:
            raise NegotiationFailed("the export there is read-only")
        if info.min_block > self.min_block:
            raise NegotiationFailed(f"the export there takes no less than {info.min_block} bytes")

    def _offers(self, flag: TransmissionFlag) -> bool:
        return bool(self._link.info.flags & flag)

    # -- what the server asks ----------------------------------------------------------------------------------------
    @property
    def size(self) -> int:
        """Bytes."""
        return self._link.info.size

    @property
    def contexts(self) -> Sequence[str]:
        """Meta contexts served."""
        return self._contexts

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``."""
        await self._link.request(Command.READ, offset, len(view), target=view)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Write ``data``."""
        flags = CommandFlag.FUA if fua and self._offers(TransmissionFlag.SEND_FUA) else NO_FLAGS
        await self._link.request(Command.WRITE, offset, len(data), flags=flags, payload=data)
        if fua and not flags:
            await self.flush()

    async def flush(self) -> None:
        """Put every acknowledged write on stable storage."""
        if self._offers(TransmissionFlag.SEND_FLUSH):
            await self._link.request(Command.FLUSH, 0, 0)

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """Discard the range, where the server can."""
        if self._offers(TransmissionFlag.SEND_TRIM):
            await self._ranges(Command.TRIM, offset, length, NO_FLAGS, fua=fua)

    async def write_zeroes(self, offset: int, length: int, *, fua: bool, may_unmap: bool, fast: bool) -> None:
        """Zero the range."""
        if not self._offers(TransmissionFlag.SEND_WRITE_ZEROES):
            if fast:
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            for at in range(offset, offset + length, self.max_payload):
                await self.write(at, memoryview(bytes(min(self.max_payload, offset + length - at))), fua=fua)
            return
        flags = NO_FLAGS if may_unmap else CommandFlag.NO_HOLE
        if fast:
            flags |= CommandFlag.FAST_ZERO
        await self._ranges(Command.WRITE_ZEROES, offset, length, flags, fua=fua)

    async def _ranges(self, command: Command, offset: int, length: int, flags: CommandFlag, *, fua: bool) -> None:
        own = fua and self._offers(TransmissionFlag.SEND_FUA)
        for at in range(offset, offset + length, _LONGEST):
            step = min(_LONGEST, offset + length - at)
            await self._link.request(command, at, step, flags=flags | CommandFlag.FUA if own else flags)
        if fua and not own:
            await self.flush()

    async def cache(self, offset: int, length: int) -> None:
        """Prefetch, where the server can."""
        if self._offers(TransmissionFlag.SEND_CACHE):
            await self._link.request(Command.CACHE, offset, length)

    async def block_status(self, context: str, offset: int, length: int, limit: int) -> list[Extent]:
        """As the server tells it."""
        flags = CommandFlag.REQ_ONE if limit == 1 else NO_FLAGS
        pending = await self._link.request(Command.BLOCK_STATUS, offset, min(length, _LONGEST), flags=flags)
        found: list[Extent] = []
        left = length
        for extent in pending.extents.get(context, [])[:limit]:
            run = min(extent.length, left)
            if run:
                found.append(Extent(run, extent.flags))
            left -= run
        return found or [Extent(length, 0)]

    def client_connected(self, client: object) -> None:
        """Nothing to prepare."""

    def client_gone(self, client: object) -> None:
        """Nothing to undo."""


def _declines(offset: int, view: memoryview) -> int:
    return MISS

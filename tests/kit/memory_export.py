"""An `nbd.Export` over a bytearray with a map of what is allocated: the simplest thing that can be served, for tests.

It is strict about the promises of the server (ranges, lengths) and can be told to fail, to miss its fast path, or to
wait, so that tests can put a server into any state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from livedisk.nbd.constants import ALLOCATION_DEPTH, BASE_ALLOCATION, STATE_HOLE, STATE_ZERO
from livedisk.nbd.export import DATA, HOLE, MISS, Extent

GRAIN = 4096
"""Bytes of one unit of allocation."""


class MemoryExport:
    """``size`` bytes in memory, all a hole at first.

    ``hook(operation, offset, length)`` is awaited at the start of every slow operation: it may wait, or raise. ``log``
    names every operation that ran. With ``fast=False`` the fast path always misses.
    """

    def __init__(
        self,
        size: int,
        name: str = "",
        *,
        description: str = "",
        read_only: bool = False,
        min_block: int = 1,
        max_payload: int = 32 << 20,
        can_fast_zero: bool = True,
        fast: bool = True,
        contexts: Sequence[str] = (BASE_ALLOCATION, ALLOCATION_DEPTH),
    ) -> None:
        self.name = name
        self.description = description
        self.read_only = read_only
        self.can_multi_conn = True
        self.can_fast_zero = can_fast_zero
        self.min_block = min_block
        self.preferred_block = max(4096, min_block)
        self.max_payload = max_payload
        self.contexts = contexts
        self.data = bytearray(size)
        self.allocated = bytearray(-(-size // GRAIN))
        self.fast = fast
        self.log: list[tuple[str, int, int]] = []
        self.clients: list[object] = []
        self.refuse: OSError | None = None
        self.hook: Callable[[str, int, int], Awaitable[None]] | None = None
        self.try_read = self._try_read
        self.try_write = self._try_write

    @property
    def size(self) -> int:
        return len(self.data)

    def fill(self, offset: int, content: bytes | memoryview) -> None:
        """Write behind the server's back."""
        self.data[offset : offset + len(content)] = content
        self._allocate(offset, len(content), 1)

    def _allocate(self, offset: int, length: int, state: int) -> None:
        first, last = offset // GRAIN, -(-(offset + length) // GRAIN)
        self.allocated[first:last] = bytes([state]) * (last - first)

    def _check(self, operation: str, offset: int, length: int) -> None:
        assert 0 <= offset <= self.size, (operation, offset, length)
        assert 0 < length <= self.size - offset, (operation, offset, length)
        self.log.append((operation, offset, length))

    async def _begin(self, operation: str, offset: int, length: int) -> None:
        if operation != "flush":
            self._check(operation, offset, length)
        if self.hook is not None:
            await self.hook(operation, offset, length)

    def _try_read(self, offset: int, view: memoryview) -> int:
        if not self.fast:
            return MISS
        length = len(view)
        self._check("try_read", offset, length)
        if not any(self.allocated[offset // GRAIN : -(-(offset + length) // GRAIN)]):
            return HOLE
        view[:] = memoryview(self.data)[offset : offset + length]
        return DATA

    def _try_write(self, offset: int, view: memoryview) -> int:
        if not self.fast:
            return MISS
        assert not self.read_only
        self._check("try_write", offset, len(view))
        self.fill(offset, view)
        return DATA

    async def read(self, offset: int, view: memoryview) -> None:
        await self._begin("read", offset, len(view))
        view[:] = memoryview(self.data)[offset : offset + len(view)]

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        assert not self.read_only
        await self._begin("write fua" if fua else "write", offset, len(data))
        self.fill(offset, data)

    async def flush(self) -> None:
        self.log.append(("flush", 0, 0))
        await self._begin("flush", 0, 0)

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        await self._begin("trim fua" if fua else "trim", offset, length)
        first, last = -(-offset // GRAIN), (offset + length) // GRAIN
        if first < last:
            self.data[first * GRAIN : last * GRAIN] = bytes((last - first) * GRAIN)
            self.allocated[first:last] = bytes(last - first)

    async def write_zeroes(self, offset: int, length: int, *, fua: bool, may_unmap: bool, fast: bool) -> None:
        words = [
            "write_zeroes",
            *(["fua"] if fua else []),
            *([] if may_unmap else ["no_hole"]),
            *(["fast"] if fast else []),
        ]
        await self._begin(" ".join(words), offset, length)
        self.data[offset : offset + length] = bytes(length)
        if may_unmap:
            await asyncio.sleep(0)
            self.allocated[-(-offset // GRAIN) : (offset + length) // GRAIN] = bytes(
                max(0, (offset + length) // GRAIN - -(-offset // GRAIN))
            )
        else:
            self._allocate(offset, length, 1)

    async def cache(self, offset: int, length: int) -> None:
        await self._begin("cache", offset, length)

    async def block_status(self, context: str, offset: int, length: int, limit: int) -> list[Extent]:
        await self._begin(f"block_status {context}", offset, length)
        assert limit >= 1
        hole = STATE_HOLE | STATE_ZERO if context == BASE_ALLOCATION else 0
        data = 0 if context == BASE_ALLOCATION else 1
        extents: list[Extent] = []
        at, end = offset, offset + length
        while at < end:
            step = min(end, (at // GRAIN + 1) * GRAIN) - at
            flags = data if self.allocated[at // GRAIN] else hole
            if extents and extents[-1].flags == flags:
                extents[-1] = Extent(extents[-1].length + step, flags)
            elif len(extents) == limit:
                break
            else:
                extents.append(Extent(step, flags))
            at += step
        return extents

    def client_connected(self, client: object) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.clients.append(client)

    def client_gone(self, client: object) -> None:
        self.clients.remove(client)

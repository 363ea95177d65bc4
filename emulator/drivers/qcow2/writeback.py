"""Cached metadata on its way to the disk, in the one order that is safe at any moment of a power cut.

    1. refcount blocks;  barrier                          (data that was written before is durable with it)
       and, for new blocks: refcount table entries;  barrier
    2. L2 tables                                          3. where L1 entries changed:  barrier;  L1 entries
    4. where something was retired:  barrier;  its refcounts go down, in memory: the next round writes them

What is written in a round is copied out of the caches before the first await: changes made meanwhile belong to the next
round, or an L2 entry could reach the disk before the data and the refcount it stands on. If a write fails, everything that was
taken is dirty again, and the next round tries anew.

With lazy refcounts and the dirty bit set, steps 1 is only the barrier.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from livedisk.emulator.block.debug import Event
from livedisk.emulator.drivers.qcow2.alloc import Allocator
from livedisk.emulator.drivers.qcow2.cache import Table
from livedisk.emulator.drivers.qcow2.geometry import table_to_bytes
from livedisk.emulator.drivers.qcow2.overlap import Section
from livedisk.emulator.drivers.qcow2.points import Point
from livedisk.emulator.drivers.qcow2.tables import Tables

Piece = tuple["Table[array[int]]", int, int, bytes]


class Writeback:
    """Writes the caches of one image. One round at a time.

    ``refcounts_may_wait``: whether refcounts need not reach the disk before the image is closed (the dirty bit is set there).
    """

    def __init__(self, tables: Tables, allocator: Allocator, refcounts_may_wait: Callable[[], bool]) -> None:
        self.tables = tables
        self.allocator = allocator
        self.refcounts = allocator.refcounts
        self.storage = tables.storage
        self.refcounts_may_wait = refcounts_may_wait
        self._lock = asyncio.Lock()

    @property
    def needed(self) -> bool:
        """Whether the caches hold anything that the disk does not have."""
        return bool(
            self.tables.slices.dirty or self.tables.l1_dirty or self.allocator.retired
            or ((self.refcounts.blocks.dirty or self.refcounts.table_dirty) and not self.refcounts_may_wait())
        )  # fmt: skip

    @property
    def urgent(self) -> bool:
        """Whether so much waits that a writer should write back before it makes more."""
        return self.tables.slices.crowded or self.refcounts.blocks.crowded or self.allocator.retired_bytes > 64 << 20

    async def run(self) -> None:
        """Write back everything. It is not durable before the files are flushed. Raises OSError; what failed stays dirty."""
        async with self._lock:
            if self.needed:
                self.storage.check_alive()
                await self._round()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """While inside, all refcounts are on stable storage and nothing else is written back: a table may move."""
        async with self._lock:
            await self._write_refcounts()
            yield

    async def finish(self) -> None:
        """Write back everything, refcounts too, and free what was retired; for closing. All requests are done."""
        async with self._lock:
            if self.needed:
                await self._round()
            if self.refcounts.blocks.dirty or self.refcounts.table_dirty:
                await self._write_refcounts()

    async def _round(self) -> None:
        retired, self.allocator.retired = self.allocator.retired, []
        self.allocator.retired_bytes = 0
        on_disk, self.tables.l1_dirty = self.tables.l1_dirty, {}
        entries = {index: self.tables.l1[index] for index in on_disk}
        pieces = self.tables.slices.take_dirty()
        try:
            await self._write_pieces(pieces)
            await self._write_l1(entries)
            if retired:
                await self.storage.barrier()
        except BaseException:
            for table, low, high, _ in pieces:
                self.tables.slices.mark(table, low, high)
            self.tables.l1_dirty.update(on_disk)
            self.allocator.retired[:0] = retired
            raise
        finally:
            self.tables.slices.written()
        await self.allocator.settle(retired)
        if not self.refcounts_may_wait():
            await self._write_blocks()

    async def _write_pieces(self, pieces: list[Piece]) -> None:
        refcounts = self.refcounts
        if (refcounts.blocks.dirty or refcounts.table_dirty) and not self.refcounts_may_wait():
            await self._write_refcounts()
        elif pieces:
            await self.storage.barrier()
        for table, low, _, raw in pieces:
            await self.storage.put(Point.L2_TABLE, Section.ACTIVE_L2, table.offset + low, raw)

    async def _write_l1(self, entries: dict[int, int]) -> None:
        """Write the L1 entries that the round took, sector by sector; entries that changed since keep what the disk has."""
        if not entries:
            return
        await self.storage.barrier()
        tables = self.tables
        for first in sorted({index // 64 * 64 for index in entries}):
            sector = tables.l1[first : first + 64]
            for index in range(first, first + len(sector)):
                if index in entries:
                    sector[index - first] = entries[index]
                elif index in tables.l1_dirty:
                    sector[index - first] = tables.l1_dirty[index]
            await self.storage.put(
                Point.L1_TABLE, Section.ACTIVE_L1, tables.l1_offset + first * 8, table_to_bytes(sector)
            )

    # -- refcounts -----------------------------------------------------------------------------------------------------
    async def write_refcounts(self) -> None:
        """Put all refcounts on stable storage, between rounds."""
        async with self._lock:
            await self._write_refcounts()

    async def _write_refcounts(self) -> None:
        """Refcount blocks, and then the table's entries for new ones, on stable storage."""
        refcounts = self.refcounts
        new = set(refcounts.table_dirty)
        if new:
            await self.storage.tell(Event.REFBLOCK_ALLOC_WRITE)
        await self._write_blocks()
        await self.storage.barrier()
        if new:
            for first in sorted({index // 64 * 64 for index in new}):
                await self.storage.put(Point.REFCOUNT_TABLE, Section.REFCOUNT_TABLE, *refcounts.table_piece(first, new))
            await self.storage.barrier()
            refcounts.table_dirty.difference_update(new)

    async def _write_blocks(self) -> None:
        blocks = self.refcounts.blocks
        taken = blocks.take_dirty()
        try:
            for block, low, _, raw in taken:
                await self.storage.put(Point.REFCOUNT_BLOCK, Section.REFCOUNT_BLOCK, block.offset + low, raw)
        except BaseException:
            for block, low, high, _ in taken:
                blocks.mark(block, low, high)
            raise
        finally:
            blocks.written()

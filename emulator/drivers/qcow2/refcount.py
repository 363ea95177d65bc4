"""Refcounts in memory: the refcount table, a bounded cache of its blocks, and the growth of both.

What is in memory may be written to the disk at any time, whatever else is or is not there yet, because an increase is made
before anything refers to the cluster, and a decrease only after nothing on the disk refers to it any more (`writeback.py`).
The blocks therefore need no order among themselves; only a new block must be on the disk before the table refers to it.

Source: QEMU ``docs/interop/qcow2.rst``, "Host cluster management".
"""

from __future__ import annotations

import asyncio
import errno
import os
from array import array

from livedisk.emulator.block.debug import Event
from livedisk.emulator.drivers.qcow2.cache import Table, TableCache
from livedisk.emulator.drivers.qcow2.fields import RefcountFields
from livedisk.emulator.drivers.qcow2.geometry import (
    MAX_REFCOUNT_TABLE_BYTES,
    REFCOUNT_TABLE_OFFSET_MASK,
    table_to_bytes,
)
from livedisk.emulator.drivers.qcow2.overlap import Section
from livedisk.emulator.drivers.qcow2.storage import Damage, Storage, c_hex


class Refcounts:
    """The refcounts of all clusters of the image's file.

    ``table``: offsets of the blocks, by index; ``table_offset``: where the table stands (bytes); ``table_dirty``: entries that
    the disk does not have yet; ``per_block``: clusters that a block describes.
    """

    def __init__(self, storage: Storage, bits: int, cluster_size: int, table_offset: int, cache_bytes: int) -> None:
        self.storage = storage
        self.fields = RefcountFields(bits)
        self.cluster_size = cluster_size
        self.per_block = cluster_size * 8 // bits
        self.table: array[int] = array("Q")
        self.table_offset = table_offset
        self.table_dirty: set[int] = set()
        self.blocks: TableCache[bytearray] = TableCache(2)
        self.resize_cache(cache_bytes)
        self._loading: dict[int, asyncio.Future[None]] = {}

    def resize_cache(self, total: int) -> None:
        """Cache at most ``total`` bytes of blocks, but at least two blocks."""
        self.blocks.limit = max(total // self.cluster_size, 2)
        self.blocks.trim()

    def adopt(self, table: array[int], offset: int) -> None:
        """Use this table, which stands at ``offset``."""
        self.table = table
        self.table_offset = offset
        guard = self.storage.guard
        guard.set_ranges(
            Section.REFCOUNT_TABLE, [(offset, -(-len(table) * 8 // self.cluster_size) * self.cluster_size)]
        )
        guard.set_clusters(Section.REFCOUNT_BLOCK, (entry & REFCOUNT_TABLE_OFFSET_MASK for entry in table))

    # -- blocks --------------------------------------------------------------------------------------------------------
    def cached(self, index: int) -> Table[bytearray] | None:
        """The block of that index, if it exists and is in memory."""
        if index >= len(self.table):
            return None
        return self.blocks.get(self.table[index] & REFCOUNT_TABLE_OFFSET_MASK)

    def exists(self, index: int) -> bool:
        """Whether the table has a block of that index; without one, all its refcounts are 0."""
        return index < len(self.table) and self.table[index] & REFCOUNT_TABLE_OFFSET_MASK != 0

    async def block(self, index: int) -> Table[bytearray] | None:
        """The block of that index, read if need be; None if there is none. Raises OSError; EIO if the table is damaged."""
        while self.exists(index):
            offset = self.table[index] & REFCOUNT_TABLE_OFFSET_MASK
            known = self.blocks.get(offset)
            if known is not None:
                return known
            if offset % self.cluster_size:
                raise await self.storage.corrupt(
                    Damage(f"Refblock offset {c_hex(offset)} unaligned (reftable index: {c_hex(index)})")
                )
            await self._load(offset)
        return None

    async def _load(self, offset: int) -> None:
        loading = self._loading.get(offset)
        if loading is not None:
            await asyncio.wait([loading])
            return
        done = self._loading[offset] = asyncio.get_running_loop().create_future()
        try:
            self.blocks.insert(Table(offset, await self.storage.read(offset, self.cluster_size, Event.REFBLOCK_LOAD)))
        finally:
            del self._loading[offset]
            done.set_result(None)

    def add_block(self, index: int, offset: int) -> Table[bytearray]:
        """Make an empty block at ``offset`` the one of ``index``. The caller counts its cluster."""
        block = Table(offset, bytearray(self.cluster_size))
        self.blocks.drop(offset, self.cluster_size)
        self.blocks.mark(block, 0, self.cluster_size)
        self.blocks.insert(block)
        self.table[index] = offset
        self.table_dirty.add(index)
        self.storage.guard.add_cluster(Section.REFCOUNT_BLOCK, offset)
        return block

    # -- counts --------------------------------------------------------------------------------------------------------
    async def get(self, cluster: int) -> int:
        """The refcount of a cluster (its number)."""
        block = await self.block(cluster // self.per_block)
        return self.fields.get(block.data, cluster % self.per_block) if block is not None else 0

    def counts(self, block: Table[bytearray], cluster: int, count: int) -> list[int]:
        """The refcounts of clusters that this block describes."""
        first = cluster % self.per_block
        return [self.fields.get(block.data, index) for index in range(first, first + count)]

    def fill(self, block: Table[bytearray], cluster: int, count: int, value: int) -> None:
        """Set the refcounts of clusters that this block describes."""
        index = cluster % self.per_block
        self.fields.fill(block.data, index, count, value)
        self.blocks.mark(block, *self.fields.dirty_bytes(index, count))

    def change(self, block: Table[bytearray], cluster: int, value: int) -> None:
        """Set one cluster's refcount. Raises EINVAL where the entries are too narrow for it."""
        if not 0 <= value <= self.fields.limit:
            raise OSError(errno.EINVAL, f"{os.strerror(errno.EINVAL)}: refcount {value} of cluster {c_hex(cluster)}")
        index = cluster % self.per_block
        self.fields.set(block.data, index, value)
        self.blocks.mark(block, *self.fields.dirty_bytes(index, 1))

    # -- growth --------------------------------------------------------------------------------------------------------
    def plan_growth(self, needed: int, first_cluster: int) -> tuple[int, int, int]:
        """A larger table: ``(entries, clusters of the table, blocks)``, standing from ``first_cluster`` on.

        ``needed``: the least number of entries. The table and its blocks describe themselves. Raises EFBIG beyond QEMU's limit.
        """
        per_cluster = self.cluster_size // 8
        entries = max(needed, len(self.table) * 3 // 2 + 1)
        blocks = 1
        while True:
            table_clusters = -(-entries // per_cluster)
            last = first_cluster + table_clusters + blocks - 1
            new_blocks = last // self.per_block - first_cluster // self.per_block + 1
            if new_blocks <= blocks and last // self.per_block < table_clusters * per_cluster:
                break
            blocks = max(blocks, new_blocks)
            entries = max(entries, last // self.per_block + 1)
        entries = table_clusters * per_cluster
        if entries * 8 > max(MAX_REFCOUNT_TABLE_BYTES, self.cluster_size):
            raise OSError(
                errno.EFBIG, f"{os.strerror(errno.EFBIG)}: refcount table beyond {MAX_REFCOUNT_TABLE_BYTES} bytes"
            )
        return entries, table_clusters, blocks

    def table_piece(self, first: int, ready: set[int]) -> tuple[int, bytes]:
        """The 64 entries from ``first`` on, to be written: ``(file offset, bytes)``.

        Entries of new blocks that are not ``ready`` (their block is not on the disk) are as the disk has them: zero.
        """
        piece = self.table[first : first + 64]
        for index in self.table_dirty - ready:
            if first <= index < first + len(piece):
                piece[index - first] = 0
        return self.table_offset + first * 8, table_to_bytes(piece)

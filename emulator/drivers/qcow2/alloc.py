"""Which clusters are free: allocation in runs, and the way back.

* `Allocator.take` hands out clusters of the current free run at once, without awaiting: in memory they are owned before the
  caller writes to them. `Allocator.ensure` finds the next run, reading refcount blocks and making new ones.
* What the guest no longer refers to goes to `Allocator.retire`. It is free only after the disk no longer refers to it either
  (`writeback.py` calls `Allocator.settle` then), and after every request that was in flight at that moment is done: a read that
  looked the cluster up before may still be under way.
* What was allocated but never published goes back at once with `Allocator.give_back`.

``fresh_from`` is the first byte of the file that was never allocated: a cluster from there on reads as zeroes as long as nobody
writes to it, so that its unwritten parts need no copying.
"""

from __future__ import annotations

import asyncio
import struct
from array import array
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from livedisk.emulator.block.debug import Event
from livedisk.emulator.drivers.qcow2.cache import Table
from livedisk.emulator.drivers.qcow2.geometry import table_to_bytes
from livedisk.emulator.drivers.qcow2.header import REFCOUNT_TABLE_AT
from livedisk.emulator.drivers.qcow2.overlap import Section
from livedisk.emulator.drivers.qcow2.points import Point
from livedisk.emulator.drivers.qcow2.refcount import Refcounts
from livedisk.emulator.drivers.qcow2.storage import Damage


class Retired(NamedTuple):
    """Clusters that lost one reference: a byte range of the file (compressed clusters are not aligned).

    ``punch``: pass a discard on to the file when nothing else refers to them. ``held_by``: requests that may still read them.
    """

    offset: int
    length: int
    punch: bool
    held_by: frozenset[object]


class Allocator:
    """Hands out clusters of the image's file and takes them back.

    ``write_refcounts`` is set by the driver: it puts all refcounts on stable storage (before the table moves). ``table_moved``:
    told where the refcount table stands now (offset, clusters).
    """

    def __init__(self, refcounts: Refcounts, fresh_from: int) -> None:
        self.refcounts = refcounts
        self.storage = refcounts.storage
        self.cluster_size = refcounts.cluster_size
        self.fresh_from = fresh_from
        self.retired: list[Retired] = []
        self.retired_bytes = 0
        self.quarantine: list[tuple[int, int]] = []
        """Ranges that a cancelled request may still be writing to: free only when the image is closed."""
        self.write_refcounts: Callable[[], Awaitable[None]]
        self.table_moved: Callable[[int, int], None]
        self._search = 0
        self._run_start = 0
        self._run_end = 0
        self._block: Table[bytearray] | None = None
        self._lock = asyncio.Lock()
        self._packed_to = 0  # where the next compressed cluster goes, in a cluster that has room; or 0

    # -- allocation ----------------------------------------------------------------------------------------------------
    @property
    def ready(self) -> bool:
        """Whether `take` gives something now."""
        return self._run_start < self._run_end

    @property
    def available(self) -> int:
        """Clusters that `take` can give at once."""
        return self._run_end - self._run_start

    async def ensure(self) -> None:
        """Return with a free run at hand, so that `take` gives at least one cluster. Raises OSError."""
        while self._run_start >= self._run_end:
            async with self._lock:
                if self._run_start >= self._run_end:
                    await self._find_run()

    def take(self, count: int) -> tuple[int, int] | None:
        """Up to ``count`` contiguous clusters, now owned: ``(file offset, clusters)``; None where `ensure` is needed."""
        start = self._run_start
        count = min(count, self._run_end - start)
        if count <= 0:
            return None
        assert self._block is not None
        self.refcounts.fill(self._block, start, count, 1)
        self._run_start = start + count
        self._own(start, count)
        return start * self.cluster_size, count

    async def cluster(self) -> int:
        """One cluster: its offset in the file."""
        while True:
            await self.ensure()
            got = self.take(1)
            if got is not None:
                return got[0]

    def _own(self, start: int, count: int) -> None:
        end = (start + count) * self.cluster_size
        if end > self.fresh_from:
            self.fresh_from = end

    async def _find_run(self) -> None:
        refcounts, per_block = self.refcounts, self.refcounts.per_block
        while True:
            index = self._search // per_block
            if index >= len(refcounts.table):
                await self._grow_table(index + 1)
                continue
            block = await refcounts.block(index)
            if index != self._search // per_block:
                continue  # something below was freed meanwhile
            if block is None:
                await self.storage.tell(Event.REFBLOCK_ALLOC)
                if index == self._search // per_block and not refcounts.exists(index):
                    self._search = self._new_block(index, max(self._search, index * per_block))
                    if self.storage.is_watched:
                        await self.write_refcounts()  # a fault injector meets this write where QEMU makes it: at once
                continue
            free = refcounts.fields.find_free(block.data, self._search - index * per_block)
            if free < 0:
                self._search = (index + 1) * per_block
                continue
            start = index * per_block + free
            if start == 0:
                raise await self.storage.corrupt(Damage("Preventing invalid allocation of data cluster at offset 0"))
            self._set_run(block, start, index * per_block + refcounts.fields.find_used(block.data, free))
            return

    def _set_run(self, block: Table[bytearray], start: int, end: int) -> None:
        self._block = block
        self.refcounts.blocks.pinned = {block.offset}
        self._run_start, self._run_end = start, end
        self._search = end

    def _new_block(self, index: int, cluster: int) -> int:
        """Make the missing block of ``index``, in ``cluster``, which it describes itself; gives the cluster after it."""
        block = self.refcounts.add_block(index, cluster * self.cluster_size)
        self.refcounts.fill(block, cluster, 1, 1)
        self._own(cluster, 1)
        return cluster + 1

    async def contiguous(self, count: int) -> int:
        """``count`` clusters in one piece (for tables): the offset of the first. Raises OSError."""
        refcounts, per_block = self.refcounts, self.refcounts.per_block
        async with self._lock:
            self._search = min(self._search, self._run_start) if self._run_start < self._run_end else self._search
            self._run_start = self._run_end = 0
            start = at = self._search
            while at - start < count:
                index = at // per_block
                if index >= len(refcounts.table):
                    await self._grow_table(index + 1)
                    start = at = max(start, self._search)
                    continue
                block = await refcounts.block(index)
                if block is None:
                    await self._block_inside(index, start)
                    start += 1
                    at = max(at, start)
                    continue
                used = refcounts.fields.find_used(block.data, at - index * per_block) + index * per_block
                if used > at:
                    at = min(used, start + count)
                else:
                    start = at = at + 1
            await self._fill(start, count)
            self._own(start, count)
            return start * self.cluster_size

    async def _block_inside(self, index: int, cluster: int) -> None:
        """Make the missing block of ``index`` in a cluster that an earlier block, or itself, describes."""
        home = cluster // self.refcounts.per_block
        if home == index:
            self._new_block(index, cluster)
            return
        describing = await self.refcounts.block(home)
        assert describing is not None
        self.refcounts.fill(describing, cluster, 1, 1)
        self._own(cluster, 1)
        self.refcounts.add_block(index, cluster * self.cluster_size)

    async def _fill(self, start: int, count: int) -> None:
        """Raise the refcounts of free clusters to 1, block by block."""
        per_block = self.refcounts.per_block
        while count:
            block = await self.refcounts.block(start // per_block)
            assert block is not None
            part = min(count, per_block - start % per_block)
            self.refcounts.fill(block, start, part, 1)
            start += part
            count -= part

    async def packed(self, length: int) -> int:
        """Room for ``length`` bytes of a compressed cluster, next to the one before where that fits: its offset."""
        await self.storage.tell(Event.CLUSTER_ALLOC_BYTES)
        while self._packed_to:
            offset = self._packed_to
            cluster = offset // self.cluster_size
            block = await self.refcounts.block(cluster // self.refcounts.per_block)
            if self._packed_to != offset:
                continue  # somebody else took the room
            count = self.refcounts.counts(block, cluster, 1)[0] if block is not None else 0
            room = -offset % self.cluster_size
            if block is None or room < length or not 0 < count < self.refcounts.fields.limit:
                break
            self.refcounts.change(block, cluster, count + 1)
            self._packed_to = offset + length if room > length else 0
            return offset
        offset = await self.cluster()
        self._packed_to = offset + length if length < self.cluster_size else 0
        return offset

    # -- growth of the refcount table ------------------------------------------------------------------------------------
    async def _grow_table(self, needed: int) -> None:
        """Move the refcount table to a larger place: written whole and durable before the header refers to it."""
        refcounts = self.refcounts
        await self.write_refcounts()
        await self.storage.tell(Event.REFTABLE_GROW)
        first = len(refcounts.table) * refcounts.per_block
        entries, table_clusters, blocks = refcounts.plan_growth(needed, first)
        table = refcounts.table + array("Q", bytes(8 * (entries - len(refcounts.table))))
        table_offset = first * self.cluster_size
        index = first // refcounts.per_block
        made: list[Table[bytearray]] = []
        for number in range(blocks):
            offset = table_offset + (table_clusters + number) * self.cluster_size
            table[index + number] = offset
            block = Table(offset, bytearray(self.cluster_size))
            low = max(first, (index + number) * refcounts.per_block)
            high = min(first + table_clusters + blocks, (index + number + 1) * refcounts.per_block)
            if high > low:
                refcounts.fields.fill(block.data, low % refcounts.per_block, high - low, 1)
            await self.storage.put(Point.REFCOUNT_BLOCK, Section.NONE, offset, bytes(block.data))
            made.append(block)
        await self.storage.put(Point.REFCOUNT_TABLE_GROW, Section.NONE, table_offset, table_to_bytes(table))
        await self.storage.barrier()
        await self.storage.put(
            Point.REFCOUNT_TABLE_SWITCH,
            Section.MAIN_HEADER,
            REFCOUNT_TABLE_AT,
            struct.pack(">QI", table_offset, table_clusters),
        )
        await self.storage.barrier()
        old_offset, old_length = refcounts.table_offset, len(refcounts.table) * 8
        refcounts.adopt(table, table_offset)
        for block in made:
            refcounts.blocks.insert(block)
        self.table_moved(table_offset, table_clusters)
        self._own(first, table_clusters + blocks)
        self.retire(old_offset, -(-old_length // self.cluster_size) * self.cluster_size)

    # -- the way back --------------------------------------------------------------------------------------------------
    def retire(self, offset: int, length: int, *, punch: bool = False) -> None:
        """The range of the file lost one reference in memory; it is freed after the disk lost it too."""
        if self._packed_to and offset <= self._packed_to < offset + length + self.cluster_size:
            self._packed_to = 0
        self.retired.append(Retired(offset, length, punch, self.storage.node.requests_in_flight()))
        self.retired_bytes += length

    def give_back(self, offset: int, count: int) -> None:
        """Clusters from `take` that nothing ever referred to, and that nobody is writing to, are free again."""
        per_block = self.refcounts.per_block
        first = offset // self.cluster_size
        block = self.refcounts.cached(first // per_block)
        if block is None:  # its block has left memory: the slow way
            self.retired.append(Retired(offset, count * self.cluster_size, punch=False, held_by=frozenset()))
            return
        self.refcounts.fill(block, first, count, 0)
        if self.ready and block is self._block and first + count == self._run_start:
            self._run_start = first  # the last that was taken of this run: as if it had not been
        else:
            self._freed(first)

    def _freed(self, cluster: int) -> None:
        if cluster < self._search:
            self._search = cluster
            self._run_start = self._run_end = 0  # the lower clusters are used first

    async def settle(self, entries: list[Retired]) -> None:
        """The disk refers to these no more: lower their refcounts. What a request still holds waits for the next time."""
        active = self.storage.node.requests_in_flight()
        while entries:
            entry = entries.pop()
            if entry.held_by & active:
                self.retired.append(entry)
                continue
            try:
                await self._lower(entry)
            except BaseException:
                self.retired += entries
                raise

    async def _lower(self, entry: Retired) -> None:
        """Lower the refcounts of one entry, block by block. Raises OSError, and what is left of the entry is retired again:
        no cluster loses two references for one."""
        size, per_block = self.cluster_size, self.refcounts.per_block
        first = entry.offset // size
        last = (entry.offset + entry.length - 1) // size
        await self.storage.tell(Event.CLUSTER_FREE)
        while first <= last:
            part = min(last + 1, (first // per_block + 1) * per_block) - first
            try:
                if not await self._lower_part(first, part, punch=entry.punch):
                    return
            except BaseException:
                self.retired.append(entry._replace(offset=first * size, length=(last + 1 - first) * size))
                raise
            first += part

    async def _lower_part(self, first: int, part: int, *, punch: bool) -> bool:
        """Lower the refcounts of clusters that one block describes. False, having told of it, if the image is damaged."""
        block = await self.refcounts.block(first // self.refcounts.per_block)
        counts = self.refcounts.counts(block, first, part) if block is not None else []
        if not counts or 0 in counts:
            text = f"Refcount of cluster {first * self.cluster_size:#x} is 0, but the cluster was in use"
            await self.storage.corrupt(Damage(text, fatal=False))
            return False
        if punch and max(counts) == 1:
            await self.punch(first, part)
            block = await self.refcounts.block(first // self.refcounts.per_block)
        assert block is not None
        for at, count in enumerate(counts, first):
            self.refcounts.change(block, at, count - 1)
            if count == 1:
                self._freed(at)
        return True

    async def used_end(self) -> int | None:
        """Where the last used cluster of the file ends (bytes); None if no refcounts are known."""
        refcounts = self.refcounts
        for index in range(len(refcounts.table) - 1, -1, -1):
            block = await refcounts.block(index)
            used = len(block.data.rstrip(b"\0")) if block is not None else 0
            if block is not None and used:
                at = used * 8 // refcounts.fields.bits  # past the last used entry, up to a byte's worth
                while at > 0 and not refcounts.fields.get(block.data, at - 1):
                    at -= 1
                return (index * refcounts.per_block + at) * self.cluster_size
        return None

    def start_over(self) -> None:
        """Look for free clusters from the start of the file: refcounts were changed past this allocator."""
        self._search = self._run_start = self._run_end = 0
        self._packed_to = 0

    def file_cut(self, end: int) -> None:
        """The file ends at ``end`` (bytes) now: what is behind it reads as zeroes again."""
        self._search = min(self._search, self._run_start if self._run_start < self._run_end else self._search)
        self._run_start = self._run_end = 0
        self.fresh_from = min(self.fresh_from, end)

    async def punch(self, cluster: int, count: int) -> None:
        """Pass the discard on; a hint, so that an error of the file below is none of ours."""
        try:
            await self.storage.file.node.discard(cluster * self.cluster_size, count * self.cluster_size)
        except OSError:
            pass

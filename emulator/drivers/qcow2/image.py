"""One open qcow2 image: its parts put together, and what they need of each other.

    header.py     what the first cluster says            points.py     the names of metadata writes, and their order
    storage.py    the files; metadata goes out here       overlap.py    what must not be overwritten
    refcount.py   refcounts, cached                       alloc.py      free clusters
    tables.py     L1 and L2 tables, cached                writeback.py  caches to disk, in order
    write.py      guest writes                            zero.py       zeroes and discards
    compress.py   compressed clusters                     resize.py     a new virtual size, preallocation
    bitmaps.py    persistent dirty bitmaps                bitmap_store.py   one of them on the disk

`driver.py` is the face that the block layer sees. Nothing here knows options' spelling.
"""

from __future__ import annotations

import os
import struct
from array import array
from dataclasses import dataclass
from typing import Final

from livedisk.emulator.block.debug import Event
from livedisk.emulator.block.driver import SLOW_GRANULE, ZERO_GRANULE
from livedisk.emulator.block.node import Edge, Node, fill_zeroes
from livedisk.emulator.block.types import HostOffset, Kind, NotMapped, Segment
from livedisk.emulator.drivers.qcow2.alloc import Allocator
from livedisk.emulator.drivers.qcow2.bitmaps import PersistentBitmaps
from livedisk.emulator.drivers.qcow2.compress import Decompressor
from livedisk.emulator.drivers.qcow2.geometry import (
    COMPRESSED,
    COPIED,
    MAX_L1_BYTES,
    OFFSET_MASK,
    ZERO,
    table_from_bytes,
)
from livedisk.emulator.drivers.qcow2.header import INCOMPATIBLE_AT, Header, Incompatible
from livedisk.emulator.drivers.qcow2.header_write import write_header
from livedisk.emulator.drivers.qcow2.overlap import OverlapGuard, Section
from livedisk.emulator.drivers.qcow2.points import Point
from livedisk.emulator.drivers.qcow2.refcount import Refcounts
from livedisk.emulator.drivers.qcow2.snapshots import Snapshot, read_snapshots, table_to_bytes
from livedisk.emulator.drivers.qcow2.storage import Storage
from livedisk.emulator.drivers.qcow2.tables import Run, State, Tables
from livedisk.emulator.drivers.qcow2.write import Writer
from livedisk.emulator.drivers.qcow2.writeback import Writeback
from livedisk.emulator.drivers.qcow2.zero import Zeroer
from livedisk.emulator.errors import BlockError

SECTOR: Final = 512
_KINDS: Final = {
    State.UNALLOCATED: Kind.UNALLOCATED,
    State.UNALLOCATED_ALLOC: Kind.UNALLOCATED,
    State.COMPRESSED: Kind.COMPRESSED,
    State.INVALID: Kind.OPAQUE,
}


@dataclass(frozen=True)
class CacheSizes:
    """Bytes: of all L2 slices, of one L2 slice, of all refcount blocks."""

    l2: int
    l2_slice: int
    refcount: int


@dataclass(frozen=True)
class DiscardPolicy:
    """Which freed clusters are passed on to the file as a discard, and whether a discard keeps the host cluster."""

    request: bool
    snapshot: bool
    other: bool
    no_unref: bool


class Image:
    """The run time of one image. ``header`` is what the disk has; ``size`` is the virtual size in bytes."""

    def __init__(
        self, node: Node, header: Header, sizes: CacheSizes, checked: Section, discards: DiscardPolicy
    ) -> None:
        self.node = node
        self.header = header
        self.geometry = header.geometry
        self.size = header.virtual_size
        self.discards = discards
        self.lazy = False
        guard = OverlapGuard(self.geometry.cluster_size, checked)
        self.storage = Storage(node, guard)
        self.storage.mark_corrupt = self.mark_corrupt
        self.refcounts = Refcounts(
            self.storage,
            self.geometry.refcount_bits,
            self.geometry.cluster_size,
            header.refcount_table_offset,
            sizes.refcount,
        )
        self.storage.has_data_file = header.has_data_file
        self.allocator = Allocator(self.refcounts, fresh_from=self.storage.file.node.size)
        self.tables = Tables(self.storage, self.allocator, self.geometry, header.version, raw_data=header.data_file_raw)
        self.tables.resize_cache(sizes.l2, sizes.l2_slice)
        self.writeback = Writeback(self.tables, self.allocator, lambda: self.header.dirty)
        self.tables.write_back = self.writeback.run
        self.allocator.write_refcounts = self.writeback.write_refcounts
        self.allocator.table_moved = self._refcount_table_moved
        self.writer = Writer(self)
        self.zeroer = Zeroer(self)
        self.snapshots: tuple[Snapshot, ...] = ()
        self.half_changed = False
        """A change of snapshots failed half-way: the dirty bit stays, for who opens the image next."""
        self.bitmaps = PersistentBitmaps(self)
        self.decompressor = Decompressor(header.compression_type, self.geometry.cluster_size)

    async def load(self) -> None:
        """Read the L1 table and the refcount table, and tell the guard where everything stands. Raises OSError."""
        header, size = self.header, self.geometry.cluster_size
        l1 = await self.storage.read(header.l1_table_offset, header.l1_size * 8)
        self.tables.adopt(table_from_bytes(l1), header.l1_table_offset)
        table_size = header.refcount_table_clusters * size
        try:
            table = await self.storage.read(header.refcount_table_offset, table_size, Event.REFTABLE_LOAD)
        except OSError as error:
            text = os.strerror(error.errno) if error.errno else str(error)
            raise BlockError(f"Could not initialize refcount handling: {text}") from error
        self.refcounts.adopt(table_from_bytes(table), header.refcount_table_offset)
        if header.bitmaps is not None:
            directory = header.bitmaps
            self.storage.guard.set_ranges(
                Section.BITMAP_DIRECTORY,
                [(directory.directory_offset, self.geometry.round_up(directory.directory_size))],
            )
        self.snapshots = (await read_snapshots(self.storage.file.node, header)).snapshots
        await self.guard_snapshots()

    async def guard_snapshots(self) -> None:
        """Tell the guard what belongs to internal snapshots."""
        guard, size = self.storage.guard, self.geometry.cluster_size
        table = table_to_bytes(self.snapshots)
        guard.set_ranges(Section.SNAPSHOT_TABLE, [(self.header.snapshots_offset, len(table))])
        guard.set_ranges(Section.INACTIVE_L1, [(known.l1_table_offset, known.l1_size * 8) for known in self.snapshots])
        if not guard.checked & Section.INACTIVE_L2:
            return
        inactive: set[int] = set()
        for known in self.snapshots:
            if known.l1_table_offset % size or known.l1_size * 8 > MAX_L1_BYTES:
                continue  # nothing that a reader of this snapshot would accept
            for entry in table_from_bytes(await self.storage.read(known.l1_table_offset, known.l1_size * 8)):
                inactive.add(entry & OFFSET_MASK)
        guard.set_clusters(Section.INACTIVE_L2, inactive)

    # -- where ---------------------------------------------------------------------------------------------------------
    def map(self, offset: int, length: int) -> Segment:
        """The generic path's question: see `Driver.map`."""
        storage = self.storage
        if storage.dead:
            return Segment(Kind.OPAQUE, length)
        run = self.tables.lookup(offset, length)
        state = run.state
        if state is State.NORMAL:
            if self.tables.raw_data and self.tables.misplaced(run, offset) is not None:
                return Segment(Kind.OPAQUE, run.length)
            in_place, length = run.copied and not self.node.read_only and self._may_write_in_place(run), run.length
            if in_place and self.bitmaps.guard is not None:
                in_place, length = self.bitmaps.passing(offset, length)
            return Segment(Kind.DATA, length, storage.data, HostOffset(run.host), in_place)
        if state is State.ZERO:
            return Segment(Kind.ZERO, run.length)
        if state is State.ZERO_ALLOC:
            return Segment(Kind.ZERO, run.length, storage.data, HostOffset(run.host))
        return Segment(_KINDS[state], run.length)

    def sift(self, shift: int, granules: list[int], found: dict[int, int]) -> tuple[list[int], Edge] | None:
        """Many granules' answers in one flat loop: see `Driver.sift`."""
        tables, storage = self.tables, self.storage
        if storage.dead or tables.extended or tables.raw_data or shift > tables.cluster_bits:
            return None
        to_cluster, cluster_bits, inside_mask = (
            tables.cluster_bits - shift,
            tables.cluster_bits,
            tables.cluster_size - 1,
        )
        entries = tables.slice_entries
        hit = None if storage.has_data_file else storage.guard.hit
        guard, to_region = self.bitmaps.guard, self.bitmaps.region_shift - shift
        unsaid: list[int] = []
        data: array[int] | None = None
        section, empty = -1, False
        for granule in granules:
            cluster = granule >> to_cluster
            if cluster // entries != section:
                section = cluster // entries
                empty = tables.has_no_table(cluster << cluster_bits)
                cached = None if empty else tables.cached(cluster << cluster_bits)
                data = None if cached is None else cached[0].data
            if empty:
                unsaid.append(granule)
            elif data is not None:
                entry = data[cluster & (entries - 1)]
                host = entry & OFFSET_MASK
                if entry == 0:
                    unsaid.append(granule)
                elif entry & (COMPRESSED | ZERO) == 0 and host and not host & inside_mask:
                    own = entry >= COPIED and (hit is None or hit(host, inside_mask + 1) is None)
                    if own and guard is not None and not guard[granule >> to_region]:
                        own = False
                    found[granule] = host + ((granule << shift) & inside_mask) | own
                else:
                    state = tables.state(entry)
                    if state is State.UNALLOCATED:
                        unsaid.append(granule)
                    elif state is State.ZERO or (state is State.ZERO_ALLOC and not host & inside_mask):
                        found[granule] = ZERO_GRANULE
                    elif state is State.COMPRESSED:
                        found[granule] = SLOW_GRANULE
                    # What is damaged, and host offset 0 of a data file: `map` judges them.
        return unsaid, storage.data

    def _may_write_in_place(self, run: Run) -> bool:
        storage = self.storage
        return storage.has_data_file or storage.guard.hit(run.host, run.length) is None

    async def check_run(self, run: Run, offset: int) -> None:
        """Before a write in place: raise EIO, having marked the image, if it would hit metadata or the wrong place."""
        damage = self.tables.misplaced(run, offset)
        if damage is not None:
            raise await self.storage.corrupt(damage)
        if not self.storage.has_data_file:
            await self.storage.check_overlap(run.host, run.length)

    async def lookup(self, offset: int, length: int) -> Run:
        """`Tables.lookup`, reading metadata as needed."""
        while True:
            try:
                return self.tables.lookup(offset, length)
            except NotMapped:
                await self.tables.load(offset)

    async def reads_as_zero(self, offset: int, length: int) -> bool:
        """Whether a guest range is known to read as zeroes without reading any data."""
        while length > 0:
            run = await self.lookup(offset, length)
            if run.state in (State.UNALLOCATED, State.UNALLOCATED_ALLOC):
                backing = self.node.backing
                if backing is not None and offset < backing.node.size:
                    return False
            elif run.state not in (State.ZERO, State.ZERO_ALLOC):
                return False
            offset += run.length
            length -= run.length
        return True

    async def read_guest(self, offset: int, view: memoryview) -> None:
        """What the guest sees, read inside a request of this node (which is in flight already)."""
        while len(view):
            run = await self.lookup(offset, len(view))
            await self._read_run(run, offset, view[: run.length])
            view = view[run.length :]
            offset += run.length

    async def _read_run(self, run: Run, offset: int, view: memoryview) -> None:
        if run.state is State.NORMAL:
            damage = self.tables.misplaced(run, offset)
            if damage is not None:
                raise await self.storage.corrupt(damage)
            await self.storage.tell(Event.READ_AIO)
            await self.storage.data.read(run.host, view)
        elif run.state is State.COMPRESSED:
            await self.read_compressed(run, offset, view)
        elif run.state is State.INVALID:
            raise await self.storage.corrupt(self.tables.damage(offset))
        elif run.state in (State.UNALLOCATED, State.UNALLOCATED_ALLOC) and self.node.backing is not None:
            await self.storage.tell(Event.READ_BACKING_AIO)
            await self.node.backing.read(offset, view)
        else:
            fill_zeroes(view)

    async def read_compressed(self, run: Run, offset: int, view: memoryview) -> None:
        """Fill ``view`` from one compressed cluster."""
        plain = self.decompressor.known(run.entry)
        if plain is None:
            where, length = self.geometry.compressed_extent(run.entry)
            plain = await self.decompressor.unpack(
                run.entry, await self.storage.read(where, length, Event.READ_COMPRESSED)
            )
        inside = self.geometry.into_cluster(offset)
        view[:] = plain[inside : inside + len(view)]

    # -- letting go ------------------------------------------------------------------------------------------------------
    def release(self, entry: int, *, punch: bool = False) -> None:
        """Whatever storage an L2 entry led to lost this reference."""
        if entry & COMPRESSED:
            self.decompressor.forget()
            self.allocator.retire(*self.geometry.compressed_extent(entry), punch=punch)
        elif not self.storage.has_data_file and entry & OFFSET_MASK:
            self.allocator.retire(entry & OFFSET_MASK, self.geometry.cluster_size, punch=punch or self.discards.other)

    # -- the header ------------------------------------------------------------------------------------------------------
    @property
    def ready_to_allocate(self) -> bool:
        """Whether an allocation has nothing to wait for."""
        return (self.allocator.ready or self.storage.has_data_file) and (not self.lazy or self.header.dirty)

    async def before_allocation(self) -> None:
        """With lazy refcounts: set the dirty bit, durably, before refcounts fall behind."""
        if self.lazy and not self.header.dirty:
            await self.set_dirty(dirty=True)

    async def set_dirty(self, *, dirty: bool) -> None:
        """Set or clear the dirty bit and make it durable. Raises OSError."""
        bits = int(Incompatible.DIRTY)
        wanted = self.header.incompatible | bits if dirty else self.header.incompatible & ~bits
        if not dirty:
            await self.storage.barrier()
        await self._put_incompatible(Point.DIRTY_BIT, wanted)
        self.header.incompatible = wanted

    async def mark_corrupt(self) -> None:
        """Set the corrupt bit (version 3), past all checks: this is the last write to the image."""
        if self.header.version < 3 or self.header.corrupt:
            return
        self.header.incompatible |= Incompatible.CORRUPT
        try:
            raw = struct.pack(">Q", self.header.incompatible)
            if self.storage.observer is not None:
                self.storage.observer(Point.CORRUPT_BIT)
            await self.storage.file.write(INCOMPATIBLE_AT, memoryview(raw))
            await self.storage.barrier()
        except OSError:
            pass  # the request fails with EIO in any case, and the image stays unusable in this process

    async def _put_incompatible(self, point: Point, bits: int) -> None:
        """Write the incompatible feature bits alone (one sector, so old or new) and make them durable."""
        await self.storage.put(point, Section.MAIN_HEADER, INCOMPATIBLE_AT, struct.pack(">Q", bits))
        await self.storage.barrier()

    async def write_header(self) -> None:
        """Write the whole first cluster, after everything it refers to, and make it durable. Raises OSError."""
        await write_header(self.storage, self.header)

    def _refcount_table_moved(self, offset: int, clusters: int) -> None:
        self.header.refcount_table_offset = offset
        self.header.refcount_table_clusters = clusters

    # -- the end ---------------------------------------------------------------------------------------------------------
    async def finish(self) -> None:
        """Put everything on the disk and clear the dirty bit. All requests are done. Raises OSError."""
        if self.storage.dead:
            return
        for offset, count in self.allocator.quarantine:
            self.allocator.give_back(offset, count)
        self.allocator.quarantine.clear()
        await self.bitmaps.finish()
        await self.writeback.finish()
        if self.header.dirty and not self.half_changed:
            await self.set_dirty(dirty=False)

    def forget(self) -> None:
        """Drop all cached metadata (it is on the disk)."""
        self.tables.slices.clear()
        self.refcounts.blocks.clear()
        self.decompressor.forget()
        self.tables.adopt(array("Q"), 0)

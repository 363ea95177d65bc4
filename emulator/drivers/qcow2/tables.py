"""Where the guest's bytes are: the L1 table in memory, a bounded cache of L2 slices, and what an entry means.

`Tables.lookup` is synchronous and answers for the longest run that it can tell from memory; it raises `NotMapped` where an L2
slice must be read first. Changes of entries are made between awaits, so that every reader sees a consistent table; they reach
the disk in the order that `points.py` draws.

An entry that cannot be right makes a run of state INVALID, never an exception: whoever touches it reports it
(`Tables.damage`). Source: QEMU ``docs/interop/qcow2.rst``, "Cluster mapping" and "Extended L2 Entries".
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable
from enum import IntEnum
from typing import Final, NamedTuple

from livedisk.emulator.block.debug import Event
from livedisk.emulator.block.types import NotMapped
from livedisk.emulator.drivers.qcow2.alloc import Allocator
from livedisk.emulator.drivers.qcow2.cache import Table, TableCache
from livedisk.emulator.drivers.qcow2.geometry import COMPRESSED, COPIED, OFFSET_MASK, ZERO, Geometry, table_from_bytes
from livedisk.emulator.drivers.qcow2.overlap import Section
from livedisk.emulator.drivers.qcow2.storage import Damage, Storage, c_hex

_CHUNK: Final = 64
_PLAIN_FLAGS: Final = COMPRESSED | ZERO


class State(IntEnum):
    """What an L2 entry (or its bits for one subcluster) says. ..._ALLOC: a host cluster stands behind it."""

    UNALLOCATED = 0
    UNALLOCATED_ALLOC = 1
    ZERO = 2
    ZERO_ALLOC = 3
    NORMAL = 4
    COMPRESSED = 5
    INVALID = 6


class Run(NamedTuple):
    """``length`` bytes from the offset asked for are alike. ``host``: where they stand in the data file, or where the compressed
    data starts; ``copied``: the cluster is this image's alone; ``entry``: the first cluster's L2 entry."""

    state: State
    length: int
    host: int = 0
    copied: bool = False
    entry: int = 0


# Names without a lookup in the enumeration: `Tables.lookup` is on the way of every request.
_UNALLOCATED: Final = State.UNALLOCATED
_NORMAL: Final = State.NORMAL
_ZERO_ALLOC: Final = State.ZERO_ALLOC
_COMPRESSED: Final = State.COMPRESSED
_LINEAR: Final = (State.NORMAL, State.ZERO_ALLOC, State.UNALLOCATED_ALLOC)


class Tables:
    """The active L1 table and its L2 tables.

    ``l1``: the table; ``l1_offset``: where it stands; ``l1_dirty``: entries that the disk does not have yet, and what it has
    instead; ``extended``: L2 entries of two words; ``granule``: bytes that are mapped as one (cluster or subcluster).
    """

    def __init__(
        self, storage: Storage, allocator: Allocator, geometry: Geometry, version: int, *, raw_data: bool
    ) -> None:
        self.storage = storage
        self.allocator = allocator
        self.geometry = geometry
        self.cluster_bits = geometry.cluster_bits
        self.cluster_size = geometry.cluster_size
        self.extended = geometry.extended_l2
        self.version = version
        self.raw_data = raw_data
        self.words = geometry.l2_entry_size // 8
        self.table_entries = geometry.l2_entries
        self.l1_shift = geometry.l2_span_bits
        self.granule = geometry.subcluster_size
        self.slice_bytes = self.cluster_size
        self.l1: array[int] = array("Q")
        self.l1_offset = 0
        self.l1_dirty: dict[int, int] = {}
        self.slices: TableCache[array[int]] = TableCache(2)
        self.write_back: Callable[[], Awaitable[None]]
        """Set by the driver: writes all metadata that waits."""
        self._loading: dict[int, asyncio.Future[None]] = {}
        self._size_slices()

    def resize_cache(self, total: int, slice_bytes: int) -> None:
        """Cache at most ``total`` bytes in slices of ``slice_bytes``. Nothing may be dirty."""
        self.slice_bytes = slice_bytes
        self.slices = TableCache(max(total // slice_bytes, 2))
        self._size_slices()

    def _size_slices(self) -> None:
        self.slice_entries = self.slice_bytes // (8 * self.words)
        self._slice_shift = self.slice_entries.bit_length() - 1

    def adopt(self, l1: array[int], offset: int) -> None:
        """Use this L1 table, which stands at ``offset``."""
        self.l1 = l1
        self.l1_offset = offset
        guard = self.storage.guard
        guard.set_ranges(Section.ACTIVE_L1, [(offset, len(l1) * 8)])
        guard.set_clusters(Section.ACTIVE_L2, (entry & OFFSET_MASK for entry in l1))

    # -- finding slices --------------------------------------------------------------------------------------------------
    def _place(self, offset: int) -> tuple[int, int]:
        """For a guest offset whose L2 table exists: the slice's file offset, and the entry's index in it."""
        index = offset >> self.cluster_bits & (self.table_entries - 1)
        table = self.l1[offset >> self.l1_shift] & OFFSET_MASK
        return table + (index >> self._slice_shift) * self.slice_bytes, index & (self.slice_entries - 1)

    def has_no_table(self, offset: int) -> bool:
        """Whether nothing at all is allocated around a guest offset."""
        l1_index = offset >> self.l1_shift
        return l1_index >= len(self.l1) or not self.l1[l1_index] & OFFSET_MASK

    def cached(self, offset: int) -> tuple[Table[array[int]], int] | None:
        """The slice that maps a guest offset and the entry's index in it, if the table exists and the slice is in memory."""
        if self.has_no_table(offset):
            return None
        at, index = self._place(offset)
        table = self.slices.get(at)
        return None if table is None else (table, index)

    async def load(self, offset: int) -> None:
        """Read the slice that maps a guest offset, if its table exists. Raises OSError."""
        l1_index = offset >> self.l1_shift
        if l1_index < len(self.l1) and self.l1[l1_index] & OFFSET_MASK:
            await self._load_slice(self._place(offset)[0])

    async def _load_slice(self, at: int) -> Table[array[int]]:
        while True:
            known = self.slices.get(at)
            if known is not None:
                return known
            loading = self._loading.get(at)
            if loading is not None:
                await asyncio.wait([loading])
                continue
            done = self._loading[at] = asyncio.get_running_loop().create_future()
            try:
                raw = await self.storage.read(at, self.slice_bytes, Event.L2_LOAD)
                return self.slices.insert(Table(at, table_from_bytes(raw)))
            finally:
                del self._loading[at]
                done.set_result(None)

    # -- reading entries -------------------------------------------------------------------------------------------------
    def lookup(self, offset: int, length: int) -> Run:
        """What the entries say of the start of ``[offset, offset+length)``. Raises NotMapped."""
        run = self._lookup_slice(offset, length)
        while run.length < length and run.state < _COMPRESSED:
            try:
                more = self._lookup_slice(offset + run.length, length - run.length)
            except NotMapped:
                break
            if more.state is not run.state or more.copied is not run.copied:
                break
            if run.state in _LINEAR and more.host != run.host + run.length:
                break
            run = run._replace(length=run.length + more.length)
        return run

    def _lookup_slice(self, offset: int, length: int) -> Run:
        l1_index = offset >> self.l1_shift
        if l1_index >= len(self.l1):
            return Run(State.UNALLOCATED, length)
        table_offset = self.l1[l1_index] & OFFSET_MASK
        if not table_offset:
            return Run(State.UNALLOCATED, self._empty_run(offset, length, l1_index))
        if table_offset & (self.cluster_size - 1):
            return Run(State.INVALID, min(length, self.cluster_size - offset % self.cluster_size))
        at, index = self._place(offset)
        table = self.slices.get(at)
        if table is None:
            raise NotMapped
        if self.extended:
            return self._extended_run(table.data, index, offset, length)
        return self._standard_run(table.data, index, offset, length)

    def _empty_run(self, offset: int, length: int, l1_index: int) -> int:
        covered = ((l1_index + 1) << self.l1_shift) - offset
        while covered < length and l1_index + 1 < len(self.l1):
            l1_index += 1
            if self.l1[l1_index] & OFFSET_MASK:
                return covered
            covered += 1 << self.l1_shift
        return min(covered, length)

    def _standard_run(self, data: array[int], index: int, offset: int, length: int) -> Run:
        entry = data[index]
        inside = offset & (self.cluster_size - 1)
        state = self.state(entry)
        if state is _NORMAL or state is _ZERO_ALLOC:
            limit = min(-(-(inside + length) >> self.cluster_bits), self.slice_entries - index)
            count = count_run(data, index, limit, self.cluster_size) if limit > 1 else 1
            length = min((count << self.cluster_bits) - inside, length)
            if entry & OFFSET_MASK & (self.cluster_size - 1):
                return Run(State.INVALID, length, entry=entry)
            return Run(state, length, (entry & OFFSET_MASK) + inside, entry >= COPIED, entry)
        if state >= _COMPRESSED:
            return Run(state, min(self.cluster_size - inside, length), 0, False, entry)
        limit = min(-(-(inside + length) >> self.cluster_bits), self.slice_entries - index)
        count = count_run(data, index, limit, 0) if limit > 1 else 1
        return Run(state, min((count << self.cluster_bits) - inside, length))

    def state(self, entry: int) -> State:
        """What a standard L2 entry says."""
        if entry == 0:
            return _UNALLOCATED
        if entry & _PLAIN_FLAGS == 0 and entry & OFFSET_MASK:
            return _NORMAL
        if entry & COMPRESSED:
            return State.INVALID if self.storage.has_data_file else State.COMPRESSED
        if entry & ZERO:
            if self.version < 3:
                return State.INVALID
            return State.ZERO_ALLOC if entry & OFFSET_MASK else State.ZERO
        if entry & OFFSET_MASK or (entry & COPIED and self.storage.has_data_file):
            return State.NORMAL
        return State.UNALLOCATED

    def _extended_run(self, data: array[int], index: int, offset: int, length: int) -> Run:
        entry, bits = data[2 * index], data[2 * index + 1]
        inside = offset & (self.cluster_size - 1)
        room = min(self.cluster_size - inside, length)
        if entry & COMPRESSED:
            state = State.INVALID if self.storage.has_data_file else State.COMPRESSED
            return Run(state, room, 0, False, entry)
        allocated = self.has_host(entry)
        if allocated and entry & OFFSET_MASK & (self.cluster_size - 1):
            return Run(State.INVALID, room, entry=entry)
        sub = inside // self.granule
        state = _subcluster_state(bits, sub, allocated)
        count = 1
        while sub + count < 32 and _subcluster_state(bits, sub + count, allocated) is state:
            count += 1
        length = min((sub + count) * self.granule - inside, length)
        host = (entry & OFFSET_MASK) + inside if allocated else 0
        return Run(state, length, host, allocated and entry >= COPIED, entry)

    def has_host(self, entry: int) -> bool:
        """Whether a host cluster (not compressed data) stands behind an entry. In a data file, offset 0 is one too, but not for a
        zero cluster: `state` says so as well (QEMU: qcow2_get_cluster_type)."""
        if entry & COMPRESSED:
            return False
        return bool(entry & OFFSET_MASK) or (entry >= COPIED and not entry & ZERO and self.storage.has_data_file)

    def damage(self, offset: int) -> Damage:
        """What is wrong with the entry of a guest offset that `lookup` called INVALID."""
        l1_index = offset >> self.l1_shift
        table_offset = self.l1[l1_index] & OFFSET_MASK
        if table_offset & (self.cluster_size - 1):
            return Damage(f"L2 table offset {c_hex(table_offset)} unaligned (L1 index: {c_hex(l1_index)})")
        found = self.cached(offset)
        index = offset >> self.cluster_bits & (self.table_entries - 1)
        where = f"(L2 offset: {c_hex(table_offset)}, L2 index: {c_hex(index)})"
        if found is None:
            return Damage(f"Invalid cluster entry found {where}")
        entry = found[0].data[found[1] * self.words]
        host = entry & OFFSET_MASK
        if entry & COMPRESSED:
            return Damage(f"Compressed cluster entry found in image with external data file {where}")
        if entry & ZERO and self.version < 3:
            return Damage(f"Zero cluster entry found in pre-v3 image {where}")
        if host & (self.cluster_size - 1):
            kind = "Preallocated zero cluster" if entry & ZERO and not self.extended else "Cluster allocation"
            return Damage(f"{kind} offset {c_hex(host)} unaligned {where}")
        return Damage(f"Invalid cluster entry found {where}")

    def misplaced(self, run: Run, offset: int) -> Damage | None:
        """With a raw data file, host and guest offset must be the same."""
        if not self.raw_data or run.host == offset or run.state not in _LINEAR:
            return None
        mask = self.cluster_size - 1
        return Damage(
            f"External data file host cluster offset {c_hex(run.host & ~mask)} does not match guest cluster offset: "
            f"{c_hex(offset & ~mask)}, L2 index: {c_hex(offset >> self.cluster_bits & (self.table_entries - 1))}"
        )

    def owned(self, offset: int) -> tuple[Table[array[int]], int] | None:
        """What `own` would give, if that needs no awaiting."""
        entry = self.l1[offset >> self.l1_shift]
        if entry < COPIED or entry & OFFSET_MASK & (self.cluster_size - 1):
            return None
        return self.cached(offset)

    # -- changing entries ------------------------------------------------------------------------------------------------
    async def own(self, offset: int) -> tuple[Table[array[int]], int]:
        """The slice that maps a guest offset, writable, and the entry's index in it: the L2 table is made, or copied where a
        snapshot shares it. Synchronous if it is there already. Raises OSError."""
        l1_index = offset >> self.l1_shift
        while True:
            entry = self.l1[l1_index]
            table_offset = entry & OFFSET_MASK
            if table_offset & (self.cluster_size - 1):
                raise await self.storage.corrupt(self.damage(offset))
            if table_offset and entry & COPIED:
                at, index = self._place(offset)
                table = self.slices.get(at)
                return (table if table is not None else await self._load_slice(at)), index
            old = await self._whole_table(table_offset) if table_offset else []
            await self.storage.tell(Event.CLUSTER_ALLOC)
            await self.storage.tell(Event.REFBLOCK_ALLOC)
            await self.allocator.ensure()
            if old:
                await self.storage.tell(Event.L2_ALLOC_COW_READ)
            await self.storage.tell(Event.L2_ALLOC_WRITE)
            if self.l1[l1_index] == entry:
                self._new_table(l1_index, old)
                damage = self._misallocated(self.l1[l1_index] & OFFSET_MASK)
                if damage is not None:
                    raise await self.storage.corrupt(damage)
                if self.storage.is_watched:
                    await self.write_back()  # a fault injector meets these writes where QEMU makes them: at once

    async def _whole_table(self, table_offset: int) -> list[Table[array[int]]]:
        return [
            await self._load_slice(at) for at in range(table_offset, table_offset + self.cluster_size, self.slice_bytes)
        ]

    def _new_table(self, l1_index: int, old: list[Table[array[int]]]) -> None:
        """Give the L1 entry a table of its own, with the old one's entries or empty."""
        got = self.allocator.take(1)
        if got is None:
            return  # somebody else was quicker: the caller tries again
        offset, _ = got
        self.slices.drop(offset, self.cluster_size)
        for number, at in enumerate(range(offset, offset + self.cluster_size, self.slice_bytes)):
            data = array("Q", old[number].data) if old else array("Q", bytes(self.slice_bytes))
            table = Table(at, data)
            self.slices.mark(table, 0, self.slice_bytes)
            self.slices.insert(table)
        guard = self.storage.guard
        before = self.l1[l1_index] & OFFSET_MASK
        self.l1_dirty.setdefault(l1_index, self.l1[l1_index])
        self.l1[l1_index] = offset | COPIED
        if before:
            guard.remove_cluster(Section.ACTIVE_L2, before)
            self.allocator.retire(before, self.cluster_size)
        if guard.hit(offset, self.cluster_size) is None:
            guard.add_cluster(Section.ACTIVE_L2, offset)

    def _misallocated(self, offset: int) -> Damage | None:
        """Whether a new table was put on other metadata (the refcounts are wrong)."""
        hit = self.storage.guard.hit(offset, self.cluster_size, Section.ACTIVE_L2)
        if hit is None:
            return None
        return Damage(
            f"Preventing invalid write on metadata (overlaps with {hit})", offset=offset, size=self.cluster_size
        )

    def mark(self, table: Table[array[int]], index: int, count: int) -> None:
        """Entries of a slice were changed."""
        step = 8 * self.words
        self.slices.mark(table, index * step, (index + count) * step)


def count_run(data: array[int], index: int, limit: int, step: int) -> int:
    """How many entries from ``index`` on (at most ``limit``) are the first one plus 0, ``step``, 2 ``step``, ..."""
    first, count = data[index], 1
    while limit - count >= _CHUNK:
        if step:
            start = first + count * step
            wanted = array("Q", range(start, start + _CHUNK * step, step))
        else:
            wanted = array("Q", [first]) * _CHUNK
        if data[index + count : index + count + _CHUNK] != wanted:
            break
        count += _CHUNK
    expected = first + count * step
    end = min(limit, count + _CHUNK)
    while count < end and data[index + count] == expected:
        count += 1
        expected += step
    return count


def _subcluster_state(bits: int, sub: int, allocated: bool) -> State:
    data, zero = bits >> sub & 1, bits >> (32 + sub) & 1
    if data:
        return State.NORMAL if allocated and not zero else State.INVALID
    if zero:
        return State.ZERO_ALLOC if allocated else State.ZERO
    return State.UNALLOCATED_ALLOC if allocated else State.UNALLOCATED

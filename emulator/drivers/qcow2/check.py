"""Is an image consistent? Every reference is counted and compared with the refcounts that the image holds.

Three passes over the metadata, none over the data:

1. *count*: header, L1 tables (active and of snapshots), L2 tables, what these refer to, snapshot table, refcount table and
   blocks, bitmaps. An L2 table is read once, however many L1 tables refer to it, and its references count that many times.
2. *compare* with the refcount blocks: more stored than counted is a leak, fewer is a corruption.
3. *copied*: the COPIED flag of every active entry says whether the refcount is one.

The counts (corruptions, leaks, check errors, fragmentation) are those of ``qemu-img check``, which programs read.
Differences, all on damaged images only: a check that would take forever (tables that overlap by the thousand) gives up with
a check error, and a refcount block outside of the file does not make a repair grow the file.

Nothing is written here; `repair.py` does that, on top of the same passes. Source: QEMU ``docs/interop/qcow2.txt``,
``qapi/block-core.json`` (ImageCheck); behaviour of ``block/qcow2-refcount.c``.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from livedisk.emulator.drivers.qcow2 import bitmap_directory
from livedisk.emulator.drivers.qcow2.counts import ClusterCounts, Values, pack, unpack
from livedisk.emulator.drivers.qcow2.geometry import (
    ALL_SUBCLUSTERS_ALLOCATED,
    COMPRESSED,
    COPIED,
    ENTRY,
    L1_RESERVED_MASK,
    L2_RESERVED_MASK,
    MAX_SNAPSHOTS,
    OFFSET_MASK,
    REFCOUNT_TABLE_OFFSET_MASK,
    REFCOUNT_TABLE_RESERVED_MASK,
    ZERO,
    ClusterType,
    table_from_bytes,
)
from livedisk.emulator.drivers.qcow2.header import (
    SNAPSHOT_ENTRY_MIN,
    Header,
    Purpose,
    Readable,
    check_table,
    read_header,
)
from livedisk.emulator.drivers.qcow2.snapshots import V3_EXTRA, SnapshotTable, l1_problem, read_snapshots
from livedisk.emulator.errors import ImageError

MAX_CLUSTERS: Final = 0x7FFF_FFFF
"""QEMU's limit on a file's length for a check, in clusters."""
_BLOCK_CACHE_BYTES: Final = 32 << 20
_CHUNK: Final = 1 << 20
Report = Callable[[str], None]


class CheckFailed(ImageError):
    """The check could not be brought to its end. ``result`` holds what was found until then."""

    def __init__(self, desc: str, result: CheckResult) -> None:
        super().__init__(desc)
        self.result = result


@dataclass(slots=True)
class CheckResult:
    """QEMU's ImageCheck without the file's name. Numbers of findings, clusters, and one offset in bytes."""

    check_errors: int = 0
    image_end_offset: int = 0
    """Bytes in the file up to the end of the last cluster in use."""
    corruptions: int = 0
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0

    def to_json(self, filename: str, fmt: str = "qcow2") -> dict[str, Any]:
        """ImageCheck as QEMU prints it: zeroes are left out, but for check-errors."""
        found: dict[str, Any] = {"filename": filename, "format": fmt, "check-errors": self.check_errors}
        for name in self.__slots__:
            value = getattr(self, name)
            if value and name != "check_errors":
                found[name.replace("_", "-")] = value
        return found

    def add_findings(self, other: CheckResult) -> None:
        """Add another part's errors, corruptions, leaks and fixes."""
        for name in ("check_errors", "corruptions", "leaks", "corruptions_fixed", "leaks_fixed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def ignore(_: str) -> None:
    """A `Report` for those who only want the numbers."""


@dataclass(slots=True)
class L2Use:
    """How often an L2 table is referred to: by all L1 tables, and by the active one."""

    total: int = 0
    active: int = 0


@dataclass(slots=True)
class Walk:
    """What the counting pass found, for the passes after it and for repairs."""

    counts: ClusterCounts
    l2: dict[int, L2Use] = field(default_factory=dict)
    """By offset of the table."""
    rebuild: bool = False
    """The refcount structures are damaged themselves."""
    misaligned_preallocations: set[int] = field(default_factory=set)
    """L2 tables with zero clusters whose set-aside host cluster is not aligned: a repair makes them plain zeroes."""
    refcount_structures: list[int] = field(default_factory=list)
    """Clusters of the refcount table and blocks, each as often as it was counted."""
    snapshot_table: bool = False
    """The clusters of the snapshot table are among what was counted."""


class Refcounts:
    """The refcounts that the image holds, read a block at a time, with the latest blocks kept."""

    def __init__(self, file: Readable, header: Header, table: array[int]) -> None:
        self.file = file
        self.geometry = header.geometry
        self.table = table
        self._blocks: OrderedDict[int, Values] = OrderedDict()
        size = self.geometry.refcount_block_entries * max(self.geometry.refcount_bits // 8, 1)
        self._room = max(_BLOCK_CACHE_BYTES // size, 2)

    def block_offset(self, index: int) -> int:
        """Where the block of that index stands; 0 if there is none."""
        return self.table[index] & REFCOUNT_TABLE_OFFSET_MASK if index < len(self.table) else 0

    def usable(self, index: int) -> bool:
        """Whether the block is where a block can be."""
        offset = self.block_offset(index)
        return not self.geometry.into_cluster(offset) and offset < 1 << 63

    async def raw(self, index: int) -> bytes:
        """The block as it stands in the file; zeroes if there is none."""
        offset = self.block_offset(index)
        raw = bytearray(self.geometry.cluster_size)
        if 0 < offset < self.file.size:
            await self.file.read(offset, memoryview(raw))
        return bytes(raw)

    async def values(self, index: int) -> Values:
        """The block's refcounts. The block is `usable`."""
        known = self._blocks.get(index)
        if known is not None:
            self._blocks.move_to_end(index)
            return known
        values = unpack(await self.raw(index), self.geometry.refcount_bits)
        self._blocks[index] = values
        if len(self._blocks) > self._room:
            self._blocks.popitem(last=False)
        return values

    async def get(self, cluster: int) -> int | None:
        """One refcount; None where its block is unusable."""
        index = cluster >> self.geometry.refcount_block_bits
        if not self.usable(index):
            return None
        if not self.block_offset(index):
            return 0
        return (await self.values(index))[cluster & (self.geometry.refcount_block_entries - 1)]

    def forget(self) -> None:
        """The blocks were changed on the disk."""
        self._blocks.clear()


class Check:
    """One check of one image. ``fixing``: errors are going to be repaired, which changes what some findings count as."""

    def __init__(
        self, file: Readable, header: Header, table: SnapshotTable, report: Report, *, fixing: bool = False
    ) -> None:
        self.file = file
        self.header = header
        self.geometry = header.geometry
        self.snapshots = table
        self.report = report
        self.fixing = fixing
        self.result = CheckResult()
        self.result.total_clusters = self.geometry.clusters(header.virtual_size)
        self.file_size = file.size
        self.refcounts = Refcounts(file, header, array("Q"))
        self._l2_budget = 0

    # -- counting ----------------------------------------------------------------------------------------------------
    async def walk(self) -> Walk:
        """Count all references. Raises CheckFailed where that cannot be finished."""
        header, clusters = self.header, self.geometry.clusters(self.file_size)
        if clusters > MAX_CLUSTERS:
            self.result.check_errors += 1
            raise CheckFailed("File too large", self.result)
        table = await self.read_table(header.refcount_table_offset, header.refcount_table_clusters << self._entry_shift)
        self.refcounts = Refcounts(self.file, header, table)
        walk = Walk(ClusterCounts(clusters, self.geometry.refcount_max))
        self.count(walk.counts, 0, self.geometry.cluster_size)
        await self._walk_l1_tables(walk)
        for offset, use in walk.l2.items():
            await self._walk_l2(walk, offset, use)
        walk.snapshot_table = self.count(walk.counts, header.snapshots_offset, self.snapshots.length)
        await self._walk_bitmaps(walk)
        self._walk_refcount_structures(walk)
        return walk

    @property
    def _entry_shift(self) -> int:
        return self.geometry.cluster_bits - 3

    async def read_table(self, offset: int, entries: int) -> array[int]:
        """A table of 64-bit entries. What lies past the end of the file reads as zeroes and is left out."""
        inside = min(entries * ENTRY, max(self.file_size - offset, 0) + 7 & ~7)
        table: array[int] = array("Q")
        for start in range(0, inside, _CHUNK):
            raw = bytearray(min(_CHUNK, inside - start))
            await self.file.read(offset + start, memoryview(raw))
            table.extend(table_from_bytes(raw))
        return table

    def count(self, counts: ClusterCounts, offset: int, length: int, times: int = 1) -> bool:
        """Count references to every cluster that the range touches.

        A range that ends a cluster or more past the end of the file is a corruption and is not counted. Returns whether it was.
        """
        if length <= 0:
            return False
        if offset + length - self.file_size >= self.geometry.cluster_size:
            self.report(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: "
                f"offset {offset:#x} size {length:#x}"
            )
            self.result.corruptions += times
            return False
        bits = self.geometry.cluster_bits
        for cluster in range(offset >> bits, (offset + length - 1 >> bits) + 1):
            over = counts.add(cluster, times)
            if over:
                self._overflow(cluster, over)
        return True

    def _overflow(self, cluster: int, times: int) -> None:
        self.report(f"ERROR: overflow cluster offset={cluster << self.geometry.cluster_bits:#x}")
        self.report(
            "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy if the "
            "image cannot be opened for writing"
        )
        self.result.corruptions += times

    async def _walk_l1_tables(self, walk: Walk) -> None:
        """All L1 tables: where their L2 tables are, and how often each is referred to."""
        header, result = self.header, self.result
        places: Counter[tuple[int, int]] = Counter()
        active = (header.l1_table_offset, header.l1_size)
        places[active] += 1
        if header.has_data_file and self.snapshots.snapshots:
            self.report(f"ERROR {len(self.snapshots.snapshots)} snapshots in image with data file")
            result.corruptions += 1
        for snapshot in self.snapshots.snapshots:
            problem = l1_problem(snapshot, self.geometry.into_cluster(snapshot.l1_table_offset))
            if problem is not None:
                self.report(f"ERROR {problem}")
                result.corruptions += 1
            else:
                places[snapshot.l1_table_offset, snapshot.l1_size] += 1
        # Tables that do not overlap cannot be larger than the file together. Ones that do may take forever.
        budget = 2 * self.file_size + (64 << 20)
        for (offset, entries), times in places.items():
            if not entries:
                continue
            self.count(walk.counts, offset, entries * ENTRY, times)
            budget -= min(entries * ENTRY, self.file_size)
            if budget < 0:
                self.report("ERROR: the L1 tables of the snapshots overlap; giving up")
                result.check_errors += 1
                raise CheckFailed("Too many overlapping L1 tables", result)
            await self._walk_l1(walk, offset, entries, times, is_active=(offset, entries) == active)

    async def _walk_l1(self, walk: Walk, offset: int, entries: int, times: int, *, is_active: bool) -> None:
        cluster_mask = self.geometry.cluster_size - 1
        # An L2 table that several entries of one L1 table refer to is counted as often.
        for entry, repeats in Counter(await self.read_table(offset, entries)).items():
            if not entry:
                continue
            uses = repeats * times
            if entry & L1_RESERVED_MASK:
                self.report(f"ERROR found L1 entry with reserved bits set: {entry:x}")
                self.result.corruptions += uses
            table = entry & OFFSET_MASK
            self.count(walk.counts, table, self.geometry.cluster_size, uses)
            if table & cluster_mask:
                self.report(f"ERROR l2_offset={table:x}: Table is not cluster aligned; L1 entry corrupted")
                self.result.corruptions += uses
            if table < self.file_size:
                use = walk.l2.setdefault(table, L2Use())
                use.total += uses
                if is_active:
                    use.active += repeats

    async def _walk_l2(self, walk: Walk, offset: int, use: L2Use) -> None:
        if self.geometry.into_cluster(offset):
            # Misaligned tables overlap, so there may be very many of them in a small file.
            self._l2_budget += self.geometry.cluster_size
            if self._l2_budget > max(self.file_size, 64 << 20):
                self.report("ERROR: too many misaligned L2 tables; giving up")
                self.result.check_errors += 1
                raise CheckFailed("Too many misaligned L2 tables", self.result)
        table = await self.read_table(offset, self.geometry.cluster_size // ENTRY)
        if not any(table):
            return
        if self.geometry.extended_l2:
            entries, bitmaps = table[::2], table[1::2]
        else:
            entries, bitmaps = table, None
        self._count_l2(walk, offset, use, entries, bitmaps)

    def _count_l2(
        self, walk: Walk, l2_offset: int, use: L2Use, entries: array[int], bitmaps: array[int] | None
    ) -> None:
        """One L2 table's entries. A hot loop: long and flat, with the common entry (a data cluster) first."""
        geometry, result, counts = self.geometry, self.result, walk.counts
        size, bits, mask = geometry.cluster_size, geometry.cluster_bits, geometry.cluster_size - 1
        in_file, times, add = not self.header.has_data_file, use.total, counts.add
        odd = COMPRESSED | L2_RESERVED_MASK | (0 if bitmaps is not None else ZERO)
        following = allocated = fragmented = 0
        for index, entry in enumerate(entries):
            host = entry & OFFSET_MASK
            if entry & odd or not host or host & mask or bitmaps is not None:
                bitmap = bitmaps[index] if bitmaps is not None else 0
                if entry or bitmap:
                    kept = self._judge_entry(walk, l2_offset, index, entry, bitmap, use)
                    if kept is None:
                        continue
                else:
                    continue
            allocated += 1
            if following and host != following:
                fragmented += 1
            following = host + size
            if in_file:
                if host >= self.file_size:
                    self.count(counts, host, size, times)
                else:
                    # A host offset that is not aligned touches two clusters.
                    over = add(host >> bits, times) + (add((host >> bits) + 1, times) if host & mask else 0)
                    if over:
                        self._overflow(host >> bits, over)
        if use.active:
            result.allocated_clusters += allocated * use.active
            result.fragmented_clusters += fragmented * use.active

    def _judge_entry(self, walk: Walk, l2_offset: int, index: int, entry: int, bitmap: int, use: L2Use) -> int | None:
        """An entry that is not simply a data cluster: report what is wrong with it.

        Returns the host cluster to count as allocated, or None if there is none (compressed ones are counted here).
        """
        result, times = self.result, use.total
        kind = self.geometry.cluster_type(entry)
        if kind is ClusterType.COMPRESSED:
            self._judge_compressed(walk, index, entry, bitmap, use)
            return None
        if entry & L2_RESERVED_MASK:
            self.report(f"ERROR found l2 entry with reserved bits set: {entry:x}")
            result.corruptions += times
        if kind is ClusterType.UNALLOCATED:
            if bitmap & ALL_SUBCLUSTERS_ALLOCATED:
                self.report("ERROR: Unallocated cluster has non-zero subcluster allocation map")
                result.corruptions += times
            return None
        if kind is ClusterType.ZERO_PLAIN:
            return None
        host = entry & OFFSET_MASK
        if bitmap >> 32 & bitmap:
            self.report(f"ERROR offset={host:x}: Allocated cluster has corrupted subcluster allocation bitmap")
            result.corruptions += times
        if self.geometry.into_cluster(host):
            holds_data = bitmap & ALL_SUBCLUSTERS_ALLOCATED if self.geometry.extended_l2 else not entry & ZERO
            result.corruptions += times
            if holds_data:
                self.report(f"ERROR offset={host:x}: Data cluster is not properly aligned; L2 entry corrupted.")
            else:
                word = "Repairing" if self.fixing else "ERROR"
                self.report(
                    f"{word} offset={host:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."
                )
                if self.fixing:
                    walk.misaligned_preallocations.add(l2_offset)
                    return None  # it will not be there any more
        return host

    def _judge_compressed(self, walk: Walk, index: int, entry: int, bitmap: int, use: L2Use) -> None:
        result = self.result
        if entry & COPIED:
            self.report(
                f"ERROR: coffset=0x{entry & self.geometry.compressed_offset_mask:x}: "
                "copied flag must never be set for compressed clusters"
            )
            result.corruptions += use.total
        if self.header.has_data_file:
            self.report(f"ERROR compressed cluster {index} with data file, entry=0x{entry & ~COPIED:x}")
            result.corruptions += use.total
            return
        if bitmap:
            self.report(
                f"ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, entry=0x{entry & ~COPIED:x}"
            )
            result.corruptions += use.total
            return
        self.count(walk.counts, *self.geometry.compressed_extent(entry), use.total)
        result.allocated_clusters += use.active
        result.compressed_clusters += use.active
        result.fragmented_clusters += use.active  # several share sectors: fragmented by nature

    async def _walk_bitmaps(self, walk: Walk) -> None:
        """The bitmap directory, the bitmap tables and the bitmaps' clusters."""
        extension = self.header.bitmaps
        if extension is None:
            return
        self.count(walk.counts, extension.directory_offset, extension.directory_size)
        try:
            entries = await bitmap_directory.read_directory(self.file, self.header)
        except ImageError as error:
            self.result.corruptions += 1
            raise CheckFailed(str(error), self.result) from None
        for entry in entries:
            self.count(walk.counts, entry.table_offset, entry.table_size * ENTRY)
            table = await self.read_table(entry.table_offset, entry.table_size)
            for place in table:
                if not bitmap_directory.table_entry_valid(place, self.geometry.cluster_size):
                    self.result.corruptions += 1
                elif place & OFFSET_MASK:
                    self.count(walk.counts, place & OFFSET_MASK, self.geometry.cluster_size)

    def _walk_refcount_structures(self, walk: Walk) -> None:
        """The refcount table and its blocks, each of which must be referred to exactly once."""
        header, geometry, counts = self.header, self.geometry, walk.counts
        size, bits = geometry.cluster_size, geometry.cluster_bits
        before = self.result.corruptions
        self.count(counts, header.refcount_table_offset, header.refcount_table_clusters * size)
        if self.result.corruptions == before:
            first = header.refcount_table_offset >> bits
            walk.refcount_structures.extend(range(first, first + header.refcount_table_clusters))
        for index, entry in enumerate(self.refcounts.table):
            if not entry:
                continue
            offset = entry & REFCOUNT_TABLE_OFFSET_MASK
            if entry & REFCOUNT_TABLE_RESERVED_MASK:
                self._damaged_block(walk, f"ERROR refcount table entry {index} has reserved bits set")
            elif geometry.into_cluster(offset):
                self._damaged_block(
                    walk, f"ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
                )
            elif offset >> bits >= counts.length:
                # Without repairing errors the other blocks are as good as they were.
                self._damaged_block(walk, f"ERROR refcount block {index} is outside image", rebuild=self.fixing)
            else:
                self.count(counts, offset, size)
                walk.refcount_structures.append(offset >> bits)
                uses = counts.get(offset >> bits)
                if min(uses, counts.limit) != 1:
                    self._damaged_block(walk, f"ERROR refcount block {index} refcount={uses}")
                walk.rebuild = walk.rebuild or uses > 1

    def _damaged_block(self, walk: Walk, text: str, *, rebuild: bool = True) -> None:
        self.report(text)
        self.result.corruptions += 1
        walk.rebuild = walk.rebuild or rebuild

    # -- comparing ---------------------------------------------------------------------------------------------------
    def block_indices(self, walk: Walk) -> list[int]:
        """Refcount blocks that exist or would have to."""
        shift, length = self.geometry.refcount_block_bits, walk.counts.length
        wanted = {index for index in range(len(self.refcounts.table)) if self.refcounts.table[index]}
        for start, end in walk.counts.used_stretches():
            wanted.update(range(start >> shift, (min(end, length) + (1 << shift) - 1) >> shift))
        return sorted(index for index in wanted if index << shift < length)

    async def compare(self, walk: Walk) -> dict[int, list[tuple[int, int, int]]]:
        """Compare what is stored with what was counted.

        Counts leaks and corruptions, sets ``image_end_offset`` and ``walk.rebuild``. Returns, by block index, the clusters
        that differ: ``(cluster, stored, counted)``.
        """
        geometry, result = self.geometry, self.result
        entries = geometry.refcount_block_entries
        differing: dict[int, list[tuple[int, int, int]]] = {}
        highest = 0
        for index in self.block_indices(walk):
            first = index * entries
            number = min(entries, walk.counts.length - first)
            counted = walk.counts.values(first, number)
            if not self.refcounts.usable(index):
                result.check_errors += number
                last = first + number - 1
                self.report(f"Can't get refcount for clusters {first} to {last}: Input/output error")
                continue
            raw = await self.refcounts.raw(index)
            padded = counted if number == entries else [*counted, *bytes(entries - number)]
            if pack(padded, geometry.refcount_bits) == raw:
                highest = max(highest, last_nonzero(first, counted))
                continue
            stored = unpack(raw, geometry.refcount_bits)[:number]
            highest = max(highest, last_nonzero(first, counted), last_nonzero(first, stored))
            differing[index] = [
                (first + at, have, want)
                for at, (have, want) in enumerate(zip(stored, counted, strict=True))
                if have != want
            ]
            for _, have, want in differing[index]:
                walk.rebuild = walk.rebuild or have == 0
                if have < want:
                    result.corruptions += 1
                else:
                    result.leaks += 1
        result.image_end_offset = (highest + 1) * geometry.cluster_size
        return differing

    def report_differences(self, differing: dict[int, list[tuple[int, int, int]]], leak: str, error: str) -> None:
        """Name every cluster that differs; ``leak`` and ``error`` are the words for the two cases."""
        for clusters in differing.values():
            for cluster, have, want in clusters:
                self.report(f"{error if have < want else leak} cluster {cluster} refcount={have} reference={want}")

    # -- the COPIED flag ---------------------------------------------------------------------------------------------
    async def find_wrong_copied(self, repairing: bool) -> tuple[list[int], list[int]]:
        """Count active entries whose COPIED flag is wrong. Returns indices of such L1 entries, and offsets of L2 tables with such
        entries."""
        word = "Repairing" if repairing else "ERROR"
        l1 = await self.read_table(self.header.l1_table_offset, self.header.l1_size)
        wrong_l1: list[int] = []
        tables: Counter[int] = Counter()
        for index, entry in enumerate(l1):
            offset = entry & OFFSET_MASK
            if not offset:
                continue
            refcount = await self.refcounts.get(offset >> self.geometry.cluster_bits)
            if refcount is None:
                continue
            if (refcount == 1) != bool(entry & COPIED):
                self.report(f"{word} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={refcount}")
                self.result.corruptions += 1
                wrong_l1.append(index)
            if offset < self.file_size:
                tables[offset] += 1
        wrong_l2: list[int] = []
        for offset, times in tables.items():
            found = await self._wrong_copied_in_table(offset, word)
            # A table that several L1 entries share is wrong once for each, until it is repaired.
            self.result.corruptions += found if repairing else found * times
            if found:
                wrong_l2.append(offset)
        return wrong_l1, wrong_l2

    async def _wrong_copied_in_table(self, offset: int, word: str) -> int:
        found = 0
        table = await self.read_table(offset, self.geometry.cluster_size // ENTRY)
        step = self.geometry.l2_entry_size // ENTRY
        for entry in table[::step]:
            refcount = await self.data_refcount(entry)
            if refcount is not None and (refcount == 1) != bool(entry & COPIED):
                self.report(f"{word} OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}")
                found += 1
        return found

    async def data_refcount(self, entry: int) -> int | None:
        """The refcount that an L2 entry's COPIED flag speaks of; None where it speaks of none."""
        if not entry or self.geometry.cluster_type(entry) not in (ClusterType.NORMAL, ClusterType.ZERO_ALLOCATED):
            return None
        if self.header.has_data_file:
            return 1
        return await self.refcounts.get((entry & OFFSET_MASK) >> self.geometry.cluster_bits)


def last_nonzero(first: int, values: Values) -> int:
    """The index of the last value other than 0, where the first value's index is ``first``; 0 if all are 0."""
    if isinstance(values, array):
        return next((first + at for at in range(len(values) - 1, -1, -1) if values[at]), 0)
    used = len(values.rstrip(b"\0"))
    return first + used - 1 if used else 0


# -- the snapshot table ------------------------------------------------------------------------------------------------
async def check_snapshot_table(
    file: Readable, header: Header, result: CheckResult, report: Report, *, repair: bool
) -> SnapshotTable:
    """Read the snapshot table and count what is wrong with it. Raises CheckFailed if it cannot be read.

    With ``repair``, what breaks a limit is left out of the returned table, and the caller must see to it that the image follows.
    """
    wanted = header.nb_snapshots
    overhang = max(wanted - MAX_SNAPSHOTS, 0)
    if overhang and repair:
        report(f"Discarding {overhang} overhanging snapshots")
        header.nb_snapshots = MAX_SNAPSHOTS
    try:
        check_table(header.geometry, header.snapshots_offset, header.nb_snapshots, SNAPSHOT_ENTRY_MIN,
                    SNAPSHOT_ENTRY_MIN * MAX_SNAPSHOTS, "snapshot table")  # fmt: skip
    except ImageError as error:
        result.check_errors += 1
        report(f"ERROR {error}")
        raise CheckFailed(str(error), result) from None
    try:
        table = await read_snapshots(file, header, repair=repair)
    except ImageError as error:
        result.check_errors += 1
        report(f"ERROR failed to read the snapshot table: {error}")
        raise CheckFailed(str(error), result) from None
    header.nb_snapshots = len(table.snapshots)
    dropped = wanted - header.nb_snapshots
    result.corruptions += dropped + table.trimmed
    if header.version >= 3:
        for index, snapshot in enumerate(table.snapshots):
            if len(snapshot.extra) < V3_EXTRA:
                result.corruptions += 1
                report(f"{'Repairing' if repair else 'ERROR'} snapshot table entry {index} is incomplete")
    return table


async def check(file: Readable, report: Report = ignore) -> CheckResult:
    """Check the image in ``file`` without changing it. ``report`` takes each finding in QEMU's words.

    Raises ImageError if this is no qcow2 image, CheckFailed (with what was found) if the check cannot be finished.
    """
    header = await read_header(file, Purpose.CHECK)
    table_result = CheckResult()
    table = await check_snapshot_table(file, header, table_result, report, repair=False)
    run = Check(file, header, table, report)
    try:
        walk = await run.walk()
        run.report_differences(await run.compare(walk), "Leaked", "ERROR")
        await run.find_wrong_copied(repairing=False)
    finally:
        run.result.add_findings(table_result)
    return run.result

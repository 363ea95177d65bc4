"""Repairing what `check.py` finds, in an order that a power cut at any point survives.

* Whatever is written anew (refcount blocks, refcount table, snapshot table) goes to clusters that nothing refers to. A barrier
  follows, then the one sector of the header that switches over, then a barrier.
* Refcounts are put right before any COPIED flag is, because the flag repeats what the refcount says.
* Entries are only written into tables that nothing else claims: the count of the table's cluster says so.
* The dirty and corrupt bits go last, and only from an image in which nothing wrong is left.

A repair that is cut short leaves an image that can be repaired again. Source: behaviour of QEMU's ``qcow2_co_check`` with
BDRV_FIX_LEAKS and BDRV_FIX_ERRORS; the old refcount structure is not first leaked and then freed, as it is there, but left out
of the new one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from enum import IntFlag
from typing import Protocol

from livedisk.emulator.drivers.qcow2.check import (
    Check,
    CheckFailed,
    CheckResult,
    Report,
    Walk,
    check,
    check_snapshot_table,
    ignore,
)
from livedisk.emulator.drivers.qcow2.counts import pack
from livedisk.emulator.drivers.qcow2.geometry import (
    ALL_SUBCLUSTERS_ZERO,
    COMPRESSED,
    COPIED,
    ENTRY,
    MAX_REFCOUNT_TABLE_BYTES,
    OFFSET_MASK,
    SECTOR,
    ZERO,
    table_to_bytes,
)
from livedisk.emulator.drivers.qcow2.header import Header, Incompatible, Purpose, Readable, read_header
from livedisk.emulator.drivers.qcow2.snapshots import V3_EXTRA, SnapshotTable, complete
from livedisk.emulator.drivers.qcow2.snapshots import table_to_bytes as snapshots_to_bytes
from livedisk.emulator.errors import BlockError, ImageError


class Fix(IntFlag):
    """What to repair (QEMU's BdrvCheckMode): ``qemu-img check -r leaks`` is LEAKS, ``-r all`` is ALL."""

    LEAKS = 1
    ERRORS = 2
    ALL = 3


class Writable(Readable, Protocol):
    """A node, or anything like it, that takes writes."""

    async def write(self, offset: int, data: memoryview) -> None: ...

    async def flush(self) -> None: ...


async def repair(file: Writable, fix: Fix, report: Report = ignore) -> CheckResult:
    """Check the image in ``file`` and repair what ``fix`` allows. Nobody else uses the image meanwhile.

    The result says what is left and what was repaired; as with QEMU a second `check` gives the final picture. Raises ImageError
    if this is no qcow2 image, CheckFailed if the check cannot be finished or the repair would need ``Fix.ERRORS``.
    """
    header = await read_header(file, Purpose.CHECK)
    run = _Repair(file, header, fix, report)
    return await run.all()


async def repair_dirty(file: Writable, report: Report = ignore) -> None:
    """Make an image whole that was not closed (the dirty bit). Read the header again afterwards.

    Raises ImageError, in QEMU's words, if it cannot be repaired.
    """
    try:
        result = await repair(file, Fix.ALL, report)
    except CheckFailed as error:
        raise ImageError(f"Could not repair dirty image: {error}") from None
    if result.check_errors:
        raise ImageError("Could not repair dirty image: Input/output error")


class _Repair:
    """One repair: the check that it works from, and the steps in their order."""

    def __init__(self, file: Writable, header: Header, fix: Fix, report: Report) -> None:
        self.file = file
        self.header = header
        self.geometry = header.geometry
        self.errors = bool(fix & Fix.ERRORS)
        self.leaks = bool(fix & Fix.LEAKS)
        self.report = report
        self.run: Check
        self.walk: Walk

    @property
    def result(self) -> CheckResult:
        return self.run.result

    async def all(self) -> CheckResult:
        """Every step in order."""
        found = CheckResult()
        table = await self._cut_snapshot_table(found)
        self.run = Check(self.file, self.header, table, self.report, fixing=self.errors)
        try:
            self.walk = await self.run.walk()
            await self._zero_misaligned()
            await self._fix_refcounts()
            await self._fix_copied()
            await self._complete_snapshots(found)
        finally:
            self.result.add_findings(found)
        if not self.result.check_errors and not self.result.corruptions:
            await self._mark_clean()
        return self.result

    async def put_header(self) -> None:
        """Write the header's fixed fields, in one sector, between two barriers."""
        await self.file.flush()
        current = bytearray(SECTOR)
        await self.file.read(0, memoryview(current))
        await self.file.write(0, memoryview(self.header.sector(bytes(current))))
        await self.file.flush()

    # -- snapshots ---------------------------------------------------------------------------------------------------
    async def _cut_snapshot_table(self, found: CheckResult) -> SnapshotTable:
        """Leave out the snapshots past the limits. Their clusters leak, and are found as leaks."""
        wanted = self.header.nb_snapshots
        table = await check_snapshot_table(self.file, self.header, found, self.report, repair=self.errors)
        dropped = wanted - self.header.nb_snapshots
        if dropped:
            await self.put_header()
            found.corruptions -= dropped
            found.corruptions_fixed += dropped
        return table

    async def _complete_snapshots(self, found: CheckResult) -> None:
        """Write the snapshot table anew where entries were cut or lack what version 3 demands."""
        if not self.errors or not found.corruptions or self.result.check_errors:
            return
        snapshots = self.run.snapshots.snapshots
        if self.header.version >= 3:
            snapshots = tuple(complete(snapshot, self.header.virtual_size) for snapshot in snapshots)
        assert all(len(snapshot.extra) >= V3_EXTRA for snapshot in snapshots) or self.header.version < 3
        raw = snapshots_to_bytes(snapshots)
        counts, bits = self.walk.counts, self.geometry.cluster_bits
        number = self.geometry.clusters(len(raw))
        first = counts.find_free(0, number)
        old = range(
            self.header.snapshots_offset >> bits,
            self.geometry.clusters(self.header.snapshots_offset + self.run.snapshots.length),
        )
        for cluster in range(first, first + number):
            counts.add(cluster)
        await self.file.write(first << bits, memoryview(raw.ljust(number << bits, b"\0")))
        await self._store_counts(range(first, first + number))
        self.header.snapshots_offset = first << bits
        await self.put_header()
        if self.walk.snapshot_table:  # else all that is counted there is somebody else's
            for cluster in old:
                counts.add(cluster, -1)
            await self._store_counts(old)
        found.corruptions_fixed += found.corruptions
        found.corruptions = 0

    # -- L2 entries --------------------------------------------------------------------------------------------------
    def _claimed_once(self, offset: int, uses: int) -> bool:
        """Whether the cluster at ``offset`` is that table's alone: nothing but its own references was counted."""
        return not self.geometry.into_cluster(offset) and (
            self.walk.counts.get(offset >> self.geometry.cluster_bits) == uses
        )

    async def _zero_misaligned(self) -> None:
        """Zero clusters that set an impossible host cluster aside set none aside any more."""
        for offset in sorted(self.walk.misaligned_preallocations):
            uses = self.walk.l2[offset].total
            if not self._claimed_once(offset, uses):
                self.report("ERROR: Overlap check failed")
                self.result.check_errors += 1
                continue
            table = await self.run.read_table(offset, self.geometry.cluster_size // ENTRY)
            step = self.geometry.l2_entry_size // ENTRY
            fixed = 0
            for at in range(0, len(table), step):
                if self._zeroed(table, at):
                    fixed += 1
            await self.file.write(offset, memoryview(table_to_bytes(table)))
            self.result.corruptions -= fixed * uses
            self.result.corruptions_fixed += fixed
        if self.walk.misaligned_preallocations:
            await self.file.flush()

    def _zeroed(self, table: array[int], at: int) -> bool:
        """Change the entry at ``at`` if it is one of those; whether it was."""
        entry = table[at]
        if entry & COMPRESSED or not self.geometry.into_cluster(entry & OFFSET_MASK):
            return False
        if not self.geometry.extended_l2:
            if not entry & ZERO:
                return False
            table[at] = ZERO
            return True
        bitmap = table[at + 1]
        if bitmap & 0xFFFF_FFFF:
            return False
        table[at], table[at + 1] = 0, bitmap & ALL_SUBCLUSTERS_ZERO
        return True

    # -- refcounts ---------------------------------------------------------------------------------------------------
    async def _fix_refcounts(self) -> None:
        differing = await self.run.compare(self.walk)
        if self.walk.rebuild and self.errors:
            self.run.report_differences(differing, "Leaked", "ERROR")
            await self._rebuild_and_recheck()
        elif self.walk.rebuild:
            self.run.report_differences(differing, "Leaked", "ERROR")
            self.report("ERROR need to rebuild refcount structures")
            self.result.check_errors += 1
            raise CheckFailed("The refcount structures must be rebuilt: repair all errors, not only leaks", self.result)
        elif differing:
            await self._fix_in_place(differing)

    async def _fix_in_place(self, differing: dict[int, list[tuple[int, int, int]]]) -> None:
        """Every refcount block that differs exists, is in the file and is referred to once: write the entries that may be."""
        result, mask = self.result, self.geometry.refcount_block_entries - 1
        self.run.report_differences(
            differing, "Repairing" if self.leaks else "Leaked", "Repairing" if self.errors else "ERROR"
        )
        for index, clusters in differing.items():
            values = list(await self.run.refcounts.values(index))
            for cluster, have, want in clusters:
                if have > want and self.leaks:
                    result.leaks -= 1
                    result.leaks_fixed += 1
                elif have < want and self.errors:
                    result.corruptions -= 1
                    result.corruptions_fixed += 1
                else:
                    continue
                values[cluster & mask] = want
            raw = pack(values, self.geometry.refcount_bits)
            await self.file.write(self.run.refcounts.block_offset(index), memoryview(raw))
        self.run.refcounts.forget()
        await self.file.flush()

    async def _rebuild_and_recheck(self) -> None:
        """New refcount structures; then count again, because the old ones are not referred to any more."""
        self.report("Rebuilding refcount structure")
        await self._rebuild()
        old = self.result
        again = Check(self.file, self.header, self.run.snapshots, ignore)
        self.walk = await again.walk()
        await again.compare(self.walk)
        self.run = again
        again.report = self.report
        result = again.result
        result.corruptions_fixed = old.corruptions_fixed + max(old.corruptions - result.corruptions, 0)
        result.leaks_fixed = old.leaks_fixed + max(old.leaks - result.leaks, 0)
        if self.walk.rebuild:
            self.report("ERROR rebuilt refcount structure is still broken")
            result.check_errors += 1

    async def _rebuild(self) -> None:
        """Write refcount blocks and a refcount table from what was counted, and switch the header to them."""
        counts, geometry = self.walk.counts, self.geometry
        in_use = frozenset(self.walk.refcount_structures)
        for cluster in self.walk.refcount_structures:
            counts.add(cluster, -1)
        place: dict[int, int] = {}
        self._place_blocks(place, self._blocks_in_use(), in_use)
        first = clusters = 0
        while (needed := geometry.clusters((max(place) + 1) * ENTRY)) > clusters:
            for cluster in range(first, first + clusters):
                counts.add(cluster, -1)
            first, clusters = counts.find_free(0, needed, in_use), needed
            for cluster in range(first, first + clusters):
                counts.add(cluster)
            self._place_blocks(
                place, {at >> geometry.refcount_block_bits for at in range(first, first + clusters)}, in_use
            )
        if clusters * geometry.cluster_size > MAX_REFCOUNT_TABLE_BYTES:
            self.result.check_errors += 1
            raise CheckFailed("ERROR allocating reftable: File too large", self.result)
        table = array("Q", bytes(clusters * geometry.cluster_size))
        for index, cluster in place.items():
            table[index] = cluster << geometry.cluster_bits
            await self._write_block(index, table[index])
        await self.file.write(first << geometry.cluster_bits, memoryview(table_to_bytes(table)))
        self.header.refcount_table_offset = first << geometry.cluster_bits
        self.header.refcount_table_clusters = clusters
        await self.put_header()

    def _blocks_in_use(self) -> set[int]:
        """Indices of the blocks that have anything to count."""
        entries, counts = self.geometry.refcount_block_entries, self.walk.counts
        found: set[int] = set()
        for start, end in counts.used_stretches():
            for first in range(start // entries * entries, end, entries):
                if any(counts.values(first, entries)):
                    found.add(first // entries)
        return found

    def _place_blocks(self, place: dict[int, int], wanted: set[int], in_use: frozenset[int]) -> None:
        """A free cluster for every wanted block, and for the blocks that count those clusters."""
        counts, free = self.walk.counts, 0
        todo = set(wanted)
        while todo:
            index = min(todo)
            todo.remove(index)
            if index not in place:
                free = counts.find_free(free, 1, in_use)
                counts.add(free)
                place[index] = free
                todo.add(free >> self.geometry.refcount_block_bits)

    async def _write_block(self, index: int, offset: int) -> None:
        entries = self.geometry.refcount_block_entries
        raw = pack(self.walk.counts.values(index * entries, entries), self.geometry.refcount_bits)
        await self.file.write(offset, memoryview(raw))

    async def _store_counts(self, clusters: Iterable[int]) -> None:
        """Let the stored refcounts of these clusters be what is counted now."""
        refcounts = self.run.refcounts
        indices = {cluster >> self.geometry.refcount_block_bits for cluster in clusters}
        if any(not refcounts.block_offset(index) for index in indices):
            await self._rebuild_and_recheck_with_counts()
            return
        for index in sorted(indices):
            await self._write_block(index, refcounts.block_offset(index))
        refcounts.forget()
        await self.file.flush()

    async def _rebuild_and_recheck_with_counts(self) -> None:
        """No refcount block counts a cluster that is about to be used: make new structures, which count it already."""
        await self._rebuild()
        self.walk.refcount_structures.clear()
        table = await self.run.read_table(
            self.header.refcount_table_offset, self.header.refcount_table_clusters * self.geometry.cluster_size // ENTRY
        )
        self.run.refcounts.table = table
        self.run.refcounts.forget()

    # -- flags -------------------------------------------------------------------------------------------------------
    async def _fix_copied(self) -> None:
        """COPIED flags after the refcounts; with ``Fix.LEAKS`` alone only if nothing else is wrong."""
        result = self.result
        repairing = self.errors or not (result.check_errors or result.corruptions or result.leaks)
        wrong_l1, wrong_l2 = await self.run.find_wrong_copied(repairing)
        if not repairing:
            return
        if wrong_l1:
            await self._write_l1(wrong_l1)
        for offset in wrong_l2:
            await self._write_l2(offset)
        if wrong_l1 or wrong_l2:
            await self.file.flush()

    async def _write_l1(self, wrong: list[int]) -> None:
        offset = self.header.l1_table_offset
        if not self._claimed_once(offset, 1):
            self.report("ERROR: Could not write L1 table; metadata overlap check failed")
            self.result.check_errors += 1
            return
        table = await self.run.read_table(offset, self.header.l1_size)
        for index in wrong:
            table[index] ^= COPIED
        first, last = min(wrong) * ENTRY // SECTOR * SECTOR, max(wrong) * ENTRY + ENTRY
        await self.file.write(offset + first, memoryview(table_to_bytes(table)[first:last]))
        self.result.corruptions -= len(wrong)
        self.result.corruptions_fixed += len(wrong)

    async def _write_l2(self, offset: int) -> None:
        if not self._claimed_once(offset, self.walk.l2[offset].total):
            self.report("ERROR: Could not write L2 table; metadata overlap check failed")
            self.result.check_errors += 1
            return
        table = await self.run.read_table(offset, self.geometry.cluster_size // ENTRY)
        fixed = 0
        for at in range(0, len(table), self.geometry.l2_entry_size // ENTRY):
            refcount = await self.run.data_refcount(table[at])
            if refcount is not None and (refcount == 1) != bool(table[at] & COPIED):
                table[at] ^= COPIED
                fixed += 1
        await self.file.write(offset, memoryview(table_to_bytes(table)))
        self.result.corruptions -= fixed
        self.result.corruptions_fixed += fixed

    async def _mark_clean(self) -> None:
        if self.header.incompatible & (Incompatible.DIRTY | Incompatible.CORRUPT):
            self.header.incompatible &= ~(Incompatible.DIRTY | Incompatible.CORRUPT)
            await self.put_header()


async def change_refcount_width(file: Writable, bits: int, report: Report = ignore) -> None:
    """Give a version 3 image refcounts of ``bits`` bits each: new structures, then one sector of the header names them and the
    width. Nobody else uses the image meanwhile.

    Raises ImageError if the image is damaged, BlockError, in QEMU's words, if a count does not fit.
    """
    header = await read_header(file, Purpose.CHECK)
    if header.refcount_order == bits.bit_length() - 1:
        return
    run = _Repair(file, header, Fix.ALL, report)
    table = await check_snapshot_table(file, header, CheckResult(), report, repair=False)
    run.run = Check(file, header, table, report)
    run.walk = await run.run.walk()
    if run.walk.rebuild or run.result.corruptions or run.result.check_errors:
        raise ImageError("The image is damaged; repair it first (check -r all)")
    counts = run.walk.counts
    limit = (1 << bits) - 1
    for start, end in counts.used_stretches():
        for cluster in range(start, end):
            if counts.get(cluster) > limit:
                raise BlockError(
                    f"Cannot decrease refcount entry width to {bits} bits: Cluster at offset "
                    f"{cluster << header.cluster_bits:#x} has a refcount of {counts.get(cluster)}"
                )
    header.refcount_order = bits.bit_length() - 1
    run.geometry = header.geometry
    counts.limit = limit
    await run._rebuild()
    after = await check(file, ignore)
    if after.corruptions or after.leaks:
        await repair(file, Fix.ALL, ignore)

"""Making, deleting and applying internal snapshots.

A snapshot is a second L1 table: everything it leads to is counted once more. All requests are drained and all caches written
back while one changes, so that tables are read and written past the caches. The order, each arrow a barrier:

    create   refcounts raised -> COPIED flags cleared -> the snapshot's L1 table, the new snapshot table -> the header names it
    delete   the new snapshot table -> the header names it -> refcounts lowered -> COPIED flags set
    apply    refcounts of the snapshot's clusters raised -> a new active L1 table -> the header names it, and the disk's size, in
             one sector -> refcounts of what was active lowered -> COPIED flags put right

A cut leaves the old or the new snapshots, the old or the new disk; refcounts may be too high (leaks). Refcounts and COPIED flags
cannot change in one write, so version 3 images carry the dirty bit meanwhile: whoever opens one next puts them right. On version
2 a cut may leave flags that ``qemu-img check`` reports; none of them lets a write reach what a snapshot holds.

Source: QEMU ``docs/interop/qcow2.rst``, "Snapshots"; ``block/qcow2-snapshot.c`` for limits and errors.
"""

from __future__ import annotations

import errno
import os
import struct
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from livedisk.emulator.block.driver import Moment
from livedisk.emulator.drivers.qcow2.counts import ClusterCounts
from livedisk.emulator.drivers.qcow2.geometry import (
    COMPRESSED,
    COPIED,
    ENTRY,
    MAX_L1_BYTES,
    MAX_SNAPSHOT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    OFFSET_MASK,
    table_from_bytes,
    table_to_bytes,
)
from livedisk.emulator.drivers.qcow2.header import SIZE_AT, SNAPSHOTS_AT
from livedisk.emulator.drivers.qcow2.overlap import Section
from livedisk.emulator.drivers.qcow2.points import Point
from livedisk.emulator.drivers.qcow2.snapshots import Snapshot
from livedisk.emulator.drivers.qcow2.snapshots import table_to_bytes as snapshots_to_bytes

if TYPE_CHECKING:
    from livedisk.emulator.drivers.qcow2.image import Image

_NO_ICOUNT: Final = 0xFFFF_FFFF_FFFF_FFFF
_ANY_L2: Final = Section.ACTIVE_L2 | Section.INACTIVE_L2


def _refused(number: int) -> OSError:
    return OSError(number, os.strerror(number))


async def create(image: Image, name: str, moment: Moment) -> Snapshot:
    """Keep the disk as it is now. All requests are drained. Raises OSError: ENOTSUP with a data file, EINVAL where a refcount
    would not fit its field, EFBIG beyond the format's limits; then nothing has changed."""
    known = image.snapshots
    if len(known) >= MAX_SNAPSHOTS:
        raise _refused(errno.EFBIG)
    async with settled(image):
        l1 = image.tables.l1[:]
        counts = await _references(image, l1)
        await _check_room(image, counts)
        entry = Snapshot(
            l1_table_offset=0,
            l1_size=len(l1),
            id=str(max((int(one.id) for one in known if one.id.isdigit()), default=0) + 1).encode(),
            name=os.fsencode(name)[:0xFFFF],
            date_sec=moment.seconds,
            date_nsec=moment.nanoseconds,
            vm_clock_nsec=moment.guest_clock,
            vm_state_size_small=0,
            extra=struct.pack(">QQQ", 0, image.size, _NO_ICOUNT),
        )
        if len(snapshots_to_bytes((*known, entry))) > MAX_SNAPSHOT_TABLE_BYTES:
            raise _refused(errno.EFBIG)
        await _add(image, counts, 1)
        await _put_copied_flags(image)
        made = _at(entry, await _write_l1(image, Section.NONE, l1, len(l1)))
        await publish(image, (*known, made))
    return made


def _at(entry: Snapshot, offset: int) -> Snapshot:
    values = {name: getattr(entry, name) for name in Snapshot.__dataclass_fields__}
    return Snapshot(**{**values, "l1_table_offset": offset})


async def delete(image: Image, gone: Snapshot) -> None:
    """Forget a snapshot. All requests are drained. Raises OSError."""
    async with settled(image):
        l1 = await _l1_of(image, gone)
        counts = await _references(image, l1)
        await publish(image, tuple(one for one in image.snapshots if one is not gone))
        await _add(image, counts, -1)
        if gone.l1_table_offset:
            image.allocator.retire(gone.l1_table_offset, image.geometry.round_up(max(gone.l1_size * ENTRY, 1)))
        await _put_copied_flags(image)


async def apply(image: Image, wanted: Snapshot) -> None:
    """Make the disk what it was; what was written since is lost. All requests are drained. Raises OSError."""
    async with settled(image):
        l1 = await _l1_of(image, wanted)
        size = image.size if wanted.disk_size is None else wanted.disk_size
        entries = max(len(l1), image.geometry.l1_entries(size))
        if entries * ENTRY > MAX_L1_BYTES:
            raise _refused(errno.EFBIG)
        counts = await _references(image, l1)
        await _check_room(image, counts)
        l1 = array("Q", (entry & ~COPIED for entry in l1))  # none of its tables is the disk's alone
        before, before_at = image.tables.l1[:], image.tables.l1_offset
        await _add(image, counts, 1)
        offset = await _write_l1(image, Section.NONE, l1, entries)
        await _switch(image, size, l1 + array("Q", bytes(ENTRY * (entries - len(l1)))), offset)
        await _add(image, await _references(image, before), -1)
        if before:
            image.allocator.retire(before_at, image.geometry.round_up(len(before) * ENTRY))
        await _put_copied_flags(image)


async def show(image: Image, wanted: Snapshot) -> None:
    """Read as the disk was; nothing is written. Raises OSError."""
    size = image.size if wanted.disk_size is None else wanted.disk_size
    l1, needed = await _l1_of(image, wanted), image.geometry.l1_entries(size)
    if len(l1) < needed:
        raise _refused(errno.EINVAL)
    image.tables.slices.clear()
    image.tables.adopt(l1, wanted.l1_table_offset)
    image.size = size
    image.node.mapping_changed()


# -- before and after ------------------------------------------------------------------------------------------------------
@asynccontextmanager
async def settled(image: Image) -> AsyncIterator[None]:
    """While inside, nothing is cached but refcounts, and the dirty bit is set. If it is left by an error after the first change
    (``half_changed``) the bit stays: refcounts and flags may disagree, and whoever opens the image next puts them right."""
    if image.storage.has_data_file:
        raise _refused(errno.ENOTSUP)
    image.storage.check_alive()
    await image.writeback.finish()
    image.tables.slices.clear()
    if image.header.version >= 3 and not image.header.dirty:
        await image.set_dirty(dirty=True)
    try:
        yield
    except BaseException:
        image.tables.slices.clear()
        image.allocator.start_over()
        if not image.half_changed:
            await image.finish()
        raise
    image.half_changed = False
    image.tables.slices.clear()
    image.allocator.start_over()
    await image.finish()
    await image.guard_snapshots()
    image.node.mapping_changed()


async def _l1_of(image: Image, snapshot: Snapshot) -> array[int]:
    return table_from_bytes(await image.storage.read(snapshot.l1_table_offset, snapshot.l1_size * ENTRY))


async def _write_l1(image: Image, section: Section, l1: array[int], entries: int) -> int:
    """An L1 table in clusters of its own, durable; its offset."""
    size = image.geometry.cluster_size
    clusters = max(image.geometry.clusters(entries * ENTRY), 1)
    offset = await image.allocator.contiguous(clusters)
    await image.storage.put(Point.SNAPSHOT_L1, section, offset, table_to_bytes(l1).ljust(clusters * size, b"\0"))
    await image.writeback.write_refcounts()
    return offset


async def publish(image: Image, snapshots: tuple[Snapshot, ...]) -> None:
    """Let the header name this table of snapshots; the old one's clusters are free."""
    header, geometry = image.header, image.geometry
    raw, offset = snapshots_to_bytes(snapshots), 0
    if snapshots:
        offset = await image.allocator.contiguous(geometry.clusters(len(raw)))
        await image.storage.put(Point.SNAPSHOT_TABLE, Section.NONE, offset, raw)
        await image.writeback.write_refcounts()
    image.half_changed = True
    where = struct.pack(">IQ", len(snapshots), offset)
    await image.storage.put(Point.SNAPSHOT_SWITCH, Section.MAIN_HEADER, SNAPSHOTS_AT, where)
    await image.storage.barrier()
    old, old_length = header.snapshots_offset, len(snapshots_to_bytes(image.snapshots))
    image.snapshots = snapshots
    header.nb_snapshots, header.snapshots_offset = len(snapshots), offset
    if old_length:
        image.allocator.retire(old, geometry.round_up(old_length))


async def _switch(image: Image, size: int, l1: array[int], offset: int) -> None:
    """Let the header name another L1 table and size, in one sector."""
    between = await image.storage.read(SIZE_AT, 24)
    raw = struct.pack(">Q", size) + bytes(between[8:12]) + struct.pack(">IQ", len(l1), offset)
    await image.storage.put(Point.SNAPSHOT_APPLY, Section.MAIN_HEADER, SIZE_AT, raw)
    await image.storage.barrier()
    header = image.header
    header.size, header.l1_size, header.l1_table_offset = size, len(l1), offset
    image.size = size
    image.tables.adopt(l1, offset)


# -- refcounts -------------------------------------------------------------------------------------------------------------
async def _l2_of(image: Image, offset: int) -> array[int]:
    return table_from_bytes(await image.storage.read(offset, image.geometry.cluster_size))


async def _references(image: Image, l1: array[int]) -> ClusterCounts:
    """How often an L1 table, what it leads to included, refers to each cluster; not to its own."""
    bits = image.geometry.cluster_bits
    counts = ClusterCounts(0, 0xFFFF_FFFF)
    for entry in l1:
        offset = entry & OFFSET_MASK
        if not offset:
            continue
        counts.add(offset >> bits)
        for first, last in _clusters_of(image, await _l2_of(image, offset)):
            for cluster in range(first, last):
                counts.add(cluster)
    return counts


def _clusters_of(image: Image, l2: array[int]) -> Iterator[tuple[int, int]]:
    """The host clusters ``[first, last)`` of each entry of an L2 table that has any."""
    bits, extent = image.geometry.cluster_bits, image.geometry.compressed_extent
    for entry in l2[:: image.tables.words]:
        if entry & COMPRESSED:
            where, length = extent(entry)
            yield where >> bits, ((where + length - 1) >> bits) + 1
        elif entry & OFFSET_MASK:
            cluster = (entry & OFFSET_MASK) >> bits
            yield cluster, cluster + 1


def _ranges(image: Image, counts: ClusterCounts) -> Iterator[tuple[int, int]]:
    """Ranges ``(first cluster, count)``, each described by one refcount block, outside of which nothing is counted."""
    per_block = image.refcounts.per_block
    for start, end in counts.used_stretches():
        while start < min(end, counts.length):
            count = min((start // per_block + 1) * per_block, end, counts.length) - start
            yield start, count
            start += count


async def _check_room(image: Image, counts: ClusterCounts) -> None:
    """Raise EINVAL, as QEMU does, if a refcount is too narrow for one more of each."""
    refcounts = image.refcounts
    for first, count in _ranges(image, counts):
        wanted = counts.values(first, count)
        block = await refcounts.block(first // refcounts.per_block)
        if block is None:
            continue
        for at, (present, more) in enumerate(zip(refcounts.counts(block, first, count), wanted, strict=True)):
            if more and present + more > refcounts.fields.limit:
                raise OSError(errno.EINVAL, f"{os.strerror(errno.EINVAL)}: refcount of cluster {first + at:#x}")


async def _add(image: Image, counts: ClusterCounts, sign: int) -> None:
    """Raise (1) or lower (-1) refcounts by these, durably."""
    image.half_changed = True
    refcounts, punch = image.refcounts, sign < 0 and image.discards.snapshot
    for first, count in _ranges(image, counts):
        change = counts.values(first, count)
        if not any(change):
            continue
        block = await refcounts.block(first // refcounts.per_block)
        free: list[int] = []
        for at, (present, more) in enumerate(
            zip(refcounts.counts(block, first, count) if block is not None else [0] * count, change, strict=True)
        ):
            if not more:
                continue
            if block is None or present + sign * more < 0:
                continue  # the image was damaged before: a check tells, nothing is lost here
            refcounts.change(block, first + at, present + sign * more)
            if present + sign * more == 0:
                free.append(first + at)
        if punch:
            for start, stop in _runs(free):
                await image.allocator.punch(start, stop - start)
        if refcounts.blocks.crowded:
            await image.writeback.write_refcounts()
    await image.writeback.write_refcounts()


def _runs(clusters: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges ``[start, stop)``."""
    start = stop = -1
    for cluster in clusters:
        if cluster != stop:
            if stop > start:
                yield start, stop
            start = cluster
        stop = cluster + 1
    if stop > start:
        yield start, stop


async def _put_copied_flags(image: Image) -> None:
    """Let the active tables say of each cluster whether this image's disk is the only one that refers to it. Durable."""
    tables, step = image.tables, image.tables.words
    bits = image.geometry.cluster_bits
    changed_l1 = False
    for index, entry in enumerate(tables.l1):
        offset = entry & OFFSET_MASK
        if not offset:
            continue
        l2 = await _l2_of(image, offset)
        changed = False
        for at in range(0, len(l2), step):
            word = l2[at]
            if word & COMPRESSED or not word & OFFSET_MASK:
                continue
            flagged = await _flagged(image, word, (word & OFFSET_MASK) >> bits)
            if flagged != word:
                l2[at], changed = flagged, True
        if changed:
            await image.storage.put(Point.L2_TABLE, _ANY_L2, offset, table_to_bytes(l2))
        flagged = await _flagged(image, entry, offset >> bits)
        if flagged != entry:
            tables.l1[index], changed_l1 = flagged, True
    if changed_l1:
        await image.storage.barrier()
        await image.storage.put(Point.L1_TABLE, Section.ACTIVE_L1, tables.l1_offset, table_to_bytes(tables.l1))
    await image.storage.barrier()


async def _flagged(image: Image, entry: int, cluster: int) -> int:
    refcounts = image.refcounts
    block = refcounts.cached(cluster // refcounts.per_block) or await refcounts.block(cluster // refcounts.per_block)
    single = block is not None and refcounts.fields.get(block.data, cluster % refcounts.per_block) == 1
    return entry | COPIED if single else entry & ~COPIED

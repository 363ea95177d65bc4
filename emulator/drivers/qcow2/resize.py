"""A new virtual size, and preallocation of what it adds.

Growing: the L1 table moves to a larger place if it must (written and durable before the header refers to it); what a longer
backing file would show, and what the last cluster held beyond the old end, is zeroed; clusters are preallocated; the new size is
written last. Shrinking: the size first, then what lies beyond it is let go, then the file is cut behind the last used cluster.
A crash in between leaks at most. Source: QEMU ``block/qcow2.c`` (qcow2_co_truncate, preallocate_co).
"""

from __future__ import annotations

import logging
import struct
from array import array
from typing import TYPE_CHECKING

from livedisk.emulator.block.debug import Event
from livedisk.emulator.block.types import Preallocation, ZeroFlags
from livedisk.emulator.drivers.qcow2.geometry import COPIED, MAX_L1_BYTES, OFFSET_MASK, SECTOR, table_to_bytes
from livedisk.emulator.drivers.qcow2.header import L1_AT, SIZE_AT
from livedisk.emulator.drivers.qcow2.overlap import Section
from livedisk.emulator.drivers.qcow2.points import Point
from livedisk.emulator.errors import BlockError

if TYPE_CHECKING:
    from livedisk.emulator.drivers.qcow2.image import Image

log = logging.getLogger(__name__)
_ZEROES = memoryview(bytes(2 << 20))


async def resize(image: Image, size: int, *, exact: bool, prealloc: Preallocation) -> None:
    """Change the virtual size to ``size`` bytes. Raises BlockError in QEMU's words, or OSError."""
    if size % SECTOR:
        raise BlockError(f"The new size must be a multiple of {SECTOR}")
    if image.header.nb_snapshots and image.header.version < 3:
        raise BlockError("Can't resize a v2 image which has snapshots")
    if size < image.size and prealloc is not Preallocation.OFF:
        raise BlockError("Preallocation can't be used for shrinking an image")
    async with image.bitmaps.resizing(size):
        if size < image.size:
            await _shrink(image, size, exact=exact)
        elif size > image.size:
            await _grow(image, size, exact=exact, prealloc=prealloc)


# -- growing ---------------------------------------------------------------------------------------------------------------
async def _grow(image: Image, size: int, *, exact: bool, prealloc: Preallocation) -> None:
    old = image.size
    needed = image.geometry.l1_entries(size)
    if needed * 8 > MAX_L1_BYTES:
        raise BlockError("Failed to grow the L1 table: File too large")
    if needed > len(image.tables.l1):
        await _grow_l1(image, needed)
    await _zero_new_part(image, old, size)
    if image.storage.has_data_file and (exact or size > image.storage.data.node.size):
        mode = prealloc if prealloc is not Preallocation.METADATA else Preallocation.OFF
        await image.storage.data.node.truncate(size, exact=exact, prealloc=mode)
    if prealloc is not Preallocation.OFF:
        await _preallocate(image, old, size, prealloc)
    await image.writeback.run()
    await _put_size(image, size)


async def _grow_l1(image: Image, needed: int) -> None:
    """Move the L1 table to a place with room for ``needed`` entries."""
    tables, allocator, geometry = image.tables, image.allocator, image.geometry
    await image.before_allocation()
    await image.storage.tell(Event.L1_GROW_ALLOC_TABLE)
    clusters = geometry.clusters(needed * 8)
    offset = await allocator.contiguous(clusters)
    async with image.writeback.exclusive():
        on_disk = tables.l1 + array("Q", bytes(8 * (needed - len(tables.l1))))
        for index, before in tables.l1_dirty.items():
            on_disk[index] = before
        raw = table_to_bytes(on_disk).ljust(clusters * geometry.cluster_size, b"\0")
        await image.storage.put(Point.L1_GROW, Section.NONE, offset, raw)
        await image.storage.barrier()
        await image.storage.put(Point.L1_SWITCH, Section.MAIN_HEADER, L1_AT, struct.pack(">IQ", needed, offset))
        await image.storage.barrier()
        old_offset, old_length = tables.l1_offset, len(tables.l1) * 8
        tables.adopt(tables.l1 + array("Q", bytes(8 * (needed - len(tables.l1)))), offset)
        image.header.l1_size, image.header.l1_table_offset = needed, offset
    if old_length:
        allocator.retire(old_offset, geometry.round_up(old_length))


async def _zero_new_part(image: Image, old: int, size: int) -> None:
    """Make what the new range would otherwise show read as zeroes: the rest of the old last cluster, and the backing file."""
    granule = image.geometry.subcluster_size
    edge = min(image.geometry.round_up(old), size)
    at = old
    while at < edge:
        length = min(edge - at, len(_ZEROES))
        if not await image.reads_as_zero(at, length):
            await image.writer.write(at, _ZEROES[:length])
        at += length
    backing = image.node.backing
    if backing is not None and size > edge and backing.node.size > edge:
        end = min(-(-backing.node.size // granule) * granule, -(-size // granule) * granule)
        if end > edge:
            await _zero_over_backing(image, edge, end)


async def _zero_over_backing(image: Image, start: int, end: int) -> None:
    if image.header.version >= 3:
        await image.zeroer.zero_whole(start, end, ZeroFlags.NONE)
        return
    for at in range(start, end, len(_ZEROES)):
        await image.writer.write(at, _ZEROES[: min(len(_ZEROES), end - at)])


async def _put_size(image: Image, size: int) -> None:
    await image.storage.barrier()
    await image.storage.put(Point.SIZE, Section.MAIN_HEADER, SIZE_AT, struct.pack(">Q", size))
    await image.storage.barrier()
    image.header.size = image.size = size


# -- preallocation -----------------------------------------------------------------------------------------------------------
async def _preallocate(image: Image, start: int, end: int, prealloc: Preallocation) -> None:
    """Give every cluster of the range a host cluster that reads as zeroes."""
    tables, size = image.tables, image.geometry.cluster_size
    at, end = image.geometry.round_up(start), image.geometry.round_up(end)
    while at < end:
        await image.before_allocation()
        await tables.own(at)
        if not image.storage.has_data_file:
            await image.allocator.ensure()
        found = tables.cached(at)
        if found is None:
            continue
        table, index = found
        count = min((end - at) // size, tables.slice_entries - index)
        count, host, fresh = _take(image, at, count)
        if count == 0:
            continue
        if not fresh:
            await _zero_host(image, host, count * size)
        for number in range(count):
            place = (index + number) * tables.words
            table.data[place] = (host + number * size) | COPIED
        tables.mark(table, index, count)
        image.node.mapping_changed(at, count * size)
        at += count * size
        if image.writeback.urgent:
            await image.writeback.run()
    if not image.storage.has_data_file and image.allocator.fresh_from > image.storage.file.node.size:
        mode = prealloc if prealloc is not Preallocation.METADATA else Preallocation.OFF
        await image.storage.file.node.truncate(image.allocator.fresh_from, exact=False, prealloc=mode)


def _take(image: Image, at: int, count: int) -> tuple[int, int, bool]:
    """Host clusters for the range: ``(count, host offset, whether they read as zeroes)``."""
    if image.storage.has_data_file:
        return count, at, True
    before = image.allocator.fresh_from
    got = image.allocator.take(count)
    if got is None:
        return 0, 0, False
    return got[1], got[0], got[0] >= before


async def _zero_host(image: Image, offset: int, length: int) -> None:
    await image.storage.check_overlap(offset, length)
    await image.storage.file.node.write_zeroes(offset, length)


# -- shrinking ---------------------------------------------------------------------------------------------------------------
async def _shrink(image: Image, size: int, *, exact: bool) -> None:
    geometry = image.geometry
    old = geometry.round_up(image.size)
    await _put_size(image, size)
    await image.zeroer.drop(geometry.round_up(size), old)
    await image.storage.tell(Event.L1_SHRINK_WRITE_TABLE)
    await image.storage.tell(Event.L1_SHRINK_FREE_L2_CLUSTERS)
    _drop_l2_tables(image, geometry.l1_entries(size))
    await image.writeback.run()
    if image.storage.has_data_file and exact:
        await image.storage.data.node.truncate(size, exact=exact, prealloc=Preallocation.OFF)
    await _cut_file(image)


def _drop_l2_tables(image: Image, keep: int) -> None:
    """Let go of the L2 tables that map nothing of the disk any more."""
    tables = image.tables
    for index in range(keep, len(tables.l1)):
        offset = tables.l1[index] & OFFSET_MASK
        if not offset:
            continue
        tables.l1_dirty.setdefault(index, tables.l1[index])
        tables.l1[index] = 0
        tables.slices.drop(offset, image.geometry.cluster_size)
        image.storage.guard.remove_cluster(Section.ACTIVE_L2, offset)
        image.allocator.retire(offset, image.geometry.cluster_size)


async def _cut_file(image: Image) -> None:
    """Give the end of the file back to the host, where nothing is used. A file that cannot be cut stays long."""
    end = await image.allocator.used_end()
    if end is None or end >= image.storage.file.node.size:
        return
    try:
        await image.storage.file.node.truncate(end, exact=False)
    except (OSError, BlockError) as error:
        log.warning("node '%s': Failed to truncate the tail of the image: %s", image.node.name, error)
        return
    image.allocator.file_cut(end)

"""Writing zeroes and discarding: changes of L2 entries instead of data.

Both work on whole clusters (zeroes: subclusters with extended L2 entries). The node serialises them against every overlapping
request, so no read or write uses a cluster while it is given up. A discarded range reads as zeroes wherever version 3 can say
so: otherwise the backing file would show through again.

A cluster that is given up is punched out of the file (if discards are passed on) before its refcount goes down, so that it is
never allocated again while the punch is under way. Source: QEMU ``block/qcow2-cluster.c`` (zero_in_l2_slice,
discard_in_l2_slice), ``block/qcow2.c`` (qcow2_co_pwrite_zeroes, qcow2_co_pdiscard).
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from livedisk.emulator.block.types import ZeroFlags
from livedisk.emulator.drivers.qcow2.geometry import (
    ALL_SUBCLUSTERS_ZERO,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    ZERO,
)

if TYPE_CHECKING:
    from livedisk.emulator.drivers.qcow2.image import Image

_ZEROES = memoryview(bytes(2 << 20))


class _Change(NamedTuple):
    """What becomes of a cluster: its new entry (and subcluster bits), and whether the storage behind the old one is given up
    (``release``) or kept but punched (``punch``)."""

    entry: int
    bits: int
    release: bool
    punch: bool


_Rule = Callable[[int, int], "_Change | None"]
"""From a cluster's entry and bits to its change; None: nothing to do."""


class Zeroer:
    """Zeroes and discards in one image."""

    def __init__(self, image: Image) -> None:
        self.image = image

    # -- zeroes --------------------------------------------------------------------------------------------------------
    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        """Make a guest range (bytes) read as zeroes. Raises ENOTSUP, having changed nothing, on version 2 images over a backing
        file, and with NO_FALLBACK where a part would have to be written."""
        image = self.image
        if image.header.version < 3 and image.node.backing is not None:
            raise OSError(errno.ENOTSUP, "zero clusters need a version 3 image")
        step = image.geometry.subcluster_size
        end = offset + length
        start, stop = -(-offset // step) * step, end // step * step
        if end >= image.size:
            stop = -(-image.size // step) * step
        ragged: list[tuple[int, int]] = []
        if start != offset:
            if await self._rest_is_zero(offset // step * step, offset, min(end, start), step):
                start -= step
            else:
                ragged.append((offset, min(end, start)))
        if stop < end and stop >= start:
            if await self._rest_is_zero(stop, stop, end, step):
                stop += step
            else:
                ragged.append((stop, end))
        if ragged and flags & ZeroFlags.NO_FALLBACK:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        for low, high in ragged:
            if not await image.reads_as_zero(low, high - low):
                await image.writer.write(low, _ZEROES[: high - low])
        if start < stop:
            await self.zero_whole(start, stop, flags)

    async def _rest_is_zero(self, first: int, low: int, high: int, step: int) -> bool:
        """Whether the (sub)cluster at ``first`` reads as zeroes outside ``[low, high)``: then all of it may be zeroed."""
        image = self.image
        last = min(first + step, max(image.size, high))
        return await image.reads_as_zero(first, low - first) and await image.reads_as_zero(high, last - high)

    async def zero_whole(self, start: int, stop: int, flags: ZeroFlags) -> None:
        """Whole (sub)clusters."""
        image, size = self.image, self.image.geometry.cluster_size
        if image.tables.raw_data:
            end = min(stop, image.storage.data.node.size)
            if end > start:
                await image.storage.data.node.write_zeroes(start, end - start, flags & ~ZeroFlags.NO_FALLBACK)
        if not image.tables.extended:
            await self._change(start, stop, self._zero_rule(flags))
            return
        first, last = -(-start // size) * size, stop // size * size
        if first > last:  # inside one cluster
            await self._zero_subclusters(start, stop)
            return
        if start < first:
            await self._zero_subclusters(start, first)
        if first < last:
            await self._change(first, last, self._zero_rule(flags))
        if last < stop:
            await self._zero_subclusters(last, stop)

    def _zero_rule(self, flags: ZeroFlags) -> _Rule:
        image, tables = self.image, self.image.tables
        if image.header.version < 3:
            return (
                self._discard_rule()
            )  # there is no flag, and what has no storage reads as zeroes without a backing file
        unmap, no_unref = bool(flags & ZeroFlags.MAY_UNMAP), image.discards.no_unref
        zero_flag = 0 if tables.extended else ZERO
        zero_bits = ALL_SUBCLUSTERS_ZERO if tables.extended else 0

        def rule(entry: int, bits: int) -> _Change | None:
            compressed = bool(entry & COMPRESSED)
            drop = compressed or (unmap and tables.has_host(entry))
            keep = no_unref and not compressed
            new = (entry if not drop or keep else 0) | zero_flag
            if (new, zero_bits) == (entry, bits):
                return None
            return _Change(new, zero_bits, release=drop and not keep, punch=drop and keep)

        return rule

    async def _zero_subclusters(self, start: int, stop: int) -> None:
        """Part of one cluster of an image with extended L2 entries."""
        image = self.image
        size, granule = image.geometry.cluster_size, image.geometry.subcluster_size
        cluster = start // size * size
        while True:
            table, index = await image.tables.own(start)
            if not image.writer.claimed(cluster, cluster + size):
                break
            # A write to other subclusters is about to publish what it copied of ours; own() awaited, so look again after.
            await image.writer.settled(cluster, cluster + size)
        if table.data[2 * index] & COMPRESSED:
            await image.writer.write(start, _ZEROES[: stop - start])
            return
        low, high = (start - cluster) // granule, (stop - cluster) // granule
        bits = (1 << high) - (1 << low)
        table.data[2 * index + 1] = (table.data[2 * index + 1] & ~bits) | bits << 32
        image.tables.mark(table, index, 1)
        image.node.mapping_changed(start, stop - start)

    # -- discards ------------------------------------------------------------------------------------------------------
    async def discard(self, offset: int, length: int) -> None:
        """Give up the storage of all whole clusters in a guest range (bytes); a partial one at the image's end is whole."""
        image, size = self.image, self.image.geometry.cluster_size
        if image.header.version < 3 and image.node.backing is not None:
            return  # the backing file would show through
        start, stop = -(-offset // size) * size, (offset + length) // size * size
        if offset + length >= image.size:
            stop = image.geometry.round_up(image.size)
        if start >= stop:
            return
        if image.tables.raw_data:
            await self.zero_whole(start, stop, ZeroFlags.MAY_UNMAP)
        else:
            await self._change(start, stop, self._discard_rule())

    async def drop(self, start: int, stop: int) -> None:
        """Forget whole clusters beyond a new, smaller size: nothing is kept, and the storage is always passed on."""
        image = self.image

        def rule(entry: int, bits: int) -> _Change | None:
            return _Change(0, 0, release=True, punch=False) if entry or bits else None

        await self._change(start, stop, rule, sparse=True)
        image.node.mapping_changed(start, stop - start)

    def _discard_rule(self) -> _Rule:
        image, tables = self.image, self.image.tables
        zero_flag = ZERO if image.header.version >= 3 and not tables.extended else 0
        zero_bits = ALL_SUBCLUSTERS_ZERO if tables.extended else 0
        has_backing = image.node.backing is not None
        no_unref = image.discards.no_unref

        def rule(entry: int, bits: int) -> _Change | None:
            held = bool(entry & COMPRESSED) or tables.has_host(entry)
            if not held and not has_backing:
                return None
            keep = no_unref and not entry & COMPRESSED
            new = (entry if keep else 0) | zero_flag
            if (new, zero_bits) == (entry, bits):
                return None
            return _Change(new, zero_bits, release=held and not keep, punch=held and keep)

        return rule

    # -- changing clusters -----------------------------------------------------------------------------------------------
    async def _change(self, start: int, stop: int, rule: _Rule, *, sparse: bool = False) -> None:
        """Apply a rule to whole clusters. ``sparse``: where there is no L2 table, there is nothing to do."""
        image, tables = self.image, self.image.tables
        size = image.geometry.cluster_size
        while start < stop:
            at = tables.l1[start >> tables.l1_shift] & OFFSET_MASK
            if not at and (sparse or (image.node.backing is None and await self._nothing_changes(rule))):
                start = min(((start >> tables.l1_shift) + 1) << tables.l1_shift, stop)
                continue
            await image.writer.settled(start, stop)
            table, index = await tables.own(start)
            count = min((stop - start) // size, tables.slice_entries - index)
            freed = self._apply(table.data, index, count, rule)
            if freed is not None:
                tables.mark(table, index, count)
                image.node.mapping_changed(start, count * size)
                await self._give_up(freed)
            start += count * size
            if image.writeback.urgent:
                await image.writeback.run()

    async def _nothing_changes(self, rule: _Rule) -> bool:
        """Whether the rule leaves an unallocated cluster alone."""
        return rule(0, 0) is None

    def _apply(self, data: array[int], index: int, count: int, rule: _Rule) -> list[tuple[int, _Change]] | None:
        """Change entries, synchronously; gives the old entries whose storage is concerned, or None where nothing changed."""
        step = self.image.tables.words
        concerned: list[tuple[int, _Change]] = []
        changed = False
        for at in range(index * step, (index + count) * step, step):
            entry = data[at]
            change = rule(entry, data[at + 1] if step == 2 else 0)
            if change is None:
                continue
            changed = True
            data[at] = change.entry
            if step == 2:
                data[at + 1] = change.bits
            if change.release or change.punch:
                concerned.append((entry, change))
        return concerned if changed else None

    async def _give_up(self, concerned: list[tuple[int, _Change]]) -> None:
        """Punch what was this image's alone, in runs; then let go of everything that is released."""
        image, size = self.image, self.image.geometry.cluster_size
        passed_on = image.discards.request
        punches: list[tuple[int, int]] = []
        for entry, _ in concerned if passed_on else ():
            if entry & COMPRESSED or not image.tables.has_host(entry):
                continue
            if not image.storage.has_data_file and not entry & COPIED:
                continue  # somebody else still refers to it
            at = entry & OFFSET_MASK
            if punches and sum(punches[-1]) == at:
                punches[-1] = punches[-1][0], punches[-1][1] + size
            else:
                punches.append((at, size))
        held: list[tuple[int, int]] = []
        try:
            for at, length in punches:
                held = [(at, length // size)]
                if image.storage.has_data_file or image.storage.guard.hit(at, length) is None:
                    await self._punch(at, length)
        except BaseException:  # cancelled: the punch may still be under way
            if not image.storage.has_data_file:
                image.allocator.quarantine += held
            raise
        for entry, change in concerned:
            if change.release:
                image.release(entry, punch=passed_on and not entry & COPIED)

    async def _punch(self, offset: int, length: int) -> None:
        """Pass a discard on; a hint, so that an error of the file below is none of ours."""
        try:
            await self.image.storage.data.node.discard(offset, length)
        except OSError:
            pass

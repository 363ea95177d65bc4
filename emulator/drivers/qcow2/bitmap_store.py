"""One persistent bitmap as its image has it: its table, its clusters, and what the disk says (``disk``).

A bitmap's clusters hold its bits, least significant bit first; its table says where each stands, or that it is all zeroes (0)
or all ones (1). Changes are made cluster by cluster against ``disk``, so that what is the same is not written again.

Invariant: only clusters and tables that this very run allocated are written in place (``owned``). Whatever the image had when
it was opened may be claimed by something else in a damaged image, and must stay as it is until the directory no longer refers
to it: it is replaced, and given to the allocator afterwards (``given_up``).

Source: QEMU ``docs/interop/qcow2.txt``, "Bitmap table", "Bitmap data"; ``block/qcow2-bitmap.c``.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from bitarray import bitarray

from livedisk.emulator.block.bits import add, put, resized, zeros
from livedisk.emulator.drivers.qcow2.bitmap_directory import IN_USE, BitmapEntry, table_entry_valid
from livedisk.emulator.drivers.qcow2.geometry import (
    BITMAP_ALL_ONES,
    ENTRY,
    OFFSET_MASK,
    table_from_bytes,
    table_to_bytes,
)
from livedisk.emulator.drivers.qcow2.overlap import Section
from livedisk.emulator.drivers.qcow2.points import Point
from livedisk.emulator.errors import ImageError

if TYPE_CHECKING:
    from livedisk.emulator.drivers.qcow2.image import Image

_SECTOR: Final = 512
_ENTRIES_A_SECTOR: Final = _SECTOR // ENTRY


class StoredBitmap:
    """A bitmap in the image. Sizes in bits are those of ``disk``; offsets are bytes in the file.

    ``flags``: those of its directory entry, as the disk has it; ``next_flags``: those it is about to get. ``kept``: nothing may
    be changed about it (it is inconsistent): the entry is carried along. ``given_up``: what the disk may still refer to.
    ``unsettled``: bits were put since `settle`, so that the disk may not have, or not refer to, what ``disk`` says.
    """

    def __init__(self, image: Image, entry: BitmapEntry, table: array[int], disk: bitarray) -> None:
        self._image = image
        self._cluster = image.geometry.cluster_size
        self._bits_a_cluster = self._cluster * 8
        self.name = entry.name
        self.granularity_bits = entry.granularity_bits
        self.flags = self.next_flags = entry.flags
        self.kept = False
        self.unsettled = False
        self.disk = disk
        self._carried = entry
        self.given_up: list[tuple[int, int]] = []
        self._table = table
        self._table_offset = entry.table_offset
        self._table_owned = False
        self._owned: set[int] = set()
        self._table_dirty: set[int] = set()

    @classmethod
    def new(cls, image: Image, name: bytes, granularity_bits: int, bits: int) -> StoredBitmap:
        """One that is not in the image yet, with that many clean bits."""
        made = cls(image, BitmapEntry(name, 0, 0, 0, granularity_bits), array("Q"), zeros(0))
        made._resize(bits)
        return made

    @property
    def entry(self) -> BitmapEntry:
        """Its directory entry."""
        if self.kept:
            return self._carried
        return BitmapEntry(self.name, self._table_offset, len(self._table), self.flags, self.granularity_bits)

    @property
    def next_entry(self) -> BitmapEntry:
        """As it will be, with ``next_flags``."""
        return BitmapEntry(self.name, self._table_offset, len(self._table), self.next_flags, self.granularity_bits)

    @property
    def in_use(self) -> bool:
        return bool(self.flags & IN_USE)

    # -- reading -----------------------------------------------------------------------------------------------------
    @classmethod
    async def read(cls, image: Image, entry: BitmapEntry, bits: int) -> StoredBitmap:
        """A bitmap of the image, with its ``bits`` bits. Raises ImageError, in QEMU's words, or OSError."""
        file, size = image.storage.file.node, image.geometry.cluster_size
        if entry.table_offset + entry.table_size * ENTRY > file.size:
            raise ImageError(f"Could not read bitmap_table table from image for bitmap '{entry.title}'")
        table = table_from_bytes(await image.storage.read(entry.table_offset, entry.table_size * ENTRY))
        if not all(table_entry_valid(place, size) for place in table):
            raise ImageError(f"Could not read bitmap_table table from image for bitmap '{entry.title}'")
        # A resize that was cut short leaves a table that is longer than needed, in a bitmap that is in use.
        needed = -(-bits // (size * 8))
        if len(table) != max(needed, 1) and (not entry.flags & IN_USE or len(table) < needed):
            raise ImageError(f"Could not read bitmap '{entry.title}' from image")
        disk = zeros(bits)
        for index, place in enumerate(table[:needed]):
            first, end = index * size * 8, min((index + 1) * size * 8, bits)
            where = place & OFFSET_MASK
            if where:
                if where >= file.size:
                    raise ImageError(f"Could not read bitmap '{entry.title}' from image")
                raw = bitarray(endian="little")
                raw.frombytes(await image.storage.read(where, -(-(end - first) // 8)))
                add(disk, raw, first)
            elif place & BITMAP_ALL_ONES:
                disk[first:end] = 1
        return cls(image, entry, table, disk)

    @classmethod
    async def carry(cls, image: Image, entry: BitmapEntry) -> StoredBitmap:
        """An inconsistent one, of which only the entry and the table matter (to give them up one day). What is not a table is
        left alone."""
        file, size = image.storage.file.node, image.geometry.cluster_size
        table = array("Q")
        if entry.table_offset + entry.table_size * ENTRY <= file.size:
            table = table_from_bytes(await image.storage.read(entry.table_offset, entry.table_size * ENTRY))
            if not all(table_entry_valid(place, size) for place in table):
                table = array("Q")
        made = cls(image, entry, table, zeros(0))
        made.kept = True
        return made

    # -- changing ----------------------------------------------------------------------------------------------------
    def _resize(self, bits: int) -> None:
        """Have room for ``bits`` bits: in memory; the table moves when it is written next."""
        if bits == len(self.disk) and self._table:
            return
        length = max(-(-bits // self._bits_a_cluster), 1)
        self.unsettled = True
        self.disk = resized(self.disk, bits)
        if length == len(self._table):
            return
        self.renew()
        for index in range(length, len(self._table)):
            self._drop(index)
        del self._table[length:]
        self._table.extend([0] * (length - len(self._table)))

    def renew(self) -> None:
        """Write the table anew, elsewhere, the next time."""
        if self._table_offset:
            self.given_up.append((self._table_offset, -(-len(self._table) * ENTRY // self._cluster) * self._cluster))
        self._table_offset, self._table_owned = 0, False
        self._table_dirty.clear()

    def disown(self) -> None:
        """From now on its clusters are not to be written in place: the disk has them as they must stay."""
        self._owned.clear()
        self._table_owned = False

    def claim(self) -> None:
        """Have a table that may be written in place, from the next time that it is written."""
        if not self._table_owned:
            self.renew()

    @property
    def table_pending(self) -> bool:
        """Whether the table must be written before what was put is in the image."""
        return not self.kept and (bool(self._table_dirty) or not self._table_offset)

    def _drop(self, index: int) -> None:
        place = self._table[index] & OFFSET_MASK
        if place:
            self.given_up.append((place, self._cluster))
        self._owned.discard(index)

    def _differing(self, wanted: bitarray) -> Iterator[int]:
        """The clusters whose bits are not those of the disk."""
        for index in range(-(-len(wanted) // self._bits_a_cluster)):
            first, end = index * self._bits_a_cluster, (index + 1) * self._bits_a_cluster
            if wanted[first:end] != self.disk[first:end]:
                yield index

    async def put(self, wanted: bitarray) -> None:
        """Write what differs from the disk. New clusters count only once the table is written. Raises OSError."""
        self._resize(len(wanted))
        for index in list(self._differing(wanted)):
            first = index * self._bits_a_cluster
            end = min(first + self._bits_a_cluster, len(wanted))
            await self._put_cluster(index, first, end, wanted[first:end])

    async def set(self, first: int, end: int) -> None:
        """Set the bits ``[first, end)`` on the disk, as `put` does."""
        at = first
        while at < end:
            index = at // self._bits_a_cluster
            start = index * self._bits_a_cluster
            stop = min(start + self._bits_a_cluster, len(self.disk))
            if self.disk.find(0, at, min(stop, end)) >= 0:
                part = self.disk[start:stop]
                part[at - start : min(stop, end) - start] = 1
                await self._put_cluster(index, start, stop, part)
            at = stop

    async def _put_cluster(self, index: int, first: int, end: int, part: bitarray) -> None:
        image, new = self._image, part.tobytes()
        self.unsettled = True
        place = self._table[index] & OFFSET_MASK
        if index in self._owned:
            low, high = _changed_sectors(self.disk[first:end].tobytes(), new)
            put(self.disk, first, part)
            await image.storage.put(Point.BITMAP_DATA, Section.NONE, place + low, new[low:high])
            return
        offset = 0
        if part.any():
            await image.before_allocation()
            offset = await image.allocator.cluster()
            await image.storage.put(Point.BITMAP_DATA, Section.NONE, offset, new.ljust(self._cluster, b"\0"))
            self._owned.add(index)
        if place:
            self.given_up.append((place, self._cluster))
        self._table[index] = offset
        self._table_dirty.add(index)
        put(self.disk, first, part)

    def drop_empty(self) -> None:
        """Let go of clusters without a set bit; counts once the table is written."""
        for index in sorted(self._owned):
            first = index * self._bits_a_cluster
            if self.disk.find(1, first, first + self._bits_a_cluster) < 0:
                self._drop(index)
                self._table[index] = 0
                self._table_dirty.add(index)

    # -- the table ---------------------------------------------------------------------------------------------------
    async def place_table(self) -> None:
        """Find room for the table, if it must move. Raises OSError."""
        if not self.table_pending or self._table_owned:
            return
        self.renew()
        await self._image.before_allocation()
        clusters = self._image.geometry.clusters(len(self._table) * ENTRY)
        self._table_offset = await self._image.allocator.contiguous(clusters)
        self._table_dirty.update(range(len(self._table)))

    async def put_table(self) -> None:
        """Write what is pending of the table. All refcounts are on stable storage (`Writeback.exclusive`). Raises OSError."""
        if not self.table_pending:
            return
        storage = self._image.storage
        if not self._table_owned:
            raw = table_to_bytes(self._table)
            raw = raw.ljust(-(-len(raw) // self._cluster) * self._cluster, b"\0")
            await storage.put(Point.BITMAP_TABLE, Section.NONE, self._table_offset, raw)
            self._table_owned = True
        else:
            for first in sorted({index // _ENTRIES_A_SECTOR * _ENTRIES_A_SECTOR for index in self._table_dirty}):
                raw = table_to_bytes(self._table[first : first + _ENTRIES_A_SECTOR])
                await storage.put(Point.BITMAP_TABLE, Section.NONE, self._table_offset + first * ENTRY, raw)
        self._table_dirty.clear()

    def give_up_all(self) -> None:
        """It is not in the image any more: everything goes."""
        for index in range(len(self._table)):
            self._drop(index)
        if self._table:
            self.renew()
        self._table = array("Q")

    def settle(self) -> None:
        """What was put is on stable storage, and the disk refers to nothing of what was given up any more."""
        self.unsettled = False
        given_up, self.given_up = self.given_up, []
        for offset, length in given_up:
            self._image.allocator.retire(offset, length)


def _changed_sectors(old: bytes, new: bytes) -> tuple[int, int]:
    """From the first to the last 512-byte sector that differs: bytes ``[low, high)``."""
    differing = [at for at in range(0, len(new), _SECTOR) if old[at : at + _SECTOR] != new[at : at + _SECTOR]]
    if not differing:
        return 0, 0
    return differing[0], min(differing[-1] + _SECTOR, len(new))

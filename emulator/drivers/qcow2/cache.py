"""Cached pieces of metadata tables: L2 slices and refcount blocks, least recently used first out.

A cache holds at most ``limit`` pieces that are clean. Dirty pieces stay until they are written back (the writers watch
`TableCache.crowded` and write back early), and so do pinned ones. Memory is thus bounded by the options, and an insertion
never has to await.

Entries are held as the disk has them in meaning, not in byte order: an L2 slice is an ``array('Q')`` of native words; a
refcount block is the block's own bytes, because its entries may be narrower than a byte.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from typing import Final, Generic, TypeVar

from livedisk.emulator.drivers.qcow2.geometry import table_to_bytes

PAGE: Final = 4096
"""Bytes: dirty ranges are written in whole pages, so that O_DIRECT files need no read-modify-write."""

D = TypeVar("D", "array[int]", bytearray)


class Table(Generic[D]):
    """One cached piece: where it stands in the file (bytes), its content, and the range that the disk does not have yet.

    ``low`` and ``high`` delimit the dirty bytes; ``low >= high`` is clean.
    """

    __slots__ = ("data", "high", "low", "offset", "used")

    def __init__(self, offset: int, data: D) -> None:
        self.offset = offset
        self.data: D = data
        self.low = sys.maxsize
        self.high = 0
        self.used = True

    @property
    def dirty(self) -> bool:
        return self.low < self.high

    @property
    def nbytes(self) -> int:
        return len(self.data) * (8 if isinstance(self.data, array) else 1)


def table_bytes(table: Table[D], low: int, high: int) -> bytes:
    """The bytes ``[low, high)`` of a table, as the disk has them (big endian)."""
    if isinstance(table.data, bytearray):
        return bytes(table.data[low:high])
    return table_to_bytes(table.data[low // 8 : high // 8])


class TableCache(Generic[D]):
    """Pieces of one kind, by their offset in the file.

    ``limit``: clean pieces kept at most. ``dirty``: those with unwritten changes. ``pinned``: offsets that are not dropped.
    ``writing``: pieces on their way to the disk, which does not have them yet: a reload would read the old content.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.dirty: dict[int, Table[D]] = {}
        self.pinned: set[int] = set()
        self.writing: set[int] = set()
        self._tables: OrderedDict[int, Table[D]] = OrderedDict()

    def get(self, offset: int) -> Table[D] | None:
        """The piece at that file offset, if it is in memory."""
        table = self._tables.get(offset)
        if table is not None:
            table.used = True
            self._tables.move_to_end(offset)
        return table

    def insert(self, table: Table[D]) -> Table[D]:
        """Take a piece in, and drop the oldest clean one beyond the limit. A piece that is already there wins."""
        present = self._tables.get(table.offset)
        if present is not None:
            return present
        self._tables[table.offset] = table
        if len(self._tables) > self.limit:
            self.trim()
        return table

    def trim(self) -> None:
        """Drop clean pieces, oldest first, down to the limit."""
        excess = len(self._tables) - self.limit
        if excess <= 0:
            return
        newest = next(reversed(self._tables))
        for offset in list(self._tables):
            if excess <= 0:
                return
            if offset != newest and not self._held(offset):
                del self._tables[offset]
                excess -= 1

    def _held(self, offset: int) -> bool:
        return offset in self.dirty or offset in self.writing or offset in self.pinned

    def mark(self, table: Table[D], low: int, high: int) -> None:
        """The bytes ``[low, high)`` of a piece were changed."""
        if low < table.low:
            table.low = low
        if high > table.high:
            table.high = high
        self.dirty[table.offset] = table

    def take_dirty(self) -> list[tuple[Table[D], int, int, bytes]]:
        """Every dirty piece with its dirty range (in whole pages) and that range's bytes, in file order.

        All are clean thereafter and held as ``writing`` until `written`. If writing fails, `mark` them again.
        """
        taken = []
        for offset in sorted(self.dirty):
            table = self.dirty[offset]
            low = table.low // PAGE * PAGE
            high = min(-(-table.high // PAGE) * PAGE, table.nbytes)
            taken.append((table, low, high, table_bytes(table, low, high)))
            table.low, table.high = sys.maxsize, 0
        self.writing.update(self.dirty)
        self.dirty.clear()
        return taken

    def written(self) -> None:
        """What `take_dirty` gave is on the disk, or marked dirty again. One taker at a time."""
        self.writing.clear()
        self.trim()

    @property
    def crowded(self) -> bool:
        """Whether more is dirty than the cache should hold: time to write back."""
        return len(self.dirty) > self.limit

    def drop(self, offset: int, length: int) -> None:
        """Forget all pieces in a range of the file, dirty or not: their storage is no longer theirs."""
        step = length
        for known in self._tables:
            step = self._tables[known].nbytes
            break
        for at in range(offset, offset + length, step or length):
            self._tables.pop(at, None)
            self.dirty.pop(at, None)

    def drop_unused(self) -> None:
        """Drop clean pieces that were not used since the last call (``cache-clean-interval``)."""
        for offset, table in list(self._tables.items()):
            if not table.used and not self._held(offset):
                del self._tables[offset]
            table.used = False

    def clear(self) -> None:
        """Forget everything. Nothing may be dirty."""
        assert not self.dirty
        assert not self.writing
        self._tables.clear()

    def __len__(self) -> int:
        return len(self._tables)

"""Where persistent dirty bitmaps stand in an image: the bitmap directory and the tables it points to.

Only what a check must know: that every cluster of a bitmap is accounted for. What bitmaps mean is not decided here.

Source: QEMU ``docs/interop/qcow2.txt``, "Bitmaps"; limits and wording from ``block/qcow2-bitmap.c``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from livedisk.emulator.drivers.qcow2.geometry import (
    BITMAP_ALL_ONES,
    BITMAP_TABLE_RESERVED_MASK,
    MAX_BITMAP_NAME,
    MAX_BITMAP_TABLE_ENTRIES,
    OFFSET_MASK,
)
from livedisk.emulator.drivers.qcow2.header import Header, Readable
from livedisk.emulator.errors import ImageError

_ENTRY: Final = struct.Struct(">QIIBBHI")
IN_USE: Final = 1
_KNOWN_FLAGS: Final = 3
_DIRTY_TRACKING: Final = 1
_GRANULARITIES: Final = range(9, 32)
_MAX_BYTES: Final = 0x2000_0000


@dataclass(frozen=True, slots=True)
class BitmapEntry:
    """One bitmap's entry in the directory. Offsets are bytes."""

    name: bytes
    table_offset: int
    table_size: int
    """Entries."""
    flags: int
    granularity_bits: int


async def read_directory(file: Readable, header: Header) -> list[BitmapEntry]:
    """All entries. The header has a bitmaps extension. Raises ImageError, in QEMU's words, if one breaks a rule."""
    extension = header.bitmaps
    assert extension is not None
    if extension.directory_offset + extension.directory_size > file.size:
        raise ImageError("Failed to read bitmap directory")
    raw = bytearray(extension.directory_size)
    await file.read(extension.directory_offset, memoryview(raw))
    found: list[BitmapEntry] = []
    at = 0
    while at < len(raw):
        if at + _ENTRY.size > len(raw):
            raise ImageError("Broken bitmap directory")
        offset, entries, flags, kind, granularity, name_size, extra = _ENTRY.unpack_from(raw, at)
        end = at + _ENTRY.size + extra + name_size
        if end > len(raw):
            raise ImageError("Broken bitmap directory")
        if len(found) == extension.nb_bitmaps:
            raise ImageError("More bitmaps found than specified in header extension")
        if extra:
            raise ImageError("Bitmap extra data is not supported")
        entry = BitmapEntry(bytes(raw[end - name_size : end]), offset, entries, flags, granularity)
        if kind != _DIRTY_TRACKING or not _entry_valid(entry, header):
            raise ImageError(f"Bitmap '{entry.name.decode(errors='replace')}' doesn't satisfy the constraints")
        found.append(entry)
        at = (end + 7) & ~7
    if len(found) != extension.nb_bitmaps:
        raise ImageError("Less bitmaps found than specified in header extension")
    return found


def _entry_valid(entry: BitmapEntry, header: Header) -> bool:
    geometry = header.geometry
    size = entry.table_size * geometry.cluster_size
    return (
        0 < entry.table_size <= MAX_BITMAP_TABLE_ENTRIES
        and entry.table_offset > 0
        and not geometry.into_cluster(entry.table_offset)
        and not entry.flags & ~_KNOWN_FLAGS
        and 0 < len(entry.name) <= MAX_BITMAP_NAME
        and entry.granularity_bits in _GRANULARITIES
        and size <= _MAX_BYTES
        and (bool(entry.flags & IN_USE) or header.virtual_size <= (size * 8) << entry.granularity_bits)
    )


def table_entry_valid(entry: int, cluster_size: int) -> bool:
    """Whether an entry of a bitmap table obeys the specification."""
    offset = entry & OFFSET_MASK
    return not (entry & BITMAP_TABLE_RESERVED_MASK or (offset and (entry & BITMAP_ALL_ONES or offset % cluster_size)))

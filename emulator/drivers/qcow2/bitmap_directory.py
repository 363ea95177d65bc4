"""Where persistent dirty bitmaps stand in an image: the bitmap directory, the tables it points to, and our own extension.

Bytes in, entries out, and back; nothing read here is trusted. What bitmaps mean is not decided here (`bitmaps.py`).

``TrackingExtension`` is a header extension that only this project knows. It says that the first ``trusted`` entries of the
directory are to be believed although they are marked as in use, as long as the autoclear bit `Autoclear.TRACKED` is set, which
every other program clears when it opens the image for writing; and as long as the directory is the one it was written for.

Source: QEMU ``docs/interop/qcow2.txt``, "Bitmaps"; limits and wording from ``block/qcow2-bitmap.c``.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from livedisk.emulator.drivers.qcow2.geometry import (
    BITMAP_ALL_ONES,
    BITMAP_TABLE_RESERVED_MASK,
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAP_NAME,
    MAX_BITMAP_TABLE_ENTRIES,
    OFFSET_MASK,
)
from livedisk.emulator.drivers.qcow2.header import Autoclear, ExtensionType, Header, Readable
from livedisk.emulator.errors import ImageError

_ENTRY: Final = struct.Struct(">QIIBBHI")
_TRACKING: Final = struct.Struct(">IIQIQ")
_TRACKING_VERSION: Final = 2
IN_USE: Final = 1
AUTO: Final = 2
_KNOWN_FLAGS: Final = 3
_DIRTY_TRACKING: Final = 1
GRANULARITIES: Final = range(9, 32)
"""As powers of two."""
MAX_BYTES: Final = 0x2000_0000
"""In one bitmap."""


@dataclass(frozen=True, slots=True)
class BitmapEntry:
    """One bitmap's entry in the directory. Offsets are bytes."""

    name: bytes
    table_offset: int
    table_size: int
    """Entries."""
    flags: int
    granularity_bits: int

    @property
    def title(self) -> str:
        """The name as text."""
        return os.fsdecode(self.name)

    def to_bytes(self) -> bytes:
        """As it stands in the directory, padded."""
        raw = _ENTRY.pack(
            self.table_offset, self.table_size, self.flags, _DIRTY_TRACKING, self.granularity_bits, len(self.name), 0
        )
        raw += self.name
        return raw + bytes(-len(raw) % 8)


def entry_size(name: bytes) -> int:
    """Bytes in the directory."""
    return -(-(_ENTRY.size + len(name)) // 8) * 8


def check_directory_size(names: Iterable[bytes], most: int) -> str | None:
    """What keeps an image from having bitmaps of these names, in QEMU's words. ``most``: how many there may be."""
    sizes = [entry_size(name) for name in names]
    if len(sizes) > most:
        return "Maximum number of persistent bitmaps is already reached"
    if sum(sizes) > MAX_BITMAP_DIRECTORY_BYTES:
        return "Not enough space in the bitmap directory"
    return None


async def read_directory(file: Readable, header: Header) -> list[BitmapEntry]:
    """All entries. The header has a bitmaps extension. Raises ImageError, in QEMU's words, if one breaks a rule."""
    extension = header.bitmaps
    assert extension is not None
    raw = await read_raw(file, header)
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


async def read_raw(file: Readable, header: Header) -> bytearray:
    """The directory as it stands. Raises ImageError if it is not in the file."""
    extension = header.bitmaps
    assert extension is not None
    if not extension.directory_size:
        raise ImageError("Requested bitmap directory size is zero")
    if extension.directory_offset + extension.directory_size > file.size:
        raise ImageError("Failed to read bitmap directory")
    raw = bytearray(extension.directory_size)
    await file.read(extension.directory_offset, memoryview(raw))
    return raw


def mark_all_in_use(raw: bytearray) -> None:
    """Set the flag in every entry of a directory, as far as there are whole ones."""
    at = 0
    while at + _ENTRY.size <= len(raw):
        table, entries, flags, kind, bits, name_size, extra = _ENTRY.unpack_from(raw, at)
        _ENTRY.pack_into(raw, at, table, entries, flags | IN_USE, kind, bits, name_size, extra)
        at += -(-(_ENTRY.size + extra + name_size) // 8) * 8


# -- what only this project knows ----------------------------------------------------------------------------------------
def tracking_extension(trusted: int, offset: int, directory: bytes, identity: int) -> bytes:
    """Our header extension for the directory at ``offset``, in the file of that identity (`Driver.identity`)."""
    return _TRACKING.pack(_TRACKING_VERSION, trusted, offset, zlib.crc32(directory), identity)


def trusted_entries(header: Header, directory: bytes | bytearray, identity: int) -> int:
    """How many entries at the start of the directory may be believed though they are marked as in use; 0 where anything is not
    as this project left it, or where this is a copy: if it was made while the image was in use, its bits may be older than its
    data."""
    extension = header.bitmaps
    if extension is None or not header.autoclear & Autoclear.TRACKED:
        return 0
    known = [one.data for one in header.extensions if one.type == ExtensionType.TRACKING]
    if len(known) != 1 or len(known[0]) != _TRACKING.size:
        return 0
    version, trusted, offset, checksum, written_in = _TRACKING.unpack(known[0])
    same = version == _TRACKING_VERSION and offset == extension.directory_offset and checksum == zlib.crc32(directory)
    if written_in and identity and written_in != identity:
        return 0
    return int(trusted) if same else 0


def _entry_valid(entry: BitmapEntry, header: Header) -> bool:
    geometry = header.geometry
    size = entry.table_size * geometry.cluster_size
    return (
        0 < entry.table_size <= MAX_BITMAP_TABLE_ENTRIES
        and entry.table_offset > 0
        and not geometry.into_cluster(entry.table_offset)
        and not entry.flags & ~_KNOWN_FLAGS
        and 0 < len(entry.name) <= MAX_BITMAP_NAME
        and entry.granularity_bits in GRANULARITIES
        and size <= MAX_BYTES
        and (bool(entry.flags & IN_USE) or header.virtual_size <= (size * 8) << entry.granularity_bits)
    )


def table_entry_valid(entry: int, cluster_size: int) -> bool:
    """Whether an entry of a bitmap table obeys the specification."""
    offset = entry & OFFSET_MASK
    return not (entry & BITMAP_TABLE_RESERVED_MASK or (offset and (entry & BITMAP_ALL_ONES or offset % cluster_size)))

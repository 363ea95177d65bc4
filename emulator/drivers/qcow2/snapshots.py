"""The table of internal snapshots: parsed whole, written back byte for byte.

An internal snapshot is an L1 table of its own; its entry in the table also carries names, times and what later versions of
the format may add (``extra``, kept as it is). Creating, applying and deleting snapshots: `snapshot_change.py`.

Source: QEMU ``docs/interop/qcow2.txt``, "Snapshots"; limits and wording from ``block/qcow2-snapshot.c``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any, Final

from livedisk.emulator.drivers.qcow2.geometry import (
    ENTRY,
    MAX_L1_BYTES,
    MAX_SNAPSHOT_EXTRA,
    MAX_SNAPSHOT_TABLE_BYTES,
)
from livedisk.emulator.drivers.qcow2.header import Header, Readable
from livedisk.emulator.errors import ImageError

_ENTRY: Final = struct.Struct(">QIHHIIQII")
_CHUNK: Final = 1 << 16
V3_EXTRA: Final = 16
"""Bytes of extra data that every entry of a version 3 image must have."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry. Offsets and sizes are bytes; ``extra`` is the entry's extra data as it stands."""

    l1_table_offset: int
    l1_size: int
    """Entries."""
    id: bytes
    name: bytes
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size_small: int
    """The 32-bit field; see `vm_state_size`."""
    extra: bytes

    def _extra_field(self, at: int) -> int | None:
        return int.from_bytes(self.extra[at : at + 8], "big") if len(self.extra) >= at + 8 else None

    @property
    def vm_state_size(self) -> int:
        large = self._extra_field(0)
        return self.vm_state_size_small if large is None else large

    @property
    def disk_size(self) -> int | None:
        """The virtual size when the snapshot was taken, or None where the entry does not say."""
        return self._extra_field(8)

    @property
    def icount(self) -> int | None:
        value = self._extra_field(16)
        return None if value in (None, 0xFFFF_FFFF_FFFF_FFFF) else value

    def to_bytes(self) -> bytes:
        """The entry without the padding after it."""
        fixed = _ENTRY.pack(
            self.l1_table_offset,
            self.l1_size,
            len(self.id),
            len(self.name),
            self.date_sec,
            self.date_nsec,
            self.vm_clock_nsec,
            self.vm_state_size_small,
            len(self.extra),
        )
        return fixed + self.extra + self.id + self.name

    def info(self) -> dict[str, Any]:
        """As QMP's SnapshotInfo."""
        seconds, nanoseconds = divmod(self.vm_clock_nsec, 10**9)
        found: dict[str, Any] = {
            "id": self.id.decode(errors="replace"),
            "name": self.name.decode(errors="replace"),
            "vm-state-size": self.vm_state_size,
            "date-sec": self.date_sec,
            "date-nsec": self.date_nsec,
            "vm-clock-sec": seconds,
            "vm-clock-nsec": nanoseconds,
        }
        if self.icount is not None:
            found["icount"] = self.icount
        return found


@dataclass(frozen=True, slots=True)
class SnapshotTable:
    """All snapshots of an image.

    ``length``: bytes that the table takes in the file. ``dropped`` and ``trimmed`` count what a repair left out: entries past
    the limit of the table's size, and entries whose extra data was too long.
    """

    snapshots: tuple[Snapshot, ...] = ()
    length: int = 0
    dropped: int = 0
    trimmed: int = 0

    def to_bytes(self) -> bytes:
        return table_to_bytes(self.snapshots)


def table_to_bytes(snapshots: tuple[Snapshot, ...]) -> bytes:
    """The table as it stands in the file: each entry padded to 8 bytes, but for the last."""
    raw = bytearray()
    for snapshot in snapshots:
        raw += bytes(-len(raw) % 8)
        raw += snapshot.to_bytes()
    return bytes(raw)


class _Reader:
    """Reads forward through the table, a chunk at a time."""

    def __init__(self, file: Readable, offset: int) -> None:
        self.file = file
        self.offset = offset
        self.at = 0
        self._start = 0
        self._chunk = b""

    async def take(self, length: int) -> bytes:
        """The next bytes."""
        low = self.at - self._start
        if low + length > len(self._chunk):
            await self._fill(max(length, _CHUNK))
            low = 0
        self.at += length
        return self._chunk[low : low + length]

    async def _fill(self, length: int) -> None:
        start = self.offset + self.at
        raw = bytearray(min(length, max(self.file.size - start, 0)))
        if raw:
            await self.file.read(start, memoryview(raw))
        # What lies beyond the end reads as zeroes, as it does for QEMU.
        self._start, self._chunk = self.at, bytes(raw).ljust(length, b"\0")


async def read_snapshots(file: Readable, header: Header, *, repair: bool = False) -> SnapshotTable:
    """Read the table that the header names. The header has been checked.

    Raises ImageError, in QEMU's words, on an entry that breaks a limit; with ``repair`` such entries are cut short or left
    out, and counted.
    """
    reader = _Reader(file, header.snapshots_offset)
    found: list[Snapshot] = []
    length = kept = trimmed = 0
    for index in range(header.nb_snapshots):
        reader.at = (reader.at + 7) & ~7
        snapshot, cut = await _read_entry(reader, index, repair=repair)
        trimmed += cut
        kept = ((kept + 7) & ~7) + len(snapshot.to_bytes())
        if kept > MAX_SNAPSHOT_TABLE_BYTES or reader.at > 0x7FFF_FFFF:
            if not repair:
                raise ImageError(
                    "Snapshot table is too big",
                    hint=f"You can force-remove all {header.nb_snapshots - index} overhanging snapshots with "
                    "qemu-img check -r all",
                )
            return SnapshotTable(tuple(found), length, header.nb_snapshots - index, trimmed)
        length = reader.at
        found.append(snapshot)
    return SnapshotTable(tuple(found), length, 0, trimmed)


async def _read_entry(reader: _Reader, index: int, *, repair: bool) -> tuple[Snapshot, bool]:
    """One entry, and whether its extra data was cut."""
    l1_at, l1_size, id_size, name_size, sec, nsec, clock, state, extra_size = _ENTRY.unpack(
        await reader.take(_ENTRY.size)
    )
    cut = extra_size > MAX_SNAPSHOT_EXTRA
    if cut and not repair:
        raise ImageError(
            f"Too much extra metadata in snapshot table entry {index}",
            hint="You can force-remove this extra metadata with qemu-img check -r all",
        )
    extra = await reader.take(min(extra_size, MAX_SNAPSHOT_EXTRA))
    reader.at += extra_size - len(extra)
    ident = await reader.take(id_size)
    name = await reader.take(name_size)
    return Snapshot(l1_at, l1_size, ident, name, sec, nsec, clock, state, extra), cut


def l1_problem(snapshot: Snapshot, into_cluster: int) -> str | None:
    """What is wrong with where the snapshot's L1 table stands, in QEMU's words, or None. ``into_cluster``: of its offset."""
    who = f"snapshot {snapshot.id.decode(errors='replace')} ({snapshot.name.decode(errors='replace')})"
    if into_cluster:
        return (
            f"{who} l1_offset={snapshot.l1_table_offset:#x}: L1 table is not cluster aligned; "
            "snapshot table entry corrupted"
        )
    if snapshot.l1_size > MAX_L1_BYTES // ENTRY:
        return f"{who} l1_size={snapshot.l1_size:#x}: L1 table is too large; snapshot table entry corrupted"
    return None


def complete(snapshot: Snapshot, disk_size: int) -> Snapshot:
    """The entry with the extra data that version 3 demands."""
    if len(snapshot.extra) >= V3_EXTRA:
        return snapshot
    size = snapshot.disk_size if snapshot.disk_size is not None else disk_size
    return replace(snapshot, extra=struct.pack(">QQ", snapshot.vm_state_size, size))

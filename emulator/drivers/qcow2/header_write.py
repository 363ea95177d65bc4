"""Rewriting the first cluster so that a power cut leaves the old header or the new one, never a mixture.

A disk writes single sectors whole, not clusters. Header extensions and the backing file name mostly reach beyond the first
sector, so a rewrite in one piece could leave a header that points at half a name. Where the first cluster has room, four steps
do it, with a barrier after each::

    1. a copy of the old backing file name goes to the end of the cluster, which nothing uses
    2. the first sector: the old header, but with that copy, and with only those extensions that matter (one sector: atomic)
    3. everything of the new header that lies behind the first sector
    4. the first sector of the new header (atomic), and the copy is wiped

Where it has no room (clusters of 512 bytes need none; 1 KiB and 2 KiB with long names may lack it) the cluster is written in
one piece, as QEMU always does.
"""

from __future__ import annotations

import os

from livedisk.emulator.drivers.qcow2.header import Extension, ExtensionType, Header, Purpose, parse_header
from livedisk.emulator.drivers.qcow2.overlap import Section
from livedisk.emulator.drivers.qcow2.points import Point
from livedisk.emulator.drivers.qcow2.storage import Storage
from livedisk.emulator.errors import ImageError

SECTOR = 512
_PARKED = 1024
"""Bytes for the parked name (1023 at most), whole sectors."""


async def write_header(storage: Storage, header: Header) -> None:
    """Write ``header`` over the first cluster, after all that it refers to, and make it durable.

    Raises OSError: ENOSPC, having written nothing, where it does not fit.
    """
    new = header.cluster()
    old = bytes(await storage.read(0, len(new)))
    await storage.barrier()
    if new[SECTOR:] != old[SECTOR:]:
        park = len(new) - _PARKED
        interim = _interim(old, park)
        if interim is not None and max(len(old.rstrip(b"\0")), len(new.rstrip(b"\0"))) <= park:
            await _around(storage, old, new, park, interim)
            return
        await _put(storage, 0, new)
        return
    await _put(storage, 0, new[:SECTOR])


async def _around(storage: Storage, old: bytes, new: bytes, park: int, interim: bytes) -> None:
    await _put(storage, park, _old_name(old).ljust(_PARKED, b"\0"))
    await _put(storage, 0, interim)
    end = max(len(old.rstrip(b"\0")), len(new.rstrip(b"\0")), SECTOR)
    await _put(storage, SECTOR, new[SECTOR : -(-end // SECTOR) * SECTOR])
    await _put(storage, 0, new[:SECTOR])
    await _put(storage, park, bytes(_PARKED))


async def _put(storage: Storage, offset: int, data: bytes) -> None:
    if data:
        await storage.put(Point.HEADER, Section.MAIN_HEADER, offset, data)
        await storage.barrier()


def _old_name(old: bytes) -> bytes:
    at, length = int.from_bytes(old[8:16], "big"), int.from_bytes(old[16:20], "big")
    return old[at : at + length] if at else b""


def _interim(old: bytes, park: int) -> bytes | None:
    """One sector that says what the old header says, with the backing file name at ``park``; None if it does not fit."""
    if park < SECTOR:
        return None
    try:
        header = parse_header(old, Purpose.CHECK)
    except ImageError:
        return None  # damaged beyond what can be said again: nothing worth keeping in steps
    parts = list(header.extensions)
    if header.bitmaps is not None:
        parts.insert(0, Extension(ExtensionType.BITMAPS, header.bitmaps.to_bytes()))
    if header.has_data_file and header.data_file is not None:
        parts.insert(0, Extension(ExtensionType.DATA_FILE, os.fsencode(header.data_file)))
    if header.backing_format is not None:
        parts.insert(0, Extension(ExtensionType.BACKING_FORMAT, os.fsencode(header.backing_format)))
    raw = header.fixed(park)
    for part in (*parts, Extension(ExtensionType.END, b"")):
        raw += part.type.to_bytes(4, "big") + len(part.data).to_bytes(4, "big") + part.data + bytes(-len(part.data) % 8)
    return raw.ljust(SECTOR, b"\0") if len(raw) <= SECTOR else None

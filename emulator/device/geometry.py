"""Cylinders, heads and sectors for the config space: as given, else from the partition table, else by size.

Source: QEMU ``hw/block/hd-geometry.c`` (guess_disk_lchs, guess_chs_for_size).
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from livedisk.emulator.device.spec import SECTOR

MAX_CYLINDERS: Final = 16383


class Geometry(NamedTuple):
    """Numbers of each; ``sectors`` is a track's."""

    cylinders: int
    heads: int
    sectors: int


def guess(size: int, first_sector: bytes) -> Geometry:
    """The geometry of a disk of ``size`` bytes whose first 512 bytes these are."""
    found = _from_partitions(size // SECTOR, first_sector)
    if found is not None and found.heads <= 16:
        return found
    # No partition table, or one written under a translation, which says nothing of the disk itself.
    cylinders = size // SECTOR // (16 * 63)
    return Geometry(min(max(cylinders, 2), MAX_CYLINDERS), 16, 63)


def _from_partitions(sectors: int, first_sector: bytes) -> Geometry | None:
    if first_sector[510:512] != b"\x55\xaa":
        return None
    for entry in range(0x1BE, 0x1FE, 16):
        end_head, end_sector = first_sector[entry + 5], first_sector[entry + 6] & 63
        (length,) = struct.unpack_from("<I", first_sector, entry + 12)
        if not (length and end_head and end_sector):
            continue
        cylinders = sectors // ((end_head + 1) * end_sector)
        if 1 <= cylinders <= MAX_CYLINDERS:
            return Geometry(cylinders, end_head + 1, end_sector)
    return None

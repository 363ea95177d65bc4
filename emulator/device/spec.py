"""Numbers and layouts of a virtio block device. Source: virtio 1.2, section 5.2 (device type 2). No behaviour here."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

SECTOR_BITS: Final = 9
SECTOR: Final = 512
"""Bytes in the unit of every sector number and of ``capacity``, whatever the logical block size (5.2.4)."""
ID_BYTES: Final = 20
"""Length of the answer to GET_ID: the serial, padded with zero bytes (5.2.6)."""


class RequestType(enum.IntEnum):
    """``type`` in a request's header (5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class Status(enum.IntEnum):
    """The byte that ends every request (5.2.6)."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


class SegmentFlag(enum.IntFlag):
    """``flags`` of a discard or write-zeroes segment (5.2.6). Any other bit is UNSUPP."""

    UNMAP = 1


class Feature(enum.IntEnum):
    """Feature bits (5.2.3; VERSION_1 is 6 in the common part)."""

    SIZE_MAX = 1
    SEG_MAX = 2
    GEOMETRY = 4
    RO = 5
    BLK_SIZE = 6
    FLUSH = 9
    TOPOLOGY = 10
    CONFIG_WCE = 11
    MQ = 12
    DISCARD = 13
    WRITE_ZEROES = 14
    VERSION_1 = 32


SEGMENT: Final = struct.Struct("<QII")
"""One discard or write-zeroes segment: sector, number of sectors, flags."""

_CONFIG: Final = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")


@dataclass(frozen=True, slots=True)
class ConfigSpace:
    """``struct virtio_blk_config`` (5.2.4), field by field; `pack` gives its 60 bytes, little endian, without gaps.

    ``capacity`` and all ``*_sectors`` count 512-byte sectors; ``min_io_size`` and ``opt_io_size`` count logical
    blocks; ``discard_sector_alignment`` sectors.
    """

    capacity: int
    size_max: int
    seg_max: int
    cylinders: int
    heads: int
    sectors: int
    blk_size: int
    physical_block_exp: int
    alignment_offset: int
    min_io_size: int
    opt_io_size: int
    writeback: int
    num_queues: int
    max_discard_sectors: int
    max_discard_seg: int
    discard_sector_alignment: int
    max_write_zeroes_sectors: int
    max_write_zeroes_seg: int
    write_zeroes_may_unmap: int

    def pack(self) -> bytes:
        """The bytes a driver reads."""
        return _CONFIG.pack(
            self.capacity,
            self.size_max,
            self.seg_max,
            self.cylinders,
            self.heads,
            self.sectors,
            self.blk_size,
            self.physical_block_exp,
            self.alignment_offset,
            self.min_io_size,
            self.opt_io_size,
            self.writeback,
            self.num_queues,
            self.max_discard_sectors,
            self.max_discard_seg,
            self.discard_sector_alignment,
            self.max_write_zeroes_sectors,
            self.max_write_zeroes_seg,
            self.write_zeroes_may_unmap,
        )


WRITEBACK_OFFSET: Final = 32
"""Where ``writeback`` stands in the config space: the one byte a driver may write, under CONFIG_WCE (5.2.5.2)."""
CONFIG_BYTES: Final = _CONFIG.size

"""The arithmetic of a qcow2 image: clusters, tables, and what stands in their entries, with the specification's names.

An image is clusters. Guest clusters are found through the L1 table (contiguous, in the header) and L2 tables (one
cluster each); the use of host clusters is counted through the refcount table (contiguous, in the header) and refcount
blocks (one cluster each). Everything here is pure: numbers in, numbers out. All offsets, sizes and spans are bytes.

Source: QEMU ``docs/interop/qcow2.txt``, sections "Host cluster management", "Cluster mapping", "Extended L2 Entries",
"Bitmap table".
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NamedTuple

SECTOR: Final = 512
"""The unit in which the size of compressed data and the virtual size are counted."""
MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
"""QEMU's limit (2 MiB), not the format's."""
ENTRY: Final = 8
"""Bytes in an entry of the L1 table, the refcount table and a bitmap table."""
SUBCLUSTERS: Final = 32
"""Sub-clusters in a cluster when L2 entries are extended."""

MAX_L1_BYTES: Final = 32 << 20
MAX_REFCOUNT_TABLE_BYTES: Final = 8 << 20
MAX_SNAPSHOTS: Final = 65536
MAX_SNAPSHOT_TABLE_BYTES: Final = 1024 * MAX_SNAPSHOTS
MAX_SNAPSHOT_EXTRA: Final = 1024
MAX_BITMAPS: Final = 65535
MAX_BITMAP_DIRECTORY_BYTES: Final = 1024 * MAX_BITMAPS
MAX_BITMAP_TABLE_ENTRIES: Final = 0x8000000
MAX_BITMAP_NAME: Final = 1023

COPIED: Final = 1 << 63
"""L1 and L2 entries: the table or cluster has a refcount of exactly one. Only accurate in the active tables."""
COMPRESSED: Final = 1 << 62
"""L2 entries."""
ZERO: Final = 1
"""Standard L2 entries that are not extended, version 3: the cluster reads as zeroes."""
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
"""The host offset in an L1 entry, a standard L2 entry and a bitmap table entry (bits 9 to 55)."""
L1_RESERVED_MASK: Final = 0x7F00_0000_0000_01FF
L2_RESERVED_MASK: Final = 0x3F00_0000_0000_01FE
"""In a standard entry; with extended L2 entries bit 0 is reserved too."""
REFCOUNT_TABLE_OFFSET_MASK: Final = 0xFFFF_FFFF_FFFF_FE00
REFCOUNT_TABLE_RESERVED_MASK: Final = 0x1FF
BITMAP_TABLE_RESERVED_MASK: Final = 0xFF00_0000_0000_01FE
BITMAP_ALL_ONES: Final = 1

ALL_SUBCLUSTERS_ALLOCATED: Final = 0xFFFF_FFFF
"""An extended entry's bitmap: every sub-cluster holds data. Bit ``n`` is sub-cluster ``n``."""
ALL_SUBCLUSTERS_ZERO: Final = 0xFFFF_FFFF << 32
"""An extended entry's bitmap: every sub-cluster reads as zeroes. Bit ``n + 32`` is sub-cluster ``n``."""


class ClusterType(IntEnum):
    """What the first 64 bits of an L2 entry say of a guest cluster."""

    UNALLOCATED = 0
    ZERO_PLAIN = 1
    """Reads as zeroes; no host cluster."""
    ZERO_ALLOCATED = 2
    """Reads as zeroes; a host cluster is set aside."""
    NORMAL = 3
    COMPRESSED = 4


class CompressedExtent(NamedTuple):
    """Where a compressed cluster's data may stand: the stream ends somewhere before ``offset + length``."""

    offset: int
    length: int
    """To the end of the last 512-byte sector used."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The numbers that follow from a header's cluster_bits, refcount_order and feature bits."""

    cluster_bits: int
    refcount_order: int = 4
    extended_l2: bool = False
    has_data_file: bool = False
    cluster_size: int = field(init=False)
    l2_entry_size: int = field(init=False)
    """8, or 16 with extended L2 entries."""
    l2_bits: int = field(init=False)
    l2_entries: int = field(init=False)
    """Guest clusters that one L2 table maps."""
    l2_span_bits: int = field(init=False)
    l2_span: int = field(init=False)
    """Guest bytes that one L2 table, and so one L1 entry, maps."""
    subcluster_bits: int = field(init=False)
    subcluster_size: int = field(init=False)
    """The cluster size unless L2 entries are extended."""
    refcount_bits: int = field(init=False)
    refcount_max: int = field(init=False)
    refcount_block_bits: int = field(init=False)
    refcount_block_entries: int = field(init=False)
    """Host clusters that one refcount block counts."""
    compressed_shift: int = field(init=False)
    """The specification's x: the width of a compressed descriptor's offset."""
    compressed_sectors_mask: int = field(init=False)
    compressed_offset_mask: int = field(init=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        bits = self.cluster_bits
        put(self, "cluster_size", 1 << bits)
        put(self, "l2_entry_size", 16 if self.extended_l2 else 8)
        put(self, "l2_bits", bits - (4 if self.extended_l2 else 3))
        put(self, "l2_entries", 1 << self.l2_bits)
        put(self, "l2_span_bits", bits + self.l2_bits)
        put(self, "l2_span", 1 << self.l2_span_bits)
        put(self, "subcluster_bits", bits - 5 if self.extended_l2 else bits)
        put(self, "subcluster_size", 1 << self.subcluster_bits)
        put(self, "refcount_bits", 1 << self.refcount_order)
        put(self, "refcount_max", (1 << self.refcount_bits) - 1)
        put(self, "refcount_block_bits", bits + 3 - self.refcount_order)
        put(self, "refcount_block_entries", 1 << self.refcount_block_bits)
        put(self, "compressed_shift", 62 - (bits - 8))
        put(self, "compressed_sectors_mask", (1 << (bits - 8)) - 1)
        put(self, "compressed_offset_mask", (1 << self.compressed_shift) - 1)

    # -- clusters
    def clusters(self, length: int) -> int:
        """How many clusters hold ``length`` bytes."""
        return (length + self.cluster_size - 1) >> self.cluster_bits

    def into_cluster(self, offset: int) -> int:
        """How far into its cluster an offset is; 0 if it is aligned."""
        return offset & (self.cluster_size - 1)

    def round_up(self, length: int) -> int:
        """To whole clusters."""
        return (length + self.cluster_size - 1) & ~(self.cluster_size - 1)

    # -- guest tables
    def l1_entries(self, size: int) -> int:
        """L1 entries that a virtual size needs."""
        return (size + self.l2_span - 1) >> self.l2_span_bits

    def l1_index(self, offset: int) -> int:
        return offset >> self.l2_span_bits

    def l2_index(self, offset: int) -> int:
        return (offset >> self.cluster_bits) & (self.l2_entries - 1)

    def cluster_type(self, entry: int) -> ClusterType:
        """What a (first) L2 word says. With a data file, offset 0 and COPIED is the data file's first cluster."""
        if entry & COMPRESSED:
            return ClusterType.COMPRESSED
        if entry & ZERO and not self.extended_l2:
            return ClusterType.ZERO_ALLOCATED if entry & OFFSET_MASK else ClusterType.ZERO_PLAIN
        if not entry & OFFSET_MASK and not (self.has_data_file and entry & COPIED):
            return ClusterType.UNALLOCATED
        return ClusterType.NORMAL

    def compressed_extent(self, entry: int) -> CompressedExtent:
        """Where the compressed data of an L2 entry stands."""
        offset = entry & self.compressed_offset_mask
        sectors = (entry >> self.compressed_shift & self.compressed_sectors_mask) + 1
        return CompressedExtent(offset, sectors * SECTOR - offset % SECTOR)

    def compressed_entry(self, offset: int, length: int) -> int:
        """The L2 entry for compressed data of ``length`` bytes at ``offset``. Raises OverflowError where it cannot be said."""
        sectors = (offset + length - 1) // SECTOR - offset // SECTOR
        if offset & ~self.compressed_offset_mask or sectors > self.compressed_sectors_mask or offset >> 56:
            raise OverflowError(f"compressed data at {offset:#x} is beyond what an L2 entry can say")
        return COMPRESSED | sectors << self.compressed_shift | offset

    # -- refcounts
    def refcount_position(self, offset: int) -> tuple[int, int]:
        """Index in the refcount table, and in the refcount block, of the host cluster at ``offset``."""
        cluster = offset >> self.cluster_bits
        return cluster >> self.refcount_block_bits, cluster & (self.refcount_block_entries - 1)

    @property
    def refcount_block_span(self) -> int:
        """Host bytes that one refcount block counts."""
        return self.refcount_block_entries << self.cluster_bits


def table_from_bytes(raw: bytes | bytearray | memoryview) -> array[int]:
    """A table of big-endian 64-bit entries as numbers; a partial last entry is left out."""
    table = array("Q", bytes(memoryview(raw)[: len(raw) // ENTRY * ENTRY]))
    if sys.byteorder == "little":
        table.byteswap()
    return table


def table_to_bytes(table: array[int]) -> bytes:
    """The reverse of `table_from_bytes`."""
    if sys.byteorder == "little":
        table = table[:]
        table.byteswap()
    return table.tobytes()

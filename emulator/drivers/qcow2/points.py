"""The names of all metadata writes: where a power cut may fall.

Every write of metadata goes through `Storage.put` with one of these names, and every barrier through `Storage.barrier`. The
crash tests walk this enumeration and cut at each, so that a write which is not named here is never made.

The order that they keep (each arrow is a barrier: what is left of it is on stable storage before what is right of it begins):

    data, refcount blocks -> [refcount table ->] L2 tables -> [L1 table ->] clusters that nothing refers to any more

so that a cluster is owned before anything refers to it, and is free only after nothing on the disk refers to it. A cut leaks at
most. Lazy refcounts leave the second step out, with the dirty bit set before.
"""

from __future__ import annotations

from enum import StrEnum


class Point(StrEnum):
    """One kind of metadata write."""

    DIRTY_BIT = "dirty-bit"
    """The header, with the dirty bit set or cleared (lazy refcounts)."""
    CORRUPT_BIT = "corrupt-bit"
    """The header, with the corrupt bit set."""
    HEADER = "header"
    """The header and its extensions rewritten (backing file, feature bits)."""
    REFCOUNT_BLOCK = "refcount-block"
    REFCOUNT_TABLE = "refcount-table"
    """Entries for new refcount blocks."""
    REFCOUNT_TABLE_GROW = "refcount-table-grow"
    """A whole new refcount table, not yet referred to."""
    REFCOUNT_TABLE_SWITCH = "refcount-table-switch"
    """The header's reference to the refcount table."""
    L2_TABLE = "l2-table"
    L1_TABLE = "l1-table"
    """Entries for new or copied L2 tables."""
    L1_GROW = "l1-grow"
    """A whole new L1 table, not yet referred to."""
    L1_SWITCH = "l1-switch"
    """The header's reference to the L1 table, and with it the virtual size."""
    SIZE = "size"
    """The header's virtual size."""
    BITMAP_DATA = "bitmap-data"
    """Clusters of persistent bitmaps."""
    BITMAP_TABLE = "bitmap-table"
    """Tables of persistent bitmaps: new ones, or entries for new clusters."""
    BITMAP_DIRECTORY = "bitmap-directory"
    """A new directory of persistent bitmaps, not yet referred to (HEADER does that); or the old one, all marked as in use."""
    SNAPSHOT_L1 = "snapshot-l1"
    """A whole L1 table, a snapshot's or one to be applied, not yet referred to."""
    SNAPSHOT_TABLE = "snapshot-table"
    """The whole table of snapshots, not yet referred to."""
    SNAPSHOT_SWITCH = "snapshot-switch"
    """The header's reference to the table of snapshots."""
    SNAPSHOT_APPLY = "snapshot-apply"
    """The header's reference to the L1 table, and the virtual size, when a snapshot is applied."""

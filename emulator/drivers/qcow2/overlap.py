"""What must not be overwritten: where an image's metadata stands, and the check before every write to its file.

A damaged table may claim a cluster that holds metadata. The guard knows the ranges that never move while the image is open, and
the clusters of the active L2 tables and refcount blocks, sorted, so that one binary search answers for a whole run of clusters.
Which sections are checked is the option ``overlap-check`` (default ``cached``). Inactive L2 tables (template ``all``) are read
when the image is opened; they only change with snapshots.

Source: QEMU ``block/qcow2-refcount.c`` (qcow2_check_metadata_overlap), ``qapi/block-core.json`` (Qcow2OverlapCheckFlags).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from enum import IntFlag
from itertools import chain


class Section(IntFlag):
    """A part of the metadata; the values are QEMU's QCOW2_OL_*."""

    NONE = 0
    MAIN_HEADER = 1
    ACTIVE_L1 = 2
    ACTIVE_L2 = 4
    REFCOUNT_TABLE = 8
    REFCOUNT_BLOCK = 16
    SNAPSHOT_TABLE = 32
    INACTIVE_L1 = 64
    INACTIVE_L2 = 128
    BITMAP_DIRECTORY = 256


TEMPLATES: dict[str, Section] = {
    "none": Section.NONE,
    "constant": Section.MAIN_HEADER
    | Section.REFCOUNT_TABLE
    | Section.SNAPSHOT_TABLE
    | Section.BITMAP_DIRECTORY
    | Section.ACTIVE_L1,
    "cached": Section(511) & ~Section.INACTIVE_L2,
    "all": Section(511),
}

_NAMES = {
    Section.MAIN_HEADER: "qcow2_header",
    Section.ACTIVE_L1: "active L1 table",
    Section.ACTIVE_L2: "active L2 table",
    Section.REFCOUNT_TABLE: "refcount table",
    Section.REFCOUNT_BLOCK: "refcount block",
    Section.SNAPSHOT_TABLE: "snapshot table",
    Section.INACTIVE_L1: "inactive L1 table",
    Section.INACTIVE_L2: "inactive L2 table",
    Section.BITMAP_DIRECTORY: "bitmap directory",
}


class OverlapGuard:
    """Where the metadata stands. Offsets and lengths are bytes in the image's file.

    ``checked``: the sections that writes are checked against. With a data file the guest's data cannot overlap; metadata still
    can. Sections are kept as plain numbers here: `hit` runs for every write.
    """

    def __init__(self, cluster_size: int, checked: Section) -> None:
        self._checked = int(checked)
        self._cluster_size = cluster_size
        self._ranges: list[tuple[int, int, int]] = []
        self._clusters: dict[int, array[int]] = {
            int(section): array("Q") for section in (Section.ACTIVE_L2, Section.REFCOUNT_BLOCK, Section.INACTIVE_L2)
        }
        self._all_clusters = array("Q")
        """Those of all sections, checked or not."""

    @property
    def checked(self) -> Section:
        return Section(self._checked)

    @checked.setter
    def checked(self, sections: Section) -> None:
        self._checked = int(sections)

    def set_ranges(self, section: Section, ranges: Iterable[tuple[int, int]]) -> None:
        """Say where a section with a few long ranges stands: ``(offset, length)`` each."""
        number = int(section)
        self._ranges = [known for known in self._ranges if known[0] != number]
        self._ranges += [(number, offset, offset + length) for offset, length in ranges if length]

    def set_clusters(self, section: Section, offsets: Iterable[int]) -> None:
        """Say where a section of single clusters stands (zero offsets are left out)."""
        self._clusters[int(section)] = array("Q", sorted(offset for offset in offsets if offset))
        self._all_clusters = array("Q", sorted(chain.from_iterable(self._clusters.values())))

    def add_cluster(self, section: Section, offset: int) -> None:
        """A new table."""
        for known in (self._clusters[int(section)], self._all_clusters):
            known.insert(bisect_left(known, offset), offset)

    def remove_cluster(self, section: Section, offset: int) -> None:
        """A table is gone."""
        for known in (self._clusters[int(section)], self._all_clusters):
            at = bisect_left(known, offset)
            if at < len(known) and known[at] == offset:
                del known[at]

    def hit(self, offset: int, length: int, but: int = 0) -> str | None:
        """The name of a checked section whose clusters a write to the range would touch, leaving out ``but``; or None."""
        checked = self._checked & ~int(but) if but else self._checked
        mask = self._cluster_size - 1
        end = (offset + length + mask) & ~mask
        offset &= ~mask
        if offset < self._cluster_size and checked & 1:
            return _NAMES[Section.MAIN_HEADER]
        for section, start, stop in self._ranges:
            if start < end and offset < stop and checked & section:
                return _NAMES[Section(section)]
        at = bisect_left(self._all_clusters, offset)
        if at == len(self._all_clusters) or self._all_clusters[at] >= end:
            return None  # nearly always
        for section, known in self._clusters.items():
            if known and checked & section:
                at = bisect_left(known, offset)
                if at < len(known) and known[at] < end:
                    return _NAMES[Section(section)]
        return None

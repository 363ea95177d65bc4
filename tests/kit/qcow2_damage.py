"""Damaging qcow2 images: at random but by seed, where the metadata is; and by hand, entry by entry."""

from __future__ import annotations

import random
import struct

from livedisk.emulator.drivers.qcow2.geometry import OFFSET_MASK
from livedisk.emulator.drivers.qcow2.header import Header, parse_header


class Anatomy:
    """Where the metadata of an image stands. Offsets are bytes."""

    def __init__(self, raw: bytes | bytearray) -> None:
        self.raw = raw
        self.header: Header = parse_header(bytes(raw[: 1 << 21]))
        self.cluster = 1 << self.header.cluster_bits
        self.refcount_table = self.header.refcount_table_offset
        self.blocks = [entry for entry in self.words(self.refcount_table, self.cluster // 8) if entry]
        self.l1 = self.header.l1_table_offset
        self.l2_tables = [entry & OFFSET_MASK for entry in self.words(self.l1, self.header.l1_size) if entry]

    def words(self, offset: int, count: int) -> tuple[int, ...]:
        """Big-endian 64-bit entries."""
        return struct.unpack_from(f">{count}Q", bytes(self.raw), offset)

    def areas(self) -> list[tuple[int, int]]:
        """Every table as ``(offset, length)``, L2 tables more often than others."""
        found = [(self.l1, self.header.l1_size * 8), (self.refcount_table, self.cluster)]
        found += [(block, self.cluster) for block in self.blocks]
        found += [(table, self.cluster) for table in self.l2_tables] * 3
        if self.header.nb_snapshots:
            found.append((self.header.snapshots_offset, 150))
        if self.header.bitmaps is not None:
            found.append((self.header.bitmaps.directory_offset, self.header.bitmaps.directory_size))
        return found

    def used_entries(self, offset: int, length: int) -> list[int]:
        """Places of the entries of a table that are not 0."""
        words = self.words(offset, min(length, len(self.raw) - offset) // 8)
        return [offset + 8 * at for at, word in enumerate(words) if word]


def put(raw: bytearray, offset: int, value: int) -> None:
    """Set one 64-bit entry."""
    struct.pack_into(">Q", raw, offset, value)


def damage(raw: bytearray, seed: int) -> bytearray:
    """The image with one to three entries of its metadata changed, sometimes cut short. ``raw`` is not changed."""
    dice = random.Random(seed)
    anatomy = Anatomy(raw)
    raw = bytearray(raw)
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        offset, length = dice.choice(anatomy.areas())
        used = anatomy.used_entries(offset, length)
        somewhere = offset + dice.randrange(0, max(length, 8)) // 8 * 8
        at = dice.choice(used) if used and dice.random() < 0.7 else somewhere
        if at + 8 > len(raw):
            continue
        old = struct.unpack_from(">Q", raw, at)[0]
        anywhere = dice.randrange(len(raw))
        other_cluster = anywhere // anatomy.cluster * anatomy.cluster
        bits = [old ^ 1 << dice.randrange(64), old ^ 1 << 63, old | 1]
        new = dice.choice(
            [0, *bits, dice.getrandbits(64), old + anatomy.cluster, other_cluster | 1 << 63, anywhere & ~511]
        )
        put(raw, at, new & (1 << 64) - 1)
    if dice.random() < 0.1:
        del raw[dice.randrange(len(raw) // 2, len(raw)) :]
    return raw

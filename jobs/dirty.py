"""What a job still has to copy: a bitmap of granules that guests' writes keep marking."""

from __future__ import annotations

from bitarray import bitarray


class DirtyMap:
    """Granules of ``granularity`` bytes of a disk of ``size`` bytes. A `DirtyTracker`: put it among a node's trackers.

    Memory: one bit a granule.
    """

    def __init__(self, size: int, granularity: int) -> None:
        self.size = size
        self.granularity = granularity
        self._shift = granularity.bit_length() - 1
        self._bits = bitarray(-(-size >> self._shift))
        self._bits.setall(0)
        self._count = 0
        self.marked = 0
        """Bytes marked since the map was made, for a rate."""

    @property
    def dirty(self) -> int:
        """Bytes to be copied; the last granule counts as far as the disk goes."""
        total = self._count << self._shift
        if self._count and self._bits[-1]:
            total -= (len(self._bits) << self._shift) - self.size
        return total

    def mark(self, offset: int, length: int) -> None:
        """The range was changed."""
        if not length:
            return
        self.marked += length
        first, end = offset >> self._shift, -(-(offset + length) >> self._shift)
        if end - first == 1 and end <= len(self._bits):  # nearly every write of a guest
            if not self._bits[first]:
                self._bits[first] = 1
                self._count += 1
            return
        end = min(end, len(self._bits))
        if first < end:
            self._count += end - first - self._bits.count(1, first, end)
            self._bits[first:end] = 1

    def clear(self, offset: int, length: int) -> None:
        """The granules that lie whole in the range are being copied. The disk's last granule may be short."""
        if not length:
            return
        first = -(-offset >> self._shift)
        end = len(self._bits) if offset + length >= self.size else (offset + length) >> self._shift
        if first < end:
            self._count -= self._bits.count(1, first, end)
            self._bits[first:end] = 0

    def any(self, offset: int, length: int) -> bool:
        """Whether a granule that the range touches is dirty."""
        first, end = offset >> self._shift, min(-(-(offset + length) >> self._shift), len(self._bits))
        return length > 0 and first < end and self._bits.find(1, first, end) >= 0

    def next(self, start: int, limit: int) -> tuple[int, int] | None:
        """The first dirty run at or after ``start``, at most ``limit`` bytes (at least a granule): (offset, length)."""
        first = self._bits.find(1, start >> self._shift)
        if first < 0:
            return None
        most = max(limit >> self._shift, 1)
        end = self._bits.find(0, first, min(first + most, len(self._bits)))
        if end < 0:
            end = min(first + most, len(self._bits))
        offset = first << self._shift
        return offset, min(end << self._shift, self.size) - offset

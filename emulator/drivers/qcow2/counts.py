"""How often each host cluster is referred to, counted in memory; and refcount blocks turned into numbers and back.

`ClusterCounts` takes a byte a cluster where clusters are used at all, and nothing where they are not, so that checking a huge,
mostly empty file costs little. A stretch in which something is counted above 254 takes four bytes a cluster.

Refcount blocks are handled whole: `unpack` and `pack` have no loop over entries, whatever the width. Source: QEMU
``docs/interop/qcow2.txt``, "Host cluster management".
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

_STRETCH_BITS: Final = 16
_STRETCH: Final = 1 << _STRETCH_BITS
_TYPES: Final = {16: "H", 32: "I", 64: "Q"}
Values: TypeAlias = "bytes | bytearray | array[int]"


class ClusterCounts:
    """References by cluster index. ``limit``: the largest refcount that the image can say.

    ``length``: clusters known to the check, which is the file's length in clusters or a little more. `get` gives the true count;
    `values`, which is what refcount blocks are compared with and written from, stops at the limit.
    """

    def __init__(self, length: int, limit: int) -> None:
        self.length = length
        self.limit = limit
        self._over_limit = False
        self._stretches: dict[int, bytearray | array[int]] = {}

    def get(self, cluster: int) -> int:
        stretch = self._stretches.get(cluster >> _STRETCH_BITS)
        return stretch[cluster & (_STRETCH - 1)] if stretch is not None else 0

    def add(self, cluster: int, times: int = 1) -> int:
        """Count ``times`` more references (or fewer, if negative). Returns how many of them were past the limit."""
        index = cluster >> _STRETCH_BITS
        stretch = self._stretches.get(index)
        if stretch is None:
            stretch = self._stretches[index] = bytearray(_STRETCH)
        at = cluster & (_STRETCH - 1)
        value = stretch[at] + times
        over = min(max(value - self.limit, 0), max(times, 0))
        self._over_limit = self._over_limit or over > 0
        if value > 254 and isinstance(stretch, bytearray):
            stretch = self._stretches[index] = array("I", list(stretch))
        stretch[at] = min(value, 0xFFFF_FFFF)
        if cluster >= self.length:
            self.length = cluster + 1
        return over

    def values(self, start: int, count: int) -> Values:
        """The counts of ``count`` clusters from ``start`` on."""
        parts: list[bytearray | array[int]] = []
        end = start + count
        wide = False
        while start < end:
            at = start & (_STRETCH - 1)
            step = min(_STRETCH - at, end - start)
            stretch = self._stretches.get(start >> _STRETCH_BITS)
            part = bytearray(step) if stretch is None else stretch[at : at + step]
            if self._over_limit:
                part = self._clamped(part)
            wide = wide or not isinstance(part, bytearray)
            parts.append(part)
            start += step
        if not wide:
            return b"".join(bytes(part) for part in parts)
        joined = array("I")
        for part in parts:
            joined.extend(part)
        return joined

    def _clamped(self, part: bytearray | array[int]) -> bytearray | array[int]:
        if isinstance(part, bytearray):
            return bytearray(min(value, self.limit) for value in part)
        limited = [min(value, self.limit) for value in part]
        return bytearray(limited) if self.limit < 256 else array("I", limited)

    def used_stretches(self) -> Iterator[tuple[int, int]]:
        """Ranges ``[start, end)`` of cluster indices outside of which nothing is counted, in order."""
        for index in sorted(self._stretches):
            yield index << _STRETCH_BITS, (index + 1) << _STRETCH_BITS

    def find_free(self, start: int, run: int = 1, avoid: frozenset[int] | set[int] = frozenset()) -> int:
        """The first cluster from ``start`` on from which ``run`` clusters are not referred to and not in ``avoid``."""
        first = at = start
        while at - first < run:
            stretch = self._stretches.get(at >> _STRETCH_BITS)
            if (stretch is not None and stretch[at & (_STRETCH - 1)]) or at in avoid:
                first = at + 1
            at += 1
        return first


def unpack(raw: bytes, bits: int) -> Values:
    """A refcount block's entries as numbers."""
    if bits == 8:
        return raw
    if bits > 8:
        values = array(_TYPES[bits], raw)
        if sys.byteorder == "little":
            values.byteswap()
        return values
    per_byte, mask = 8 // bits, (1 << bits) - 1
    out = bytearray(len(raw) * per_byte)
    for place in range(per_byte):
        out[place::per_byte] = raw.translate(bytes(byte >> place * bits & mask for byte in range(256)))
    return bytes(out)


def pack(values: Values | Sequence[int], bits: int) -> bytes:
    """The reverse of `unpack`. No value is larger than the width can say."""
    if bits == 8:
        return bytes(values)
    if bits > 8 and isinstance(values, (bytes, bytearray)):
        raw = bytearray(len(values) * (bits // 8))
        raw[bits // 8 - 1 :: bits // 8] = values
        return bytes(raw)
    if bits > 8:
        wide = array(_TYPES[bits], values)
        if sys.byteorder == "little":
            wide.byteswap()
        return wide.tobytes()
    per_byte = 8 // bits
    narrow = bytes(values)
    length = len(narrow) // per_byte
    # The entries of one place in all bytes, shifted at once as one long number: no entry reaches into the next byte.
    word = 0
    for place in range(per_byte):
        word |= int.from_bytes(narrow[place::per_byte], "little") << place * bits
    return word.to_bytes(length, "little")

"""Refcount entries inside a refcount block: 1 to 64 bits wide, searched without a loop over entries.

Entries of 8 bits and more are big endian; narrower ones fill a byte from its least significant bit. Source: QEMU
``docs/interop/qcow2.rst``, "Host cluster management".
"""

from __future__ import annotations

import re
from typing import Final

_NONZERO: Final = re.compile(rb"[^\0]")


class RefcountFields:
    """Reads, writes and searches the entries of a block held as a ``bytearray``.

    ``bits``: width of an entry; ``limit``: largest refcount.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.limit = (1 << bits) - 1
        self._bytes = bits // 8
        self._per_byte = 8 // bits if bits < 8 else 1
        self._mask = self.limit if bits < 8 else 0
        self._has_free = _bytes_with_zero_field(bits) if bits < 8 else _NONZERO

    def get(self, raw: bytearray, index: int) -> int:
        """The refcount at ``index``."""
        size = self._bytes
        if size:
            return int.from_bytes(raw[index * size : index * size + size], "big")
        per = self._per_byte
        return raw[index // per] >> index % per * self.bits & self._mask

    def set(self, raw: bytearray, index: int, value: int) -> None:
        """Set one refcount; ``value`` is in ``0..limit``."""
        size = self._bytes
        if size:
            raw[index * size : index * size + size] = value.to_bytes(size, "big")
            return
        per = self._per_byte
        shift = index % per * self.bits
        raw[index // per] = raw[index // per] & ~(self._mask << shift) | value << shift

    def fill(self, raw: bytearray, index: int, count: int, value: int) -> None:
        """Set ``count`` refcounts from ``index`` on."""
        size = self._bytes
        if size:
            raw[index * size : (index + count) * size] = value.to_bytes(size, "big") * count
            return
        for at in range(index, index + count):
            self.set(raw, at, value)

    def dirty_bytes(self, index: int, count: int) -> tuple[int, int]:
        """The bytes ``[low, high)`` of a block in which these entries stand."""
        return index * self.bits // 8, -(-(index + count) * self.bits // 8)

    def find_free(self, raw: bytearray, start: int) -> int:
        """The first entry from ``start`` on whose refcount is 0; -1 if there is none."""
        if self._bytes:
            return self._find_free_wide(raw, start)
        per = self._per_byte
        while start < len(raw) * per:
            if start % per == 0:
                match = self._has_free.search(raw, start // per)
                if match is None:
                    return -1
                start = max(start, match.start() * per)
            if self.get(raw, start) == 0:
                return start
            start += 1
        return -1

    def _find_free_wide(self, raw: bytearray, start: int) -> int:
        size = self._bytes
        zero = bytes(size)
        at = start * size
        while True:
            at = raw.find(zero, at)
            if at < 0:
                return -1
            aligned = -(-at // size) * size
            if raw[aligned : aligned + size] == zero:
                return aligned // size
            at = aligned + 1 if aligned == at else aligned

    def find_used(self, raw: bytearray, start: int) -> int:
        """The first entry from ``start`` on whose refcount is not 0; the number of entries if there is none."""
        if self._bytes:
            match = _NONZERO.search(raw, start * self._bytes)
            return match.start() // self._bytes if match is not None else len(raw) // self._bytes
        per = self._per_byte
        while start < len(raw) * per:
            if start % per == 0:
                match = _NONZERO.search(raw, start // per)
                if match is None:
                    break
                start = max(start, match.start() * per)
            if self.get(raw, start):
                return start
            start += 1
        return len(raw) * per


def _bytes_with_zero_field(bits: int) -> re.Pattern[bytes]:
    """Matches a byte in which at least one field of that width is zero."""
    mask = (1 << bits) - 1
    found = [value for value in range(256) if any(value >> shift & mask == 0 for shift in range(0, 8, bits))]
    return re.compile(b"[" + b"".join(b"\\x%02x" % value for value in found) + b"]")

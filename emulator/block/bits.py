"""Bit arrays of which only those pages take memory in which a bit was ever set: what dirty bitmaps are made of.

A disk of 1 TiB has 16 Mi granules of 64 KiB, so that a bitmap has 2 MiB, and several are needed for a moment by every command
(what it said before, what the image has, what is being gathered). Nearly all of them are zeroes nearly everywhere. `zeros`
therefore gives large arrays as a mapping of their own, in which the kernel keeps one page of zeroes for all that were never
written; and it goes back to the kernel whole, whatever the allocator would have kept. Everything below looks before it writes.

Invariant: the length of an array is never changed in place (a mapping cannot grow): `resized` makes another one.

Bits are in qcow2's order: least significant first. Lengths, offsets and factors are bits.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Final

from bitarray import bitarray, util

PAGE: Final = 4096 * 8
"""Bits that are looked at, copied and changed as one: a page of memory."""
MAPPED: Final = 16 * PAGE
"""Bits from which on an array is a mapping."""
_FEW: Final = 256
"""Bits up to which a loop is quick enough."""


def zeros(length: int) -> bitarray:
    """That many clean bits. An array that is not a whole number of bytes takes its memory at once, as small ones do."""
    if length < MAPPED or length % 8:
        return util.zeros(length, "little")
    pages = mmap.mmap(-1, length // 8, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    except OSError:
        pass  # a kernel that has no huge pages does not know the advice, nor need it
    return bitarray(buffer=pages, endian="little")


def dirty_pages(bits: bitarray, start: int = 0) -> Iterator[tuple[int, int]]:
    """The pages with a set bit, as ``[first, end)``, from the one on in which ``start`` lies. Pages may be changed meanwhile."""
    at = bits.find(1, start // PAGE * PAGE)
    while at >= 0:
        first = at // PAGE * PAGE
        end = min(first + PAGE, len(bits))
        yield first, end
        at = bits.find(1, end)


def add(target: bitarray, source: bitarray, at: int = 0) -> None:
    """Set in ``target``, from ``at`` on, what is set in ``source``; what goes past its end is left out."""
    for first, end in dirty_pages(source):
        end = min(end, len(target) - at)
        if first >= end:
            return
        target[at + first : at + end] |= source[first:end]


def put(target: bitarray, at: int, source: bitarray) -> None:
    """Make the bits of ``target`` from ``at`` on those of ``source``."""
    for first in range(0, len(source), PAGE):
        page = source[first : first + PAGE]
        if target[at + first : at + first + len(page)] != page:
            target[at + first : at + first + len(page)] = page


def copied(bits: bitarray) -> bitarray:
    """Another array that says the same."""
    return resized(bits, len(bits))


def resized(bits: bitarray, length: int) -> bitarray:
    """Another array of ``length``, that says the same as far as both go, and is clean from there on."""
    made = zeros(length)
    add(made, bits)
    return made


def wipe(bits: bitarray) -> None:
    """Clear every bit."""
    for first, end in dirty_pages(bits):
        bits[first:end] = 0


def add_coarser(target: bitarray, source: bitarray, steps: int) -> None:
    """Set a bit in ``target`` for every ``1 << steps`` bits of ``source`` of which one is set."""
    for first, end in dirty_pages(source):
        if PAGE >> steps == 0:
            target[first >> steps] = 1
        else:
            at = first >> steps
            found = _coarser(source[first:end], steps)
            target[at : at + len(found)] |= found


def add_finer(target: bitarray, source: bitarray, steps: int) -> None:
    """Set ``1 << steps`` bits in ``target`` for every set bit of ``source``; what goes past its end is left out."""
    piece = max(PAGE >> steps, 8)
    for first, end in dirty_pages(source):
        for at in range(first, end, piece):
            part = source[at : min(at + piece, end)]
            if part.any():
                found = _finer(part, steps)
                place = at << steps
                del found[max(len(target) - place, 0) :]
                target[place : place + len(found)] |= found


def _coarser(bits: bitarray, steps: int) -> bitarray:
    length, factor = -(-len(bits) >> steps), 1 << steps
    if length <= _FEW:
        return bitarray((bits.find(1, at << steps, at + 1 << steps) >= 0 for at in range(length)), "little")
    bits.extend(util.zeros((length << steps) - len(bits), "little"))
    if steps < 3:
        found = bits[::factor]
        for plane in range(1, factor):
            found |= bits[plane::factor]
        return found
    raw, stride = bits.tobytes(), factor // 8
    gathered = 0
    for plane in range(stride):
        gathered |= int.from_bytes(raw[plane::stride], "little")
    found = bitarray(endian="little")
    found.pack(gathered.to_bytes(length, "little"))
    return found


def _finer(bits: bitarray, steps: int) -> bitarray:
    factor = 1 << steps
    found = util.zeros(len(bits) << steps, "little")
    if len(bits) <= _FEW:
        for at in bits.search(1):
            found[at << steps : at + 1 << steps] = 1
    elif steps < 3:
        for plane in range(factor):
            found[plane::factor] = bits
    else:
        stride = factor // 8
        raw, every = bytearray(len(bits) * stride), bits.unpack(b"\0", b"\xff")
        for plane in range(stride):
            raw[plane::stride] = every
        found.clear()
        found.frombytes(bytes(raw))
    return found

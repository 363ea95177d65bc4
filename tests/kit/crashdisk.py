"""A disk that loses power: it remembers what was flushed, and by seed keeps or drops every sector that was not.

`Platter` is the medium. Writes are volatile until a flush; `Platter.after_power_cut` gives what a disk might hold if the power
failed now: each 512-byte sector of each unflushed write arrived or did not, independently, so that writes are also torn. The
driver ``crash-disk`` shows a platter as a node. `History` is the model beside it: for each sector the contents that may be found
after a cut.
"""

from __future__ import annotations

import random
from typing import Any

from livedisk.emulator.block.driver import DRIVERS, Driver, register
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.block.types import Kind, Preallocation, Segment, ZeroFlags

SECTOR = 512


class Platter:
    """What a disk holds: ``now`` as a reader sees it, ``durable`` as it was at the last flush, ``pending`` writes since."""

    def __init__(self, content: bytes = b"") -> None:
        self.now = bytearray(content)
        self.durable = bytes(content)
        self.pending: list[tuple[int, bytes]] = []
        self.flushes = 0

    def write(self, offset: int, data: bytes) -> None:
        """A volatile write; the disk grows as needed."""
        if not data:
            return  # in ``pending`` no data means a cut
        end = offset + len(data)
        if end > len(self.now):
            self.now.extend(bytes(end - len(self.now)))
        self.now[offset:end] = data
        self.pending.append((offset, data))

    def cut(self, size: int) -> None:
        """Make the disk ``size`` bytes long."""
        del self.now[size:]
        self.now.extend(bytes(size - len(self.now)))
        self.pending.append((size, b""))

    def flush(self) -> None:
        """Everything is durable."""
        self.durable = bytes(self.now)
        self.pending.clear()
        self.flushes += 1

    def flush_up_to(self, last: tuple[int, bytes] | None) -> None:
        """The pending writes up to and with ``last`` (that very object) are durable; None, or one that is not pending any
        more: nothing changes."""
        count = next((number for number, write in enumerate(self.pending, 1) if write is last), 0)
        durable = bytearray(self.durable)
        for offset, data in self.pending[:count]:
            if not data:
                del durable[offset:]
                durable.extend(bytes(offset - len(durable)))
            else:
                durable.extend(bytes(max(offset + len(data) - len(durable), 0)))
                durable[offset : offset + len(data)] = data
        self.durable = bytes(durable)
        del self.pending[:count]

    def after_power_cut(self, seed: int) -> bytes:
        """One of the contents that the disk might have if the power failed now."""
        chance = random.Random(seed)
        keep = chance.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        left = bytearray(self.durable)
        for offset, data in self.pending:
            if not data and offset < len(left):
                continue  # a cut of the file that did not happen
            for at in range(0, len(data), SECTOR):
                if chance.random() < keep:
                    sector = data[at : at + SECTOR]
                    start = offset + at
                    if start + len(sector) > len(left):
                        left.extend(bytes(start + len(sector) - len(left)))
                    left[start : start + len(sector)] = sector
        return bytes(left)


class CrashDiskOptions(BlockdevOptions, kw_only=True):
    """``platter``: the `Platter` to show."""

    platter: Any


class CrashDisk(Driver):
    """Shows a platter."""

    name = "crash-disk"
    Options = CrashDiskOptions

    async def open(self) -> None:
        self.platter: Platter = self.options.platter

    @property
    def size(self) -> int:
        return len(self.platter.now)

    def map(self, offset: int, length: int) -> Segment:
        return Segment(Kind.OPAQUE, length)

    async def read(self, offset: int, view: memoryview) -> None:
        view[:] = self.platter.now[offset : offset + len(view)]

    async def write(self, offset: int, data: memoryview) -> None:
        self.platter.write(offset, bytes(data))

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        self.platter.write(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        self.platter.write(offset, bytes(max(min(length, self.size - offset), 0)))

    async def flush(self) -> None:
        self.platter.flush()

    async def truncate(self, size: int, *, exact: bool, prealloc: Preallocation) -> None:
        self.platter.cut(size)


if CrashDisk.name not in DRIVERS:
    register(CrashDisk)


class History:
    """What each sector of a guest's disk may hold after a power cut: what was there at the last flush, or anything since."""

    def __init__(self, content: bytes) -> None:
        self.now = bytearray(content)
        self._since: dict[int, set[bytes]] = {}

    def write(self, offset: int, data: bytes) -> None:
        """About to be written (whole sectors)."""
        for at in range(offset // SECTOR, (offset + len(data)) // SECTOR):
            allowed = self._since.setdefault(at, {bytes(self.now[at * SECTOR : (at + 1) * SECTOR])})
            allowed.add(data[at * SECTOR - offset : (at + 1) * SECTOR - offset])
        self.now[offset : offset + len(data)] = data

    def flushed(self) -> None:
        """A flush is done, and no write was made while it ran."""
        self._since.clear()

    def grow(self, size: int) -> None:
        """The disk is longer; the new part reads as zeroes."""
        self.now.extend(bytes(size - len(self.now)))

    def copy(self) -> History:
        """As it is now."""
        twin = History(bytes(self.now))
        twin._since = {at: set(allowed) for at, allowed in self._since.items()}
        return twin

    def wrong(self, found: bytes) -> list[int]:
        """The sectors of ``found`` that could not have come from a power cut now. It may be shorter: a resize is not flushed."""
        bad = []
        for at in range(min(len(self.now), len(found)) // SECTOR):
            sector = found[at * SECTOR : (at + 1) * SECTOR]
            allowed = self._since.get(at)
            if sector != self.now[at * SECTOR : (at + 1) * SECTOR] if allowed is None else sector not in allowed:
                bad.append(at)
        return bad

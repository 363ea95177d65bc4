"""What the sectors of a disk may hold, for clients that overlap each other, vanish, and lose their server.

Every write gets a number, and a sector's content tells its number (zeroes: that of any write of zeroes). `SectorHistory`
keeps for each sector the writes that it may show now and those that it may show after a crash:

* a write may show from when it is issued, and until a write that was issued after its reply is acknowledged;
* a read may give whatever could show at any moment between its request and its reply;
* after a crash a sector may hold what could show when the last acknowledged flush was issued, or anything issued since.

Time is a counter that grows with every request and every reply. Offsets and counts are sectors.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

SECTOR: Final = 512
"""Bytes."""

_CONTENT = struct.Struct("<QQ")
_ZEROES: Final = bytes(SECTOR)
_PENDING: Final = 1 << 62
"""Later than every reply."""


@dataclass(frozen=True)
class Change:
    """A write, or write of zeroes, under way."""

    number: int
    start: int
    count: int


@dataclass(frozen=True)
class Look:
    """A read under way: what each of its sectors could show so far."""

    start: int
    seen: list[set[int]]


@dataclass(frozen=True)
class Flush:
    """A flush under way: when it was issued, and what the sectors that it matters to could show then."""

    issued: int
    shown: dict[int, set[int]]


class Impossible(AssertionError):
    """A sector holds what it cannot."""


class SectorHistory:
    """The possible contents of ``sectors`` sectors, all zero at first."""

    def __init__(self, sectors: int) -> None:
        self.sectors = sectors
        self._clock = 0
        self._zeroes = {0}
        self._shows: list[dict[int, int]] = [{0: 0} for _ in range(sectors)]
        """By sector: the writes that it may show, each with the time of its reply."""
        self._survives: list[set[int]] = [{0} for _ in range(sectors)]
        self._unflushed: set[int] = set()
        self._looks: dict[int, Look] = {}

    # -- requests ------------------------------------------------------------------------------------------------------
    def change(self, start: int, count: int, *, zeroes: bool = False) -> Change:
        """A write is about to be sent."""
        self._clock += 1
        number = self._clock
        if zeroes:
            self._zeroes.add(number)
        end = start + count
        for sector in range(start, end):
            self._shows[sector][number] = _PENDING
            self._survives[sector].add(number)
        self._unflushed.update(range(start, end))
        for look in self._looks.values():
            for sector in range(max(start, look.start), min(end, look.start + len(look.seen))):
                look.seen[sector - look.start].add(number)
        return Change(number, start, count)

    def data(self, change: Change) -> bytes:
        """The bytes of a write."""
        sectors = range(change.start, change.start + change.count)
        return b"".join(_CONTENT.pack(sector, change.number) * (SECTOR // _CONTENT.size) for sector in sectors)

    def done(self, change: Change, *, certain: bool = True, stable: bool = False) -> None:
        """The reply to a write came. Without ``certain`` the write may have had no effect (a discard); ``stable``: it had
        FUA."""
        self._clock += 1
        for sector in range(change.start, change.start + change.count):
            shows = self._shows[sector]
            if certain:
                for known in [known for known, replied in shows.items() if replied < change.number]:
                    del shows[known]
            if change.number in shows:
                shows[change.number] = self._clock
            if stable and shows.keys() == {change.number}:
                self._survives[sector] = {known for known in self._survives[sector] if known >= change.number}

    def look(self, start: int, count: int) -> Look:
        """A read is about to be sent."""
        look = Look(start, [set(self._shows[sector]) for sector in range(start, start + count)])
        self._looks[id(look)] = look
        return look

    def give_up(self, look: Look) -> None:
        """The read will get no reply."""
        del self._looks[id(look)]

    def looked(self, look: Look, data: bytes) -> None:
        """The reply to a read came. Raises `Impossible`."""
        del self._looks[id(look)]
        self.judge(look, data, "read")

    def judge(self, look: Look, data: bytes, when: str) -> None:
        """The data is what could show at some moment of the look. Raises `Impossible`."""
        for index, seen in enumerate(look.seen):
            self._judge(look.start + index, data[index * SECTOR : (index + 1) * SECTOR], seen, when)

    def flush(self) -> Flush:
        """A flush is about to be sent."""
        self._clock += 1
        return Flush(self._clock, {sector: set(self._shows[sector]) for sector in self._unflushed})

    def flushed(self, flush: Flush) -> None:
        """The reply to a flush came."""
        for sector, shown in flush.shown.items():
            later = {known for known in self._survives[sector] if known > flush.issued}
            # Never more than before: another flush may have said more meanwhile.
            self._survives[sector] = (shown & self._survives[sector]) | later
            if not later and len(self._survives[sector]) == 1:
                self._unflushed.discard(sector)

    def grow(self, sectors: int) -> None:
        """There are more sectors now; the new ones are zero."""
        more = sectors - self.sectors
        self.sectors = sectors
        self._shows += [{0: 0} for _ in range(more)]
        self._survives += [{0} for _ in range(more)]

    # -- the end of a process ----------------------------------------------------------------------------------------------
    def ended(self, image: bytes, *, crashed: bool) -> None:
        """The server ended; ``image`` is what its disk holds. From now on that is what it shows. Raises `Impossible`."""
        for sector in range(self.sectors):
            allowed = self._survives[sector] if crashed else set(self._shows[sector])
            found = self._judge(
                sector,
                image[sector * SECTOR : (sector + 1) * SECTOR],
                allowed,
                "after a crash" if crashed else "at the end",
            )
            self._shows[sector] = {found: self._clock}
            self._survives[sector] = {found}
        self._unflushed.clear()
        self._looks.clear()

    def check_crash(self, image: bytes) -> None:
        """What ``image`` holds could be left by a crash now. Raises `Impossible`."""
        for sector in range(self.sectors):
            self._judge(
                sector, image[sector * SECTOR : (sector + 1) * SECTOR], self._survives[sector], "after a power cut"
            )

    def _judge(self, sector: int, content: bytes, allowed: set[int], when: str) -> int:
        """The number of the write that a sector holds. Raises `Impossible` if it is not an allowed one."""
        if content == _ZEROES:
            found = next((known for known in allowed if known in self._zeroes), -1)
        else:
            place, found = _CONTENT.unpack_from(content)
            if place != sector or content != _CONTENT.pack(place, found) * (SECTOR // _CONTENT.size):
                raise Impossible(f"{when}: sector {sector} holds what was never written there: {content[:32].hex()}...")
        if found not in allowed:
            what = "zeroes" if content == _ZEROES else f"write {found}"
            raise Impossible(f"{when}: sector {sector} holds {what}, and may hold {sorted(allowed)}")
        return found

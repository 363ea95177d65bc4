"""What a node looked like at one moment: which clusters are still as they were, and which were copied away since.

The bookkeeping of copy-before-write, without any I/O. A cluster is in one of these states:

    dirty      as it was at the moment; not copied yet          a guest's write must wait until it is copied
    copying    being copied to the target                       likewise
    done       copied; what it was is read from the target      writes pass
    dropped    never wanted, or wanted no more                  writes pass; reads of the moment fail

    dirty ──take──> copying ──copied──> done        dirty ──skip, drop──> dropped        done ──drop──> dropped
      ├──<──failed──┘                     │
      └────────────copied_now─────────────┘

* Nobody but who took a cluster copies it. It is copied once; if that failed, it is dirty again.
* A read of the moment that finds its clusters not done reads the node itself, and has them *frozen* until it is over: a write
  that passed because its cluster was copied meanwhile would change what is being read.
* What the node has grown by since is not of the moment: writes there pass.
* ``broken``, once set, is final: the moment is lost (a copy failed, and the guest's write was more important). Every write
  passes then, but those into frozen ranges still wait for the reads there.

A cluster is *touched* once a write has asked (`touch`): only then do further ones pass without asking. So it is known what was
written, whichever way, as QEMU's queries tell it.

Whatever may change whether a write passes, or where the moment is read, is told to ``changed`` at once, before anybody can
act on the old answer. Memory: five bits a cluster. Source: QEMU ``block/copy-before-write.c`` (access_bitmap, done_bitmap,
frozen_read_reqs), ``block/block-copy.c`` (copy_bitmap, reqs), ``block/reqlist.c``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from bitarray import bitarray


class Held:
    """A range of clusters that somebody copies or reads: bytes, whole clusters."""

    __slots__ = ("_ended", "end", "over", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.over = False
        self._ended: asyncio.Future[None] | None = None

    @property
    def length(self) -> int:
        """Bytes."""
        return self.end - self.start

    async def ended(self) -> None:
        """Wait until it is over."""
        if not self.over:
            if self._ended is None:
                self._ended = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._ended)

    def end_now(self) -> None:
        """Let those who wait go on."""
        self.over = True
        if self._ended is not None:
            self._ended.set_result(None)


class Inaccessible(Exception):
    """A read of the moment where there is nothing to be read (any more)."""


class PointInTime:
    """See the module. ``size``: bytes of the node; ``cluster``: bytes, a power of two. All clusters are dirty at first.

    ``changed(offset, length)`` is called as the module says.
    """

    def __init__(self, size: int, cluster: int, changed: Callable[[int, int], None]) -> None:
        self.size = size
        self.cluster = cluster
        self.broken: OSError | None = None
        self._shift = cluster.bit_length() - 1
        self._count = -(-size >> self._shift)
        self._changed = changed
        self._dirty = bitarray(self._count)
        self._dirty.setall(1)
        self._busy = bitarray(self._count)
        self._done = bitarray(self._count)
        self._touched = bitarray(self._count)
        self._access = bitarray(self._count)
        self._access.setall(1)
        self._busy.setall(0)
        self._done.setall(0)
        self._touched.setall(0)
        self._dirty_count = self._count
        self._copies: list[Held] = []
        self._frozen: list[Held] = []

    # -- counting; whole clusters, so that a short last one counts as a whole ------------------------------------------
    @property
    def dirty(self) -> int:
        """Bytes that are not copied and not being copied."""
        return self._dirty_count << self._shift

    @property
    def copying(self) -> int:
        """Bytes being copied."""
        return sum(self._clusters(copy.start, copy.length) for copy in self._copies) << self._shift

    def counts(self) -> tuple[int, int, int]:
        """Bytes that are dirty, that nobody dropped, that were touched: what QEMU tells of its bitmaps."""
        return self.dirty, self._access.count() << self._shift, self._touched.count() << self._shift

    def _clusters(self, offset: int, length: int) -> int:
        return -(-(offset + length) >> self._shift) - (offset >> self._shift)

    def align(self, offset: int, length: int) -> tuple[int, int]:
        """Start and end (bytes) of the clusters that a range touches; the last one ends where the node does."""
        start = offset >> self._shift << self._shift
        return start, min(-(-(offset + length) >> self._shift) << self._shift, self.size)

    # -- which clusters are wanted -------------------------------------------------------------------------------------
    def want_only(self, runs: Iterable[tuple[int, int]]) -> None:
        """Copy only the clusters that these ranges (offset and length, bytes) touch. Nothing was copied yet."""
        wanted = bitarray(self._count)
        wanted.setall(0)
        for offset, length in runs:
            if length:
                wanted[offset >> self._shift : min(-(-(offset + length) >> self._shift), self._count)] = 1
        self._dirty &= wanted
        self._dirty_count = self._dirty.count()
        self._changed(0, self.size)

    def show_only_wanted(self) -> None:
        """Count what is not wanted as dropped."""
        self._access &= self._dirty
        self._changed(0, self.size)

    def drop(self, offset: int, length: int) -> None:
        """The clusters that lie whole in the range need neither be copied nor read any more. One being copied stays."""
        first, end = self._whole(offset, length)
        if first < end:
            self._dirty_count -= self._dirty.count(1, first, end)
            self._dirty[first:end] = 0
            self._access[first:end] = 0
            self._changed(first << self._shift, (end - first) << self._shift)

    def skip(self, offset: int, length: int) -> None:
        """The dirty ones of the clusters that lie whole in the range need not be copied."""
        first, end = self._whole(offset, length)
        if first < end:
            self._dirty_count -= self._dirty.count(1, first, end)
            self._dirty[first:end] = 0
            self._changed(first << self._shift, (end - first) << self._shift)

    def _whole(self, offset: int, length: int) -> tuple[int, int]:
        end = self._count if offset + length >= self.size else (offset + length) >> self._shift
        return -(-offset >> self._shift), end

    def missing_runs(self) -> Iterable[tuple[int, int]]:
        """What is not copied, or not yet: offset and length, bytes, inside the node."""
        missing = self._dirty | self._busy
        start = 0
        while (start := missing.find(1, start)) >= 0:
            stop = missing.find(0, start)
            stop = self._count if stop < 0 else stop
            yield start << self._shift, min(stop << self._shift, self.size) - (start << self._shift)
            start = stop

    # -- copying -------------------------------------------------------------------------------------------------------
    def next_dirty(self, start: int, end: int, most: int) -> tuple[int, int] | None:
        """The first dirty run in ``[start, end)``: offset and length, at most ``most`` bytes (but a cluster), or None."""
        last = min(-(-end >> self._shift), self._count)
        first = self._dirty.find(1, start >> self._shift, last) if start < end else -1
        if first < 0:
            return None
        last = min(last, first + max(most >> self._shift, 1))
        stop = self._dirty.find(0, first, last)
        stop = last if stop < 0 else stop
        return first << self._shift, min(stop << self._shift, self.size) - (first << self._shift)

    def take(self, offset: int, length: int) -> Held:
        """Begin to copy this part (whole clusters) of a run that `next_dirty` gave; `copied`, `failed` or `dropped` ends it."""
        first, end = offset >> self._shift, -(-(offset + length) >> self._shift)
        self._dirty[first:end] = 0
        self._dirty_count -= end - first
        self._busy[first:end] = 1
        copy = Held(offset, offset + length)
        self._copies.append(copy)
        return copy

    def copied(self, copy: Held) -> None:
        """The target has it."""
        self._done[copy.start >> self._shift : -(-copy.end >> self._shift)] = 1
        self._end(copy)

    def copied_now(self, offset: int, length: int) -> None:
        """The target has a run that `next_dirty` gave: it was copied at once, so that nobody saw it under way."""
        first, end = offset >> self._shift, -(-(offset + length) >> self._shift)
        self._dirty[first:end] = 0
        self._dirty_count -= end - first
        self._done[first:end] = 1
        self._changed(offset, length)

    def failed(self, copy: Held) -> None:
        """The target may have a part of it: it must be copied again."""
        first, end = copy.start >> self._shift, -(-copy.end >> self._shift)
        self._dirty[first:end] = 1
        self._dirty_count += end - first
        self._end(copy)

    def dropped(self, copy: Held) -> None:
        """It turned out not to be wanted."""
        self._end(copy)

    def _end(self, copy: Held) -> None:
        self._busy[copy.start >> self._shift : -(-copy.end >> self._shift)] = 0
        self._copies.remove(copy)
        self._changed(copy.start, copy.length)
        copy.end_now()

    def copy_in(self, start: int, end: int) -> Held | None:
        """A copy under way that touches the range, or None."""
        return next((copy for copy in self._copies if copy.start < end and start < copy.end), None)

    def break_off(self, error: OSError) -> None:
        """The moment is lost. The first error stays."""
        if self.broken is None:
            self.broken = error
            self._changed(0, self.size)

    # -- writes --------------------------------------------------------------------------------------------------------
    def run(self, offset: int, length: int) -> tuple[int, bool]:
        """Of the start of a range: for how many bytes it holds, and whether a write may pass without asking."""
        if offset < self.size:
            length = min(length, (self._count << self._shift) - offset)
        end = offset + length
        if self.broken is None and offset < self.size:
            first, last = offset >> self._shift, -(-end >> self._shift)
            free = bool(self._touched[first] and not self._dirty[first] and not self._busy[first])
            if not free:
                # Until the next one that was touched, at least.
                stop = self._touched.find(1, first + 1, last)
                return (length if stop < 0 else (stop << self._shift) - offset), False
            for bits, other in ((self._touched, 0), (self._dirty, 1), (self._busy, 1)):
                stop = bits.find(other, first, last)
                if stop >= 0:
                    last = stop
            end = min(end, last << self._shift)
        for reader in self._frozen:
            if reader.start <= offset < reader.end:
                return min(end, reader.end) - offset, False
            if offset < reader.start < end:
                end = reader.start
        return end - offset, True

    def passes(self, offset: int, length: int) -> bool:
        """Whether nothing need be copied, or waited for, before a write to the range."""
        if self.broken is None:
            first, last = offset >> self._shift, -(-(offset + length) >> self._shift)
            if last - first == 1 and last <= self._count:  # nearly every write of a guest
                if self._dirty[first] or self._busy[first]:
                    return False
            elif self._dirty.find(1, first, last) >= 0 or self._busy.find(1, first, last) >= 0:
                return False
        return not self._frozen or self._reader_in(offset, offset + length) is None

    def touched(self, offset: int, length: int) -> bool:
        """Whether every cluster of the range was touched before, or need not be."""
        if self.broken is not None or offset >= self.size:
            return True
        first, last = offset >> self._shift, -(-(offset + length) >> self._shift)
        return self._touched.find(0, first, last) < 0

    def touch(self, offset: int, length: int) -> None:
        """A write to the range has asked, and may go."""
        if not self.touched(offset, length):
            start, end = self.align(offset, length)
            self._touched[start >> self._shift : -(-end >> self._shift)] = 1
            self._changed(start, end - start)

    def _reader_in(self, start: int, end: int) -> Held | None:
        return next((reader for reader in self._frozen if reader.start < end and start < reader.end), None)

    async def thawed(self, start: int, end: int) -> None:
        """Wait until no read of the moment depends on the node in this range."""
        while (reader := self._reader_in(start, end)) is not None:
            await reader.ended()

    # -- reads of the moment -------------------------------------------------------------------------------------------
    def place(self, offset: int, length: int) -> tuple[int, bool]:
        """Where the start of a range is to be read: for how many bytes, and whether in the target.

        Raises Inaccessible if the first cluster cannot be read.
        """
        first, last = offset >> self._shift, -(-(offset + length) >> self._shift)
        readable = self._readable(first, last)
        if not readable or not readable[0]:
            raise Inaccessible
        there = bool(self._done[first])
        stop = readable.find(0)
        if stop >= 0:
            last = first + stop
        stop = self._done.find(0 if there else 1, first, last)
        if stop >= 0:
            last = stop
        return min(last << self._shift, offset + length) - offset, there

    def blank(self, offset: int, length: int) -> int:
        """For how many bytes of the start of a range nothing can be read."""
        first, last = offset >> self._shift, -(-(offset + length) >> self._shift)
        stop = self._readable(first, last).find(1)
        return length if stop < 0 else max((first + stop << self._shift) - offset, 0)

    def _readable(self, first: int, last: int) -> bitarray:
        """Of each cluster of a range whether the moment is known there; empty if it is lost."""
        if self.broken is not None:
            return bitarray()
        known = self._dirty[first:last]
        known |= self._busy[first:last]
        known |= self._done[first:last]
        known &= self._access[first:last]
        return known

    @asynccontextmanager
    async def frozen(self, offset: int, length: int) -> AsyncIterator[None]:
        """While inside, no write passes into the clusters of the range: for a read of the node in the place of the target."""
        reader = Held(*self.align(offset, length))
        self._frozen.append(reader)
        try:
            yield
        finally:
            self._frozen.remove(reader)
            self._changed(reader.start, reader.length)
            reader.end_now()

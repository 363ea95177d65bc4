"""The persistent dirty bitmaps of an open image: loaded, tracked so that a crash loses nothing, and stored.

The format, and QEMU, know two states of a bitmap on the disk: *exact*, or *in use*, which means that a program has it open and
that it is worthless if that program dies. Here a third stands behind the second: *tracked*. A tracked bitmap is in use for
everybody else, but what the disk says of it is never too clean:

* The disk is divided into *regions* (`region_size`: 2 to 64 MiB). Before the first write to a region, all bits of the region are
  set on the disk, in every tracked bitmap, and are on stable storage. The region is then *marked*, and writes to it cost nothing
  more: they are recorded in memory alone, on the fast path too (`guard` says which regions it may write to).
* A region that was not written to for `TIDY_SECONDS` is brought back to the exact bits, when a flush comes by. Marks are
  therefore first made *soft*: a write to a soft region only takes the mark up again, without touching the disk.
* So for every region: marked or soft: the disk has ones; else: the disk has what memory has. After a crash the regions that were
  being written are dirty as a whole, and all else is exact.

Why the image stays what it should be to others: bits stand in the bitmap's own clusters, and these are referred to by its own
table, so that a check finds nothing odd. The first change marks the bitmaps as in use, and a header extension of our own beside
an autoclear bit of our own say that they are tracked (`bitmap_directory.py`). Whoever opens the image for writing without knowing
the bit clears it; the bitmaps are inconsistent from then on, to us too. That is as it must be: that writer recorded nothing.

A bitmap tells what differs from the moment at which it began. So that moment must survive, too: before the disk says less than
it did (a bitmap was added or cleared, a backup has taken what it said), all that was written until then is on stable storage.

A bitmap that does not record (it is disabled) is exact on the disk at all times, and nothing has to be marked for it.

Changes of the set of bitmaps, or of one that is exact, go through `_publish`: clusters and tables to places that nothing refers
to, a new directory, then the header, which switches from the old directory to the new one in one sector. Order of writes, with
a barrier at each arrow::

    bitmap data -> refcounts -> bitmap tables, bitmap directory -> header -> what was replaced is given up
    bits of a region (-> refcounts -> table entries of new clusters) -> the guest's write

If the disk refuses a mark (no space), the guest's write goes on and the tracking ends instead (`_give_up`): our autoclear bit
goes first, so that the bitmaps are what they are with every other program, inconsistent if we die now, and stored if we close.

While an image is resized all its bitmaps are in use and tracked, with tables for the larger of both sizes. An image
of no size has none that is exact: neither QEMU nor anybody could read it.

Source: QEMU ``docs/interop/qcow2.txt``, "Bitmaps extension"; refusals from ``block/qcow2-bitmap.c``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from enum import Enum
from typing import TYPE_CHECKING, Final

from bitarray import bitarray

from livedisk.emulator.block.bitmaps import DirtyBitmap
from livedisk.emulator.block.bits import add, copied, resized, zeros
from livedisk.emulator.drivers.qcow2.bitmap_directory import (
    AUTO,
    GRANULARITIES,
    IN_USE,
    MAX_BYTES,
    BitmapEntry,
    check_directory_size,
    mark_all_in_use,
    read_directory,
    read_raw,
    tracking_extension,
    trusted_entries,
)
from livedisk.emulator.drivers.qcow2.bitmap_store import StoredBitmap
from livedisk.emulator.drivers.qcow2.geometry import MAX_BITMAP_NAME, MAX_BITMAP_TABLE_ENTRIES, MAX_BITMAPS
from livedisk.emulator.drivers.qcow2.header import AUTOCLEAR_AT, Autoclear, BitmapsExtension, Extension, ExtensionType
from livedisk.emulator.drivers.qcow2.overlap import Section
from livedisk.emulator.drivers.qcow2.points import Point
from livedisk.emulator.errors import BlockError, ImageError

if TYPE_CHECKING:
    from livedisk.emulator.drivers.qcow2.image import Image

log = logging.getLogger(__name__)

MIN_REGION: Final = 2 << 20
"""No less than a cluster."""
MAX_REGION: Final = 64 << 20
REGIONS: Final = 4096
"""Up to `MAX_REGION` a region, so many a disk."""
AHEAD: Final = 4
"""Regions marked at once where writes come in order."""
TIDY_SECONDS: Final = 30.0


def region_size(size: int) -> int:
    """Bytes of a region of a disk of ``size`` bytes."""
    return min(max(1 << (-(-size // REGIONS) - 1).bit_length(), MIN_REGION), MAX_REGION)


class _Mode(Enum):
    """Which bitmaps a directory marks as in use."""

    EXACT = "none"
    TRACKED = "those that record"
    RESIZING = "all"


class PersistentBitmaps:
    """The persistent bitmaps of one image, in memory those of its node.

    ``guard``: None where nothing is tracked, or for each region (``1 << region_shift`` bytes) whether it may be written to
    without asking (`before_change`).
    """

    def __init__(self, image: Image) -> None:
        self._image = image
        self.guard: bitarray | None = None
        self.region_shift = region_size(image.size).bit_length() - 1
        self._soft = zeros(0)
        self._asked = zeros(0)
        self._stored: dict[bytes, StoredBitmap] = {}
        self._tracking: frozenset[bytes] = frozenset()
        self._published = False
        self._hopeless = False
        self._lock = asyncio.Lock()
        self._tidied = 0.0

    # -- opening -----------------------------------------------------------------------------------------------------
    async def load(self) -> None:
        """Make the image's bitmaps bitmaps of its node. Raises ImageError, in QEMU's words, or OSError."""
        image, node = self._image, self._image.node
        if image.header.bitmaps is None:
            return
        file = image.storage.file.node
        entries = await read_directory(file, image.header)
        trusted = trusted_entries(image.header, await read_raw(file, image.header), file.driver.identity())
        for number, entry in enumerate(entries):
            bits = -(-image.size >> entry.granularity_bits)
            believed = not entry.flags & IN_USE or number < trusted
            stored: StoredBitmap | None = None
            if believed:
                try:
                    stored = await StoredBitmap.read(image, entry, bits)
                except ImageError:
                    if not entry.flags & IN_USE:
                        raise
                    believed = False
            if stored is None:
                stored = await StoredBitmap.carry(image, entry)
            try:
                bitmap = node.bitmaps.create(1 << entry.granularity_bits, entry.title, disabled=True)
            except BlockError as error:
                raise ImageError(str(error)) from None
            if believed:
                bitmap.adopt(stored.disk)
            bitmap.persistent, bitmap.inconsistent, bitmap.read_only = True, not believed, node.read_only
            self._stored[entry.name] = stored
            if believed and entry.flags & AUTO:
                bitmap.enable()

    def entries(self) -> list[BitmapEntry]:
        """The directory as the disk has it."""
        return [stored.entry for stored in self._stored.values()]

    # -- what there is -----------------------------------------------------------------------------------------------
    def _bitmaps(self) -> dict[bytes, DirtyBitmap]:
        """The bitmaps that the image should have, by name, the oldest first."""
        found = {one.name: one for one in self._image.node.bitmaps if one.persistent and not one.removing}
        return {os.fsencode(name): one for name, one in reversed(found.items()) if name is not None}

    def _storable(self, mode: _Mode) -> dict[bytes, DirtyBitmap]:
        """Those of `_bitmaps` that the image may have now: without a size none that is exact, which nobody could read again
        (QEMU refuses such an image)."""
        found = self._bitmaps()
        if self._image.size:
            return found
        return {name: one for name, one in found.items() if one.inconsistent or _flags(one, mode) & IN_USE}

    def _needing_marks(self) -> frozenset[bytes]:
        if self._image.node.read_only or self._hopeless:
            return frozenset()
        return frozenset(name for name, one in self._bitmaps().items() if one.recording and not one.inconsistent)

    def changed(self) -> None:
        """Some bitmap of the node was added, removed, enabled or disabled: from now on writes wait until the image knows which
        ones record."""
        tracking = self._needing_marks()
        if tracking == self._tracking:
            return
        self._tracking = tracking
        self._close_guard()

    def _close_guard(self) -> None:
        """Let no write pass without asking."""
        self._published = False
        if not self._tracking:
            self.guard = None
        else:
            self.region_shift = region_size(self._image.size).bit_length() - 1
            self.guard = zeros(-(-self._image.size >> self.region_shift))
            self._soft, self._asked = self.guard.copy(), self.guard.copy()
        self._image.node.mapping_changed()

    def passes(self, offset: int, length: int) -> bool:
        """Whether a write to the range needs nothing more than to be recorded in memory."""
        guard, shift = self.guard, self.region_shift
        return guard is None or guard.find(0, offset >> shift, (offset + length - 1 >> shift) + 1) < 0

    def passing(self, offset: int, length: int) -> tuple[bool, int]:
        """`passes` for the start of the range, and for how many bytes that holds."""
        guard, shift = self.guard, self.region_shift
        if guard is None:
            return True, length
        first, end = offset >> shift, (offset + length - 1 >> shift) + 1
        marked = bool(guard[first]) if first < len(guard) else False
        change = guard.find(not marked, first, end)
        return marked, length if change < 0 else (change << shift) - offset

    # -- marking -----------------------------------------------------------------------------------------------------
    async def before_change(self, offset: int, length: int) -> None:
        """The range is about to be written: see that the disk does not say less than it should. Raises OSError where neither
        the mark nor the end of the tracking can be written."""
        guard, shift = self.guard, self.region_shift
        if guard is None or length <= 0:
            return
        first, end = offset >> shift, (offset + length - 1 >> shift) + 1
        if self._published:
            self._harden(first, end)
            if guard.find(0, first, end) < 0:
                return
        self._asked[first:end] = 1
        async with self._lock:
            try:
                while self.guard is not None and not self._published:
                    await self._publish(_Mode.TRACKED)
                if self.guard is not None and self.guard.find(0, first, min(end, len(self.guard))) >= 0:
                    self._asked[first:end] = 1  # again: somebody's mark that failed took all that was asked for
                    await self._mark()
            except (OSError, BlockError) as error:
                if self._image.storage.dead:
                    raise  # no write will pass any more, and the first one says what the damage is
                await self._give_up(error)

    def _harden(self, first: int, end: int) -> None:
        """Take up soft marks again."""
        assert self.guard is not None
        at = self._soft.find(1, first, end)
        if at < 0:
            return
        self.guard[first:end] |= self._soft[first:end]
        self._soft[first:end] = 0
        self._remapped(first, end)

    def _remapped(self, first: int, end: int) -> None:
        self._image.node.mapping_changed(first << self.region_shift, end - first << self.region_shift)

    async def _mark(self) -> None:
        """Set the bits of all regions that were asked for, on stable storage; the lock is held."""
        guard = self.guard
        assert guard is not None
        asked, self._asked = self._asked, zeros(len(guard))
        todo = asked & ~guard
        for first, end in _runs(todo):
            if first and guard[first - 1]:
                todo[end : end + AHEAD] = 1
        todo &= ~guard
        runs = list(_runs(todo))
        for stored in self._tracked():
            for first, end in runs:
                await stored.set(*self._bits(stored, first, end))
        await self._put_tables()
        await self._barrier()
        if guard is not self.guard:
            return  # the set of bitmaps changed meanwhile: all is asked anew
        guard |= todo
        self._soft &= ~todo
        for first, end in runs:
            self._remapped(first, end)

    def _tracked(self) -> list[StoredBitmap]:
        return [stored for stored in self._stored.values() if stored.in_use and not stored.kept]

    def _bits(self, stored: StoredBitmap, first: int, end: int) -> tuple[int, int]:
        """Regions as bits of a bitmap."""
        low = first << self.region_shift >> stored.granularity_bits
        return low, min(-(-(end << self.region_shift) >> stored.granularity_bits), len(stored.disk))

    async def _put_tables(self) -> None:
        pending = [stored for stored in self._stored.values() if stored.table_pending]
        if not pending:
            return
        for stored in pending:
            await stored.place_table()
        async with self._image.writeback.exclusive():
            for stored in pending:
                await stored.put_table()

    async def tidy(self) -> None:
        """From time to time: bring regions that are not written to any more back to their exact bits. Raises OSError."""
        if self.guard is None or not self._published or self._lock.locked():
            return
        now = asyncio.get_running_loop().time()
        if now < self._tidied + TIDY_SECONDS:
            return
        self._tidied = now
        async with self._lock:
            if self.guard is not None and self._published:
                await self._tidy(self.guard)

    async def _tidy(self, guard: bitarray) -> None:
        node, shift = self._image.node, self.region_shift
        cold = self._soft.copy()
        for first, end in _runs(cold):
            for region in range(first, end):
                if node.overlapped(region << shift, 1 << shift):
                    cold[region] = 0  # a write that is still under way is not recorded yet
        # What is marked becomes soft now, what was soft already becomes exact.
        self._soft ^= cold
        self._soft |= guard
        for first, end in _runs(guard):
            self._remapped(first, end)
        guard.setall(0)
        bitmaps = self._bitmaps()
        for stored in self._tracked():
            # Not only cold regions: also what a job's end or an undone command left on the disk.
            if stored.name in bitmaps:
                await stored.put(self._wanted(stored, bitmaps[stored.name]))
        await self._put_tables()

    # -- the whole of it ---------------------------------------------------------------------------------------------
    async def sync(self) -> None:
        """Bitmaps were changed by something other than writes: put into the image what a crash must not undo. Raises OSError or
        BlockError."""
        if self._image.node.read_only or self._image.storage.dead:
            return
        async with self._lock, self._storing():
            if self._hopeless or not (self._stored or self._bitmaps()):
                return
            # What was written before a bitmap began, or was cleared, is not in it: it must not be lost by a crash any more. A
            # backup of that moment has it, and the next increment would not bring back what the disk has instead.
            await self._image.writeback.run()
            await self._image.storage.barrier()
            mode = _Mode.TRACKED if self._tracking else _Mode.EXACT
            if not self._up_to_date(mode) or (self._tracking and not self._published):
                await self._publish(mode)
                return
            bitmaps = self._bitmaps()
            for stored in self._tracked():
                await stored.put(self._wanted(stored, bitmaps[stored.name]))
            if any(stored.unsettled for stored in self._tracked()):
                await self._put_tables()
                await self._barrier()

    async def _barrier(self) -> None:
        """All bits and tables are on stable storage, and what they replaced may go."""
        await self._image.storage.barrier()
        for stored in self._tracked():
            stored.settle()

    def _up_to_date(self, mode: _Mode) -> bool:
        """Whether the directory says what it should, and exact bitmaps are as they should be."""
        bitmaps = self._storable(mode)
        if bitmaps.keys() != self._stored.keys():
            return False
        for name, bitmap in bitmaps.items():
            stored = self._stored[name]
            if bitmap.inconsistent and stored.kept:
                continue
            if stored.kept or stored.flags != _flags(bitmap, mode) or stored.granularity_bits != bitmap.shift:
                return False
            if not stored.in_use and (stored.unsettled or not _says(stored.disk, bitmap)):
                return False
        return True

    def _wanted(self, stored: StoredBitmap, bitmap: DirtyBitmap) -> bitarray:
        """What the disk should have of a bitmap now: what memory has, and for a tracked one all of the regions that may be
        written to."""
        wanted = _content(bitmap)
        if bitmap.recording:
            self._set_regions(stored, wanted)
        return wanted

    def _set_regions(self, stored: StoredBitmap, wanted: bitarray) -> None:
        if self.guard is None:
            return
        for first, end in _runs(self.guard | self._soft):
            low = first << self.region_shift >> stored.granularity_bits
            wanted[low : min(-(-(end << self.region_shift) >> stored.granularity_bits), len(wanted))] = 1

    async def _publish(self, mode: _Mode, size: int = 0) -> None:
        """Put all bitmaps into the image as ``mode`` says, with room for ``size`` bytes of disk; the lock is held."""
        image = self._image
        tracking = self._tracking
        if mode is not _Mode.EXACT:
            self._mark_in_flight()
        bitmaps = self._storable(mode)
        leaving = [stored for name, stored in self._stored.items() if name not in bitmaps]
        normal: dict[bytes, StoredBitmap] = {}
        kept: dict[bytes, StoredBitmap] = {}
        for name, bitmap in bitmaps.items():
            stored = self._stored.get(name)
            if stored is not None and not stored.kept and stored.granularity_bits != bitmap.shift:
                leaving.append(stored)
                stored = None
            if stored is not None and stored.kept:
                kept[name] = stored
                continue
            if stored is None:
                stored = StoredBitmap.new(image, name, bitmap.shift, len(bitmap.bits))
            await self._prepare(stored, bitmap, mode, size)
            normal[name] = stored
        for stored in normal.values():
            await stored.place_table()
        await self._switch(normal, kept, mode)
        for stored in leaving:
            stored.give_up_all()
        for stored in (*leaving, *normal.values()):
            stored.settle()
            if not stored.in_use:
                stored.disown()
        self._stored = {**normal, **kept}
        if tracking == self._tracking:
            self._published = mode is not _Mode.EXACT

    def _mark_in_flight(self) -> None:
        """Writes that are under way were let in before marks were asked for: their regions are as good as marked."""
        if self.guard is None:
            return
        for start, end in self._image.node.in_flight():
            first, last = start >> self.region_shift, (min(end, self._image.size) - 1 >> self.region_shift) + 1
            self._soft[first:last] = 1

    async def _prepare(self, stored: StoredBitmap, bitmap: DirtyBitmap, mode: _Mode, size: int) -> None:
        """Put a bitmap's content where nothing refers to it, or where it may be changed in place."""
        if not stored.in_use:
            stored.disown()
        wanted = _content(bitmap) if mode is _Mode.EXACT else self._wanted(stored, bitmap)
        bits = -(-size >> bitmap.shift)
        if bits > len(wanted):
            wanted = resized(wanted, bits)
        await stored.put(wanted)
        flags = _flags(bitmap, mode)
        if flags & IN_USE:
            stored.claim()
        else:
            stored.drop_empty()
        stored.next_flags = flags

    async def _switch(self, normal: dict[bytes, StoredBitmap], kept: dict[bytes, StoredBitmap], mode: _Mode) -> None:
        """Write tables and a new directory, and let the header refer to it."""
        image = self._image
        header, storage = image.header, image.storage
        before = header.bitmaps, header.autoclear, header.extensions
        offset, room = 0, 0
        raw = b"".join(stored.next_entry.to_bytes() for stored in normal.values())
        raw += b"".join(stored.entry.to_bytes() for stored in kept.values())
        if raw:
            await image.before_allocation()
            room = image.geometry.clusters(len(raw)) * image.geometry.cluster_size
            offset = await image.allocator.contiguous(room // image.geometry.cluster_size)
        try:
            async with image.writeback.exclusive():
                for stored in normal.values():
                    await stored.put_table()
                if raw:
                    await storage.put(Point.BITMAP_DIRECTORY, Section.NONE, offset, raw.ljust(room, b"\0"))
                self._describe(len(normal) if mode is not _Mode.EXACT else 0, len(normal) + len(kept), offset, raw)
                await image.write_header()
        except BaseException:
            # The new directory is left as it is: whether the header refers to it is not known.
            header.bitmaps, header.autoclear, header.extensions = before
            raise
        for stored in normal.values():
            stored.flags = stored.next_flags
        storage.guard.set_ranges(Section.BITMAP_DIRECTORY, [(offset, room)])
        if before[0] is not None:
            image.allocator.retire(before[0].directory_offset, image.geometry.round_up(before[0].directory_size))

    def _describe(self, trusted: int, count: int, offset: int, raw: bytes) -> None:
        """Put the directory, and that we vouch for it, into the header in memory."""
        header = self._image.header
        header.extensions = [one for one in header.extensions if one.type != ExtensionType.TRACKING]
        header.autoclear &= ~(Autoclear.TRACKED | Autoclear.BITMAPS)
        header.bitmaps = None
        if not raw:
            return
        header.bitmaps = BitmapsExtension(count, len(raw), offset)
        header.autoclear |= Autoclear.BITMAPS
        if trusted:
            identity = self._image.storage.file.node.driver.identity()
            data = tracking_extension(trusted, offset, raw, identity)
            header.extensions.append(Extension(ExtensionType.TRACKING, data))
            if header.fits():
                header.autoclear |= Autoclear.TRACKED
            else:
                header.extensions.pop()

    def forget(self) -> None:
        """Another process may open the image now: its bitmaps are no more those of the node."""
        bitmaps = self._image.node.bitmaps
        for one in [one for one in bitmaps if one.persistent]:
            bitmaps.remove(one)
        self._stored.clear()

    def reopened(self) -> None:
        """The node became read-only or writable."""
        for one in self._image.node.bitmaps:
            if one.persistent:
                one.read_only = self._image.node.read_only
        self.changed()

    async def finish(self) -> None:
        """Leave the image as others expect it: every bitmap exact, nothing in use but what is inconsistent. All requests are
        done. Raises OSError or BlockError."""
        async with self._lock, self._storing():
            self._image.node.bitmaps.follow_size()
            lost = [os.fsdecode(name) for name in self._bitmaps().keys() - self._storable(_Mode.EXACT).keys()]
            if lost:
                log.warning(
                    "node '%s': an image of no size keeps no bitmaps: %s", self._image.node.name, ", ".join(lost)
                )
            if not self._up_to_date(_Mode.EXACT):
                await self._publish(_Mode.EXACT)
            self._hopeless = False
            self._tracking = self._needing_marks()
            self._close_guard()

    @asynccontextmanager
    async def _storing(self) -> AsyncIterator[None]:
        """While inside, an OSError says what it was about."""
        try:
            yield
        except OSError as error:
            text = f"{error.strerror}: the dirty bitmaps of node '{self._image.node.name}' could not be stored in its image"
            raise OSError(error.errno, text) from error

    async def _give_up(self, error: OSError | BlockError) -> None:
        """The tracking cannot go on: see that nobody believes it, and let writes pass."""
        image = self._image
        log.error(
            "node '%s': dirty bitmaps cannot be tracked on the disk any more: %s; a crash from now on makes them inconsistent",
            image.node.name,
            error,
        )
        header = image.header
        autoclear = header.autoclear & ~Autoclear.TRACKED
        raw = struct.pack(">Q", autoclear)
        await image.storage.put(Point.HEADER, Section.MAIN_HEADER, AUTOCLEAR_AT, raw)
        if header.bitmaps is not None:
            directory = await read_raw(image.storage.file.node, header)
            mark_all_in_use(directory)
            place = header.bitmaps.directory_offset
            await image.storage.put(Point.BITMAP_DIRECTORY, Section.BITMAP_DIRECTORY, place, bytes(directory))
        await image.storage.barrier()
        header.autoclear = autoclear
        for stored in self._stored.values():
            stored.flags |= IN_USE
        self._hopeless = True
        self._tracking = frozenset()
        self._close_guard()

    # -- resizing ----------------------------------------------------------------------------------------------------
    @asynccontextmanager
    async def resizing(self, size: int) -> AsyncIterator[None]:
        """While inside, the image may get ``size`` bytes: whatever happens, its bitmaps are tracked and their tables are long
        enough. Raises BlockError, in QEMU's words, if one of them cannot follow."""
        bitmaps = self._bitmaps()
        for bitmap in bitmaps.values():
            bitmap.check_usable(allow_read_only=True)
            self._check_room(size, bitmap.granularity)
        async with self._lock:
            if bitmaps and not self._hopeless:
                await self._publish(_Mode.RESIZING, max(size, self._image.size))
            try:
                yield
            finally:
                if bitmaps:
                    self._close_guard()

    # -- refusals ----------------------------------------------------------------------------------------------------
    def check_storable(self, name: str, granularity: int) -> None:
        """Raise BlockError, in QEMU's words, if the image cannot have one more bitmap of that name and granularity (bytes)."""
        node = self._image.node
        reason = self._why_not(os.fsencode(name), granularity)
        if reason is not None:
            raise BlockError(f"Can't make bitmap '{name}' persistent in '{node.name}': {reason}")

    def _why_not(self, name: bytes, granularity: int) -> str | None:
        if self._image.header.version < 3:
            return "Cannot store dirty bitmaps in qcow2 v2 files"
        bits = granularity.bit_length() - 1
        if bits > GRANULARITIES[-1]:
            return f"Granularity exceeds maximum ({1 << GRANULARITIES[-1]} bytes)"
        if bits < GRANULARITIES[0]:
            return f"Granularity is under minimum ({1 << GRANULARITIES[0]} bytes)"
        if not self._has_room(self._image.size, granularity):
            return "Too much space will be occupied by the bitmap. Use larger granularity"
        if not self._image.size:
            return "An image of no size keeps no bitmaps"
        if len(name) > MAX_BITMAP_NAME:
            return f"Name length exceeds maximum ({MAX_BITMAP_NAME} characters)"
        return check_directory_size((*self._bitmaps(), name), MAX_BITMAPS)

    def _has_room(self, size: int, granularity: int) -> bool:
        most = min(MAX_BYTES, MAX_BITMAP_TABLE_ENTRIES * self._image.geometry.cluster_size)
        return size <= most * 8 * granularity

    def _check_room(self, size: int, granularity: int) -> None:
        if not self._has_room(size, granularity):
            raise BlockError("Too much space will be occupied by the bitmap. Use larger granularity")


def _flags(bitmap: DirtyBitmap, mode: _Mode) -> int:
    in_use = mode is _Mode.RESIZING or (mode is _Mode.TRACKED and bitmap.recording)
    return (AUTO if bitmap.recording else 0) | (IN_USE if in_use else 0)


def _content(bitmap: DirtyBitmap) -> bitarray:
    """What a bitmap and its successor say together, copied."""
    bits = copied(bitmap.bits)
    if bitmap.successor is not None:
        add(bits, bitmap.successor.bits)
    return bits


def _says(disk: bitarray, bitmap: DirtyBitmap) -> bool:
    """Whether the disk has what a bitmap and its successor say together."""
    return disk == (bitmap.bits if bitmap.successor is None else _content(bitmap))


def _runs(bits: bitarray) -> Iterable[tuple[int, int]]:
    """The runs of ones: ``(first, end)``."""
    at = bits.find(1)
    while at >= 0:
        end = bits.find(0, at)
        end = len(bits) if end < 0 else end
        yield at, end
        at = bits.find(1, end)

"""Writes: in place where the cluster is the image's own, otherwise into new clusters that are published afterwards.

An allocating write goes through these steps; other requests run between any two of them::

    plan      which clusters, contiguous both in the guest and on the host; they are owned (refcount 1) at once
    fill      the data, and around it what the first and last cluster held before (copy on write), in one write
    publish   the L2 entries, the retired old clusters, `Node.mapping_changed`: all between two awaits

Writes to one cluster that both need an allocation queue up (`Writer.settled`); others run side by side. If filling fails, the
clusters go back and nothing was changed. What is published is in memory; `writeback.py` gets it to the disk in order.

Copying is needed per subcluster with extended L2 entries, else per cluster. Bytes that read as zeroes are not copied into
clusters that nobody ever wrote to (`Allocator.fresh_from`). Source: QEMU ``block/qcow2-cluster.c``.
"""

from __future__ import annotations

import asyncio
import errno
import os
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, NamedTuple

from livedisk.emulator.block.debug import Event
from livedisk.emulator.block.extents import Extents
from livedisk.emulator.block.node import fill_zeroes, read_now
from livedisk.emulator.block.types import DetectZeroes, NotMapped, ZeroFlags
from livedisk.emulator.drivers.file import FileDriver
from livedisk.emulator.drivers.qcow2.cache import Table
from livedisk.emulator.drivers.qcow2.geometry import ALL_SUBCLUSTERS_ALLOCATED, COMPRESSED, COPIED, OFFSET_MASK, ZERO
from livedisk.emulator.drivers.qcow2.tables import State

if TYPE_CHECKING:
    from livedisk.emulator.drivers.qcow2.image import Image

MAX_MERGED: Final = 2 << 20
"""Bytes: up to here data and copied surroundings go out in one write."""
MAX_COPIED: Final = 16 << 20
"""Bytes: clusters up to here are allocated at once for data that the kernel copies from file to file."""
MAX_INLINE: Final = 1 << 20
"""Bytes copied to the page cache at once: as much as `HostFile` does inline."""
MAX_NOW: Final = 2 << 20
"""The same for the fast path: as much as it does where nothing is allocated, for a request of a mirror from elsewhere. To leave
it costs a copy of the data and a turn of a thread, which is longer than the write takes."""
_BIG_ZERO: Final = 64 << 10


class _Claim:
    """Guest clusters ``[start, end)`` (bytes) whose allocation is under way."""

    __slots__ = ("done", "end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.done: asyncio.Future[None] | None = None


class _Plan(NamedTuple):
    """One piece of an allocating write. All in bytes.

    ``start``, ``end``: the guest clusters; ``host``: where they go; ``new``: clusters taken from the allocator (0: the host
    clusters were there already); ``fresh``: the host clusters read as zeroes; ``copy_from``, ``copy_to``: guest range that must
    be whole afterwards: what the write does not cover of it is copied.
    """

    start: int
    end: int
    host: int
    new: int
    fresh: bool
    copy_from: int
    copy_to: int


class Writer:
    """All changes of guest data in one image."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self._claims: list[_Claim] = []
        self._past_end: list[_Plan] = []
        self._merging = memoryview(b"")

    # -- requests ------------------------------------------------------------------------------------------------------
    async def write(self, offset: int, data: memoryview | Extents) -> None:
        """Write ``data`` at guest ``offset`` (bytes). Raises OSError."""
        image, position, end = self.image, 0, len(data)
        most = MAX_MERGED if isinstance(data, memoryview) else MAX_COPIED
        tables, told = image.tables, -1
        while position < end:
            at = offset + position
            try:
                run = tables.lookup(at, end - position)
            except NotMapped:
                await tables.load(at)
                continue
            if run.state is State.NORMAL and run.copied:
                await image.check_run(run, at)
                await image.storage.tell(Event.WRITE_AIO)
                await self._put(run.host, data[position : position + run.length])
                position += run.length
            elif run.state is State.INVALID:
                raise await image.storage.corrupt(tables.damage(at))
            else:
                if told != position and image.storage.is_watched:
                    told = position
                    await image.storage.tell(Event.CLUSTER_ALLOC)
                    await image.storage.tell(Event.REFBLOCK_ALLOC)
                    continue  # it may have been held, and the mapping be another one
                position += await self._allocating(at, data[position : position + min(run.length, most)])

    def write_now(self, offset: int, data: memoryview) -> bool:
        """An allocating write of which everything is at hand, without awaiting. False: nothing was changed. Raises OSError."""
        image, tables, length = self.image, self.image.tables, len(data)
        size = image.geometry.cluster_size
        if self._claims and self._conflict(offset // size * size, offset + length) is not None:
            return False
        if not image.ready_to_allocate or image.writeback.urgent or not image.bitmaps.passes(offset, length):
            return False
        found = tables.owned(offset)
        if found is None or found[0].data[found[1] * tables.words] > ZERO:
            return False
        clusters = (offset % size + length + size - 1) // size
        if found[1] + clusters > tables.slice_entries or image.allocator.available < clusters:
            return False
        if clusters > 1 and tables.lookup(offset, length).length < length:
            return False
        plan = self._plan(*found, offset, length)
        if plan is None:
            return False
        if plan.end < offset + length or not self._inline(plan, *found, offset, data, MAX_NOW):
            if plan.new:
                image.allocator.give_back(plan.host, plan.new)
            return False
        self._publish(plan, *found)
        return True

    async def settled(self, start: int, end: int) -> None:
        """Return when no allocation is under way in these guest clusters (bytes)."""
        while True:
            claim = self._conflict(start, end)
            if claim is None:
                return
            if claim.done is None:
                claim.done = asyncio.get_running_loop().create_future()
            await asyncio.shield(claim.done)

    def claimed(self, start: int, end: int) -> bool:
        """Whether an allocation is under way in these guest clusters (bytes)."""
        return self._conflict(start, end) is not None

    def _conflict(self, start: int, end: int) -> _Claim | None:
        for claim in self._claims:
            if claim.start < end and start < claim.end:
                return claim
        return None

    # -- allocating writes -----------------------------------------------------------------------------------------------
    async def _put(self, host: int, data: memoryview | Extents) -> None:
        if isinstance(data, memoryview):
            await self.image.storage.data.write(host, data)
        else:
            await self.image.storage.data.copy_in(host, data)

    async def _allocating(self, offset: int, data: memoryview | Extents) -> int:
        """Write the first part of ``data``; gives how many bytes. 0: look again, the mapping may have changed."""
        image, size = self.image, self.image.geometry.cluster_size
        first = offset & ~(size - 1)
        found = image.tables.owned(offset)
        if found is None or not image.ready_to_allocate or self._conflict(first, first + size) is not None:
            await self._get_ready(offset, first)
            return 0
        # No await until the claim stands.
        plan = self._plan(*found, offset, len(data))
        if plan is None:
            return 0
        done = min(len(data), plan.end - offset)
        if self._inline(plan, *found, offset, data[:done]):
            self._publish(plan, *found)
            if image.writeback.urgent:
                await image.writeback.run()
            return done
        claim = _Claim(plan.start, plan.end)
        self._claims.append(claim)
        try:
            await self._fill(plan, offset, data[:done])
            # No await from here on, if the slice is still in memory: a reader sees all of it or nothing.
            self._publish(plan, *(image.tables.owned(plan.start) or await image.tables.own(plan.start)))
        except OSError:
            if plan.new:
                image.allocator.give_back(plan.host, plan.new)
            raise
        except BaseException:  # cancelled: a thread may still be writing there
            if plan.new:
                image.allocator.quarantine.append((plan.host, plan.new))
            raise
        finally:
            self._claims.remove(claim)
            if claim.done is not None:
                claim.done.set_result(None)
        if image.writeback.urgent:
            await image.writeback.run()
        return done

    def _inline(
        self,
        plan: _Plan,
        table: Table[array[int]],
        index: int,
        offset: int,
        data: memoryview | Extents,
        most: int = MAX_INLINE,
    ) -> bool:
        """Write the data of a plan, and what must be copied around it, at once, if everything is at hand and the host file takes
        it without blocking, ``most`` bytes.

        This is what makes allocating writes quick: no await, and so no claim either. It writes as the flat map does, and only
        where nothing that must be waited for goes on in the file. False: nothing was written.
        """
        image, node = self.image, self.image.storage.data.node
        if not isinstance(data, memoryview) or not isinstance(node.driver, FileDriver):
            return False
        if plan.copy_from != offset or plan.copy_to != offset + len(data):
            last = index + (plan.end - plan.start >> image.geometry.cluster_bits) - 1
            if image.tables.extended or table.data[index] > ZERO or table.data[last] > ZERO:
                return False
            if not plan.fresh or image.node.backing is not None:
                whole = self._merged_now(plan, table.data[index], offset, data)
                if whole is None:
                    return False
                offset, data = plan.copy_from, whole
        if node.trackers or node.read_only or len(data) > most:
            return False
        if node.busy and node.overlapped(plan.host - plan.start + offset, len(data)):
            return False
        if node.detect_zeroes is not DetectZeroes.OFF or node.write_threshold:
            return False
        host_file, at = node.driver.host, plan.host - plan.start + offset
        if not host_file.inline_writes:
            return False
        # Also where the cluster was there already: a damaged entry may say that metadata's place is its own.
        if not image.storage.has_data_file and image.storage.guard.hit(at, len(data)) is not None:
            return False
        try:
            host_file.write_blocking(at, data)
        except OSError:
            if plan.new:
                image.allocator.give_back(plan.host, plan.new)
            raise
        node.driver.grown(at + len(data))
        return True

    def _merged_now(self, plan: _Plan, entry: int, offset: int, data: memoryview) -> memoryview | None:
        """The data, and around it what the clusters held before, ``entry`` the first of them; None where that cannot be had
        without awaiting. It is good until the next call."""
        start, length = plan.copy_from, plan.copy_to - plan.copy_from
        if length > MAX_INLINE:
            return None
        if len(self._merging) < length:
            self._merging = memoryview(bytearray(length))
        head, view = offset - start, self._merging[:length]
        end, backing = head + len(data), self.image.node.backing
        if entry == 0 and backing is not None and length == self.image.geometry.cluster_size:
            # To read what the data then covers, too, takes less than to ask twice.
            if not read_now(backing.node, start, view):
                return None
        elif not self._old_now(start, view[:head]) or not self._old_now(offset + len(data), view[end:]):
            return None
        view[head:end] = data
        return view

    def _old_now(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` with what unallocated or zero clusters show."""
        image = self.image
        while len(view):
            try:
                run = image.tables.lookup(offset, len(view))
            except NotMapped:
                return False
            backing = image.node.backing
            if run.state is State.UNALLOCATED and backing is not None:
                if not read_now(backing.node, offset, view[: run.length]):
                    return False
            elif run.state in (State.UNALLOCATED, State.ZERO, State.ZERO_ALLOC):
                fill_zeroes(view[: run.length])
            else:
                return False
            offset += run.length
            view = view[run.length :]
        return True

    async def _get_ready(self, offset: int, first: int) -> None:
        """Everything that an allocation may have to wait for."""
        image = self.image
        await self.settled(first, first + image.geometry.cluster_size)
        await image.tables.own(offset)
        if not image.storage.has_data_file:
            await image.allocator.ensure()
        await image.before_allocation()

    def _plan(self, table: Table[array[int]], index: int, offset: int, length: int) -> _Plan | None:
        """Choose host clusters for the start of a write, and own them. None: nothing to allocate, or somebody was quicker."""
        data, tables, geometry = table.data, self.image.tables, self.image.geometry
        size, step = geometry.cluster_size, tables.words
        start = offset & ~(size - 1)
        wanted = min(-(-(offset + length - start) // size), tables.slice_entries - index)
        if self._claims:
            wanted = self._unclaimed(start, wanted)
        entry = data[index * step]
        reuse = tables.has_host(entry) and entry >= COPIED
        count = 1
        while count < wanted and self._alike(data[(index + count) * step], entry + count * size, reuse=reuse):
            count += 1
        if reuse:
            if not self._needs_change(offset):
                return None
            host, new, fresh = entry & OFFSET_MASK, 0, False
        elif self.image.storage.has_data_file:
            host, new, fresh = start, 0, False
        else:
            before = self.image.allocator.fresh_from
            got = self.image.allocator.take(count)
            if got is None:
                return None
            host, new = got
            count, fresh = new, host >= before
        copy_from, copy_to = self._copy_range(data, index, count, offset, min(offset + length, start + count * size))
        return _Plan(start, start + count * size, host, new, fresh, copy_from, copy_to)

    def _unclaimed(self, start: int, count: int) -> int:
        size = self.image.geometry.cluster_size
        for claim in self._claims:
            if start < claim.start < start + count * size:
                count = (claim.start - start) // size
        return count

    def _alike(self, entry: int, expected: int, *, reuse: bool) -> bool:
        """Whether the next cluster can be part of the same plan."""
        tables = self.image.tables
        if reuse:  # its own host cluster, right behind, with the same flags
            return entry == expected
        return not (tables.has_host(entry) and entry >= COPIED)

    def _needs_change(self, offset: int) -> bool:
        """Whether the (sub)cluster of ``offset`` still is not plain data: another write may have made it so."""
        try:
            run = self.image.tables.lookup(offset, 1)
        except NotMapped:
            return False
        return run.state in (State.ZERO_ALLOC, State.UNALLOCATED_ALLOC)

    def _copy_range(self, data: array[int], index: int, count: int, offset: int, end: int) -> tuple[int, int]:
        """Guest range, in whole (sub)clusters, that holds valid data after the write."""
        tables = self.image.tables
        size, granule = tables.cluster_size, tables.granule
        low, high = offset // granule * granule, -(-end // granule) * granule
        if tables.extended:
            # Clusters that lose their host cluster take all they have with them.
            first, last = data[index * 2], data[(index + count - 1) * 2]
            if self._moves(first):
                low = offset // size * size
            if self._moves(last):
                high = -(-end // size) * size
        return low, high

    def _moves(self, entry: int) -> bool:
        return bool(entry & COMPRESSED) or (self.image.tables.has_host(entry) and entry < COPIED)

    # -- compressed clusters -----------------------------------------------------------------------------------------------
    async def write_compressed(self, offset: int, data: memoryview) -> None:
        """Write whole clusters compressed; the image's last one may be short. A cluster that does not get smaller is written as
        it is. Raises ENOTSUP with a data file, EINVAL for a part of a cluster."""
        image, size = self.image, self.image.geometry.cluster_size
        if image.storage.has_data_file:
            raise OSError(
                errno.ENOTSUP, f"{os.strerror(errno.ENOTSUP)}: compressed clusters and a data file exclude each other"
            )
        end = offset + len(data)
        if offset % size or (end % size and end != image.size):
            raise OSError(
                errno.EINVAL, f"{os.strerror(errno.EINVAL)}: compressed writes take whole clusters of {size} bytes"
            )
        while len(data):
            await self._write_one_compressed(offset, data[:size])
            offset += size
            data = data[size:]

    async def _write_one_compressed(self, offset: int, data: memoryview) -> None:
        image, size = self.image, self.image.geometry.cluster_size
        packed = await image.decompressor.pack(data if len(data) == size else bytes(data).ljust(size, b"\0"))
        if len(packed) >= size:
            await self.write(offset, data)
            return
        await self.settled(offset, offset + size)
        await image.before_allocation()
        await image.tables.own(offset)
        host = await image.allocator.packed(len(packed))
        try:
            entry = image.geometry.compressed_entry(host, len(packed))
            await image.storage.check_overlap(host, len(packed))
            await image.storage.tell(Event.L2_UPDATE_COMPRESSED)
            await image.storage.tell(Event.WRITE_COMPRESSED)
            await image.storage.file.write(host, memoryview(packed))
            table, index = await image.tables.own(offset)
        except OSError:
            image.allocator.retire(host, len(packed))
            raise
        step = image.tables.words
        old = table.data[index * step]
        table.data[index * step] = entry
        if step == 2:
            table.data[index * step + 1] = 0
        if old:
            image.release(old)
        image.decompressor.forget()
        image.tables.mark(table, index, 1)
        image.node.mapping_changed(offset, size)
        if image.writeback.urgent:
            await image.writeback.run()

    # -- filling ---------------------------------------------------------------------------------------------------------
    async def _fill(self, plan: _Plan, offset: int, data: memoryview | Extents) -> None:
        """Write the data and what must be copied around it to the planned host clusters."""
        image = self.image
        end = offset + len(data)
        host = plan.host - plan.start
        if not image.storage.has_data_file:
            hit = image.storage.guard.hit(host + plan.copy_from, plan.copy_to - plan.copy_from)
            if hit is not None:
                await image.storage.check_overlap(host + plan.copy_from, plan.copy_to - plan.copy_from)
        head, tail = offset - plan.copy_from, plan.copy_to - end
        if head and await self._leave_zero(plan, plan.copy_from, head):
            head = 0
        if tail and await self._leave_zero(plan, end, tail):
            tail = 0
        target = image.storage.data
        if not head and not tail:
            await image.storage.tell(Event.WRITE_AIO)
            await self._put(host + offset, data)
        elif isinstance(data, memoryview) and head + len(data) + tail <= MAX_MERGED:
            merged = memoryview(await self._merged(offset, head, data, tail))
            await image.storage.tell(Event.WRITE_AIO)
            await image.storage.tell(Event.COW_WRITE)
            await target.write(host + offset - head, merged)
        else:
            await image.storage.tell(Event.WRITE_AIO)
            await self._put(host + offset, data)
            if head:
                await self._copy_old(host, offset - head, head)
            if tail:
                await self._copy_old(host, end, tail)

    async def _merged(self, offset: int, head: int, data: memoryview, tail: int) -> bytearray:
        merged = bytearray(head + len(data) + tail)
        view = memoryview(merged)
        end = head + len(data)
        view[head:end] = data
        await self.image.storage.tell(Event.COW_READ)
        if head:
            await self.image.read_guest(offset - head, view[:head])
        if tail:
            await self.image.read_guest(offset + len(data), view[end:])
        return merged

    async def _copy_old(self, host: int, offset: int, length: int) -> None:
        """Copy what the guest sees in a range to ``host + offset`` of the file."""
        with memoryview(bytearray(length)) as raw:
            await self.image.storage.tell(Event.COW_READ)
            await self.image.read_guest(offset, raw)
            await self.image.storage.tell(Event.COW_WRITE)
            await self.image.storage.data.write(host + offset, raw)

    async def _leave_zero(self, plan: _Plan, offset: int, length: int) -> bool:
        """Whether this part around the data reads as zeroes and the host range already does, or could be made to cheaply."""
        if not await self.image.reads_as_zero(offset, length):
            return False
        if plan.fresh:
            return True
        if length < _BIG_ZERO:
            return False
        try:
            at = plan.host - plan.start + offset
            await self.image.storage.tell(Event.CLUSTER_ALLOC_SPACE)
            await self.image.storage.data.node.write_zeroes(at, length, ZeroFlags.NO_FALLBACK | ZeroFlags.MAY_UNMAP)
        except OSError:
            return False  # the caller writes zeroes out instead
        return True

    # -- publishing ------------------------------------------------------------------------------------------------------
    def _publish(self, plan: _Plan, table: Table[array[int]], index: int) -> None:
        """Let the L2 entries lead to the planned host clusters; what they led to before is retired."""
        size = self.image.geometry.cluster_size
        count = (plan.end - plan.start) // size
        if self.image.tables.extended:
            self._publish_extended(table, index, count, plan)
        elif count == 1:
            old_entry, table.data[index] = table.data[index], plan.host | COPIED
            if old_entry:
                self._release(plan, (old_entry,))
        else:
            old = table.data[index : index + count]
            first = plan.host | COPIED
            table.data[index : index + count] = array("Q", range(first, first + count * size, size))
            self._release(plan, old)
        self.image.tables.mark(table, index, count)
        self.image.node.mapping_changed(plan.start, plan.end - plan.start)
        self._note_end(plan)

    def _note_end(self, plan: _Plan) -> None:
        """A cluster whose unwritten rest lies past the end of the file is not whole to the flat maps: when the file has grown
        over it, they are told to look again."""
        size = self.image.storage.data.node.size
        if self._past_end and self._past_end[0].host + self._past_end[0].end - self._past_end[0].start <= size:
            for known in self._past_end:
                self.image.node.mapping_changed(known.start, known.end - known.start)
            self._past_end.clear()
        if plan.fresh and plan.host + plan.end - plan.start > size:
            self._past_end.append(plan)

    def _publish_extended(self, table: Table[array[int]], index: int, count: int, plan: _Plan) -> None:
        size, granule = self.image.geometry.cluster_size, self.image.tables.granule
        for number in range(count):
            start = plan.start + number * size
            low = max(plan.copy_from - start, 0) // granule
            high = min(plan.copy_to - start, size) // granule
            bits = ((1 << high) - (1 << low)) & ALL_SUBCLUSTERS_ALLOCATED
            at = (index + number) * 2
            old = table.data[at]
            table.data[at] = plan.host + number * size | COPIED
            table.data[at + 1] = (table.data[at + 1] & ~(bits << 32)) | bits
            if old & COMPRESSED:
                table.data[at + 1] = ALL_SUBCLUSTERS_ALLOCATED
            self._release(plan, (old,))

    def _release(self, plan: _Plan, entries: Iterable[int]) -> None:
        """What the entries led to before is not used here any more, unless it was used again."""
        if plan.new:
            for entry in entries:
                if entry:
                    self.image.release(entry)

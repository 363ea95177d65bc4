"""A named node of the graph, its edges, and the one checked way into its driver.

A request enters the graph at a `BlockBackend` (a device, an export, a job), which range-checks and gates it, and goes
from
node to node along edges. Every `Node` method here is that one way: it checks read-only, tracks the request as in
flight, lets conflicting
requests wait for each other, and only then asks the driver.

Invariants
* Requests that free or re-map storage (`discard`, `write_zeroes`, `write_compressed`), and writes that do not cover
  whole blocks of a driver that only takes whole ones, are *serialising*: they wait for every overlapping request that
  came before them, and later overlapping requests wait for them. A host cluster is thus never freed under a running
  read or write, and two writes to one block never undo each other.
* A write is marked in every dirty tracker of the node before it is acknowledged.
* Whatever changes a mapping calls `Node.mapping_changed`; nothing else invalidates the flat maps above.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

from livedisk.emulator.block.bitmaps import Bitmaps
from livedisk.emulator.block.debug import Event, primary, tell
from livedisk.emulator.block.extents import Extents, write_through_memory
from livedisk.emulator.block.permissions import Perm, Role
from livedisk.emulator.block.types import DetectZeroes, Discard, Kind, NotMapped, Preallocation, Segment, ZeroFlags

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from livedisk.emulator.block.blockers import Blocker
    from livedisk.emulator.block.driver import Driver
    from livedisk.emulator.block.graph import Graph
    from livedisk.emulator.block.options import BlockdevOptions
    from livedisk.emulator.block.settings import Settings

ZERO_CHUNK = bytes(1 << 20)
"""Zeroes to copy from: 1 MiB."""


class Parent(Protocol):
    """Whoever holds an edge to a node: another node, or a `BlockBackend`."""

    @property
    def description(self) -> str:
        """As QEMU's messages name it: "node 'x'", "block device 'y'"."""

    def child_replaced(self, edge: Edge) -> None:
        """``edge.node`` is a different node now."""

    def child_mapping_changed(self, edge: Edge, offset: int, length: int) -> None:
        """The mapping of that range of the child is not what it was."""


class DirtyTracker(Protocol):
    """Something that must learn of every write to a node: a dirty bitmap, a job's dirty map."""

    def mark(self, offset: int, length: int) -> None:
        """The range was changed. Must not fail and must not await."""


class Edge:
    """One parent's use of one node: a name ("file", "backing", "root"), a role and the permissions taken.

    ``frozen`` edges (a job works on the chain) may not be replaced. ``may_write``: whether the permissions let the parent write.
    """

    __slots__ = ("_perm", "frozen", "may_write", "name", "node", "parent", "role", "shared")

    def __init__(self, parent: Parent, node: Node, name: str, role: Role) -> None:
        self.parent = parent
        self.node = node
        self.name = name
        self.role = role
        self.perm = Perm.NONE
        self.shared = Perm.ALL
        self.frozen = False

    @property
    def perm(self) -> Perm:
        """The permissions taken."""
        return self._perm

    @perm.setter
    def perm(self, perm: Perm) -> None:
        self._perm = perm
        self.may_write = bool(perm & (Perm.WRITE | Perm.WRITE_UNCHANGED))  # asked for every request

    @property
    def parent_description(self) -> str:
        """Who holds this edge, in QEMU's words."""
        return self.parent.description

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from the child; bytes past the child's end read as zeroes."""
        await self.node.read(offset, view)

    async def write(self, offset: int, data: memoryview) -> None:
        """Write to the child. Raises EPERM if the edge does not hold the permission."""
        if not self.may_write:
            raise PermissionError(errno.EPERM, f"no write permission on node '{self.node.name}' as '{self.name}'")
        await self.node.write(offset, data)

    async def copy_in(self, offset: int, extents: Extents) -> None:
        """Write bytes that stand in host files to the child. Raises EPERM if the edge does not hold the permission."""
        if not self.may_write:
            raise PermissionError(errno.EPERM, f"no write permission on node '{self.node.name}' as '{self.name}'")
        await self.node.copy_in(offset, extents)

    async def prefetch(self, offset: int, length: int) -> None:
        """Bring what the child has of the range into the host's cache."""
        inside = min(length, self.node.size - offset)
        if inside > 0:
            await self.node.prefetch(offset, inside)

    def __repr__(self) -> str:
        return f"<Edge {self.parent.description} -{self.name}-> {self.node.name}>"


class InFlight:
    """One tracked request: a byte range, and whether others must wait for it."""

    __slots__ = ("done", "end", "over", "serialising", "start")

    def __init__(self, start: int, end: int, *, serialising: bool) -> None:
        self.start = start
        self.end = end
        self.serialising = serialising
        self.over = False
        self.done: asyncio.Future[None] | None = None

    async def ended(self) -> None:
        """Wait until the request is not in flight any more."""
        if not self.over:
            if self.done is None:
                self.done = asyncio.get_running_loop().create_future()
            await asyncio.shield(self.done)


class Node:
    """A node of the graph. Made by `Graph`; never directly.

    Attributes: ``name``; ``driver``; ``options`` as given; ``children`` by edge name; ``parents``; ``read_only``; ``active``;
    ``discard``; ``detect_zeroes``; ``cache_direct``, ``cache_no_flush``; ``force_share``; ``implicit`` (made by a job,
    hidden from users); ``monitor_owned`` (blockdev-add made it, so blockdev-del ends it);
    ``opened_inactive`` (whatever its options said); ``opened_by`` and
    ``opened_role``: the node inside whose options this one was described, whose settings it inherits where its own
    options are silent; ``opened_backing``: the backing file name that the image's header had when it was opened;
    ``reopening``: the settings that a reopen under way is about to give the node; ``blockers``: whoever forbids others'
    operations on it (`blockers.py`), the newest last; ``trackers``; ``bitmaps``; ``own_highest``
    (largest byte offset, exclusive, that a request on this node wrote to); ``write_threshold`` (bytes; a write beyond
    it is reported once, 0: none is asked for).
    """

    def __init__(self, graph: Graph, name: str, options: BlockdevOptions) -> None:
        self.graph = graph
        self.name = name
        self.options = options
        self.driver: Driver
        self.children: dict[str, Edge] = {}
        self.parents: list[Edge] = []
        self.read_only = False
        self.active = True
        self.opened_inactive = False
        self.auto_read_only = False
        self.discard_mode = Discard.IGNORE
        self.detect_zeroes = DetectZeroes.OFF
        self.cache_direct = False
        self.cache_no_flush = False
        self.force_share = False
        self.implicit = False
        self.monitor_owned = False
        self.opened_by: Node | None = None
        self.opened_role = Role.NONE
        self.opened_backing: str | None = None
        self.blockers: list[Blocker] = []
        self.trackers: list[DirtyTracker] = []
        self.bitmaps = Bitmaps(self)
        self.own_highest = 0
        self.write_threshold = 0
        self.perm = Perm.NONE
        self.shared = Perm.ALL
        self.reopening: Settings | None = None
        self._in_flight: list[InFlight] = []
        self._serialising = 0  # how many of them others wait for

    # -- the graph around it -----------------------------------------------------------------------------------------
    @property
    def description(self) -> str:
        return f"node '{self.name}'"

    @property
    def size(self) -> int:
        """Bytes."""
        return self.driver.size

    @property
    def wr_highest(self) -> int:
        """Largest byte offset written to, exclusive, whichever way the write took."""
        return max(self.own_highest, self.driver.highest_written())

    @property
    def file(self) -> Edge:
        """The child that stores this node's bytes."""
        return self.children["file"]

    @property
    def backing(self) -> Edge | None:
        """The child that is read where this node has nothing."""
        return self.children.get("backing")

    @property
    def filtered(self) -> Edge | None:
        """The child that a filter shows, or None."""
        if not self.driver.is_filter:  # raw takes its file as filters take theirs, but is a format
            return None
        return next((edge for edge in self.children.values() if edge.role & Role.FILTERED), None)

    def child_replaced(self, edge: Edge) -> None:
        """A child is a different node now: nothing known about the mapping holds."""
        self.mapping_changed()

    def child_mapping_changed(self, edge: Edge, offset: int, length: int) -> None:
        """Pass on what changed below: the same range for what shows through, everything for what only stores."""
        if edge.role & (Role.COW | Role.FILTERED) or edge.name in self.driver.aligned_children:
            self.mapping_changed(offset, length)
        else:
            self.mapping_changed()

    def mapping_changed(self, offset: int = 0, length: int = 1 << 63) -> None:
        """Forget what any flat map above says of this range. The one function that whatever changes a mapping calls."""
        for edge in self.parents:
            edge.parent.child_mapping_changed(edge, offset, length)

    # -- requests in flight ------------------------------------------------------------------------------------------
    @property
    def busy(self) -> bool:
        """Whether requests are in flight on this very node."""
        return bool(self._in_flight)

    def overlapped(self, offset: int, length: int) -> bool:
        """Whether a request in flight touches the range (bytes)."""
        end = offset + length
        return any(other.start < end and offset < other.end for other in self._in_flight)

    def in_flight(self) -> list[tuple[int, int]]:
        """The ranges (bytes) of all requests in flight: first and one past the last."""
        return [(request.start, request.end) for request in self._in_flight]

    def barred(self, offset: int, length: int) -> bool:
        """Whether a serialising request in flight, which others wait for, touches the range (bytes)."""
        end = offset + length
        return any(other.serialising and other.start < end and offset < other.end for other in self._in_flight)

    def requests_in_flight(self) -> frozenset[object]:
        """The requests in flight that may still use storage which another request gives up: it must outlive them.

        Serialising requests are left out: they only use storage of their own range, which nobody else changes meanwhile.
        """
        return frozenset(request for request in self._in_flight if not request.serialising)

    async def _begin(self, offset: int, length: int) -> InFlight:
        """Track a request that may overlap others, and wait for the serialising ones before it. `_end` it whatever
        happens."""
        request = InFlight(offset, offset + length, serialising=False)
        await self._wait_turn(request)
        return request

    async def _begin_serialising(self, offset: int, length: int, step: int = 1) -> InFlight:
        """Track a request that nothing may overlap, and wait for all overlapping ones before it. ``step``: the bytes
        around it that it works on as one."""
        request = InFlight(offset // step * step, -(-(offset + length) // step) * step, serialising=True)
        await self._wait_turn(request)
        return request

    async def _wait_turn(self, request: InFlight) -> None:
        # A request only waits for those that came before it: no cycle is possible, and none starves.
        earlier = [
            other
            for other in self._in_flight
            if (request.serialising or other.serialising) and other.start < request.end and request.start < other.end
        ]
        self._in_flight.append(request)
        self._serialising += request.serialising
        try:
            for other in earlier:
                await other.ended()
        except BaseException:
            self._end(request)
            raise

    def begin_now(self, offset: int, length: int) -> InFlight | None:
        """`_begin` where nothing has to be waited for; else None. `end_now` it whatever happens."""
        if self._serialising and self.barred(offset, length):
            return None
        request = InFlight(offset, offset + length, serialising=False)
        self._in_flight.append(request)
        return request

    def end_now(self, request: InFlight) -> None:
        """The request is not in flight any more."""
        self._end(request)

    def _end(self, request: InFlight) -> None:
        self._in_flight.remove(request)
        self._serialising -= request.serialising
        request.over = True
        if request.done is not None:
            request.done.set_result(None)

    @asynccontextmanager
    async def exclusive(self, offset: int, length: int) -> AsyncIterator[None]:
        """While inside, no other request of this node overlaps the range, rounded out to whole blocks: for one that looks
        and then acts on what it saw, with the driver's own methods."""
        request = await self._begin_serialising(offset, length, max(self._block(), 1))
        try:
            yield
        finally:
            self._end(request)

    async def hold(self, offset: int, length: int) -> Callable[[], None]:
        """Be in flight as a read of the range is, until the answer is called: what stands there stays there."""
        return partial(self._end, await self._begin(offset, length))

    # -- where -----------------------------------------------------------------------------------------------------
    async def map(self, offset: int, length: int) -> Segment:
        """This node's own answer for the start of the range, reading metadata as needed."""
        while True:
            try:
                return self.driver.map(offset, length)
            except NotMapped:
                await self.driver.load(offset, length)

    # -- moving bytes ------------------------------------------------------------------------------------------------
    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` (bytes) from ``offset``; what lies past the end of the node reads as zeroes."""
        request = await self._begin(offset, len(view))
        try:
            inside = min(max(self.size - offset, 0), len(view))
            if inside < len(view):
                fill_zeroes(view[inside:])
            position = 0
            while position < inside:
                segment = await self.map(offset + position, inside - position)
                part = view[position : position + segment.length]
                await self._read_segment(segment, offset + position, part)
                position += segment.length
        finally:
            self._end(request)

    async def _read_segment(self, segment: Segment, offset: int, part: memoryview) -> None:
        if segment.kind is Kind.DATA:
            assert segment.source is not None
            if self.driver.is_format:
                await tell(self.children.get("file"), Event.READ_AIO)
            await segment.source.read(segment.offset, part)
        elif segment.kind is Kind.ZERO:
            fill_zeroes(part)
        elif segment.kind is Kind.UNALLOCATED:
            if self.backing is not None:
                await tell(self.children.get("file"), Event.READ_BACKING_AIO)
                await self.backing.read(offset, part)
            else:
                fill_zeroes(part)
        else:
            await self.driver.read(offset, part)

    def check_writable(self) -> None:
        """Raise EPERM if the node is read-only or inactive."""
        if self.read_only or not self.active:
            state = "read-only" if self.read_only else "inactive"
            raise PermissionError(errno.EPERM, f"node '{self.name}' is {state}")

    async def write(self, offset: int, data: memoryview, *, fua: bool = False) -> None:
        """Write ``data`` at ``offset`` (bytes); with ``fua`` it is on stable storage on return."""
        self.check_writable()
        if self.detect_zeroes is not DetectZeroes.OFF and is_zero(data):
            flags = ZeroFlags.NONE
            if self.detect_zeroes is DetectZeroes.UNMAP and self.discard_mode is Discard.UNMAP:
                flags = ZeroFlags.MAY_UNMAP
            await self.write_zeroes(offset, len(data), flags, fua=fua)
            return
        step = self.driver.request_alignment
        if (offset | len(data)) % step:  # the driver reads and rewrites the blocks around it
            request = await self._begin_serialising(offset, len(data), step)
        else:
            request = await self._begin(offset, len(data))
        durably = fua and self.driver.writes_durably and not self.cache_no_flush
        await self._do_write(request, offset, data, durably=durably)
        if fua and not durably:
            await self.flush()

    async def write_serialising(self, offset: int, data: memoryview) -> None:
        """Write once every request that overlaps and came before is over, reads too: none of them sees the new bytes, nor what
        the caller does to a node below after this write."""
        self.check_writable()
        request = await self._begin_serialising(offset, len(data), self.driver.request_alignment)
        await self._do_write(request, offset, data)

    async def _do_write(self, request: InFlight, offset: int, data: memoryview, *, durably: bool = False) -> None:
        try:
            await (self.driver.write_durably(offset, data) if durably else self.driver.write(offset, data))
        finally:
            self.written(offset, len(data))
            self._end(request)

    async def copy_in(self, offset: int, extents: Extents) -> None:
        """Write bytes that stand in host files at ``offset`` (bytes). Raises SourceUnreadable where they cannot be read."""
        self.check_writable()
        looks = self.detect_zeroes is not DetectZeroes.OFF
        if not self.driver.copies_in or (looks and await extents.may_be_zero()):
            await write_through_memory(extents, offset, self.write)
            return
        step, length = self.driver.request_alignment, len(extents)
        if (offset | length) % step:
            request = await self._begin_serialising(offset, length, step)
        else:
            request = await self._begin(offset, length)
        try:
            await self.driver.copy_in(offset, extents)
        finally:
            self.written(offset, length)
            self._end(request)

    async def write_zeroes(
        self, offset: int, length: int, flags: ZeroFlags = ZeroFlags.NONE, *, fua: bool = False
    ) -> None:
        """Zero ``length`` bytes; raises ENOTSUP under NO_FALLBACK where that would be slow."""
        self.check_writable()
        if self.discard_mode is Discard.IGNORE:
            flags &= ~ZeroFlags.MAY_UNMAP
        request = await self._begin_serialising(offset, length, self._block())
        try:
            await self._zero(offset, length, flags)
        finally:
            self.written(offset, length)
            self._end(request)
        if fua:
            await self.flush()

    async def _zero(self, offset: int, length: int, flags: ZeroFlags) -> None:
        try:
            await self.driver.write_zeroes(offset, length, flags)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP) or flags & ZeroFlags.NO_FALLBACK:
                raise
            for start in range(0, length, len(ZERO_CHUNK)):
                step = min(len(ZERO_CHUNK), length - start)
                await self.driver.write(offset + start, memoryview(ZERO_CHUNK)[:step])

    async def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Drop the storage of the range, unless the node ignores discards."""
        self.check_writable()
        if self.discard_mode is Discard.UNMAP:
            request = await self._begin_serialising(offset, length, self._block())
            try:
                await self.driver.discard(offset, length)
            finally:
                self.written(offset, length)
                self._end(request)
        if fua:
            await self.flush()

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        """Write whole clusters compressed (the last may be short at the image's end)."""
        self.check_writable()
        request = await self._begin_serialising(offset, len(data), self._block())
        try:
            await self.driver.write_compressed(offset, data)
        finally:
            self.written(offset, len(data))
            self._end(request)

    def _block(self) -> int:
        """Bytes that a request which re-maps storage works on as one."""
        return max(self.driver.map_granularity, self.driver.request_alignment)

    async def prefetch(self, offset: int, length: int) -> None:
        """Bring a range (bytes, inside the node) into the host's cache, as far as that is cheap to ask for."""
        request = await self._begin(offset, length)
        try:
            while length > 0:
                segment = await self.map(offset, length)
                if segment.kind is Kind.DATA:
                    assert segment.source is not None
                    await segment.source.prefetch(segment.offset, segment.length)
                elif segment.kind is Kind.UNALLOCATED and self.backing is not None:
                    await self.backing.prefetch(offset, segment.length)
                elif segment.kind in (Kind.COMPRESSED, Kind.OPAQUE):
                    await self.driver.prefetch(offset, segment.length)
                offset += segment.length
                length -= segment.length
        finally:
            self._end(request)

    async def flush(self) -> None:
        """Put every acknowledged write on stable storage, down through the children."""
        await tell(primary(self), Event.FLUSH_TO_OS)
        if self.cache_no_flush:
            await self.driver.flush_metadata()
        else:
            await self.driver.flush()

    async def truncate(self, size: int, *, exact: bool = True, prealloc: Preallocation = Preallocation.OFF) -> None:
        """Resize to ``size`` bytes. The caller has drained the node and holds RESIZE."""
        self.check_writable()
        old = self.size
        request = await self._begin_serialising(min(old, size), 1 << 62)
        try:
            await self.driver.truncate(size, exact=exact, prealloc=prealloc)
        finally:
            self._end(request)
        # What is new is no write of a guest's, but a job that copies must learn of it.
        self.bitmaps.follow_size()
        if self.size > old:
            for tracker in self.bitmaps.others(self.trackers):
                tracker.mark(old, self.size - old)
            self._grown(old, self.size - old)
        else:
            self.mapping_changed()
        self.graph.resized(self)
        if self.bitmaps:
            await self.driver.sync_bitmaps()

    def _grown(self, old: int, more: int) -> None:
        """What lies past the old end shows differently where this node shows through. A format that stores in this node
        keeps its mapping."""
        for edge in self.parents:
            if edge.role & (Role.COW | Role.FILTERED):
                edge.parent.child_mapping_changed(edge, old, more)

    def written(self, offset: int, length: int) -> None:
        """Account a finished change of the range: dirty trackers, the highest offset written."""
        if offset + length > self.own_highest:
            self.own_highest = offset + length
        for tracker in self.trackers:
            tracker.mark(offset, length)

    def __repr__(self) -> str:
        return f"<Node {self.name} {self.options.driver}>"


def read_now(node: Node, offset: int, view: memoryview, *, stored: bool = False) -> bool:
    """`Node.read` without awaiting, and so atomic towards the event loop: True; or False, with anything in ``view``, where
    something must be waited for or asked: metadata, cold pages, a request that others wait for, a filter, compressed data.
    ``stored``: False, too, where not all of the range is data, as `block_status` has it."""
    position, end = 0, len(view)
    if node.busy and node.barred(offset, end):
        return False
    driver, size = node.driver, node.size
    while position < end:
        at = offset + position
        inside = min(end - position, size - at)
        if inside <= 0:
            fill_zeroes(view[position:])
            return not stored
        try:
            segment = driver.map(at, inside)
        except NotMapped:
            return False
        part = view[position : position + segment.length]
        position += segment.length
        if segment.kind is Kind.DATA:
            if not _read_data_now(driver, segment, part, stored=stored):
                return False
        elif segment.kind is Kind.UNALLOCATED and node.backing is not None:
            if not read_now(node.backing.node, at, part, stored=stored):
                return False
        elif segment.kind in (Kind.UNALLOCATED, Kind.ZERO) and not stored:
            fill_zeroes(part)
        else:
            return False
    return True


def _read_data_now(driver: Driver, segment: Segment, part: memoryview, *, stored: bool) -> bool:
    source = segment.source
    if isinstance(source, Edge):
        stored = stored and (driver.shows_through() or driver.may_have_holes())
        return read_now(source.node, segment.offset, part, stored=stored)
    assert source is not None
    if source.inline_flags is None or (stored and driver.data_run(segment.offset, len(part)) != (True, len(part))):
        return False
    try:
        return os.preadv(source.fd, (part,), segment.offset, source.inline_flags) == len(part)
    except OSError:  # cold, or an error that is told when the slow path meets it
        return False


def write_now(node: Node, offset: int, data: memoryview) -> bool:
    """`Node.write` without awaiting, and so atomic towards the event loop: True; or False, with nothing or a part of it written,
    where `write` must do it (again): allocations that must wait, filters that have their say, a file that grows, errors."""
    if (
        node.read_only
        or node.detect_zeroes is not DetectZeroes.OFF
        or (offset | len(data)) % node.driver.request_alignment
    ):
        return False
    if offset + len(data) > node.size or (node.busy and node.overlapped(offset, len(data))):
        return False
    position, end = 0, len(data)
    while position < end:
        at = offset + position
        try:
            segment = node.driver.map(at, end - position)
        except NotMapped:
            return False
        part = data[position : position + segment.length]
        if segment.kind is Kind.DATA and segment.in_place:
            done = _write_in_place_now(segment, part)
        else:
            part = data[position:]
            try:
                done = node.driver.write_now(at, part)
            except OSError:
                return False
        if not done:
            return False
        position += len(part)
    node.written(offset, end)
    return True


def _write_in_place_now(segment: Segment, part: memoryview) -> bool:
    source = segment.source
    if isinstance(source, Edge):
        return source.may_write and write_now(source.node, segment.offset, part)
    assert source is not None
    if not source.inline_writes:
        return False
    try:
        source.write_blocking(segment.offset, part)
    except OSError:
        return False
    return True


def fill_zeroes(view: memoryview) -> None:
    """Zero a byte view in place."""
    for start in range(0, len(view), len(ZERO_CHUNK)):
        part = view[start : start + len(ZERO_CHUNK)]
        part[:] = ZERO_CHUNK[: len(part)]


def is_zero(data: memoryview) -> bool:
    """Whether all bytes are zero."""
    return not data.nbytes or (data[0] == 0 and not any_nonzero(data))


def any_nonzero(data: memoryview) -> bool:
    """Whether any byte is not zero; compares in chunks (memcmp) rather than byte by byte."""
    return any(
        bytes(data[start : start + len(ZERO_CHUNK)]) != ZERO_CHUNK[: min(len(ZERO_CHUNK), len(data) - start)]
        for start in range(0, len(data), len(ZERO_CHUNK))
    )


def io_error(number: int, what: str) -> OSError:
    """An OSError with the number's own text and what was tried."""
    return OSError(number, f"{os.strerror(number)}: {what}")


__all__ = [
    "DirtyTracker",
    "Edge",
    "InFlight",
    "Node",
    "Parent",
    "fill_zeroes",
    "io_error",
    "is_zero",
    "read_now",
    "write_now",
]

"""copy-on-read: what is read from a backing file is kept in the image above it.

A filter on a node: a read of what the node does not hold itself is copied into it, and the next read finds it there.
With ``bottom`` (a node of the chain) only data from the layers down to it, itself included, is copied.

`map` shows the node's own data as it is, so that what is there stays on the fast path; what is not yet is OPAQUE, and
is copied when it is read. `copy_up` is the one way in which data moves up a chain: a block-stream job, which works through
such a filter, uses it too. It holds its range exclusively, looks again at what is still missing there, and only then
writes, so that a guest's write always wins.

Where we differ: QEMU fails the guest's read when the data cannot be kept (a full disk). Here the guest gets its data,
which was read all right; it is merely not kept.

Source: QEMU ``block/copy-on-read.c``, ``block/io.c`` (bdrv_co_do_copy_on_readv).
"""

from __future__ import annotations

from typing import Any

import msgspec

from livedisk.emulator.block.copy import PIECE, SMALL, STEP, grain_of
from livedisk.emulator.block.driver import Driver, register
from livedisk.emulator.block.extents import copy_buffer
from livedisk.emulator.block.node import Edge, Node, is_zero
from livedisk.emulator.block.options import BlockdevOptions, BlockdevRef
from livedisk.emulator.block.permissions import Perm, Role
from livedisk.emulator.block.pins import pinned
from livedisk.emulator.block.status import allocation_depth
from livedisk.emulator.block.types import HostOffset, Kind, Preallocation, Segment, ZeroFlags
from livedisk.emulator.errors import BlockError


class CopyOnReadOptions(BlockdevOptions, kw_only=True):
    """What a copy-on-read filter takes."""

    file: BlockdevRef
    bottom: str | msgspec.UnsetType = msgspec.UNSET
    """The lowest layer whose data is copied; its node name."""


class CopyOnRead(Driver):
    """A filter that fills the node below it as it is read."""

    name = "copy-on-read"
    Options = CopyOnReadOptions
    options: CopyOnReadOptions
    is_filter = True

    async def open(self) -> None:
        self._edge = await self.node.graph.open_child(
            self.node, self.options.file, "file", Role.FILTERED | Role.PRIMARY
        )
        self._bottom: Node | None = None
        if isinstance(self.options.bottom, str):
            self._bottom = self._find_bottom(self.options.bottom)
        self.map_granularity = self._edge.node.driver.map_granularity
        self.request_alignment = self._edge.node.driver.request_alignment

    def _find_bottom(self, name: str) -> Node:
        bottom = self.node.graph.nodes.get(name)
        if bottom is None:
            raise BlockError(f"Bottom node '{name}' not found")
        if bottom.driver.is_filter:
            raise BlockError(f"Bottom node '{name}' is a filter")
        layer: Node | None = self._edge.node
        while layer is not None and layer is not bottom:
            edge = layer.filtered or layer.backing
            layer = edge.node if edge is not None else None
        if layer is None:
            raise BlockError(f"Bottom node '{name}' is not in the backing chain of the filter node '{self.node.name}'")
        return bottom

    @property
    def size(self) -> int:
        return self._edge.node.size

    # -- where -------------------------------------------------------------------------------------------------------
    def map(self, offset: int, length: int) -> Segment:
        below = self._edge.node
        segment = below.driver.map(offset, length)
        if segment.kind is Kind.UNALLOCATED and below.backing is not None and below is not self._bottom:
            return Segment(Kind.OPAQUE, segment.length)
        return Segment(Kind.DATA, segment.length, self._edge, HostOffset(offset), True)

    async def load(self, offset: int, length: int) -> None:
        await self._edge.node.driver.load(offset, length)

    # -- moving bytes ------------------------------------------------------------------------------------------------
    async def read(self, offset: int, view: memoryview) -> None:
        below = self._edge.node
        if not below.read_only:
            try:
                await self.fill(offset, len(view))
            except OSError:
                pass  # not kept; the read itself says whether the data can be had
        await below.read(offset, view)

    async def fill(self, offset: int, length: int) -> None:
        """Copy into the node below what it lacks of the range and layers down to ``bottom`` hold. Raises OSError."""
        below = self._edge.node
        stop = _under(self._bottom) if self._bottom is not None else None
        end = min(offset + length, below.size)
        while offset < end:
            depth, run = await allocation_depth(below, offset, min(end - offset, PIECE), stop)
            if depth > 1:
                await copy_up(below, offset, run)
            offset += run

    async def write(self, offset: int, data: memoryview) -> None:
        await self._edge.write(offset, data)

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        await self._edge.node.write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self._edge.node.discard(offset, length)

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        await self._edge.node.write_compressed(offset, data)

    async def truncate(self, size: int, *, exact: bool, prealloc: Preallocation) -> None:
        await self._edge.node.truncate(size, exact=exact, prealloc=prealloc)

    def highest_written(self) -> int:
        return self._edge.node.wr_highest

    # -- permissions and reopening -----------------------------------------------------------------------------------
    def child_perms(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        if edge.node.read_only:
            return perm, shared
        return perm | Perm.WRITE_UNCHANGED, shared

    async def reopen_prepare(self, options: Any, *, read_only: bool) -> None:
        self.check_unchanged(options)


def _under(node: Node) -> Node | None:
    edge = node.filtered or node.backing
    return edge.node if edge is not None else None


async def copy_up(node: Node, offset: int, length: int) -> None:
    """Copy what ``node`` lacks of the range (bytes, inside it) from its backing file into it. What its users see does not
    change. Memory: at most `STEP`. Raises OSError."""
    for start in range(offset, offset + length, PIECE):
        await _copy_chunk(node, start, min(PIECE, offset + length - start))


async def _copy_chunk(node: Node, offset: int, length: int) -> None:
    end = offset + length
    async with node.exclusive(offset, length):
        while offset < end:
            segment = await node.map(offset, end - offset)
            run, backing = segment.length, node.backing
            if segment.kind is Kind.UNALLOCATED and backing is not None:
                run = await _lift(node, backing, offset, run)
            offset += run


async def _lift(node: Node, backing: Edge, offset: int, length: int) -> int:
    """Copy the start of a range that ``node`` lacks; gives how many bytes. The caller has it exclusively."""
    grain = grain_of(node)
    if length > SMALL and node.driver.copies_in and not offset % grain:
        # In whole clusters: nothing around the data has to be read from below, which is pinned.
        whole = length if offset + length == node.size else length // grain * grain
        async with pinned(backing.node, offset, whole, _own(node)) as extents:
            if extents is not None and len(extents) < whole:
                extents = extents[: len(extents) // grain * grain]
            if extents is not None and len(extents) and not await extents.may_be_zero():
                await node.driver.copy_in(offset, extents)
                return len(extents)
    length = min(length, STEP)
    with copy_buffer() as buffer, memoryview(buffer) as room, room[:length] as data:
        await backing.read(offset, data)
        await _keep(node, offset, data)
    return length


def _own(node: Node) -> set[Node]:
    """The node and what it stores its bytes in."""
    stores = [edge.node for edge in node.children.values() if not edge.role & Role.COW]
    return {node, *stores, *(below for store in stores for below in node.graph.below(store))}


async def _keep(node: Node, offset: int, data: memoryview) -> None:
    """Write what was read from below; zeroes as zeroes."""
    if is_zero(data):
        try:
            await node.driver.write_zeroes(offset, len(data), ZeroFlags.MAY_UNMAP)
            return
        except OSError:
            pass  # no quick way: as data
    await node.driver.write(offset, data)


register(CopyOnRead)

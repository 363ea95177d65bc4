"""Making a range of one node read as another's: what jobs, and filters that copy, have in common.

`copy_range` asks block status of the source, so that what reads as zeroes is written as zeroes whatever its length. Data is moved
in one of two ways:

* *from host file to host file* (`pins.py`, `extents.py`), up to `PIECE` bytes at a time, where both sides say where their bytes
  stand: nothing passes through this process;
* *through memory*, `STEP` bytes at a time: what is compressed or must be asked for, what is to be compressed, clusters that the
  range covers only in part (the target reads around them, and must not while the source is pinned), and where the target, or
  what it shows, is part of the source.

A few bytes of data for which nothing has to be waited are copied without a task at all (`copy_now`).

Pieces are whole clusters of the target: zeroes shorter than a cluster are copied as data. Both ways go through the nodes' own
requests, so that a copy is in flight on them, waits for what overlaps, and marks the target's dirty trackers. Neither keeps
anybody off the range between the read and the write: a caller with a guest that writes to the source or the target does that
(`jobs/copy.py`, a filter's own ranges).

`CopyFailed` says which side failed, because callers answer a source and a target that fail by policies of their own.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Awaitable
from typing import Final

from livedisk.emulator.block.extents import COPY_BUFFER, SourceUnreadable, copy_buffer
from livedisk.emulator.block.node import Edge, Node, is_zero, read_now, write_now
from livedisk.emulator.block.pins import pinned
from livedisk.emulator.block.status import BlockStatus, block_status
from livedisk.emulator.block.types import ZeroFlags

STEP: Final = COPY_BUFFER
"""Bytes in memory of one copy at most; a multiple of every cluster size. Above what `HostFile` moves inline, so that threads
do it, on every core, while the guest is served."""
PIECE: Final = 4 << 20
"""Bytes moved from host file to host file at once."""
SMALL: Final = 512 << 10
"""Bytes that are copied through memory in any case: where nothing blocks they are through before a thread would have begun,
and before the guest's next write, so that a mirror catches up with a guest that writes all over the disk."""
ZERO_STEP: Final = 1 << 30
"""Bytes zeroed in one request at most."""


class Side(enum.Enum):
    """Which node of a copy."""

    SOURCE = enum.auto()
    TARGET = enum.auto()


class CopyFailed(Exception):
    """A copy failed on one side; ``error`` says why. Not for users: who copies answers it by its policies."""

    def __init__(self, side: Side, error: OSError) -> None:
        super().__init__(str(error))
        self.side = side
        self.error = error


async def copy_range(
    source: Edge,
    target: Edge,
    offset: int,
    length: int,
    *,
    flags: ZeroFlags = ZeroFlags.NONE,
    detect_zeroes: bool = False,
    compressed: bool = False,
    leave_zeroes: bool = False,
    offload: bool = True,
    granule: int = 0,
    zeroes_as_data: bool = False,
) -> None:
    """Make the target read as the source does in the range (bytes, inside both).

    ``flags``: how zeroes are written; ``detect_zeroes``: look for them in data too; ``compressed``: write data compressed, for
    which the range must be whole clusters of the target (but for its end); ``leave_zeroes``: write none where the target reads
    as zeroes already (not for one that will get a backing file); ``offload``: the kernel may move data; ``granule``: look for
    zeroes of so many bytes in data, rounded up to clusters of the target (0: not); ``zeroes_as_data``: write zeroes as data, so
    that they are allocated.
    Raises CopyFailed; what was copied by then stays.
    """
    _check(source, target, offset, length)
    copier = _Copier(source, target, flags)
    copier.detect_zeroes, copier.leave_zeroes, copier.compressed = detect_zeroes, leave_zeroes, compressed
    copier.offloads = copier.offloads and offload and not compressed and not granule
    copier.granule = -(-granule // copier.grain) * copier.grain
    copier.zeroes_as_data = zeroes_as_data
    await copier.run(offset, offset + length)


def copy_now(source: Edge, target: Edge, offset: int, length: int) -> bool:
    """`copy_range` of a few bytes of data without awaiting, and so atomic towards the event loop: True; or False, with nothing
    or a part of it copied, where `copy_range` must do it: more than `SMALL`, zeroes, cold pages, anything that waits or fails."""
    if length > SMALL or not target.may_write:
        return False
    if offset + length > source.node.size or offset + length > target.node.size:
        return False
    with copy_buffer() as buffer, memoryview(buffer) as whole, whole[:length] as data:
        return read_now(source.node, offset, data, stored=True) and write_now(target.node, offset, data)


class _Copier:
    """One call of `copy_range`. ``grain``: bytes that the target maps, or compresses, as one; ``offloads``: whether the kernel
    moves data where it can."""

    def __init__(self, source: Edge, target: Edge, flags: ZeroFlags) -> None:
        self.source = source
        self.target = target
        self.flags = flags
        self.detect_zeroes = self.leave_zeroes = self.compressed = self.zeroes_as_data = False
        self.granule = 0
        self.grain = grain_of(target.node)
        self._of_target = {target.node, *target.node.graph.below(target.node)}
        self.offloads = target.node.driver.copies_in and source.node not in self._of_target

    async def run(self, offset: int, end: int) -> None:
        while offset < end:
            length, zero = await self._look(offset, end)
            if zero and not self.zeroes_as_data:
                length = await self._zero(offset, length)
            else:
                length = await self._move(offset, length)
            offset += length

    async def _look(self, offset: int, end: int) -> tuple[int, bool]:
        """The length of the run at ``offset``, and whether it is to be written as zeroes: whole clusters, but at the range's
        ends; data up to `PIECE`."""
        grain, stop = self.grain, min(end, offset + PIECE)
        status = await run_at(self.source, offset, end - offset)
        position = offset + status.length
        if status.zero and (whole := position if position >= end else position // grain * grain) > offset:
            return min(whole - offset, ZERO_STEP), True
        while position < stop:
            status = await run_at(self.source, position, end - position)
            after = position + status.length
            if status.zero and (after >= end or after // grain * grain > -(-position // grain) * grain):
                position = min(-(-position // grain) * grain, end)
                break
            position = after
        return min(position, stop) - offset, False

    async def _zero(self, offset: int, length: int) -> int:
        """Have zeroes at ``offset``; gives how many bytes of them."""
        node = self.target.node
        if self.leave_zeroes:
            try:
                status = await block_status(node, offset, length)
            except OSError as error:
                raise CopyFailed(Side.TARGET, error) from error
            if status.zero and status.length:
                return min(status.length, length)
        await writing(node.write_zeroes(offset, length, self.flags))
        return length

    async def _move(self, offset: int, length: int) -> int:
        """Copy data at ``offset``; gives how many bytes of it."""
        grain, size = self.grain, self.target.node.size
        if not self.offloads or length <= SMALL:
            return await self._through_memory(offset, min(length, STEP))
        if inside := offset % grain:
            return await self._through_memory(offset, min(length, grain - inside))
        whole = length if offset + length == size else length // grain * grain
        if whole:
            done = await self._offload(offset, whole)
            if done:
                return done
        return await self._through_memory(offset, min(length, STEP))

    async def _offload(self, offset: int, length: int) -> int:
        """Copy from host file to host file; gives how many bytes. 0: it cannot be."""
        try:
            async with pinned(self.source.node, offset, length, self._of_target) as extents:
                if extents is None:
                    return 0
                if len(extents) < length:
                    extents = extents[: len(extents) // self.grain * self.grain]
                if not len(extents) or (self.detect_zeroes and await extents.may_be_zero()):
                    return 0
                await writing(self.target.copy_in(offset, extents))
                return len(extents)
        except OSError as error:
            raise CopyFailed(Side.SOURCE, error) from error

    async def _through_memory(self, offset: int, length: int) -> int:
        with copy_buffer() as buffer, memoryview(buffer) as whole, whole[:length] as data:
            await reading(self.source.read(offset, data))
            if self.granule:
                await self._put_sifted(offset, data)
            elif self.detect_zeroes and is_zero(data):
                await writing(self.target.node.write_zeroes(offset, length, self.flags))
            else:
                await self._put(offset, data)
        return length

    async def _put(self, offset: int, data: memoryview) -> None:
        if self.compressed:
            await writing(self.target.node.write_compressed(offset, data))
        else:
            await writing(self.target.write(offset, data))

    async def _put_sifted(self, offset: int, data: memoryview) -> None:
        """Write data, and zeroes where a whole granule of the disk, or what is here of it, is zeroes."""
        length, start = len(data), 0
        while start < length:
            stop, zero = start, None
            while stop < length:
                step = min(self.granule - (offset + stop) % self.granule, length - stop)
                with data[stop : stop + step] as part:
                    found = is_zero(part)
                if zero is not None and found is not zero:
                    break
                zero, stop = found, stop + step
            if zero:
                await self._zero_all(offset + start, stop - start)
            else:
                with data[start:stop] as part:
                    await self._put(offset + start, part)
            start = stop

    async def _zero_all(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            offset += await self._zero(offset, end - offset)


def _check(source: Edge, target: Edge, offset: int, length: int) -> None:
    for side, edge in ((Side.SOURCE, source), (Side.TARGET, target)):
        if offset + length > edge.node.size:
            what = f"[{offset}, {offset + length}) is outside node '{edge.node.name}' ({edge.node.size} bytes)"
            raise CopyFailed(side, OSError(errno.EIO, f"{os.strerror(errno.EIO)}: {what}"))
    if not target.may_write:
        what = f"no write permission on node '{target.node.name}' as '{target.name}'"
        raise CopyFailed(Side.TARGET, PermissionError(errno.EPERM, what))


def grain_of(node: Node) -> int:
    """Bytes that the image below maps, or writes compressed, as one; 1 where it has no clusters."""
    while node.filtered is not None:
        node = node.filtered.node
    return max(node.driver.cluster_size(), node.driver.map_granularity, 1)


async def run_at(source: Edge, offset: int, length: int) -> BlockStatus:
    """Block status of the run at ``offset``. Raises CopyFailed."""
    try:
        return await block_status(source.node, offset, length)
    except OSError as error:
        raise CopyFailed(Side.SOURCE, error) from error


async def reading(request: Awaitable[None]) -> None:
    """Await a request to the source. Raises CopyFailed."""
    try:
        await request
    except OSError as error:
        raise CopyFailed(Side.SOURCE, error) from error


async def writing(request: Awaitable[None]) -> None:
    """Await a request to the target. Raises CopyFailed."""
    try:
        await request
    except SourceUnreadable as error:
        raise CopyFailed(Side.SOURCE, error) from error
    except OSError as error:
        raise CopyFailed(Side.TARGET, error) from error

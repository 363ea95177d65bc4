"""The filters that commit and mirror jobs put on their source: ``commit_top`` and ``mirror_top``.

Users cannot open them, but see them by name while such a job runs. Both show their child straight, so that the fast path
goes through them as if they were not there.

* ``commit_top`` stands on the top of what an intermediate commit moves down. Nobody above it relies on the images
  between top and base any more, only on what they show together: so it asks nothing of them and shares everything,
  which lets the job write into the base.
* ``mirror_top`` stands on the source of a mirror or an active commit. Its ``mirror`` is told of guests' writes: in the
  background the job's dirty map, among the node's trackers, learns of them afterwards, also from the fast path; while
  ``mirror`` is set, no write may bypass the driver, and each reaches the target before it is acknowledged.

Source: QEMU ``block/commit.c`` (bdrv_commit_top), ``block/mirror.c`` (bdrv_mirror_top).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from livedisk.emulator.block.driver import Driver, register
from livedisk.emulator.block.node import Edge
from livedisk.emulator.block.options import BlockdevOptions, BlockdevRef
from livedisk.emulator.block.permissions import Perm, Role
from livedisk.emulator.block.types import HostOffset, Kind, Preallocation, Segment, ZeroFlags


class JobFilterOptions(BlockdevOptions, kw_only=True):
    """The node that the filter shows."""

    backing: BlockdevRef


class JobFilter(Driver):
    """Shows its child, whatever is asked."""

    Options = JobFilterOptions
    options: JobFilterOptions
    is_filter = True
    internal = True
    named_as_child = True

    async def open(self) -> None:
        role = Role.FILTERED | Role.PRIMARY
        self._edge = await self.node.graph.open_child(self.node, self.options.backing, "backing", role)
        self.request_alignment = self._edge.node.driver.request_alignment

    @property
    def size(self) -> int:
        return self._edge.node.size

    @property
    def filename(self) -> str:
        return self._edge.node.driver.filename

    def map(self, offset: int, length: int) -> Segment:
        return Segment(Kind.DATA, length, self._edge, HostOffset(offset), True)

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


class CommitTop(JobFilter):
    """See the module."""

    name = "commit_top"

    def child_perms(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        return Perm.NONE, Perm.ALL


class Mirror(Protocol):
    """Where writes go besides the source, while they are mirrored at once. None of these raises: a write that the target
    could not take is the job's business, not the guest's."""

    async def write(self, offset: int, data: memoryview) -> None:
        """The source took this write, or is about to: the caller has the range for itself."""

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        """Likewise."""

    async def discard(self, offset: int, length: int) -> None:
        """The source took this discard, or did something else of which only it can tell the outcome: a write that failed, and
        may have been made in part. What it holds there now is to be copied."""

    async def enter(self, offset: int, length: int) -> None:
        """Have the range for oneself."""

    def leave(self, offset: int, length: int) -> None:
        """Let others in again."""


class Lack(Protocol):
    """What a mirror's target lacks, in bytes, by granules of so many bytes."""

    @property
    def dirty(self) -> int: ...

    @property
    def granularity(self) -> int: ...


class MirrorTop(JobFilter):
    """See the module. ``commits``: the target is a node below, so its writers must be shared. ``lack``: the job's dirty map,
    which queries show."""

    name = "mirror_top"
    mirror: Mirror | None = None
    lack: Lack | None = None
    commits = False

    def own_bitmaps(self) -> Sequence[tuple[int, int]]:
        return [(self.lack.granularity, self.lack.dirty)] if self.lack is not None else ()

    def map(self, offset: int, length: int) -> Segment:
        return Segment(Kind.DATA, length, self._edge, HostOffset(offset), self.mirror is None)

    def child_perms(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        if self.commits:
            return perm & ~Perm.CONSISTENT_READ, shared | Perm.WRITE
        return perm, shared

    async def write(self, offset: int, data: memoryview) -> None:
        mirror = self.mirror
        if mirror is None:
            await super().write(offset, data)
            return
        await mirror.enter(offset, len(data))
        try:
            await super().write(offset, data)
            await mirror.write(offset, data)
        except BaseException:
            await mirror.discard(offset, len(data))
            raise
        finally:
            mirror.leave(offset, len(data))

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        mirror = self.mirror
        if mirror is None:
            await super().write_zeroes(offset, length, flags)
            return
        await mirror.enter(offset, length)
        try:
            await super().write_zeroes(offset, length, flags)
            await mirror.write_zeroes(offset, length, flags)
        except BaseException:
            await mirror.discard(offset, length)
            raise
        finally:
            mirror.leave(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        mirror = self.mirror
        if mirror is None:
            await super().discard(offset, length)
            return
        await mirror.enter(offset, length)
        try:
            await super().discard(offset, length)
        finally:
            await mirror.discard(offset, length)
            mirror.leave(offset, length)

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        mirror = self.mirror
        if mirror is None:
            await super().write_compressed(offset, data)
            return
        await mirror.enter(offset, len(data))
        try:
            await super().write_compressed(offset, data)
        finally:
            await mirror.discard(offset, len(data))
            mirror.leave(offset, len(data))


register(CommitTop)
register(MirrorTop)

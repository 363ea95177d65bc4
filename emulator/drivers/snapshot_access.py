"""snapshot-access: shows the moment at which the copy-before-write filter below it was made, while the guest writes on.

    reader ─> snapshot-access ─> copy-before-write ─file─> the disk
                                         └──target─> what the disk's clusters were

A cluster that was copied is read from the target, any other from the disk itself. The latter is *frozen* for as long as the read
takes: a guest's write whose copy was made meanwhile waits for it (`PointInTime`). On the fast path nothing need be frozen, such
a read is over before anything else happens.

What the filter's ``bitmap`` leaves out, what was discarded here (the reader is done with it: it is neither copied nor kept
any more) and everything, once the moment is lost, gives EACCES. It takes no writes.

Block status is that of the place where the bytes are. Where we differ: QEMU looks at the topmost layer of the disk only,
and tells of what stands in a backing file as of a hole that is not zero. Source: QEMU ``block/snapshot-access.c``,
``block/copy-before-write.c`` (cbw_co_preadv_snapshot and its neighbours).
"""

from __future__ import annotations

import errno
import os

from livedisk.emulator.block.driver import Driver, register
from livedisk.emulator.block.node import Edge
from livedisk.emulator.block.options import BlockdevOptions, BlockdevRef
from livedisk.emulator.block.permissions import Perm, Role
from livedisk.emulator.block.point_in_time import Inaccessible
from livedisk.emulator.block.status import BlockStatus, Status, block_status
from livedisk.emulator.block.types import HostOffset, Kind, Segment, ZeroFlags
from livedisk.emulator.drivers.copy_before_write import CopyBeforeWrite


class SnapshotAccessOptions(BlockdevOptions, kw_only=True):
    """What snapshot-access takes: ``file``, a copy-before-write node."""

    file: BlockdevRef


class SnapshotAccess(Driver):
    """See the module."""

    name = "snapshot-access"
    Options = SnapshotAccessOptions
    options: SnapshotAccessOptions
    named_as_child = True

    async def open(self) -> None:
        self._edge = await self.node.graph.open_child(
            self.node, self.options.file, "file", Role.FILTERED | Role.PRIMARY
        )
        below = self._edge.node.driver
        self.map_granularity = below.map_granularity
        self.request_alignment = below.request_alignment

    @property
    def size(self) -> int:
        below = self._edge.node.driver
        return below.moment.size if isinstance(below, CopyBeforeWrite) else below.size

    @property
    def _filter(self) -> CopyBeforeWrite:
        below = self._edge.node.driver
        if not isinstance(below, CopyBeforeWrite):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        return below

    # -- where -------------------------------------------------------------------------------------------------------
    def map(self, offset: int, length: int) -> Segment:
        below = self._edge.node.driver
        if not isinstance(below, CopyBeforeWrite):
            return Segment(Kind.OPAQUE, length)
        try:
            length, in_target = below.moment.place(offset, length)
        except Inaccessible:
            return Segment(Kind.OPAQUE, below.moment.blank(offset, length))
        edge = below.target if in_target else _Frozen(below)
        return Segment(Kind.DATA, length, edge, HostOffset(offset))

    async def status(self, offset: int, length: int) -> BlockStatus:
        below = self._filter
        try:
            length, in_target = below.moment.place(offset, length)
        except Inaccessible:
            raise _no_access() from None
        if in_target:
            found = await block_status(below.target.node, offset, length)
        else:
            async with below.moment.frozen(offset, length):
                found = await block_status(below.disk.node, offset, length)
        # This node is all there is: nothing shows through it.
        return found._replace(flags=found.flags & ~Status.EOF, depth=1, layer=self.node)

    # -- moving bytes ------------------------------------------------------------------------------------------------
    async def read(self, offset: int, view: memoryview) -> None:
        self._filter  # noqa: B018  # ENOTSUP comes first
        raise _no_access()

    async def write(self, offset: int, data: memoryview) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    async def discard(self, offset: int, length: int) -> None:
        await self._filter.forget(offset, length)

    async def flush(self) -> None:
        """Nothing is ever written."""

    def dirty_flag(self) -> None:
        return None

    # -- permissions -------------------------------------------------------------------------------------------------
    def child_perms(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        return Perm.NONE, Perm.ALL


class _Frozen(Edge):
    """The disk below the filter, for reads during which it may not change."""

    __slots__ = ("_filter",)

    def __init__(self, below: CopyBeforeWrite) -> None:
        edge = below.disk
        super().__init__(edge.parent, edge.node, edge.name, edge.role)
        self._filter = below

    async def read(self, offset: int, view: memoryview) -> None:
        async with self._filter.moment.frozen(offset, len(view)):
            await self.node.read(offset, view)


def _no_access() -> OSError:
    return OSError(errno.EACCES, os.strerror(errno.EACCES))


register(SnapshotAccess)

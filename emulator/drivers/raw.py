"""raw: the bytes of a file as they are, or a part of it (``offset``, ``size``).

Without a part it shows its child unchanged, like a filter, and takes no permission that its parents do not need. A part
keeps the file from being resized under it. Source: QEMU ``block/raw-format.c``; ``qapi/block-core.json``
(BlockdevOptionsRaw).
"""

from __future__ import annotations

import errno
import os
from typing import Any

import msgspec

from livedisk.emulator.block.debug import Debugger, Event, tell
from livedisk.emulator.block.driver import Driver, register
from livedisk.emulator.block.extents import Extents
from livedisk.emulator.block.node import Edge
from livedisk.emulator.block.options import BlockdevOptions, BlockdevRef, Natural
from livedisk.emulator.block.permissions import Perm, Role
from livedisk.emulator.block.types import SECTOR, HostOffset, Kind, Preallocation, Segment, ZeroFlags, whole_sectors
from livedisk.emulator.errors import BlockError


class RawOptions(BlockdevOptions):
    """What a raw image takes."""

    file: BlockdevRef
    """The node that has the bytes."""
    offset: Natural = 0
    """Where the image begins in the file, bytes."""
    size: Natural | msgspec.UnsetType = msgspec.UNSET
    """Bytes of the image; absent: up to the end of the file."""


class RawDriver(Driver):
    """A straight view of a file."""

    name = "raw"
    Options = RawOptions
    options: RawOptions
    is_format = True
    copies_in = True

    async def open(self) -> None:
        part = self.options.offset or self.options.size is not msgspec.UNSET
        role = Role.DATA | Role.PRIMARY if part else Role.FILTERED | Role.PRIMARY
        self._edge = await self.node.graph.open_child(self.node, self.options.file, "file", role)
        self._check_part(self.options)
        self._apply(self.options)

    def _apply(self, options: RawOptions) -> None:
        self._offset = options.offset
        self._fixed = options.size if isinstance(options.size, int) else None

    def _check_part(self, options: RawOptions) -> None:
        """Raise BlockError if the file does not hold the part."""
        offset, actual = options.offset, self._edge.node.size
        if offset > actual:
            raise BlockError(f"Offset ({offset}) cannot be greater than size of the containing file ({actual})")
        if isinstance(options.size, int):
            if actual - offset < options.size:
                raise BlockError(
                    f"The sum of offset ({offset}) and size ({options.size}) has to be smaller or equal to the "
                    f" actual size of the containing file ({actual})"
                )
            if options.size % SECTOR:
                raise BlockError(f"Specified size is not multiple of {SECTOR}")

    # -- where -------------------------------------------------------------------------------------------------------
    @property
    def size(self) -> int:
        available = max(self._edge.node.size - self._offset, 0)
        return whole_sectors(available) if self._fixed is None else min(self._fixed, available)

    def map(self, offset: int, length: int) -> Segment:
        return Segment(Kind.DATA, length, self._edge, HostOffset(self._offset + offset), True)

    def shows_through(self) -> bool:
        return True

    @property
    def debugger(self) -> Debugger | None:
        return self._edge.node.driver.debugger

    def vm_state_offset(self) -> int:
        return self._edge.node.driver.vm_state_offset()

    def cluster_size(self) -> int:
        return self._edge.node.driver.cluster_size()

    # -- moving bytes ------------------------------------------------------------------------------------------------
    def _check_inside(self, offset: int, length: int) -> None:
        """A write past the end of a part would hit what is not ours."""
        if self._fixed is not None and offset + length > self._fixed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def write(self, offset: int, data: memoryview) -> None:
        self._check_inside(offset, len(data))
        await tell(self._edge, Event.WRITE_AIO)
        await self._edge.write(self._offset + offset, data)

    async def copy_in(self, offset: int, extents: Extents) -> None:
        self._check_inside(offset, len(extents))
        await self._edge.copy_in(self._offset + offset, extents)

    @property
    def writes_durably(self) -> bool:
        return self._edge.node.driver.writes_durably

    async def write_durably(self, offset: int, data: memoryview) -> None:
        self._check_inside(offset, len(data))
        await self._edge.node.write(self._offset + offset, data, fua=True)

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        self._check_inside(offset, length)
        await self._edge.node.write_zeroes(self._offset + offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        self._check_inside(offset, length)
        await self._edge.node.discard(self._offset + offset, length)

    def highest_written(self) -> int:
        return max(self._edge.node.wr_highest - self._offset, 0)

    async def truncate(self, size: int, *, exact: bool, prealloc: Preallocation) -> None:
        if self._fixed is not None:
            raise BlockError("Cannot resize fixed-size raw disks")
        if size > (1 << 63) - 1 - self._offset:
            raise BlockError("Disk size too large for the chosen offset")
        await self._edge.node.truncate(size + self._offset, exact=exact, prealloc=prealloc)

    # -- permissions and reopening -----------------------------------------------------------------------------------
    def child_perms(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """No more than the parents need: the defaults for storage would add RESIZE to every WRITE."""
        own, own_shared = super().child_perms(edge, perm, shared)
        return own & (perm | ~(Perm.WRITE | Perm.RESIZE)), own_shared

    async def reopen_prepare(self, options: Any, *, read_only: bool) -> None:
        self.check_unchanged(options, changeable=("offset", "size"))
        self._check_part(options)
        self._new_options: RawOptions = options

    def reopen_commit(self) -> None:
        self.options = self._new_options
        self._apply(self.options)
        self.node.mapping_changed()


register(RawDriver)

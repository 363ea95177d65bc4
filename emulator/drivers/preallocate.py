"""preallocate: a filter that lets a growing file grow in large steps.

A write past the end of the file first zeroes a range beyond it, of ``prealloc-size`` bytes, ending at a multiple of
``prealloc-align``, if the file can do that quickly; the writes that follow find their place made. What is shown is the size
without that reserve, which is cut off when the last user that writes is gone, when the node turns read-only or is closed.

For it to know the file's end nobody else may write or resize it meanwhile. Source: QEMU ``block/preallocate.c``; messages asked
from QEMU 10.0.2.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

from livedisk.emulator.block.driver import register
from livedisk.emulator.block.node import Edge
from livedisk.emulator.block.options import BlockdevOptions, BlockdevRef, Natural
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.types import SECTOR, Preallocation, ZeroFlags, whole_sectors
from livedisk.emulator.drivers.opaque_filter import OpaqueFilter
from livedisk.emulator.errors import BlockError

log = logging.getLogger(__name__)

_GROWS: Final = Perm.WRITE | Perm.RESIZE


class PreallocateOptions(BlockdevOptions, kw_only=True):
    """QEMU's BlockdevOptionsPreallocate; bytes."""

    file: BlockdevRef
    prealloc_align: Natural = 1 << 20
    prealloc_size: Natural = 128 << 20


class Preallocate(OpaqueFilter):
    """See the module. ``_end``: bytes shown, while there may be a reserve behind them; -1: the file's own size."""

    name = "preallocate"
    Options = PreallocateOptions
    options: PreallocateOptions

    async def open(self) -> None:
        self._end = -1
        self._growing = asyncio.Lock()
        self._futile = False
        self._dropping: asyncio.Task[None] | None = None
        await self.open_child()
        self._check(self.options)

    def _check(self, options: PreallocateOptions) -> None:
        if options.prealloc_align % SECTOR:
            raise BlockError(f"prealloc-align parameter of preallocate filter is not aligned to {SECTOR}")
        least = self.below.driver.request_alignment
        if options.prealloc_align % least:
            raise BlockError(
                "prealloc-align parameter of preallocate filter is not aligned to underlying node request alignment "
                f"({least})"
            )

    @property
    def size(self) -> int:
        return self._end if self._end >= 0 else self.below.size

    # -- growing -----------------------------------------------------------------------------------------------------
    async def write(self, offset: int, data: memoryview) -> None:
        await self._make_room(offset + len(data))
        await super().write(offset, data)
        self._grown(offset + len(data))

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        await self._make_room(offset + length)
        await super().write_zeroes(offset, length, flags)
        self._grown(offset + length)

    def _grown(self, end: int) -> None:
        if 0 <= self._end < end:
            self._end = whole_sectors(end)

    async def _make_room(self, end: int) -> None:
        """Before a write up to ``end``: reserve what lies behind the file's end. That it cannot be had is no error."""
        if self._futile or end <= self.below.size or self.node.perm & _GROWS != _GROWS:
            return
        async with self._growing:
            start = self.below.size
            if end <= start:
                return
            if self._end < 0:
                self._end = start
            step = max(self.options.prealloc_align, 1)
            stop = -(-(end + self.options.prealloc_size) // step) * step
            try:
                await self.below.write_zeroes(start, stop - start, ZeroFlags.NO_FALLBACK)
            except OSError:
                self._futile = True  # until the file is another one, or resized

    async def _drop_reserve(self) -> None:
        """Cut the file to what is shown."""
        end, self._end = self._end, -1
        if 0 <= end < self.below.size:
            await self.below.truncate(end, exact=True)

    async def truncate(self, size: int, *, exact: bool, prealloc: Preallocation) -> None:
        self._futile = False
        if self._end >= 0:
            if prealloc is Preallocation.OFF and self._end <= size <= self.below.size:
                self._end = size  # the reserve reads as zeroes
                return
            await self._drop_reserve()
        await super().truncate(size, exact=exact, prealloc=prealloc)

    # -- the end of it -------------------------------------------------------------------------------------------------
    def commit_perms(self, perm: Perm, shared: Perm) -> None:
        if perm & _GROWS != _GROWS and self._end >= 0 and self._dropping is None:
            self._dropping = asyncio.get_running_loop().create_task(self._let_go())

    async def _let_go(self) -> None:
        """Nobody writes any more: cut the file, then let others have it."""
        try:
            async with self.node.graph.drained(self.node):
                if self.node.perm & _GROWS != _GROWS:
                    await self._drop_reserve()
        except (OSError, BlockError) as error:
            log.warning("node '%s': the reserve at the end of its file is still there: %s", self.node.name, error)
        finally:
            self._dropping = None
        self.node.graph.refresh_permissions()

    async def close(self) -> None:
        if self._dropping is not None:
            await asyncio.wait([self._dropping])
        await self._drop_reserve()

    async def inactivate(self) -> None:
        await self._drop_reserve()
        await self.flush()

    def child_perms(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        perm, shared = super().child_perms(edge, perm, shared)
        if perm & _GROWS == _GROWS or self._end >= 0:
            return perm | _GROWS, shared & ~_GROWS
        return perm, shared

    async def reopen_prepare(self, options: Any, *, read_only: bool) -> None:
        self.check_unchanged(options, changeable=("prealloc_align", "prealloc_size"))
        self._check(options)
        if read_only:
            await self._drop_reserve()
        self._new_options: PreallocateOptions = options

    def reopen_commit(self) -> None:
        self.options = self._new_options


register(Preallocate)

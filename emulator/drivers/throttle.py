"""throttle: a filter that lets through so many requests or bytes a second, as its group allows.

The group is a ``throttle-group`` object (`block/throttle.py` has the rules). Reads, writes and zero writes count; flushes and
discards pass. While the node is drained nothing is held back. Source: QEMU ``block/throttle.c``; messages asked from QEMU 10.0.2.
"""

from __future__ import annotations

from typing import Any

from livedisk.emulator.block.driver import register
from livedisk.emulator.block.options import BlockdevOptions, BlockdevRef
from livedisk.emulator.block.throttle import Direction, Member, ThrottleGroup
from livedisk.emulator.block.types import ZeroFlags
from livedisk.emulator.drivers.opaque_filter import OpaqueFilter
from livedisk.emulator.errors import BlockError


class ThrottleOptions(BlockdevOptions, kw_only=True):
    """The group's name, and the node below."""

    throttle_group: str
    file: BlockdevRef


class Throttle(OpaqueFilter):
    """See the module."""

    name = "throttle"
    Options = ThrottleOptions
    options: ThrottleOptions

    async def open(self) -> None:
        await self.open_child()
        self._member = Member(self._group(self.options.throttle_group))
        self.node.graph.drain_listeners[self.node] = self

    def _group(self, name: str) -> ThrottleGroup:
        found = self.node.graph.throttle_groups.find(name)
        if found is None:
            raise BlockError(f"Throttle group '{name}' does not exist")
        return found

    async def close(self) -> None:
        del self.node.graph.drain_listeners[self.node]
        self._member.leave()
        self.node.graph.throttle_groups.tidy()

    # -- drains ------------------------------------------------------------------------------------------------------
    def drain_begin(self) -> None:
        """See `throttle.DrainListener`."""
        self._member.suspend()

    def drain_end(self) -> None:
        """See `throttle.DrainListener`."""
        self._member.unsuspend()

    # -- requests ----------------------------------------------------------------------------------------------------
    async def read(self, offset: int, view: memoryview) -> None:
        await self._member.admit(Direction.READ, len(view))
        await super().read(offset, view)

    async def write(self, offset: int, data: memoryview) -> None:
        await self._member.admit(Direction.WRITE, len(data))
        await super().write(offset, data)

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        await self._member.admit(Direction.WRITE, length)
        await super().write_zeroes(offset, length, flags)

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        await self._member.admit(Direction.WRITE, len(data))
        await super().write_compressed(offset, data)

    # -- reopening ---------------------------------------------------------------------------------------------------
    async def reopen_prepare(self, options: Any, *, read_only: bool) -> None:
        self.check_unchanged(options, changeable=("throttle_group",))
        self._new_group = self._group(options.throttle_group)
        self._new_options: ThrottleOptions = options

    def reopen_commit(self) -> None:
        self.options = self._new_options
        if self._new_group is not self._member.group:
            self._member.move(self._new_group)
            self.node.graph.throttle_groups.tidy()


register(Throttle)

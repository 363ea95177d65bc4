"""What filters have in common that must see every request: they show their child, but nothing goes past them.

`map` calls everything OPAQUE, so that neither the flat map nor a copy between files bypasses the driver; block status is the
child's all the same. Each filter overrides what it is there for.
"""

from __future__ import annotations

from typing import ClassVar

from livedisk.emulator.block.driver import Driver
from livedisk.emulator.block.node import Edge, Node
from livedisk.emulator.block.permissions import Role
from livedisk.emulator.block.status import BlockStatus, Status, layer_status
from livedisk.emulator.block.types import Kind, Preallocation, Segment, ZeroFlags


class OpaqueFilter(Driver):
    """Passes every request on. ``child_name``: the child that it shows."""

    is_filter = True
    child_name: ClassVar[str] = "file"

    async def open(self) -> None:
        await self.open_child()

    async def open_child(self) -> None:
        """Attach the child that is shown."""
        ref = getattr(self.options, self.child_name.replace("-", "_"))
        self.edge: Edge = await self.node.graph.open_child(
            self.node, ref, self.child_name, Role.FILTERED | Role.PRIMARY
        )
        self.request_alignment = self.edge.node.driver.request_alignment

    @property
    def below(self) -> Node:
        """The node that is shown."""
        return self.node.children[self.child_name].node

    @property
    def size(self) -> int:
        return self.below.size

    # -- where -------------------------------------------------------------------------------------------------------
    def map(self, offset: int, length: int) -> Segment:
        return Segment(Kind.OPAQUE, length)

    async def status(self, offset: int, length: int) -> BlockStatus:
        answer = await layer_status(self.below, offset, length)
        if not answer.length:  # past the child's end
            answer = BlockStatus(Status.ZERO | Status.ALLOCATED, length, 1, self.node)
        return answer._replace(flags=answer.flags & ~Status.EOF, layer=self.node)

    # -- moving bytes ------------------------------------------------------------------------------------------------
    async def read(self, offset: int, view: memoryview) -> None:
        await self.below.read(offset, view)

    async def write(self, offset: int, data: memoryview) -> None:
        await self.node.children[self.child_name].write(offset, data)

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        await self.below.write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self.below.discard(offset, length)

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        await self.below.write_compressed(offset, data)

    async def truncate(self, size: int, *, exact: bool, prealloc: Preallocation) -> None:
        await self.below.truncate(size, exact=exact, prealloc=prealloc)

    async def prefetch(self, offset: int, length: int) -> None:
        await self.node.children[self.child_name].prefetch(offset, length)

    def highest_written(self) -> int:
        return self.below.wr_highest

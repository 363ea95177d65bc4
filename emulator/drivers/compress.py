"""compress: every write to the node below is a compressed one.

Clusters are compressed whole: a write that does not cover one reads what stands around it first. Reads, zeroes and discards
pass straight through. Source: QEMU ``block/filter-compress.c``; messages asked from QEMU 10.0.2.

Where we differ: QEMU fails a write to a cluster that is compressed already (EIO); here it is compressed anew.
"""

from __future__ import annotations

from typing import Any

from livedisk.emulator.block.driver import Driver, register
from livedisk.emulator.block.options import BlockdevOptions, BlockdevRef
from livedisk.emulator.block.types import HostOffset, Kind, Segment
from livedisk.emulator.drivers.opaque_filter import OpaqueFilter
from livedisk.emulator.errors import BlockError


class CompressOptions(BlockdevOptions, kw_only=True):
    """The node whose writes are compressed."""

    file: BlockdevRef


class Compress(OpaqueFilter):
    """See the module."""

    name = "compress"
    Options = CompressOptions
    options: CompressOptions

    async def open(self) -> None:
        await self.open_child()
        below = self.below.driver
        if type(below).write_compressed is Driver.write_compressed or not below.cluster_size():
            raise BlockError(f"Compression is not supported for underlying format: {below.name}")
        self.request_alignment = self.map_granularity = below.cluster_size()

    def map(self, offset: int, length: int) -> Segment:
        return Segment(Kind.DATA, length, self.node.children["file"], HostOffset(offset))

    async def write(self, offset: int, data: memoryview) -> None:
        size = self.size
        step, end = self.request_alignment, offset + len(data)
        first, last = offset // step * step, min(-(-end // step) * step, max(size, end))
        if (first, last) == (offset, end):
            await self.below.write_compressed(offset, data)
            return
        with memoryview(bytearray(last - first)) as whole:
            if offset > first:
                await self.below.read(first, whole[: offset - first])
            if end < last:
                await self.below.read(end, whole[end - first :])
            whole[offset - first : end - first] = data
            await self.below.write_compressed(first, whole)

    async def reopen_prepare(self, options: Any, *, read_only: bool) -> None:
        self.check_unchanged(options)


register(Compress)

"""null-co, null-aio: a disk that keeps nothing. For measuring what everything above a disk costs.

This is the driver to copy when writing one: an options class, `open`, `size`, `map`, what `map` does not answer, and the
registration in the last lines. Source: QEMU ``block/null.c``, ``qapi/block-core.json`` (BlockdevOptionsNull).

Where we differ: without ``read-zeroes`` QEMU leaves a read's buffer as it was, so that old memory reaches the client;
here it always reads as zeroes, and ``read-zeroes`` only decides whether block status says so.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec

from livedisk.emulator.block.driver import Driver, register
from livedisk.emulator.block.node import fill_zeroes
from livedisk.emulator.block.options import BlockdevOptions, Natural
from livedisk.emulator.block.status import BlockStatus, Status
from livedisk.emulator.block.types import Kind, Segment, ZeroFlags, whole_sectors
from livedisk.emulator.errors import BlockError

Nanoseconds = Annotated[int, msgspec.Meta(ge=0, extra={"qapi": "uint64"})]


class NullOptions(BlockdevOptions):
    """What a null disk takes."""

    size: Natural = 1 << 30
    """Bytes that it shows."""
    latency_ns: Nanoseconds = 0
    """How long every request takes at least, in nanoseconds."""
    read_zeroes: bool | msgspec.UnsetType = msgspec.UNSET
    """Report in block status that everything reads as zeroes."""


class NullCo(Driver):
    """A disk without storage: writes vanish, reads give zeroes."""

    name = "null-co"
    Options = NullOptions
    options: NullOptions

    async def open(self) -> None:
        if self.options.latency_ns >= 1 << 63:
            raise BlockError("latency-ns is invalid")
        self._seconds = self.options.latency_ns / 1e9
        self._size = whole_sectors(self.options.size)

    @property
    def size(self) -> int:
        return self._size

    @property
    def filename(self) -> str:
        return f"{self.name}://"

    def map(self, offset: int, length: int) -> Segment:
        zero = self.options.read_zeroes is True and not self._seconds
        return Segment(Kind.ZERO if zero else Kind.OPAQUE, length)

    async def status(self, offset: int, length: int) -> BlockStatus:
        zero = Status.ZERO if self.options.read_zeroes is True else Status.DATA
        return BlockStatus(zero | Status.ALLOCATED | Status.OFFSET_VALID, length, 1, self.node, self.node, offset)

    async def read(self, offset: int, view: memoryview) -> None:
        await self._wait()
        fill_zeroes(view)

    async def write(self, offset: int, data: memoryview) -> None:
        await self._wait()

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        await self._wait()

    async def flush(self) -> None:
        await self._wait()

    async def prefetch(self, offset: int, length: int) -> None:
        """Nothing is ever cold."""

    async def _wait(self) -> None:
        if self._seconds:
            await asyncio.sleep(self._seconds)

    async def reopen_prepare(self, options: Any, *, read_only: bool) -> None:
        self.check_unchanged(options)

    async def allocated_size(self) -> int:
        return 0

    def dirty_flag(self) -> None:
        return None


class NullAio(NullCo):
    """The same under its other name: QEMU's variant through callbacks."""

    name = "null-aio"


register(NullCo)
register(NullAio)

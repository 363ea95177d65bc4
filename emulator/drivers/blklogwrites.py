"""blklogwrites: a filter that writes down, in order, everything that is written to its child.

The log has the format of Linux' dm-log-writes, so that its tools replay it up to any point: a superblock in the first sector,
then for each request an entry of one sector and the data, padded to sectors. All numbers are little endian::

    superblock   u64 magic 0x6a736677736872, u64 version 1, u64 entries, u32 sector size
    entry        u64 first sector, u64 sectors, u64 flags (1 flush, 2 FUA, 4 discard, 8 mark), u64 bytes of mark data

The child's write is made before it is logged, as in QEMU. The superblock counts the entries; it is brought up to date, and the
log flushed, at every flush and every ``log-super-update-interval`` entries.

Source: Linux ``Documentation/admin-guide/device-mapper/log-writes.rst``; QEMU ``block/blklogwrites.c``; messages asked from
QEMU 10.0.2.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from typing import Annotated, Any, Final

import msgspec

from livedisk.emulator.block.driver import register
from livedisk.emulator.block.node import Edge
from livedisk.emulator.block.options import BlockdevOptions, BlockdevRef
from livedisk.emulator.block.permissions import Role
from livedisk.emulator.block.types import ZeroFlags
from livedisk.emulator.drivers.opaque_filter import OpaqueFilter
from livedisk.emulator.errors import BlockError

UInt32 = Annotated[int, msgspec.Meta(extra={"qapi": "uint32"})]
UInt64 = Annotated[int, msgspec.Meta(extra={"qapi": "uint64"})]

MAGIC: Final = 0x6A736677736872
VERSION: Final = 1
FLUSH: Final = 1
DISCARD: Final = 4
_SUPERBLOCK: Final = struct.Struct("<QQQI")
_ENTRY: Final = struct.Struct("<QQQQ")
_ZERO_STEP: Final = 1 << 20


class BlklogwritesOptions(BlockdevOptions, kw_only=True):
    """QEMU's BlockdevOptionsBlklogwrites. ``log-sector-size``: bytes; ``log-append``: go on with a log that is there."""

    file: BlockdevRef
    log: BlockdevRef
    log_sector_size: UInt32 | msgspec.UnsetType = msgspec.UNSET
    log_append: bool = False
    log_super_update_interval: UInt64 = 4096


class Blklogwrites(OpaqueFilter):
    """See the module."""

    name = "blklogwrites"
    Options = BlklogwritesOptions
    options: BlklogwritesOptions

    async def open(self) -> None:
        given = self.options
        if given.log_append and given.log_sector_size is not msgspec.UNSET:
            raise BlockError("log-append and log-sector-size are mutually exclusive")
        if not given.log_super_update_interval:
            raise BlockError("Invalid log superblock update interval 0")
        await self.open_child()
        log = await self.node.graph.open_child(self.node, given.log, "log", Role.METADATA)
        self._sector = given.log_sector_size if isinstance(given.log_sector_size, int) else 512
        self._entries, self._next = 0, 1  # the next free sector of the log
        self._lock = asyncio.Lock()
        if given.log_append:
            await self._resume(log)
        if not _is_sector_size(self._sector):
            raise BlockError(f"Invalid log sector size {self._sector}")
        self.request_alignment = max(self._sector, self.below.driver.request_alignment)

    async def _resume(self, log: Edge) -> None:
        """Find the end of the log. Raises BlockError if it is none."""
        raw = bytearray(_SUPERBLOCK.size)
        await log.read(0, memoryview(raw))
        magic, version, entries, self._sector = _SUPERBLOCK.unpack(raw)
        if magic != MAGIC:
            raise BlockError("Invalid log superblock magic")
        if version != VERSION:
            raise BlockError(f"Unsupported log version {version}")
        if not _is_sector_size(self._sector):
            raise BlockError(f"Invalid log sector size {self._sector}")
        entry = bytearray(_ENTRY.size)
        for number in range(entries):
            at = self._next * self._sector
            if at >= log.node.size:
                raise BlockError(f"Invalid log: entry {number} of {entries} lies past the end")
            await log.read(at, memoryview(entry))
            _, sectors, flags, extra = _ENTRY.unpack(entry)
            if flags & ~15:
                raise BlockError(f"Invalid flags 0x{flags:x} in log entry {number}")
            data = 0 if flags & DISCARD else sectors * self._sector + extra
            self._next += 1 + -(-data // self._sector)
        self._entries = entries

    # -- logging -----------------------------------------------------------------------------------------------------
    async def _log(self, offset: int, length: int, flags: int, data: memoryview | None, zeroes: int = 0) -> None:
        """Write an entry: ``data`` follows it, or as many ``zeroes``."""
        log, sector = self.node.children["log"], self._sector
        at = self._next * sector
        stored = len(data) if data is not None else zeroes
        self._entries += 1
        entries = self._entries
        self._next += 1 + -(-stored // sector)
        head = _ENTRY.pack(offset // sector, -(-length // sector), flags, 0).ljust(sector, b"\0")
        await log.write(at, memoryview(head + bytes(data if data is not None else b"")))
        if zeroes:
            await log.node.write_zeroes(at + sector, -(-zeroes // sector) * sector)
        if flags & FLUSH or entries % self.options.log_super_update_interval == 0:
            await self._update()

    async def _update(self) -> None:
        """Bring the superblock up to date and the log to stable storage."""
        log = self.node.children["log"]
        async with self._lock:
            raw = _SUPERBLOCK.pack(MAGIC, VERSION, self._entries, self._sector).ljust(self._sector, b"\0")
            await log.write(0, memoryview(raw))
            await log.node.flush()

    # -- requests ------------------------------------------------------------------------------------------------------
    async def write(self, offset: int, data: memoryview) -> None:
        step, end = self.request_alignment, offset + len(data)
        first, last = offset // step * step, -(-end // step) * step
        if (first, last) != (offset, end):
            data, offset = memoryview(await self._padded(first, last, offset, data)), first
        await super().write(offset, data)
        await self._log(offset, len(data), 0, data)

    async def _padded(self, first: int, last: int, offset: int, data: memoryview) -> bytearray:
        whole = bytearray(last - first)
        with memoryview(whole) as view:
            await self.below.read(first, view)
            view[offset - first : offset - first + len(data)] = data
        return whole

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        if (offset | length) % self.request_alignment:
            if flags & ZeroFlags.NO_FALLBACK:
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            for start in range(0, length, _ZERO_STEP):
                await self.write(offset + start, memoryview(bytes(min(_ZERO_STEP, length - start))))
            return
        await super().write_zeroes(offset, length, flags)
        await self._log(offset, length, 0, None, zeroes=length)

    async def discard(self, offset: int, length: int) -> None:
        step = self.request_alignment
        start, stop = -(-offset // step) * step, (offset + length) // step * step
        if start < stop:
            await super().discard(start, stop - start)
            await self._log(start, stop - start, DISCARD, None)

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    async def flush(self) -> None:
        await self.below.flush()
        await self._log(0, 0, FLUSH, None)

    async def reopen_prepare(self, options: Any, *, read_only: bool) -> None:
        self.check_unchanged(options)


def _is_sector_size(size: int) -> bool:
    return _ENTRY.size <= size < 1 << 24 and not size & (size - 1)


register(Blklogwrites)

"""blkdebug: a filter that makes requests fail, or holds them, exactly where a test wants it.

Rules (`blkdebug_rules.py`; as options, or in the file that ``config`` names) say at which event which requests fail. Events are
told by the format above (`block/debug.py`), and by this node of its own writes: ``pwritev``, ``pwritev_zero``, ``pwritev_done``,
and ``pwritev_rmw_*`` where ``align`` makes a write read the blocks around it. Breakpoints are set by a monitor.

``align``, ``max-transfer``, ``opt-write-zero``, ``max-write-zero``, ``opt-discard``, ``max-discard`` let the node look like
storage with such limits: requests are padded and cut to fit, and a zero write or discard that is smaller than its optimum is not
passed on as one. ``take-child-perms`` and ``unshare-child-perms`` add to what is asked of the child, for tests of conflicts.

A file name of the form ``blkdebug:CONFIG:IMAGE`` means this driver. Source: QEMU ``block/blkdebug.c``,
``docs/devel/blkdebug.rst``; messages asked from QEMU 10.0.2.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, ClassVar

import msgspec

from livedisk.emulator.block.debug import Event
from livedisk.emulator.block.driver import register
from livedisk.emulator.block.node import ZERO_CHUNK, Edge
from livedisk.emulator.block.options import BlockdevOptions, BlockdevRef, Natural
from livedisk.emulator.block.permissions import BlockPermission, Perm
from livedisk.emulator.block.status import BlockStatus
from livedisk.emulator.block.types import ZeroFlags
from livedisk.emulator.drivers.blkdebug_rules import InjectError, IoType, Rules, SetState, read_config
from livedisk.emulator.drivers.opaque_filter import OpaqueFilter
from livedisk.emulator.errors import BlockError

UNSET = msgspec.UNSET
Unset = msgspec.UnsetType
Int32 = Annotated[int, msgspec.Meta(extra={"qapi": "int32"})]
_INT_MAX = (1 << 31) - 1


class BlkdebugOptions(BlockdevOptions, kw_only=True):
    """QEMU's BlockdevOptionsBlkdebug. Sizes are bytes; 0: no such limit."""

    image: BlockdevRef
    config: str | Unset = UNSET
    align: Natural | Unset = UNSET
    max_transfer: Int32 | Unset = UNSET
    opt_write_zero: Int32 | Unset = UNSET
    max_write_zero: Int32 | Unset = UNSET
    opt_discard: Int32 | Unset = UNSET
    max_discard: Int32 | Unset = UNSET
    inject_error: list[InjectError] | Unset = UNSET
    set_state: list[SetState] | Unset = UNSET
    take_child_perms: list[BlockPermission] | Unset = UNSET
    unshare_child_perms: list[BlockPermission] | Unset = UNSET


class Blkdebug(OpaqueFilter):
    """See the module."""

    name = "blkdebug"
    Options = BlkdebugOptions
    options: BlkdebugOptions
    child_name: ClassVar[str] = "image"
    filename_children: ClassVar[tuple[str, ...]] = ("image",)

    async def open(self) -> None:
        errors, states = self._read_rules()
        self._taken = _perms(self.options.take_child_perms)
        self._unshared = _perms(self.options.unshare_child_perms)
        self._rules: Rules | None = None  # nothing fails while the child is being opened
        await self.open_child()
        self._set_limits()
        self._rules = Rules(errors, states)

    def _read_rules(self) -> tuple[list[InjectError], list[SetState]]:
        errors, states = read_config(self.options.config) if isinstance(self.options.config, str) else ([], [])
        errors += self.options.inject_error if isinstance(self.options.inject_error, list) else []
        states += self.options.set_state if isinstance(self.options.set_state, list) else []
        return errors, states

    def _set_limits(self) -> None:
        given = self.options
        align = max(_number(given.align), self.below.driver.request_alignment)
        if align >= _INT_MAX or align & (align - 1) or align <= 0:
            raise BlockError(f"Cannot meet constraints with align {align}")
        self.request_alignment = align
        self._max_transfer = _limit("max-transfer", given.max_transfer, align)
        self._opt_zero = _limit("opt-write-zero", given.opt_write_zero, align)
        self._max_zero = _limit("max-write-zero", given.max_write_zero, max(self._opt_zero, align))
        self._opt_discard = _limit("opt-discard", given.opt_discard, align)
        self._max_discard = _limit("max-discard", given.max_discard, max(self._opt_discard, align))

    # -- events and breakpoints --------------------------------------------------------------------------------------
    @property
    def debugger(self) -> Blkdebug:
        return self

    async def event(self, event: Event) -> None:
        """See `debug.Debugger`."""
        if self._rules is not None:
            await self._rules.event(event)

    def breakpoints(self) -> Rules | None:
        return self._rules

    # -- failing ---------------------------------------------------------------------------------------------------------
    async def _check(self, kind: IoType, offset: int, length: int) -> None:
        """Raise the OSError that a rule has for the request."""
        assert self._rules is not None
        rule = self._rules.failing(kind, offset, length)
        if rule is None:
            return
        if not rule.immediately:
            await asyncio.sleep(0)
        raise OSError(rule.number, os.strerror(rule.number))

    async def status(self, offset: int, length: int) -> BlockStatus:
        await self._check(IoType.BLOCK_STATUS, offset, length)
        return await super().status(offset, length)

    # -- reading -----------------------------------------------------------------------------------------------------
    async def read(self, offset: int, view: memoryview) -> None:
        step, end = self.request_alignment, offset + len(view)
        first, last = offset // step * step, -(-end // step) * step
        if (first, last) == (offset, end):
            await self._read_aligned(offset, view)
            return
        with memoryview(bytearray(last - first)) as whole:
            await self._read_aligned(first, whole)
            view[:] = whole[offset - first : end - first]

    async def _read_aligned(self, offset: int, view: memoryview) -> None:
        for start, length in _pieces(offset, len(view), self._max_transfer):
            await self._check(IoType.READ, start, length)
            await self.below.read(start, view[start - offset : start - offset + length])

    # -- writing -----------------------------------------------------------------------------------------------------
    async def write(self, offset: int, data: memoryview) -> None:
        step, end = self.request_alignment, offset + len(data)
        first, last = offset // step * step, -(-end // step) * step
        if (first, last) != (offset, end):
            data, offset = memoryview(await self._padded(first, last, offset, data)), first
        await self.event(Event.PWRITEV)
        try:
            await self._write_aligned(offset, data)
        finally:
            await self.event(Event.PWRITEV_DONE)

    async def _padded(self, first: int, last: int, offset: int, data: memoryview) -> bytearray:
        """The data with what stands around it in its first and last block."""
        step, end = self.request_alignment, offset + len(data)
        whole = bytearray(last - first)
        with memoryview(whole) as view:
            head, tail = offset > first, end < last
            if last - first == step:  # one block, read once
                await self._fill(first, view, head=head, tail=tail)
            else:
                if head:
                    await self._fill(first, view[:step], head=True, tail=False)
                if tail:
                    await self._fill(last - step, view[-step:], head=False, tail=True)
            view[offset - first : end - first] = data
        return whole

    async def _fill(self, offset: int, view: memoryview, *, head: bool, tail: bool) -> None:
        for wanted, before in ((head, Event.PWRITEV_RMW_HEAD), (tail, Event.PWRITEV_RMW_TAIL)):
            if wanted:
                await self.event(before)
        await self._read_aligned(offset, view)
        for wanted, after in ((head, Event.PWRITEV_RMW_AFTER_HEAD), (tail, Event.PWRITEV_RMW_AFTER_TAIL)):
            if wanted:
                await self.event(after)

    async def _write_aligned(self, offset: int, data: memoryview) -> None:
        edge = self.node.children["image"]
        for start, length in _pieces(offset, len(data), self._max_transfer):
            await self._check(IoType.WRITE, start, length)
            await edge.write(start, data[start - offset : start - offset + length])

    # -- zeroes and discards -----------------------------------------------------------------------------------------
    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        step = self.request_alignment
        await self.event(Event.PWRITEV_ZERO)
        try:
            for start, size in _blocks(offset, length, max(self._opt_zero, step), self._max_zero):
                if not await self._zero_piece(start, size, flags):
                    if flags & ZeroFlags.NO_FALLBACK:
                        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
                    await self._write_zero_data(start, size)
        finally:
            await self.event(Event.PWRITEV_DONE)

    async def _zero_piece(self, offset: int, length: int, flags: ZeroFlags) -> bool:
        """Pass it on as a zero write; False where it is too small for one, or the child has none."""
        if length < max(self._opt_zero, self.request_alignment):
            return False
        await self._check(IoType.WRITE_ZEROES, offset, length)
        try:
            await self.below.write_zeroes(offset, length, flags | ZeroFlags.NO_FALLBACK)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            return False
        return True

    async def _write_zero_data(self, offset: int, length: int) -> None:
        step, end = self.request_alignment, offset + length
        for start in range(offset, end, len(ZERO_CHUNK)):
            stop = min(start + len(ZERO_CHUNK), end)
            data = memoryview(ZERO_CHUNK)[: stop - start]
            first, last = start // step * step, -(-stop // step) * step
            if (first, last) != (start, stop):
                data, start = memoryview(await self._padded(first, last, start, data)), first
            await self._write_aligned(start, data)

    async def discard(self, offset: int, length: int) -> None:
        step = self.request_alignment
        for start, size in _blocks(offset, length, max(self._opt_discard, step), self._max_discard):
            if size >= step:
                await self._check(IoType.DISCARD, start, size)
                await self.below.discard(start, size)

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))  # as in QEMU

    async def flush(self) -> None:
        await self._check(IoType.FLUSH, 0, 0)
        await super().flush()

    # -- permissions, reopening, words ---------------------------------------------------------------------------------
    def child_perms(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        perm, shared = super().child_perms(edge, perm, shared)
        return perm | self._taken, shared & ~self._unshared

    async def reopen_prepare(self, options: Any, *, read_only: bool) -> None:
        self.check_unchanged(options)

    @property
    def filename(self) -> str:
        given = [name for name in self.options.__struct_fields__[-9:] if getattr(self.options, name) is not UNSET]
        return self.exact_filename({"image": self.below.driver.filename}, given) or ""

    def exact_filename(self, children: Mapping[str, str], strong: Collection[str]) -> str | None:
        config = self.options.config if isinstance(self.options.config, str) else ""
        return "" if set(strong) - {"config"} or not children["image"] else f"blkdebug:{config}:{children['image']}"

    @classmethod
    def parse_filename(cls, rest: str) -> dict[str, str]:
        config, colon, image = rest.partition(":")
        if not colon:
            raise BlockError("blkdebug requires both config file and image path")
        return {"config": config, "image": image} if config else {"image": image}

    async def allocated_size(self) -> int | None:
        return None

    def dirty_flag(self) -> bool | None:
        return self.below.driver.dirty_flag()


def _perms(given: list[BlockPermission] | Unset) -> Perm:
    perms = Perm.NONE
    for one in given if isinstance(given, list) else ():
        perms |= Perm[one.name]
    return perms


def _number(given: int | Unset) -> int:
    return given if isinstance(given, int) else 0


def _limit(name: str, given: int | Unset, step: int) -> int:
    """A limit in bytes, 0 for none. Raises BlockError if it is no multiple of ``step``."""
    value = _number(given)
    if value < 0:
        raise BlockError(f"Value '{value}' is out of range for parameter '{name}'")
    if value and (value >= _INT_MAX or value % step):
        raise BlockError(f"Cannot meet constraints with {name} {value}")
    return value


def _pieces(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    """A range cut to pieces of ``most`` bytes (0: not cut): (offset, length)."""
    step = most or length
    for start in range(0, length, step or 1):
        yield offset + start, min(step, length - start)


def _blocks(offset: int, length: int, block: int, most: int) -> Iterator[tuple[int, int]]:
    """A range cut where its first and last whole ``block`` begin and end, and to pieces of ``most`` bytes (0: not cut)."""
    end = offset + length
    while offset < end:
        size = end - offset
        if offset % block:
            size = min(size, block - offset % block)
        elif size > block:
            size -= end % block
        yield offset, min(size, most or size)
        offset += min(size, most or size)


register(Blkdebug)

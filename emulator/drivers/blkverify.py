"""blkverify: two nodes that must hold the same; every read compares them.

``test`` is the image whose driver is on trial, ``raw`` a plain copy to compare it with. Writes go to both; a read that differs
is told on standard error, in QEMU's words, and fails with EIO. Size, flushes and block status are those of ``test``.

A file name of the form ``blkverify:RAW:IMAGE`` means this driver. Source: QEMU ``block/blkverify.c``,
``docs/devel/blkverify.rst``; messages asked from QEMU 10.0.2.

Where we differ: QEMU exits at once where the two differ; here only the request fails, because other disks are served, too.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from livedisk.emulator.block.driver import register
from livedisk.emulator.block.node import Edge, Node
from livedisk.emulator.block.options import BlockdevOptions, BlockdevRef
from livedisk.emulator.block.permissions import Perm, Role
from livedisk.emulator.block.types import Preallocation, ZeroFlags
from livedisk.emulator.drivers.opaque_filter import OpaqueFilter
from livedisk.emulator.errors import BlockError


class BlkverifyOptions(BlockdevOptions, kw_only=True):
    """The image on trial and its plain copy."""

    test: BlockdevRef
    raw: BlockdevRef


class Blkverify(OpaqueFilter):
    """See the module."""

    name = "blkverify"
    Options = BlkverifyOptions
    options: BlkverifyOptions
    child_name: ClassVar[str] = "test"
    filename_children: ClassVar[tuple[str, ...]] = ("test", "raw")
    image_children: ClassVar[tuple[str, ...]] = ("test",)

    async def open(self) -> None:
        node = self.node
        await node.graph.open_child(node, self.options.raw, "raw", Role.FILTERED | Role.PRIMARY)
        await node.graph.open_child(node, self.options.test, "test", Role.DATA)
        self.request_alignment = max(child.node.driver.request_alignment for child in node.children.values())

    @property
    def _raw(self) -> Node:
        return self.node.children["raw"].node

    # -- moving bytes ------------------------------------------------------------------------------------------------
    async def read(self, offset: int, view: memoryview) -> None:
        with memoryview(bytearray(len(view))) as raw:
            await self._both("read", offset, len(view), self.below.read(offset, view), self._raw.read(offset, raw))
            if raw == view:
                return
            at = next(index for index, byte in enumerate(raw) if byte != view[index])
        self._differ("read", offset, len(view), f"contents mismatch at offset {offset + at}")

    async def write(self, offset: int, data: memoryview) -> None:
        children = self.node.children
        writes = children["test"].write(offset, data), children["raw"].write(offset, data)
        await self._both("write", offset, len(data), *writes)

    async def _both(self, what: str, offset: int, length: int, test: Any, raw: Any) -> None:
        """Do it on both. Raises OSError: that of the two, if they fail alike."""
        outcomes = await asyncio.gather(test, raw, return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None and not isinstance(outcome, OSError):
                raise outcome
        numbers = [-(one.errno or errno.EIO) if isinstance(one, OSError) else 0 for one in outcomes]
        if numbers[0] != numbers[1]:
            self._differ(what, offset, length, f"return value mismatch {numbers[1]} != {numbers[0]}")
        if isinstance(outcomes[0], OSError):
            raise outcomes[0]

    def _differ(self, what: str, offset: int, length: int, how: str) -> None:
        text = f"blkverify: {what} offset={offset} bytes={length} {how}"
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
        raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}: node '{self.node.name}': {text}")

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))  # written out, so that both drivers do the same

    async def discard(self, offset: int, length: int) -> None:
        """What a discarded range reads as is up to each driver: not passed on."""

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    async def flush(self) -> None:
        """The plain copy need not survive."""
        await self.below.flush()

    async def truncate(self, size: int, *, exact: bool, prealloc: Preallocation) -> None:
        raise BlockError("Image format driver does not support resize")

    # -- permissions, reopening, words ---------------------------------------------------------------------------------
    def child_perms(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        perm, shared = super().child_perms(edge, perm, shared)
        # A copy that is shorter or longer only shows at its end; it never is resized on purpose.
        return (perm & ~Perm.RESIZE, shared) if edge.name == "raw" else (perm, shared)

    async def reopen_prepare(self, options: Any, *, read_only: bool) -> None:
        self.check_unchanged(options)

    def exact_filename(self, children: Mapping[str, str], strong: Collection[str]) -> str | None:
        if not children["raw"] or not children["test"]:
            return ""
        return f"blkverify:{children['raw']}:{children['test']}"

    @property
    def filename(self) -> str:
        return (
            self.exact_filename({name: edge.node.driver.filename for name, edge in self.node.children.items()}, ())
            or ""
        )

    @classmethod
    def parse_filename(cls, rest: str) -> dict[str, str]:
        raw, colon, test = rest.partition(":")
        if not colon:
            raise BlockError("blkverify requires raw copy and original image path")
        return {"raw": raw, "test": test}

    async def allocated_size(self) -> int | None:
        return None

    def dirty_flag(self) -> bool | None:
        return self.node.children["raw"].node.driver.dirty_flag()


register(Blkverify)

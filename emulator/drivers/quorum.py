"""quorum: the same data on several nodes; a read is what enough of them agree on.

Writes and flushes go to all ``children`` and succeed where at least ``vote-threshold`` of them do. A read (pattern *quorum*) asks
all: if those that answered differ, the version with most votes wins, if it has as many as the threshold, and with
``rewrite-corrupted`` is written to those that differ. With the pattern *fifo* the first child that can be read answers. What
went wrong is told: QUORUM_REPORT_BAD of each child, QUORUM_FAILURE where there is no quorum. ``blkverify``: two children that
must not differ.

Children come and go while the node is used (x-blockdev-change). Discards reach no child: what they read as afterwards is each
one's own. Source: QEMU ``block/quorum.c``; messages asked from QEMU 10.0.2.

Where we differ: in the mode ``blkverify`` QEMU exits where the two differ; here the read fails, and says so on standard error.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import os
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final

import msgspec

from livedisk.emulator.block.driver import ChildKeeper, register
from livedisk.emulator.block.node import Edge, Node
from livedisk.emulator.block.options import BlockdevOptions, BlockdevRef
from livedisk.emulator.block.permissions import Perm, Role
from livedisk.emulator.block.status import BlockStatus, Status, block_status
from livedisk.emulator.block.types import SECTOR, Kind, Preallocation, Segment, ZeroFlags
from livedisk.emulator.errors import BlockError

Int = Annotated[int, msgspec.Meta(extra={"qapi": "int"})]
_SHARED: Final = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED


class ReadPattern(enum.StrEnum):
    """QEMU's QuorumReadPattern."""

    QUORUM = "quorum"
    FIFO = "fifo"


class QuorumOptions(BlockdevOptions, kw_only=True):
    """QEMU's BlockdevOptionsQuorum."""

    blkverify: bool = False
    children: list[BlockdevRef]
    vote_threshold: Int
    rewrite_corrupted: bool = False
    read_pattern: ReadPattern = ReadPattern.QUORUM


class Quorum(ChildKeeper):
    """See the module."""

    name = "quorum"
    Options = QuorumOptions
    options: QuorumOptions

    async def open(self) -> None:
        self._check(self.options)
        self._next = 0
        for ref in self.options.children:
            await self.node.graph.open_child(self.node, ref, self._new_name(), Role.DATA)
        children = self._children()
        self.request_alignment = max(child.driver.request_alignment for child in children)
        if len({child.size for child in children}) > 1:
            raise BlockError(f"Could not refresh total sector count: {os.strerror(errno.EIO)}")

    def _check(self, options: QuorumOptions) -> None:
        count, threshold = len(options.children), options.vote_threshold
        if count < 1:
            raise BlockError("Number of provided children must be 1 or more")
        if threshold < 1:
            raise BlockError("Parameter 'vote-threshold' expects a value >= 1")
        if threshold > count:
            raise BlockError("threshold may not exceed children count")
        if options.read_pattern is ReadPattern.QUORUM:
            if options.blkverify and (count, threshold) != (2, 2):
                raise BlockError("blkverify=on can only be set if there are exactly two files and vote-threshold is 2")
            if options.blkverify and options.rewrite_corrupted:
                raise BlockError("rewrite-corrupted=on cannot be used with blkverify=on")

    def _new_name(self) -> str:
        self._next += 1
        return f"children.{self._next - 1}"

    def _edges(self) -> list[Edge]:
        return list(self.node.children.values())

    def _children(self) -> list[Node]:
        return [edge.node for edge in self._edges()]

    @property
    def size(self) -> int:
        return self._children()[0].size

    def map(self, offset: int, length: int) -> Segment:
        return Segment(Kind.OPAQUE, length)

    async def status(self, offset: int, length: int) -> BlockStatus:
        """Zeroes as far as all say so, else data as far as one does."""
        data, zero = 0, length
        for child in self._children():
            try:
                found = await block_status(child, offset, length)
            except OSError as error:
                self._report_bad("read", offset, length, child, error)
                data = length
                continue
            if found.zero:
                zero = min(zero, found.length)
            else:
                data = max(data, found.length)
        flags = Status.DATA if data else Status.ZERO
        return BlockStatus(flags | Status.ALLOCATED, data or zero, 1, self.node)

    # -- telling -------------------------------------------------------------------------------------------------------
    def _report_bad(self, kind: str, offset: int, length: int, child: Node, error: OSError | None) -> None:
        told: dict[str, Any] = {"type": kind, "node_name": child.name, **_sectors(offset, length)}
        if error is not None:
            told["error"] = os.strerror(error.errno or errno.EIO)
        for watcher in list(self.node.graph.on_vote):
            watcher("bad", told)

    def _report_failure(self, offset: int, length: int) -> None:
        for watcher in list(self.node.graph.on_vote):
            watcher("failure", {"reference": self.node.name, **_sectors(offset, length)})

    # -- asking all ------------------------------------------------------------------------------------------------------
    async def _ask(
        self, kind: str, offset: int, length: int, ask: Callable[[Edge], Awaitable[None]]
    ) -> dict[Edge, OSError | None]:
        """What each child said. Raises OSError, having told, if fewer than the threshold did it."""
        edges = self._edges()
        said = await asyncio.gather(*(ask(edge) for edge in edges), return_exceptions=True)
        outcome: dict[Edge, OSError | None] = {}
        for edge, one in zip(edges, said, strict=True):
            if one is not None and not isinstance(one, OSError):
                raise one
            outcome[edge] = one
            if one is not None:
                self._report_bad(kind, offset, length, edge.node, one)
        failures = [one for one in outcome.values() if one is not None]
        if len(edges) - len(failures) < self.options.vote_threshold:
            if kind != "flush":
                self._report_failure(offset, length)
            number = Counter(one.errno or errno.EIO for one in failures).most_common(1)[0][0]
            raise OSError(number, f"{os.strerror(number)}: no quorum on node '{self.node.name}'")
        return outcome

    async def read(self, offset: int, view: memoryview) -> None:
        if self.options.read_pattern is ReadPattern.FIFO:
            await self._read_first(offset, view)
            return
        buffers = {edge: bytearray(len(view)) for edge in self._edges()}
        outcome = await self._ask("read", offset, len(view), lambda edge: edge.read(offset, memoryview(buffers[edge])))
        versions: dict[bytes, list[Edge]] = {}
        for edge, error in outcome.items():
            if error is None:
                versions.setdefault(bytes(buffers[edge]), []).append(edge)
        view[:] = await self._vote(offset, len(view), versions)

    async def _read_first(self, offset: int, view: memoryview) -> None:
        failed: OSError | None = None
        for edge in self._edges():
            try:
                await edge.read(offset, view)
                return
            except OSError as error:
                self._report_bad("read", offset, len(view), edge.node, error)
                failed = error
        self._report_failure(offset, len(view))
        assert failed is not None
        raise failed

    async def _vote(self, offset: int, length: int, versions: dict[bytes, list[Edge]]) -> bytes:
        """The version that wins. Raises EIO, having told, if none has enough votes."""
        if len(versions) == 1:
            return next(iter(versions))
        if self.options.blkverify:
            one, other = versions
            at = next(index for index in range(length) if one[index] != other[index])
            sys.stderr.write(f"quorum: offset={offset} bytes={length} contents mismatch at offset {offset + at}\n")
            sys.stderr.flush()
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}: the children of '{self.node.name}' differ")
        winner = max(versions, key=lambda version: len(versions[version]))
        if len(versions[winner]) < self.options.vote_threshold:
            self._report_failure(offset, length)
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}: no quorum on node '{self.node.name}'")
        for version, edges in versions.items():
            for edge in edges if version is not winner else ():
                self._report_bad("read", offset, length, edge.node, None)
                if self.options.rewrite_corrupted:
                    await self._repair(edge, offset, winner)
        return winner

    async def _repair(self, edge: Edge, offset: int, data: bytes) -> None:
        try:
            await edge.write(offset, memoryview(data))
        except OSError as error:
            self._report_bad("write", offset, len(data), edge.node, error)

    async def write(self, offset: int, data: memoryview) -> None:
        await self._ask("write", offset, len(data), lambda edge: edge.write(offset, data))

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        if flags & ZeroFlags.NO_FALLBACK:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))  # one may be able to, another not
        await self._ask("write", offset, length, lambda edge: edge.node.write_zeroes(offset, length, flags))

    async def flush(self) -> None:
        await self._ask("flush", 0, 0, lambda edge: edge.node.flush())

    async def truncate(self, size: int, *, exact: bool, prealloc: Preallocation) -> None:
        raise BlockError("Image format driver does not support resize")

    # -- children ------------------------------------------------------------------------------------------------------
    def attach(self, child: Node) -> None:
        """One more. Nothing is in flight. Raises BlockError or PermissionConflict."""
        if self.options.blkverify:
            raise BlockError("Cannot add a child to a quorum in blkverify mode")
        self.node.graph.attach_child(self.node, child, f"children.{self._next}", Role.DATA)
        self._next += 1

    def detach(self, edge: Edge) -> None:
        """One less. Nothing is in flight. Raises BlockError."""
        if len(self.node.children) <= self.options.vote_threshold:
            raise BlockError(
                f"The number of children cannot be lower than the vote threshold {self.options.vote_threshold}"
            )
        self.node.graph.detach_child(edge)
        if edge.name == f"children.{self._next - 1}":
            self._next -= 1

    # -- permissions, reopening, words -----------------------------------------------------------------------------------
    def child_perms(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Nobody else may write a child: it would differ from the others."""
        if self.options.rewrite_corrupted:
            perm |= Perm.WRITE
        return perm, shared & _SHARED | Perm.WRITE_UNCHANGED

    async def reopen_prepare(self, options: Any, *, read_only: bool) -> None:
        self.check_unchanged(options, changeable=("children",))
        self._new_options: QuorumOptions = options

    def reopen_commit(self) -> None:
        self.options = self._new_options

    @property
    def filename(self) -> str:
        return ""

    async def allocated_size(self) -> int | None:
        sizes = [await child.driver.allocated_size() for child in self._children()]
        return sum(size or 0 for size in sizes)

    def dirty_flag(self) -> bool | None:
        return None


def _sectors(offset: int, length: int) -> dict[str, int]:
    first, end = offset // SECTOR, -(-(offset + length) // SECTOR)
    return {"sector_num": first, "sectors_count": end - first}


register(Quorum)

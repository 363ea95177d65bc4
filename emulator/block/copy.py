"""Making a range of one node read as another's: what jobs, and filters that copy, have in common.

`copy_range` asks block status of the source, so that what reads as zeroes is written as zeroes whatever its length, and only data
is moved, `STEP` bytes at a time. It goes through the nodes' own requests, so that it is in flight on them, waits for what
overlaps, and marks the target's dirty trackers. It does not keep anybody off the range between its read and its write: a
caller with a guest that writes to the source or the target does that (`jobs/copy.py`, a filter's own ranges).

`CopyFailed` says which side failed, because callers answer a source and a target that fail by policies of their own.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Awaitable
from typing import Final

from livedisk.emulator.block.node import Edge, is_zero
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.status import BlockStatus, block_status
from livedisk.emulator.block.types import ZeroFlags

STEP: Final = 2 << 20
"""Bytes in memory of one copy at most; a multiple of every cluster size. Above what `HostFile` moves inline, so that threads
do it, on every core, while the guest is served."""
ZERO_STEP: Final = 1 << 30
"""Bytes zeroed in one request at most."""


class Side(enum.Enum):
    """Which node of a copy."""

    SOURCE = enum.auto()
    TARGET = enum.auto()


class CopyFailed(Exception):
    """A copy failed on one side; ``error`` says why. Not for users: who copies answers it by its policies."""

    def __init__(self, side: Side, error: OSError) -> None:
        super().__init__(str(error))
        self.side = side
        self.error = error


async def copy_range(
    source: Edge,
    target: Edge,
    offset: int,
    length: int,
    *,
    flags: ZeroFlags = ZeroFlags.NONE,
    detect_zeroes: bool = False,
    compressed: bool = False,
) -> None:
    """Make the target read as the source does in the range (bytes, inside both).

    ``flags``: how zeroes are written; ``detect_zeroes``: look for them in data too; ``compressed``: write data compressed, for
    which the range must be whole clusters of the target (but for its end). Raises CopyFailed; what was copied by then stays.
    """
    _check(source, target, offset, length)
    whole = _cluster(target) if compressed else 1
    end = offset + length
    while offset < end:
        status = await run_at(source, offset, end - offset)
        run = status.length if offset + status.length == end else status.length // whole * whole
        if status.zero and run:
            run = min(run, ZERO_STEP)
            await writing(target.node.write_zeroes(offset, run, flags))
        else:  # where a run is less than a cluster, the cluster is data
            run = min(max(run, whole), STEP, end - offset)
            with memoryview(bytearray(run)) as data:
                await reading(source.read(offset, data))
                if detect_zeroes and is_zero(data):
                    await writing(target.node.write_zeroes(offset, run, flags))
                elif compressed:
                    await writing(target.node.write_compressed(offset, data))
                else:
                    await writing(target.write(offset, data))
        offset += run


def _check(source: Edge, target: Edge, offset: int, length: int) -> None:
    for side, edge in ((Side.SOURCE, source), (Side.TARGET, target)):
        if offset + length > edge.node.size:
            what = f"[{offset}, {offset + length}) is outside node '{edge.node.name}' ({edge.node.size} bytes)"
            raise CopyFailed(side, OSError(errno.EIO, f"{os.strerror(errno.EIO)}: {what}"))
    if not target.perm & (Perm.WRITE | Perm.WRITE_UNCHANGED):
        what = f"no write permission on node '{target.node.name}' as '{target.name}'"
        raise CopyFailed(Side.TARGET, PermissionError(errno.EPERM, what))


def _cluster(target: Edge) -> int:
    """Bytes that the image below writes compressed as one; 1 where it has no clusters."""
    node = target.node
    while node.filtered is not None:
        node = node.filtered.node
    return node.driver.cluster_size() or 1


async def run_at(source: Edge, offset: int, length: int) -> BlockStatus:
    """Block status of the run at ``offset``. Raises CopyFailed."""
    try:
        return await block_status(source.node, offset, length)
    except OSError as error:
        raise CopyFailed(Side.SOURCE, error) from error


async def reading(request: Awaitable[None]) -> None:
    """Await a request to the source. Raises CopyFailed."""
    try:
        await request
    except OSError as error:
        raise CopyFailed(Side.SOURCE, error) from error


async def writing(request: Awaitable[None]) -> None:
    """Await a request to the target. Raises CopyFailed."""
    try:
        await request
    except OSError as error:
        raise CopyFailed(Side.TARGET, error) from error

"""Block status: what a range of a chain holds, without reading it (QEMU's bdrv_co_common_block_status_above).

The answer comes from `Driver.map` down the chain. A first cut, made so that exports can be served: holes in host files
are asked for here (SEEK_DATA), one system call for each answer.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from livedisk.emulator.block.hostfile import HostFile, in_thread
from livedisk.emulator.block.node import Edge, Node
from livedisk.emulator.block.types import HostOffset, Kind, Segment


class BlockStatus(NamedTuple):
    """The first ``length`` bytes of the range asked for are alike.

    ``data``: storage holds them. ``zero``: they read as zeroes. ``depth``: 0 if no node of the chain holds them, else 1 for
    the node asked, 2 for what shows through it, and so on. ``source``, ``offset``: where they stand, where that is known.
    """

    length: int
    data: bool
    zero: bool
    depth: int
    source: Edge | HostFile | None = None
    offset: HostOffset = HostOffset(0)

    @property
    def allocated(self) -> bool:
        """Whether some node of the chain holds the range."""
        return self.depth > 0


async def block_status(node: Node, offset: int, length: int, base: Node | None = None) -> BlockStatus:
    """What ``[offset, offset + length)`` of ``node`` holds (bytes; inside the node), looking no further down than to above
    ``base``. The answer's length is in ``1..length``."""
    depth = 1
    while True:
        segment = await node.map(offset, length)
        length = min(length, segment.length)
        if segment.kind is not Kind.UNALLOCATED:
            return await _settle(segment, length, depth)
        below = node.filtered or node.backing
        if below is None:
            return BlockStatus(length, data=False, zero=True, depth=0)
        if below.node is base:
            return BlockStatus(length, data=False, zero=False, depth=0)
        node, depth = below.node, depth + 1
        if offset >= node.size:
            # What lies past the end of a short backing file reads as zeroes because of that file.
            return BlockStatus(length, data=False, zero=True, depth=depth)
        length = min(length, node.size - offset)


async def _settle(segment: Segment, length: int, depth: int) -> BlockStatus:
    if segment.kind is Kind.ZERO:
        return BlockStatus(length, False, True, depth, segment.source, segment.offset)
    if segment.kind is not Kind.DATA or segment.source is None:
        return BlockStatus(length, data=True, zero=False, depth=depth)
    source, host = segment.source, segment.offset
    if isinstance(source, HostFile):
        length, data = await in_thread(_run, source.fd, host, length)
        return BlockStatus(length, data, not data, depth, source, host)
    inner = await block_status(source.node, host, min(length, max(source.node.size - host, 1)))
    return BlockStatus(inner.length, inner.data, inner.zero, depth, source, host)


def _run(fd: int, offset: int, length: int) -> tuple[int, bool]:
    """``(length, data)`` of the run that begins at ``offset`` of a host file. Where the file system does not say: data."""
    try:
        start = os.lseek(fd, offset, os.SEEK_DATA)
        end = os.lseek(fd, offset, os.SEEK_HOLE) if start == offset else start
    except OSError as error:
        return length, error.errno != errno.ENXIO
    return min(length, max(end - offset, 1)), start == offset

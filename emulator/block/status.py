"""Block status: what a range of a node reads as, and which layer of its chain says so.

All of it comes from `Driver.map`, so that NBD's ``base:allocation`` and ``qemu:allocation-depth``, query commands and the
jobs' "is it allocated above the base?" cannot disagree with what a read returns. A call describes the run at the start
of the range, and does a bounded amount of work: one `map` a layer, one look for a hole.

Source: QEMU ``block/io.c`` (bdrv_co_do_block_status, bdrv_co_common_block_status_above).
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from livedisk.emulator.block.hostfile import HostFile
from livedisk.emulator.block.node import Edge, Node
from livedisk.emulator.block.types import Kind, Segment


class Status(enum.IntFlag):
    """QEMU's BDRV_BLOCK_* flags, with its values."""

    NONE = 0
    DATA = 0x01
    """Stored in the layer."""
    ZERO = 0x02
    """Reads as zeroes."""
    OFFSET_VALID = 0x04
    """The bytes (or the space kept for them) stand at ``offset`` in ``file``."""
    ALLOCATED = 0x10
    """The layer decides what is read: data, or zeroes of its own."""
    EOF = 0x20
    """The run ends where the node ends."""
    COMPRESSED = 0x80


class BlockStatus(NamedTuple):
    """The first ``length`` bytes of a range are alike.

    ``depth``: which layer decides what is read, counted from 1; 0 if none does. ``layer``: the node that was asked last.
    ``file``, ``offset`` (bytes): where the bytes stand, under OFFSET_VALID.
    """

    flags: Status
    length: int
    depth: int
    layer: Node
    file: Node | None = None
    offset: int = 0

    @property
    def data(self) -> bool:
        """Whether storage holds the run."""
        return bool(self.flags & Status.DATA)

    @property
    def zero(self) -> bool:
        """Whether the run reads as zeroes."""
        return bool(self.flags & Status.ZERO)

    @property
    def allocated(self) -> bool:
        """Whether a layer of the chain decides what is read."""
        return bool(self.flags & Status.ALLOCATED)


async def block_status(
    node: Node, offset: int, length: int, base: Node | None = None, *, include_base: bool = False
) -> BlockStatus:
    """Status of the run at ``offset`` (bytes), looking down the chain to ``base`` (without it, unless
    ``include_base``), or to its end.

    A length of 0 is answered at or past the end of ``node`` only. Raises OSError where metadata cannot be read.
    """
    return await _status_above(node, offset, length, base, include_base, look_for_holes=True)


async def allocation_depth(
    node: Node, offset: int, length: int, base: Node | None = None, *, include_base: bool = False
) -> tuple[int, int]:
    """``(depth, run length)`` of `block_status`, cheaper: the host is not asked for holes."""
    status = await _status_above(node, offset, length, base, include_base, look_for_holes=False)
    return status.depth, status.length


async def _status_above(
    top: Node, offset: int, length: int, base: Node | None, include_base: bool, *, look_for_holes: bool
) -> BlockStatus:
    if top is base and not include_base:
        return BlockStatus(Status.NONE, length, 0, top)
    status = await layer_status(top, offset, length, look_for_holes=look_for_holes)
    depth, end = 1, -1
    layer: Node | None = top
    while status.length and not status.flags & Status.ALLOCATED and layer is not base:
        assert layer is not None
        if status.flags & Status.EOF:
            end = offset + status.length
        layer = _below(layer)
        if layer is None or (layer is base and not include_base):
            break
        length, depth = status.length, depth + 1
        status = await layer_status(layer, offset, length, look_for_holes=look_for_holes)
        # What ends with a lower layer does not end the disk.
        status = status._replace(flags=status.flags & ~Status.EOF if status.flags & Status.ALLOCATED else status.flags)
        if not status.length:  # past the end of a short layer: zeroes that are as good as its own
            status = BlockStatus(Status.ZERO | Status.ALLOCATED, length, depth, layer, layer)
    flags = status.flags | (Status.EOF if offset + status.length == end else Status.NONE)
    return status._replace(flags=flags, depth=depth if flags & Status.ALLOCATED else 0)


def _below(node: Node) -> Node | None:
    """The node that shows through where this one has nothing."""
    edge = node.filtered or node.backing
    return edge.node if edge is not None else None


async def layer_status(node: Node, offset: int, length: int, *, look_for_holes: bool = True) -> BlockStatus:
    """What one layer says, without those below it: neither DATA nor ZERO where it says nothing. Past the end of the
    node: EOF and length 0. Without ``look_for_holes`` a hole of a host file counts as data."""
    inside = min(length, node.size - offset)
    if inside <= 0:
        return BlockStatus(Status.EOF, 0, 1, node)
    answer = await node.driver.status(offset, inside)
    if answer is None:
        segment = await node.map(offset, inside)
        through = node.driver.shows_through()
        if through and isinstance(segment.source, Edge):
            answer = await layer_status(
                segment.source.node, segment.offset, segment.length, look_for_holes=look_for_holes
            )
            if not answer.length:  # past the end of the file: reads as zeroes
                answer = BlockStatus(Status.ZERO | Status.ALLOCATED, segment.length, 1, node)
            answer = answer._replace(flags=answer.flags & ~Status.EOF, layer=node)
        else:
            answer = _of_segment(node, offset, segment)
            if look_for_holes and answer.flags & Status.DATA:
                answer = await _without_holes(node, segment, answer)
    if offset + answer.length == node.size:
        answer = answer._replace(flags=answer.flags | Status.EOF)
    return answer


def _of_segment(node: Node, offset: int, segment: Segment) -> BlockStatus:
    flags = {
        Kind.DATA: Status.DATA | Status.ALLOCATED,
        Kind.ZERO: Status.ZERO | Status.ALLOCATED,
        Kind.UNALLOCATED: Status.NONE,
        Kind.COMPRESSED: Status.DATA | Status.ALLOCATED | Status.COMPRESSED,
        Kind.OPAQUE: Status.DATA | Status.ALLOCATED,
    }[segment.kind]
    if segment.kind is Kind.UNALLOCATED and (node.backing is None or offset >= node.backing.node.size):
        flags |= Status.ZERO
    if segment.source is None:
        return BlockStatus(flags, segment.length, 1, node)
    file = segment.source.node if isinstance(segment.source, Edge) else node
    return BlockStatus(flags | Status.OFFSET_VALID, segment.length, 1, node, file, segment.offset)


async def _without_holes(node: Node, segment: Segment, answer: BlockStatus) -> BlockStatus:
    """Data that the file below does not store reads as zeroes."""
    if isinstance(segment.source, HostFile):
        stored, run = node.driver.data_run(segment.offset, segment.length)
        if stored:
            return answer._replace(length=run)
        return answer._replace(length=run, flags=answer.flags & ~Status.DATA | Status.ZERO)
    if not node.driver.may_have_holes() or not isinstance(segment.source, Edge):
        return answer
    below = await layer_status(segment.source.node, segment.offset, segment.length)
    if below.flags & Status.EOF and (not below.length or below.flags & Status.ZERO):
        return answer._replace(flags=answer.flags | Status.ZERO)  # and what is past the file's end reads as zeroes, too
    return answer._replace(length=below.length, flags=answer.flags | below.flags & Status.ZERO)

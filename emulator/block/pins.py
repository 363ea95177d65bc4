"""Where a range of a node stands in host files, held there for as long as somebody copies it from there.

`pinned` is what a read does, up to the moment of moving bytes: it is in flight on every node on the way, and follows `map` down
the chain. It differs in what it holds at a time, and so has rules of its own against waiting in a circle:

* A layer (the node, what it filters, its backing files) is held once, for the whole range, before anything of it is looked
  at: a second hold could wait for a discard that waits for the first.
* What layers store their bytes in is held afterwards, in one order for everybody.
* What the bytes are copied to must not wait for these holds: nodes that the caller names are never held; where the way leads
  through one, or the bytes cannot be said to stand in a host file (compressed, a filter that must be asked, an image inside
  an image), there is no answer, and the caller reads and writes.

A range is answered for as far as `PARTS` pieces go.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Container
from contextlib import asynccontextmanager
from typing import Final

from livedisk.emulator.block.extents import Extents
from livedisk.emulator.block.flatmap import straight
from livedisk.emulator.block.hostfile import HostFile
from livedisk.emulator.block.node import Edge, Node
from livedisk.emulator.block.permissions import Role
from livedisk.emulator.block.types import Kind

PARTS: Final = 256
"""Pieces of one answer."""


@asynccontextmanager
async def pinned(node: Node, offset: int, length: int, but: Container[Node]) -> AsyncIterator[Extents | None]:
    """The bytes of the start of the range (bytes, inside the node), which stay where they are inside the block; None where that
    cannot be said. ``but``: nodes that must not be held. Raises OSError where metadata cannot be read."""
    pins = _Pins(offset, length, but)
    try:
        yield await pins.find(node)
    finally:
        pins.release()


class _Pins:
    def __init__(self, offset: int, length: int, but: Container[Node]) -> None:
        self._start = offset
        self._length = length
        self._but = but
        self._held: list[Callable[[], None]] = []
        self._layers: set[Node] = set()
        self._stores: dict[Edge, tuple[HostFile | None, int, int]] = {}
        self._used: dict[Edge, tuple[int, int]] = {}

    def release(self) -> None:
        for let_go in self._held:
            let_go()

    async def find(self, node: Node) -> Extents | None:
        parts: list[tuple[HostFile | None, int, int]] = []
        position, end = self._start, self._start + self._length
        while position < end and len(parts) < PARTS:
            part = await self._locate(node, position, end - position)
            if part is None:
                break
            file, at, length = part
            if parts and parts[-1][0] is file and (file is None or parts[-1][1] + parts[-1][2] == at):
                parts[-1] = file, parts[-1][1], parts[-1][2] + length
            else:
                parts.append(part)
            position += length
        if not parts or not await self._hold_stores():
            return None
        return Extents(parts)

    async def _locate(self, node: Node, offset: int, length: int) -> tuple[HostFile | None, int, int] | None:
        """The first bytes of a range: file, host offset, length."""
        while True:
            if node not in self._layers:
                if node in self._but:
                    return None
                self._layers.add(node)
                self._held.append(await node.hold(self._start, self._length))
            inside = min(length, node.size - offset)
            if inside <= 0:  # past the end of a backing file
                return None, 0, length
            segment = await node.map(offset, inside)
            length = segment.length
            if segment.kind is Kind.DATA:
                if isinstance(segment.source, HostFile):
                    return segment.source, segment.offset, length
                assert segment.source is not None
                if not segment.source.role & (Role.COW | Role.FILTERED) or segment.offset != offset:
                    return self._stored(segment.source, segment.offset, length)
                node = segment.source.node
            elif segment.kind is Kind.UNALLOCATED and node.backing is not None:
                node = node.backing.node
            elif segment.kind in (Kind.UNALLOCATED, Kind.ZERO):
                return None, 0, length
            else:
                return None

    def _stored(self, edge: Edge, offset: int, length: int) -> tuple[HostFile | None, int, int] | None:
        """Bytes that a layer stores in a child, at ``offset`` there."""
        file, base, size = self._stores.get(edge, (None, 0, 0))
        if offset + length > size:  # not asked yet, or it may have grown
            file, base, size, _ = straight(edge)
            self._stores[edge] = file, base, size
        if file is None:
            return None
        if offset >= size:
            return None, 0, length
        length = min(length, size - offset)
        low, high = self._used.get(edge, (offset, offset + length))
        self._used[edge] = min(low, offset), max(high, offset + length)
        return file, base + offset, length

    async def _hold_stores(self) -> bool:
        for edge in sorted(self._used, key=id):
            low, high = self._used[edge]
            node = edge.node
            while True:  # down a straight line
                if node in self._but or node in self._layers:
                    return False
                self._held.append(await node.hold(low, high - low))
                segment = await node.map(low, high - low)
                if isinstance(segment.source, HostFile) or segment.source is None:
                    break
                node, low, high = segment.source.node, segment.offset, segment.offset + high - low
        return True

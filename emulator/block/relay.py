"""Requests that go straight to a driver which waits for somebody else, without a coroutine on the way.

What the flat map cannot answer takes the slow path: a coroutine or two, a task, futures. Where the driver works on the request
that is little; where it only passes it on to a server (`Driver.start_read`), it would be most of the cost. So where the nodes
below a backend are one straight line to such a driver (a raw image on an export, an export alone), the request is started at
once and counted as in flight in every node that it passes, as any other: drains wait for it, serialising requests keep it off,
dirty trackers learn of it before it is acknowledged.

As the flat map, this is only a cache of `Driver.map`, dropped whenever a mapping or the graph changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from livedisk.emulator.block.driver import Driver, Ended
from livedisk.emulator.block.node import Edge, InFlight, Node
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.types import DetectZeroes, Kind, NotMapped

if TYPE_CHECKING:
    from livedisk.emulator.block.backend import BlockBackend


class Relay:
    """The straight line below one backend."""

    def __init__(self, backend: BlockBackend) -> None:
        self._backend = backend
        self.reset()

    def reset(self) -> None:
        """Forget the line: something below changed."""
        self._known = False
        self._line: list[tuple[Node, int]] = []
        self._driver: Driver | None = None
        self._writable = False

    def _find(self) -> Driver | None:
        """Learn the line: every node with the offset in it of the disk's first byte."""
        self._known = True
        edge = self._backend.root
        if edge is None:
            return None
        self._writable = bool(edge.perm & Perm.WRITE)
        node, base, size = edge.node, 0, edge.node.size
        while size:
            self._line.append((node, base))
            self._writable = self._writable and not node.read_only and node.detect_zeroes is DetectZeroes.OFF
            try:
                segment = node.driver.map(base, size)
            except NotMapped:
                return None
            if segment.length != size:
                return None
            if segment.kind is Kind.OPAQUE:
                self._driver = node.driver
                return node.driver
            if segment.kind is not Kind.DATA or not isinstance(segment.source, Edge):
                return None
            self._writable = self._writable and segment.in_place
            node, base = segment.source.node, segment.offset
            size = min(size, node.size - base)
        return None

    def start_read(self, offset: int, view: memoryview, ended: Ended) -> bool:
        """Begin to fill ``view`` from ``offset`` and call ``ended`` afterwards; False: nothing happened."""
        driver = self._driver or (None if self._known else self._find())
        if driver is None or self._backend.quiesced:
            return False
        requests = self._enter(offset, len(view))
        if requests is None:
            return False
        line = self._line

        def over(error: OSError | None, holes: Sequence[tuple[int, int]]) -> None:
            self._leave(line, requests)
            ended(error, holes)

        if driver.start_read(offset + line[-1][1], view, over):
            return True
        self._leave(line, requests)
        return False

    def start_write(self, offset: int, data: memoryview, ended: Ended) -> bool:
        """Begin to write ``data`` at ``offset``; as `start_read`."""
        driver = self._driver or (None if self._known else self._find())
        if driver is None or not self._writable or self._backend.quiesced:
            return False
        length = len(data)
        requests = self._enter(offset, length)
        if requests is None:
            return False
        line = self._line

        def over(error: OSError | None, holes: Sequence[tuple[int, int]]) -> None:
            for node, base in line:
                node.written(offset + base, length)
            self._leave(line, requests)
            ended(error, holes)

        if driver.start_write(offset + line[-1][1], data, over):
            return True
        self._leave(line, requests)
        return False

    def _enter(self, offset: int, length: int) -> list[InFlight] | None:
        """Count as in flight everywhere; None where that would have to wait."""
        requests: list[InFlight] = []
        for node, base in self._line:
            request = node.begin_now(offset + base, length)
            if request is None:
                self._leave(self._line, requests, counted=False)
                return None
            requests.append(request)
        self._backend.count_in()
        return requests

    def _leave(self, line: list[tuple[Node, int]], requests: list[InFlight], *, counted: bool = True) -> None:
        for (node, _), request in zip(line, requests, strict=False):
            node.end_now(request)
        if counted:
            self._backend.count_out()

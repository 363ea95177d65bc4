"""Where requests enter the graph: the root of a device, an export or a job (QEMU's BlockBackend).

A backend holds the *root* edge to a node. It checks ranges against the node's size, gates requests while the graph is
drained or the
backend is held, counts what is in flight (drain waits for that count), and owns the flat map, whose `try_read` and
`try_write` serve what needs
none of this.

A request that passed the gate runs to its end, whatever happens to its caller: drivers are never cancelled.

Quiesce: ``quiesce()`` closes the gate and the fast path at once; ``await idle()`` waits until nothing is in flight;
``unquiesce()`` opens it.
Both are counted, so that nested drains work.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

from livedisk.emulator.block.flatmap import FlatMap
from livedisk.emulator.block.node import Edge, Node
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.relay import Relay
from livedisk.emulator.block.throttle import Direction, Member, ThrottleGroup
from livedisk.emulator.block.types import Preallocation, ZeroFlags

if TYPE_CHECKING:
    from livedisk.emulator.block.graph import Graph

R = TypeVar("R")
_WRITE: Final = Perm.WRITE | Perm.WRITE_UNCHANGED


class BlockBackend:
    """One user of the graph. Attach it with ``graph.attach_root``.

    ``description``: as QEMU's messages name it ("block device 'x'", "an unnamed block device"). ``known_size``: the
    node's size (bytes) when it was last looked at. ``on_resize``, ``on_root_changed``: called after the node's size, or
    the node itself, changed. ``throttle``: its part in a group of limits, or None. ``resting``: what it needs and shares once
    its node is active again (`activity.py`); None: that is so now. ``rests``: whether that is fine with it; None: unless it may
    write.
    """

    of_job = False
    """Whether it is a job's hold on a node, and no user of its own."""
    user_name = ""
    """The name that a user gave it (a drive's); "": none."""
    owner: object | None = None
    """The job whose hold it is."""

    def __init__(self, graph: Graph, name: str = "", description: str = "") -> None:
        self.graph = graph
        self.name = name
        self._description = description
        self.root: Edge | None = None
        self.on_resize: list[Callable[[], None]] = []
        self.on_root_changed: list[Callable[[], None]] = []
        self.fast = FlatMap(self)
        self.try_read = self.fast.try_read
        self.try_write = self.fast.try_write
        self.relay = Relay(self)
        self.start_read = self.relay.start_read
        self.start_write = self.relay.start_write
        self.known_size = 0
        self.rests: Callable[[], bool] | None = None
        self.resting: tuple[Perm, Perm] | None = None
        self.throttle: Member | None = None
        self._each_is_timed = False
        self._quiesced = 0
        self._in_flight = 0
        self._opened: asyncio.Future[None] | None = None
        self._emptied: asyncio.Future[None] | None = None

    # -- as an edge's parent -------------------------------------------------------------------------------------------
    @property
    def description(self) -> str:
        if self._description:
            return self._description
        return f"block device '{self.name}'" if self.name else "an unnamed block device"

    @property
    def node(self) -> Node:
        """The node below. Raises ENOMEDIUM where there is none."""
        if self.root is None:
            raise OSError(errno.ENOMEDIUM, os.strerror(errno.ENOMEDIUM))
        return self.root.node

    @property
    def size(self) -> int:
        """Bytes; 0 without a node."""
        return self.root.node.size if self.root is not None else 0

    def child_replaced(self, edge: Edge) -> None:
        self.refresh()
        for callback in list(self.on_root_changed):
            callback()

    def child_mapping_changed(self, edge: Edge, offset: int, length: int) -> None:
        self.fast.invalidate(offset, length)
        self.relay.reset()

    def refresh(self) -> None:
        """The graph below changed: forget the flat map and re-decide whether the fast path is open."""
        self.fast.reset()
        self.relay.reset()
        self.known_size = self.size
        plain = self.throttle is None and not self._each_is_timed
        self.fast.enabled = plain and not self._quiesced and self.root is not None

    def may_rest(self) -> bool:
        """Whether its node may be inactivated: it loses its permissions for as long."""
        if self.rests is not None:
            return self.rests()
        return self.root is None or not self.root.perm & _WRITE

    # -- the gate --------------------------------------------------------------------------------------------------
    @property
    def quiesced(self) -> bool:
        """Whether new requests wait."""
        return self._quiesced > 0

    @property
    def in_flight(self) -> int:
        """Requests that passed the gate and are not done."""
        return self._in_flight

    def quiesce(self) -> None:
        """Let no new request in. Counted."""
        self._quiesced += 1
        if self.throttle is not None:
            self.throttle.suspend()  # what waits there must not hold up a drain
        self.refresh()

    def unquiesce(self) -> None:
        """Undo one `quiesce`; the last one lets the waiting requests in."""
        self._quiesced -= 1
        if self.throttle is not None:
            self.throttle.unsuspend()
        if self._quiesced == 0:
            self.refresh()
            if self._opened is not None:
                opened, self._opened = self._opened, None
                opened.set_result(None)

    def time_each_request(self, timed: bool) -> None:
        """Whether somebody wants to know of each request how long it takes, so that none may take the fast path."""
        self._each_is_timed = timed
        self.refresh()

    def set_throttle(self, group: ThrottleGroup | None) -> None:
        """Let the backend's requests share the limits of ``group``, or (None) of none."""
        if self.throttle is not None and group is not None:
            if self.throttle.group is not group:
                self.throttle.move(group)
            return
        if self.throttle is not None:
            self.throttle.leave()
            self.throttle = None
        elif group is not None:
            self.throttle = Member(group)
            self.throttle.suspended = self._quiesced
        self.refresh()

    async def idle(self) -> None:
        """Wait until no request is in flight."""
        while self._in_flight:
            if self._emptied is None:
                self._emptied = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._emptied)

    async def _enter(self) -> Node:
        """Pass the gate and be counted; `_leave` afterwards, whatever happens."""
        while self._quiesced:
            if self._opened is None:
                self._opened = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._opened)
        node = self.node
        self._in_flight += 1
        return node

    def count_in(self) -> None:
        """A request that passed the open gate without a coroutine is in flight; `count_out` it."""
        self._in_flight += 1

    def count_out(self) -> None:
        """It is over."""
        self._leave()

    def _leave(self) -> None:
        self._in_flight -= 1
        if not self._in_flight and self._emptied is not None:
            self._emptied.set_result(None)
            self._emptied = None

    @asynccontextmanager
    async def request(self) -> AsyncIterator[Node]:
        """Pass the gate and count as in flight, for what only looks and has no method of its own here (block status)."""
        node = await self._enter()
        try:
            yield node
        finally:
            self._leave()

    async def _finish(self, work: Coroutine[Any, Any, R]) -> R:
        """Run what was let in to its end and count it out.

        A caller that is cancelled gets its CancelledError, but only then: a request that was cut off between two
        metadata updates would leave the image half-changed, and a thread may still work on the caller's buffer.
        """
        try:
            task = asyncio.get_running_loop().create_task(work)
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                while not task.done():
                    try:
                        await asyncio.wait([task])
                    except asyncio.CancelledError:
                        continue  # asked again: the answer is the same
                if not task.cancelled():
                    task.exception()  # the caller is gone: nobody else will look at it
                raise
        finally:
            self._leave()

    def _check(self, node: Node, offset: int, length: int, need: Perm) -> None:
        if offset < 0 or length < 0 or offset + length > node.size:
            raise OSError(
                errno.EIO,
                f"{os.strerror(errno.EIO)}: [{offset}, {offset + length}) is outside node '{node.name}' ({node.size} bytes)",
            )
        assert self.root is not None
        if need and not self.root.perm & need:
            raise PermissionError(errno.EPERM, f"{self.description} has no write permission on node '{node.name}'")

    # -- requests; offsets and lengths are bytes ---------------------------------------------------------------------
    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``."""
        await self._finish(self._read(await self._enter(), offset, view))

    async def _read(self, node: Node, offset: int, view: memoryview) -> None:
        self._check(node, offset, len(view), Perm.NONE)
        if self.throttle is not None:
            await self.throttle.admit(Direction.READ, len(view))
        await node.read(offset, view)

    async def write(self, offset: int, data: memoryview, *, fua: bool = False) -> None:
        """Write ``data``; with ``fua`` it is on stable storage on return."""
        await self._finish(self._write(await self._enter(), offset, data, fua=fua))

    async def _write(self, node: Node, offset: int, data: memoryview, *, fua: bool) -> None:
        self._check(node, offset, len(data), _WRITE)
        if self.throttle is not None:
            await self.throttle.admit(Direction.WRITE, len(data))
        await node.write(offset, data, fua=fua)

    async def write_zeroes(
        self, offset: int, length: int, flags: ZeroFlags = ZeroFlags.NONE, *, fua: bool = False
    ) -> None:
        """Zero a range; see `Node.write_zeroes`."""
        await self._finish(self._write_zeroes(await self._enter(), offset, length, flags, fua=fua))

    async def _write_zeroes(self, node: Node, offset: int, length: int, flags: ZeroFlags, *, fua: bool) -> None:
        self._check(node, offset, length, _WRITE)
        if self.throttle is not None:
            await self.throttle.admit(Direction.WRITE, length)
        await node.write_zeroes(offset, length, flags, fua=fua)

    async def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Drop a range's storage."""
        await self._finish(self._discard(await self._enter(), offset, length, fua=fua))

    async def _discard(self, node: Node, offset: int, length: int, *, fua: bool) -> None:
        self._check(node, offset, length, _WRITE)
        await node.discard(offset, length, fua=fua)

    async def prefetch(self, offset: int, length: int) -> None:
        """Bring a range into the host's cache, as far as that is cheap to ask for."""
        await self._finish(self._prefetch(await self._enter(), offset, length))

    async def _prefetch(self, node: Node, offset: int, length: int) -> None:
        self._check(node, offset, length, Perm.NONE)
        await node.prefetch(offset, length)

    async def flush(self) -> None:
        """Put every acknowledged write on stable storage."""
        await self._finish(self._flush(await self._enter()))

    async def _flush(self, node: Node) -> None:
        if not node.read_only and node.active:
            await node.flush()

    async def truncate(self, size: int, *, exact: bool = True, prealloc: Preallocation = Preallocation.OFF) -> None:
        """Resize the node to ``size`` bytes. Raises EPERM without the RESIZE permission. The caller has drained."""
        assert self.root is not None
        if not self.root.perm & Perm.RESIZE:
            raise PermissionError(
                errno.EPERM, f"{self.description} has no resize permission on node '{self.node.name}'"
            )
        await self.node.truncate(size, exact=exact, prealloc=prealloc)

    def __repr__(self) -> str:
        return f"<BlockBackend {self.description}>"

"""A node as an NBD export: its own user of the graph, which follows the node through snapshots and pivots.

The export holds a `BlockBackend`. Its root edge is moved when the node is replaced (a snapshot puts an overlay there, a
pivot the mirror's target), and all that clients ask is answered from whatever node is there then. What a client was
promised when it connected (block sizes, the right to write) does not change.

Source: QEMU ``nbd/server.c`` (nbd_export_create, nbd_negotiate_send_info), ``block/export/export.c``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.bitmaps import DirtyBitmap
from livedisk.emulator.block.flatmap import MISS
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.transaction import Transaction
from livedisk.emulator.block.types import ZeroFlags
from livedisk.emulator.exports.contexts import Contexts
from livedisk.nbd.export import Extent

FastPath = Callable[[int, memoryview], int]

PREFERRED_BLOCK: Final = 4096
MAX_PAYLOAD: Final = 32 << 20
"""Bytes in one request at most, as QEMU has it."""
_CACHE_STEP: Final = 1 << 20
"""Bytes read at once to warm the host's cache."""


class NodeExport:
    """``livedisk.nbd.export.Export`` on a node. Made detached: `attach` puts it there.

    ``writethrough``: every write is on stable storage when it is answered. ``shared_clients``: whether more than one
    client may be connected, which is when multi-conn is offered. ``allow_inactive``: whether the node may be inactive.
    """

    def __init__(
        self,
        graph: Graph,
        name: str,
        *,
        description: str = "",
        writable: bool = False,
        writethrough: bool = False,
        with_depth: bool = False,
        bitmaps: Sequence[DirtyBitmap] = (),
        shared_clients: bool = True,
        allow_inactive: bool = False,
    ) -> None:
        self.name = name
        self.description = description
        self.read_only = not writable
        self.can_multi_conn = shared_clients
        self.can_fast_zero = writable
        self.min_block = 1
        self.preferred_block = PREFERRED_BLOCK
        self.max_payload = MAX_PAYLOAD
        self.backend = BlockBackend(graph)
        if allow_inactive:
            self.backend.rests = lambda: True
        self.try_read: FastPath = self.backend.try_read
        self.try_write: FastPath = declines if writethrough else self.backend.try_write
        self.start_read = self.backend.start_read
        self.start_write = None if writethrough else self.backend.start_write
        self._graph = graph
        self._writethrough = writethrough
        self._contexts = Contexts(bitmaps, with_depth=with_depth)

    # -- life --------------------------------------------------------------------------------------------------------
    def attach(self, node: Node) -> None:
        """Put the export on ``node``. Raises PermissionConflict, LockError or BlockError."""
        perm = Perm.CONSISTENT_READ if self.read_only else Perm.CONSISTENT_READ | Perm.WRITE
        # A resize under clients that know the old size is not allowed, as with QEMU; all else is. In two steps as there,
        # so that a node that is in use is refused for what the export needs before what it denies.
        with Transaction() as steps:
            if node.active:
                self._graph.attach_root(self.backend, node, perm, Perm.ALL, steps)
            else:
                self.backend.resting = perm, Perm.ALL
                self._graph.attach_root(self.backend, node, Perm.NONE, Perm.ALL, steps)
            self._graph.set_root_permissions(self.backend, perm, Perm.ALL & ~Perm.RESIZE)
        self.min_block = node.driver.request_alignment
        self.preferred_block = max(self.preferred_block, self.min_block)

    def close_door(self) -> None:
        """The export is about to be withdrawn: nothing of a node's waits for the run state."""

    async def close(self) -> None:
        """Take the export off its node, once nothing is in flight. No client is left; a node that nobody else uses syncs as
        it closes."""
        await self.backend.idle()
        await self._graph.detach_root(self.backend)

    # -- what the server asks ----------------------------------------------------------------------------------------
    @property
    def node(self) -> Node:
        """The node served now."""
        return self.backend.node

    @property
    def size(self) -> int:
        """Bytes."""
        return self.backend.size

    @property
    def contexts(self) -> Sequence[str]:
        """Meta contexts served."""
        return self._contexts.names

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``."""
        await self.backend.read(offset, view)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Write ``data`` at ``offset``."""
        await self.backend.write(offset, data, fua=fua or self._writethrough)

    async def flush(self) -> None:
        """Put every acknowledged write on stable storage."""
        await self.backend.flush()

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """Discard the range."""
        await self.backend.discard(offset, length, fua=fua or self._writethrough)

    async def write_zeroes(self, offset: int, length: int, *, fua: bool, may_unmap: bool, fast: bool) -> None:
        """Zero the range."""
        flags = zero_flags(may_unmap=may_unmap, fast=fast)
        await self.backend.write_zeroes(offset, length, flags, fua=fua or self._writethrough)

    async def cache(self, offset: int, length: int) -> None:
        """Bring the range into the host's cache, by reading it."""
        await warm(self.read, offset, length)

    async def block_status(self, context: str, offset: int, length: int, limit: int) -> list[Extent]:
        """Describe the range in one of `contexts`."""
        return await self._contexts.describe(self.backend, context, offset, length, limit)

    def client_connected(self, client: object) -> None:
        """Nothing to prepare: clients share the backend."""

    def client_gone(self, client: object) -> None:
        """Nothing to undo."""


def declines(offset: int, view: memoryview) -> int:
    """Writing through cannot be done without blocking."""
    return MISS


def zero_flags(*, may_unmap: bool, fast: bool) -> ZeroFlags:
    """NBD's flags in the block layer's."""
    flags = ZeroFlags.MAY_UNMAP if may_unmap else ZeroFlags.NONE
    return flags | ZeroFlags.NO_FALLBACK if fast else flags


async def warm(read: Callable[[int, memoryview], Awaitable[None]], offset: int, length: int) -> None:
    """Read a range and drop what was read, in steps of bounded size."""
    room = memoryview(bytearray(min(length, _CACHE_STEP)))
    for start in range(offset, offset + length, _CACHE_STEP):
        await read(start, room[: min(_CACHE_STEP, offset + length - start)])

"""A device as an NBD export: the guest's door.

Requests go through the device's queue: the run state holds them, the error policy answers for them, the statistics
count them. The export has no edge of its own in the graph; it needs no permission that the device does not hold.

With logical blocks of 512 bytes clients may address single bytes, as they may on QEMU's export of a device's node;
with larger logical blocks (``logical_block_size``) they are held to them, as a guest is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from livedisk.emulator.block.bitmaps import DirtyBitmap
from livedisk.emulator.block.node import Node
from livedisk.emulator.device.accounting import FastPath
from livedisk.emulator.device.spec import SECTOR
from livedisk.emulator.device.virtio_blk import VirtioBlk
from livedisk.emulator.exports.contexts import Contexts
from livedisk.emulator.exports.node_export import MAX_PAYLOAD, PREFERRED_BLOCK, declines, warm, zero_flags
from livedisk.nbd.export import Extent


class DeviceExport:
    """``livedisk.nbd.export.Export`` on a device; also its `virtio_blk.Door`.

    ``writethrough``, ``shared_clients``: as for `NodeExport`.
    """

    def __init__(
        self,
        device: VirtioBlk,
        name: str,
        *,
        description: str = "",
        writable: bool = False,
        writethrough: bool = False,
        with_depth: bool = False,
        bitmaps: Sequence[DirtyBitmap] = (),
        shared_clients: bool = True,
    ) -> None:
        block = device.logical_block_size
        self.device: Final = device
        self.name = name
        self.description = description
        self.read_only = not writable
        self.can_multi_conn = shared_clients
        self.can_fast_zero = writable
        self.min_block = 1 if block == SECTOR else block
        self.preferred_block = max(PREFERRED_BLOCK, device.physical_block_size)
        self.max_payload = MAX_PAYLOAD
        self.closed = False
        self.try_read: FastPath = device.try_read
        self.try_write: FastPath = declines
        self._writethrough = writethrough
        self._choose_write()
        device.on_write_cache.append(self._choose_write)
        self._contexts = Contexts(bitmaps, with_depth=with_depth)

    # -- life --------------------------------------------------------------------------------------------------------
    def close_door(self) -> None:
        """The export is about to be withdrawn: what waits for the run state fails, nothing new waits."""
        self.closed = True
        self.device.door_closed(self)

    async def close(self) -> None:
        """No client is left."""
        self.device.on_write_cache.remove(self._choose_write)

    def _choose_write(self) -> None:
        self.try_write = declines if self._writethrough else self.device.try_write

    # -- what the server asks ----------------------------------------------------------------------------------------
    @property
    def node(self) -> Node:
        """The device's node now."""
        return self.device.backend.node

    @property
    def size(self) -> int:
        """Bytes. Asked once for a batch of requests, which is how the statistics know when the device was last
        used without reading the clock for each."""
        self.device.accounting.touch()
        return self.device.size

    @property
    def contexts(self) -> Sequence[str]:
        """Meta contexts served."""
        return self._contexts.names

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``."""
        await self.device.read(offset, view, self)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Write ``data`` at ``offset``."""
        await self.device.write(offset, data, fua=fua or self._writethrough, door=self)

    async def flush(self) -> None:
        """Put every acknowledged write on stable storage."""
        await self.device.flush(self)

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """Discard the range."""
        await self.device.discard(offset, length, fua=fua or self._writethrough, door=self)

    async def write_zeroes(self, offset: int, length: int, *, fua: bool, may_unmap: bool, fast: bool) -> None:
        """Zero the range."""
        flags = zero_flags(may_unmap=may_unmap, fast=fast)
        await self.device.write_zeroes(offset, length, flags, fua=fua or self._writethrough, door=self)

    async def cache(self, offset: int, length: int) -> None:
        """Bring the range into the host's cache, by reading it. Virtio has no such request: it is not counted."""
        await warm(self._read_uncounted, offset, length)

    async def _read_uncounted(self, offset: int, view: memoryview) -> None:
        await self.device.enter(self)
        await self.device.backend.read(offset, view)

    async def block_status(self, context: str, offset: int, length: int, limit: int) -> list[Extent]:
        """Describe the range in one of `contexts`."""
        await self.device.enter(self)
        return await self._contexts.describe(self.device.backend, context, offset, length, limit)

    def client_connected(self, client: object) -> None:
        """Nothing to prepare."""

    def client_gone(self, client: object) -> None:
        """Nothing to undo."""

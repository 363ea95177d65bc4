"""Meta contexts: what a client can ask of a range besides its bytes.

    base:allocation         0 data, 1 hole, 2 zero, 3 both
    qemu:allocation-depth   0 nowhere allocated, 1 in the top node, n in the n-th node of the chain
    qemu:dirty-bitmap:NAME  0 clean, 1 dirty; as the bitmap is when it is asked, which may go on recording

Source: proto.md, "base:allocation" metadata context; QEMU ``docs/interop/nbd.txt``, ``nbd/server.c``
(blockstatus_to_extents, blockalloc_to_extents, bitmap_to_extents).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.bitmaps import DirtyBitmap
from livedisk.emulator.block.status import BlockStatus, block_status
from livedisk.nbd.constants import STATE_HOLE, STATE_ZERO
from livedisk.nbd.export import Extent

BASE_ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
_DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
_STATE_DIRTY: Final = 1


class Contexts:
    """The contexts of one export, in the order of their ids. ``bitmaps``: those that it shows, by the names they have now."""

    def __init__(self, bitmaps: Sequence[DirtyBitmap], *, with_depth: bool) -> None:
        self._bitmaps = {f"{_DIRTY_BITMAP}{bitmap.name}": bitmap for bitmap in bitmaps}
        self.names = (BASE_ALLOCATION, *((ALLOCATION_DEPTH,) if with_depth else ()), *self._bitmaps)

    async def describe(self, backend: BlockBackend, context: str, offset: int, length: int, limit: int) -> list[Extent]:
        """At most ``limit`` extents of the range (bytes) in one of the contexts, adjacent ones differing; at least one."""
        bitmap = self._bitmaps.get(context)
        if bitmap is not None:
            return _dirty(bitmap, offset, length, limit)
        return await describe(backend, context, offset, length, limit)


def _allocation(status: BlockStatus) -> int:
    return (0 if status.data else STATE_HOLE) | (STATE_ZERO if status.zero else 0)


def _depth(status: BlockStatus) -> int:
    return status.depth


_FLAGS: Final[dict[str, Callable[[BlockStatus], int]]] = {
    BASE_ALLOCATION: _allocation,
    ALLOCATION_DEPTH: _depth,
}


async def describe(backend: BlockBackend, context: str, offset: int, length: int, limit: int) -> list[Extent]:
    """At most ``limit`` extents of the range (bytes) in that context, adjacent ones differing; at least one.

    Counts as one request in flight on ``backend``, so that the chain does not change under it.
    """
    flags_of = _FLAGS[context]
    extents: list[Extent] = []
    end = offset + length
    async with backend.request() as node:
        while offset < end:
            status = await block_status(node, offset, end - offset)
            flags = flags_of(status)
            if extents and extents[-1].flags == flags:
                extents[-1] = Extent(extents[-1].length + status.length, flags)
            elif len(extents) == limit:
                break
            else:
                extents.append(Extent(status.length, flags))
            offset += status.length
    return extents


def _dirty(bitmap: DirtyBitmap, offset: int, length: int, limit: int) -> list[Extent]:
    extents: list[Extent] = []
    end = offset + length
    while offset < end and len(extents) < limit:
        dirty = bitmap.any(offset, 1)
        change = bitmap.next_clean(offset, end) if dirty else bitmap.next_dirty(offset, end)
        if change is None:
            change = min(end, bitmap.size) if dirty else end
        extents.append(Extent(change - offset, _STATE_DIRTY if dirty else 0))
        offset = change
    return extents

"""Meta contexts: what a client can ask of a range besides its bytes.

    base:allocation         0 data, 1 hole, 2 zero, 3 both
    qemu:allocation-depth   0 nowhere allocated, 1 in the top node, n in the n-th node of the chain

Source: proto.md, "base:allocation" metadata context; QEMU ``docs/interop/nbd.txt``, ``nbd/server.c``
(blockstatus_to_extents, blockalloc_to_extents).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.status import BlockStatus, block_status
from livedisk.nbd.constants import STATE_HOLE, STATE_ZERO
from livedisk.nbd.export import Extent

BASE_ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"


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

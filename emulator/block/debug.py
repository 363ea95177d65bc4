"""Debug events: a format tells whoever stands below what it is about to do, so that a test can make exactly that fail.

`blkdebug` listens: its `Driver.debugger` is set, every other driver's is None (raw passes its child's on), and asking costs
an attribute look-up on paths that are slow already; the fast path never meets a listener, because `blkdebug` maps everything
OPAQUE. An event is told where the request may be held: a breakpoint suspends it there.

Names and places are QEMU's (``qapi/block-core.json``, BlkdebugEvent; the BLKDBG_EVENT lines of ``block/``). As there, what
belongs to formats that are not here, and ``vmstate_*``, never happens. Our qcow2 driver keeps all metadata in memory until it is
flushed; where somebody listens it writes at once what QEMU writes at once, new L2 tables and refcount blocks.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Protocol

from livedisk.emulator.block.permissions import Role

if TYPE_CHECKING:
    from livedisk.emulator.block.node import Edge, Node


class Event(enum.StrEnum):
    """QEMU's BlkdebugEvent."""

    L1_UPDATE = "l1_update"
    L1_GROW_ALLOC_TABLE = "l1_grow_alloc_table"
    L1_GROW_WRITE_TABLE = "l1_grow_write_table"
    L1_GROW_ACTIVATE_TABLE = "l1_grow_activate_table"
    L2_LOAD = "l2_load"
    L2_UPDATE = "l2_update"
    L2_UPDATE_COMPRESSED = "l2_update_compressed"
    L2_ALLOC_COW_READ = "l2_alloc_cow_read"
    L2_ALLOC_WRITE = "l2_alloc_write"
    READ_AIO = "read_aio"
    READ_BACKING_AIO = "read_backing_aio"
    READ_COMPRESSED = "read_compressed"
    WRITE_AIO = "write_aio"
    WRITE_COMPRESSED = "write_compressed"
    VMSTATE_LOAD = "vmstate_load"
    VMSTATE_SAVE = "vmstate_save"
    COW_READ = "cow_read"
    COW_WRITE = "cow_write"
    REFTABLE_LOAD = "reftable_load"
    REFTABLE_GROW = "reftable_grow"
    REFTABLE_UPDATE = "reftable_update"
    REFBLOCK_LOAD = "refblock_load"
    REFBLOCK_UPDATE = "refblock_update"
    REFBLOCK_UPDATE_PART = "refblock_update_part"
    REFBLOCK_ALLOC = "refblock_alloc"
    REFBLOCK_ALLOC_HOOKUP = "refblock_alloc_hookup"
    REFBLOCK_ALLOC_WRITE = "refblock_alloc_write"
    REFBLOCK_ALLOC_WRITE_BLOCKS = "refblock_alloc_write_blocks"
    REFBLOCK_ALLOC_WRITE_TABLE = "refblock_alloc_write_table"
    REFBLOCK_ALLOC_SWITCH_TABLE = "refblock_alloc_switch_table"
    CLUSTER_ALLOC = "cluster_alloc"
    CLUSTER_ALLOC_BYTES = "cluster_alloc_bytes"
    CLUSTER_FREE = "cluster_free"
    FLUSH_TO_OS = "flush_to_os"
    FLUSH_TO_DISK = "flush_to_disk"
    PWRITEV_RMW_HEAD = "pwritev_rmw_head"
    PWRITEV_RMW_AFTER_HEAD = "pwritev_rmw_after_head"
    PWRITEV_RMW_TAIL = "pwritev_rmw_tail"
    PWRITEV_RMW_AFTER_TAIL = "pwritev_rmw_after_tail"
    PWRITEV = "pwritev"
    PWRITEV_ZERO = "pwritev_zero"
    PWRITEV_DONE = "pwritev_done"
    EMPTY_IMAGE_PREPARE = "empty_image_prepare"
    L1_SHRINK_WRITE_TABLE = "l1_shrink_write_table"
    L1_SHRINK_FREE_L2_CLUSTERS = "l1_shrink_free_l2_clusters"
    COR_WRITE = "cor_write"
    CLUSTER_ALLOC_SPACE = "cluster_alloc_space"
    NONE = "none"


class Debugger(Protocol):
    """Whoever is told of debug events."""

    async def event(self, event: Event) -> None:
        """It is about to happen. Returns at once, or after a breakpoint was resumed."""


async def tell(edge: Edge | None, event: Event) -> None:
    """Tell the node below ``edge``, if it listens."""
    debugger = edge.node.driver.debugger if edge is not None else None
    if debugger is not None:
        await debugger.event(event)


def primary(node: Node) -> Edge | None:
    """The child that a format stores its data in, or that a filter shows."""
    return next((edge for edge in node.children.values() if edge.role & Role.PRIMARY), None)


class Breakpoints(Protocol):
    """What a monitor asks of a listener. Each raises OSError(ENOENT) where there is no such event, tag or request."""

    def set_breakpoint(self, event: str, tag: str) -> None:
        """Hold the next request that comes to ``event``; it is known as ``tag`` then."""

    def remove_breakpoint(self, tag: str) -> None:
        """Forget breakpoints of that tag, and let go on what they hold."""

    def resume(self, tag: str) -> None:
        """Let a held request go on."""

    def is_suspended(self, tag: str) -> bool:
        """Whether a request is held under that tag."""


def breakpoints(node: Node) -> Breakpoints | None:
    """Who takes breakpoints for ``node``: the first listener on the way down to its storage (QEMU's
    bdrv_find_debug_node); None: there is none (ENOTSUP)."""
    current: Node | None = node
    while current is not None:
        found = current.driver.breakpoints()
        if found is not None:
            return found
        edge = primary(current)
        current = edge.node if edge is not None else None
    return None

"""The human monitor's ``commit``: what an image holds is written into its backing file, while all requests wait.

Not a job: it is over when the command is. The image stays on top; where its format can, it is emptied, so that what the backing
file holds shows through it again. A backing file that is smaller grows. Source: QEMU ``block/commit.c`` (bdrv_commit).
"""

from __future__ import annotations

import errno
import os
from typing import Final

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.blockers import check_not_busy
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.permissions import Perm, Role
from livedisk.emulator.block.reopen import set_read_only
from livedisk.emulator.block.status import layer_status
from livedisk.emulator.errors import BlockError

_CHUNK: Final = 2 << 20


async def commit_into_backing(graph: Graph, top: Node) -> None:
    """Raises OSError: ENOTSUP without a backing file, EBUSY if a job works on the image, EACCES if it cannot be written;
    or BlockError, PermissionConflict or LockError."""
    while top.filtered is not None:
        top = top.filtered.node
    edge = top.backing
    if edge is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    base = edge.node
    for node in (top, base):
        if node.blockers:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
    check_not_busy(top)
    was_read_only = base.read_only
    if was_read_only:
        await set_read_only(graph, base, False)
    try:
        async with graph.drained(top, base):
            # While the image stands on it, nobody may write to it; nobody looks at either meanwhile.
            graph.detach_child(edge)
            try:
                await _copy(graph, top, base)
            finally:
                graph.attach_child(top, base, "backing", Role.COW)
    finally:
        if was_read_only:
            await set_read_only(graph, base, True)


async def _copy(graph: Graph, top: Node, base: Node) -> None:
    owned, base.monitor_owned = base.monitor_owned, True  # it stays open without a user
    backend = BlockBackend(graph)
    graph.attach_root(backend, base, Perm.NONE, Perm.ALL)
    try:
        if base.size < top.size:
            graph.set_root_permissions(backend, Perm.RESIZE, Perm.ALL)
            await base.truncate(top.size, exact=False)
        graph.set_root_permissions(backend, Perm.WRITE, Perm.ALL)
        offset, end = 0, top.size
        while offset < end:
            status = await layer_status(top, offset, end - offset)
            step = min(status.length, _CHUNK)
            if status.allocated:
                data = bytearray(step)
                await top.read(offset, memoryview(data))
                await base.write(offset, memoryview(data))
            offset += step
        await base.flush()
        if not top.read_only:
            await _empty(top)
    finally:
        await graph.detach_root(backend)
        base.monitor_owned = owned


async def _empty(top: Node) -> None:
    try:
        await top.driver.make_empty()
    except BlockError:
        return

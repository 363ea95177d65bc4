"""Operations that a node's users forbid, in QEMU's words (its "op blockers").

Permissions say who may read, write and resize; some operations are refused beyond that. A backing file may not be
resized, deleted, snapshotted or given another backing file name while an overlay stands on it: the overlay's guest
would see it change. Streaming, committing into and backing up such a node stay allowed, so those do not ask here.
Source: QEMU ``block.c``, bdrv_backing_attach.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from livedisk.emulator.block.permissions import Role
from livedisk.emulator.errors import BlockError

if TYPE_CHECKING:
    from livedisk.emulator.block.node import Node


def check_not_busy(node: Node) -> None:
    """Raise BlockError if an overlay stands on ``node``; of several, the newest is named."""
    for edge in reversed(node.parents):
        if edge.role & Role.COW:
            reason = f"node is used as backing hd of {edge.parent_description.removeprefix('node ')}"
            raise BlockError(f"Node '{node.name}' is busy: {reason}")

"""Operations that a node's users forbid, in QEMU's words (its "op blockers").

Permissions say who may read, write and resize; some operations are refused beyond that. A backing file may not be
resized, deleted, snapshotted or given another backing file name while an overlay stands on it: the overlay's guest
would see it change. Streaming, committing into and backing up such a node stay allowed. A node that a job works on is
closed to everything else.
Source: QEMU ``block.c``, bdrv_backing_attach; ``blockjob.c``, block_job_add_bdrv.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from livedisk.emulator.block.permissions import Role
from livedisk.emulator.errors import BlockError

if TYPE_CHECKING:
    from livedisk.emulator.block.node import Node


class Operation(enum.Enum):
    """What a user wants to do with a node, as far as blockers tell it apart."""

    CHANGE = "change"
    """Resize, delete, snapshot, mirror: whatever a backing file is not fit for."""
    STREAM = "stream"
    COMMIT_INTO = "commit into"
    BACK_UP = "back up"


@dataclass(eq=False, frozen=True)
class Blocker:
    """Somebody's ban on all operations on a node (``node.blockers``): a job's. ``reason`` ends QEMU's message."""

    reason: str


def check_not_busy(node: Node, operation: Operation = Operation.CHANGE) -> None:
    """Raise BlockError, in QEMU's words, if a job works on ``node`` or an overlay stands on it; of several, the newest is
    named."""
    reasons = [blocker.reason for blocker in reversed(node.blockers)]
    if operation is Operation.CHANGE:
        reasons += [
            f"node is used as backing hd of {edge.parent_description.removeprefix('node ')}"
            for edge in reversed(node.parents)
            if edge.role & Role.COW
        ]
    if reasons:
        raise BlockError(f"Node '{node.name}' is busy: {reasons[0]}")

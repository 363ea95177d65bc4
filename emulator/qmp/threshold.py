"""BLOCK_WRITE_THRESHOLD: tell a client, once, that a write to a node went beyond an offset.

Management software uses it on thin-provisioned storage to enlarge it in time. Source: QEMU ``block/write-threshold.c``,
``qapi/block-core.json``.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from livedisk.emulator.block.node import Node
from livedisk.emulator.qmp.events import event
from livedisk.emulator.qmp.qapi import QapiStruct, UInt64


@event("BLOCK_WRITE_THRESHOLD")
class BlockWriteThreshold(QapiStruct):
    """Bytes, both: how far beyond the threshold the write went, and the threshold."""

    node_name: str
    amount_exceeded: UInt64
    write_threshold: UInt64


class _Watch:
    """Sees every write to its node, and goes away when it has spoken."""

    def __init__(self, node: Node, emit: Callable[[msgspec.Struct], None]) -> None:
        self._node = node
        self._emit = emit

    def mark(self, offset: int, length: int) -> None:
        limit = self._node.write_threshold
        excess = offset + length - limit
        if limit and excess > 0:
            self._node.write_threshold = 0
            self._emit(BlockWriteThreshold(node_name=self._node.name, amount_exceeded=excess, write_threshold=limit))


def set_write_threshold(node: Node, limit: int, emit: Callable[[msgspec.Struct], None]) -> None:
    """Ask for one event when a write goes beyond ``limit`` bytes; 0 ends the watch."""
    node.trackers[:] = [tracker for tracker in node.trackers if not isinstance(tracker, _Watch)]
    node.write_threshold = limit
    if limit:
        node.trackers.append(_Watch(node, emit))
    # Writes to a watched node below the root do not take the fast path: the flat maps must be made anew.
    node.graph.changed()

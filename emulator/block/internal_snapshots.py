"""Finding the image that keeps a node's internal snapshots, and the snapshot that somebody means.

A filter, or a raw node on a format that has them, passes on to the one child that holds all of its data. Source: QEMU
``block/snapshot.c`` (bdrv_can_snapshot, bdrv_snapshot_fallback_child, bdrv_snapshot_find_by_id_and_name).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from livedisk.emulator.block.node import Node
from livedisk.emulator.block.permissions import Role

_STORES = Role.DATA | Role.METADATA | Role.FILTERED


def keeper(node: Node) -> Node | None:
    """The node at or below ``node`` whose format keeps snapshots of what it shows; None where there is none."""
    while not node.driver.has_snapshots:
        stored = [edge for edge in node.children.values() if edge.role & _STORES]
        if len(stored) != 1 or not stored[0].role & Role.PRIMARY:
            return None
        node = stored[0].node
    return node


def find(node: Node, id: str | None, name: str | None) -> Mapping[str, Any] | None:
    """The first snapshot of a keeper that has the id and the name, as far as they are given."""
    for one in node.driver.snapshots():
        if id in (None, one["id"]) and name in (None, one["name"]):
            return one
    return None

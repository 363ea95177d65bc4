"""query-blockstats: what devices and nodes did. Source: QEMU ``block/qapi.c`` (bdrv_query_bds_stats), ``qapi/block-core.json``
(BlockStats)."""

from __future__ import annotations

from typing import Any

from livedisk.emulator.block.node import Node
from livedisk.emulator.block.permissions import Role
from livedisk.emulator.device.accounting import BlockDeviceStats
from livedisk.emulator.device.drives import Drive
from livedisk.emulator.device.virtio_blk import VirtioBlk
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType


class BlockStats(QapiStruct):
    """A device's, or a node's, statistics; ``parent`` is what stores the node's bytes, ``backing`` what shows
    through."""

    stats: BlockDeviceStats
    device: str | UnsetType = UNSET
    qdev: str | UnsetType = UNSET
    node_name: str | UnsetType = UNSET
    driver_specific: dict[str, Any] | UnsetType = UNSET
    parent: BlockStats | UnsetType = UNSET
    backing: BlockStats | UnsetType = UNSET


def device_stats(device: VirtioBlk) -> BlockStats:
    """A device's own sums, and the nodes below it."""
    root = device.backend.root
    if root is None:
        return BlockStats(device=device.backend.user_name, qdev=device.backend_path, stats=device.accounting.stats())
    stats = _below(_visible(root.node))
    stats.device = device.backend.user_name
    stats.qdev = device.backend_path
    stats.stats = device.accounting.stats(device.backend.node.wr_highest)
    return stats


def drive_stats(drive: Drive) -> BlockStats:
    """A drive without a device: nobody asks anything of it."""
    node = drive.node
    stats = BlockStats(stats=drive.accounting.stats()) if node is None else _below(_visible(node))
    stats.device = drive.name
    stats.stats = drive.accounting.stats(node.wr_highest if node is not None else 0)
    return stats


def node_stats(node: Node) -> BlockStats:
    """A node's highest offset written; only devices count requests, as with QEMU."""
    return _one(node, _stored_in(node))


def _below(node: Node) -> BlockStats:
    """As a device shows them: without hidden filters, with the chain of backing files."""
    stored = _stored_in(node)
    stats = _one(node, stored)
    if stored is not None:
        stats.parent = _below(_visible(stored))
    shown = node.filtered or node.backing
    if shown is not None:
        stats.backing = _below(_visible(shown.node))
    return stats


def _one(node: Node, stored: Node | None) -> BlockStats:
    specific = node.driver.specific_stats()
    return BlockStats(
        stats=BlockDeviceStats(wr_highest_offset=node.wr_highest),
        node_name=node.name,
        driver_specific=UNSET if specific is None else dict(specific),
        parent=UNSET if stored is None else node_stats(stored),
    )


def _stored_in(node: Node) -> Node | None:
    """The child that carries the node's data: an external data file rather than the file with the metadata. None where
    several do, and none of them more than the others."""
    edges = [edge for edge in node.children.values() if edge.role & (Role.DATA | Role.FILTERED)]
    primary = next((edge for edge in edges if edge.role & Role.PRIMARY), None)
    if primary is not None:
        return primary.node
    return edges[0].node if len(edges) == 1 else None


def _visible(node: Node) -> Node:
    while node.implicit and node.filtered is not None:
        node = node.filtered.node
    return node

"""Find the node that a command means by a device's id or a node's name.

QEMU's ``device`` arguments name block backends, which ``-device`` leaves without names; here the device's id serves, so
that ``device=virtio0`` works where QEMU 10 only takes the node's name. Source: QEMU ``block.c``, bdrv_lookup_bs.
"""

from __future__ import annotations

from livedisk.emulator.block.node import Node
from livedisk.emulator.errors import NodeNotFound
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.qapi import UnsetType


def find_node(ctx: Context, device: str | UnsetType, node_name: str | UnsetType) -> Node:
    """The node in ``device``, else the node ``node_name``. Raises NodeNotFound in QEMU's words."""
    if isinstance(device, str):
        drive = ctx.daemon.devices.drives.find(device)
        if drive is not None:
            if drive.node is None:
                raise NodeNotFound(f"Device '{device}' has no medium")
            return drive.node
        found_device = ctx.daemon.devices.find(device)
        if found_device is not None:
            return found_device.backend.node
    if isinstance(node_name, str):
        found = ctx.daemon.graph.nodes.get(node_name)
        if found is not None:
            return found
    names = [name if isinstance(name, str) else "" for name in (device, node_name)]
    raise NodeNotFound(f"Cannot find device='{names[0]}' nor node-name='{names[1]}'")


def backing_chain(root: Node) -> list[Node]:
    """``root`` and what shows through it: filters' children and backing files, from the top down."""
    chain = [root]
    while (edge := chain[-1].filtered or chain[-1].backing) is not None:
        chain.append(edge.node)
    return chain

"""x-blockdev-change: give a node that takes any number of children one more, or take one away.

Source: QEMU ``qapi/block-core.json``, ``blockdev.c`` (qmp_x_blockdev_change), ``block.c`` (bdrv_add_child, bdrv_del_child);
messages asked from QEMU 10.0.2.
"""

from __future__ import annotations

from livedisk.emulator.block.driver import ChildKeeper
from livedisk.emulator.errors import BlockError
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.lookup import find_node
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType
from livedisk.emulator.qmp.registry import command


class XBlockdevChange(QapiStruct, kw_only=True):
    """``parent``: a device or node. ``child``: the name of the child to take away. ``node``: the node to add."""

    parent: str
    child: str | UnsetType = UNSET
    node: str | UnsetType = UNSET


@command("x-blockdev-change", allow_preconfig=True, features=("unstable",))
async def x_blockdev_change(ctx: Context, args: XBlockdevChange) -> None:
    """Add or remove a child of a node."""
    parent = find_node(ctx, args.parent, args.parent)
    graph, keeper = ctx.daemon.graph, parent.driver
    if (args.child is UNSET) is (args.node is UNSET):
        if args.child is UNSET:
            raise BlockError("Either child or node must be specified")
        raise BlockError("The parameters child and node are in conflict")
    if isinstance(args.child, str):
        edge = parent.children.get(args.child)
        if edge is None:
            raise BlockError(f"Node '{parent.name}' does not have child '{args.child}'")
        if not isinstance(keeper, ChildKeeper):
            raise BlockError(f"The node {parent.name} does not support removing a child")
        async with graph.drained(parent):
            keeper.detach(edge)
        await graph.release(edge.node)
    if isinstance(args.node, str):
        node = graph.nodes.get(args.node)
        if node is None:
            raise BlockError(f"Node '{args.node}' not found")
        if not isinstance(keeper, ChildKeeper):
            raise BlockError(f"The node {parent.name} does not support adding a child")
        if node.parents:
            raise BlockError(f"The node {node.name} already has a parent")
        async with graph.drained(parent, node):
            keeper.attach(node)

"""Commands on the graph: blockdev-add, -del, -reopen, block_resize, change-backing-file, block-set-write-threshold.

Snapshots are in `block_commands_snapshot`. Source: QEMU ``qapi/block-core.json``, ``blockdev.c``; every message was
asked from QEMU 10.0.2.
"""

from __future__ import annotations

import os

from livedisk.emulator.block import activity
from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.blockers import check_not_busy
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.reopen import reopen, set_read_only
from livedisk.emulator.errors import BlockError, NodeNotFound
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.lookup import backing_chain, find_node
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UInt64, UnsetType
from livedisk.emulator.qmp.registry import command
from livedisk.emulator.qmp.threshold import set_write_threshold


@command("blockdev-add", allow_preconfig=True)
async def blockdev_add(ctx: Context, args: BlockdevOptions) -> None:
    """Open a node, with those described inside it. It stays until blockdev-del."""
    if args.node_name is UNSET:
        raise BlockError("'node-name' must be specified for the root node")
    await ctx.daemon.graph.add(args)


class BlockdevDel(QapiStruct):
    """The name of a node that blockdev-add or ``-blockdev`` made."""

    node_name: str


@command("blockdev-del", allow_preconfig=True)
async def blockdev_del(ctx: Context, args: BlockdevDel) -> None:
    """Close a node that nobody uses."""
    await ctx.daemon.graph.delete(args.node_name)


class BlockdevSetActive(QapiStruct, kw_only=True):
    """``node-name``: without it, every node."""

    node_name: str | UnsetType = UNSET
    active: bool


@command("blockdev-set-active", allow_preconfig=True)
async def blockdev_set_active(ctx: Context, args: BlockdevSetActive) -> None:
    """Take an image for this process, or give it up for another (`block/activity.py`)."""
    graph = ctx.daemon.graph
    if not isinstance(args.node_name, str):
        await (activity.activate_all if args.active else activity.inactivate_all)(graph)
        return
    node = graph.nodes.get(args.node_name)
    if node is None:
        raise NodeNotFound(f"Failed to find node with node-name='{args.node_name}'")
    await (activity.activate if args.active else activity.inactivate)(graph, node)


class BlockdevReopen(QapiStruct):
    """The full options of each node; what is not given goes back to its default."""

    options: list[BlockdevOptions]


@command("blockdev-reopen", allow_preconfig=True)
async def blockdev_reopen(ctx: Context, args: BlockdevReopen) -> None:
    """Change options and children of nodes, of all or of none."""
    wanted: dict[Node, BlockdevOptions] = {}
    for options in args.options:
        if not isinstance(options.node_name, str):
            raise BlockError("node-name not specified")
        node = ctx.daemon.graph.nodes.get(options.node_name)
        if node is None:
            raise NodeNotFound(f"Failed to find node with node-name='{options.node_name}'")
        wanted[node] = options
    await reopen(ctx.daemon.graph, wanted)


class BlockResize(QapiStruct, kw_only=True):
    """``size`` in bytes."""

    device: str | UnsetType = UNSET
    node_name: str | UnsetType = UNSET
    size: int


@command("block_resize", allow_preconfig=True)
async def block_resize(ctx: Context, args: BlockResize) -> None:
    """Change a node's size while it is in use; its devices and exports learn of it."""
    node = find_node(ctx, args.device, args.node_name)
    if args.size < 0:
        raise BlockError("Parameter 'size' expects a >0 size")
    check_not_busy(node)
    graph = ctx.daemon.graph
    backend = BlockBackend(graph)
    graph.attach_root(backend, node, Perm.RESIZE, Perm.ALL)
    try:
        if node.read_only:
            raise BlockError("Image is read-only")
        async with graph.drained(node):
            await backend.truncate(args.size, exact=False)
    finally:
        await graph.detach_root(backend)


class ChangeBackingFile(QapiStruct):
    """``device`` (a device or node) has the image in its chain; ``backing-file`` is written as it stands."""

    device: str
    image_node_name: str
    backing_file: str


@command("change-backing-file", allow_preconfig=True)
async def change_backing_file(ctx: Context, args: ChangeBackingFile) -> None:
    """Rewrite the backing file name in an image's header; the running graph does not change.

    The format that is recorded is that of the backing node in use. (QEMU 10 records the format of the image itself,
    which is wrong, and unsafe when the backing file is raw.)
    """
    graph = ctx.daemon.graph
    root = find_node(ctx, args.device, args.device)
    if any(isinstance(edge.parent, Node) for edge in root.parents):
        raise BlockError("Need a root block node")
    image = graph.find(args.image_node_name)
    below = image.backing or image.filtered
    if below is None:
        raise BlockError("not allowing backing file change on an image without a backing file")
    if image not in backing_chain(root):
        raise BlockError(f"'{args.device}' and image file are not in the same chain")
    was_read_only = image.read_only
    if was_read_only:
        await set_read_only(graph, image, False)
    try:
        async with graph.drained(image):
            await image.driver.change_backing_file(args.backing_file, below.node.options.driver)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise BlockError(f"Could not change backing file to '{args.backing_file}': {reason}") from error
    finally:
        if was_read_only:
            await set_read_only(graph, image, True)


class BlockSetWriteThreshold(QapiStruct):
    """``write-threshold`` in bytes; 0 ends it."""

    node_name: str
    write_threshold: UInt64


@command("block-set-write-threshold", allow_preconfig=True)
async def block_set_write_threshold(ctx: Context, args: BlockSetWriteThreshold) -> None:
    """Have BLOCK_WRITE_THRESHOLD sent once when a write to the node goes beyond an offset."""
    node = ctx.daemon.graph.nodes.get(args.node_name)
    if node is None:
        raise NodeNotFound(f"Device '{args.node_name}' not found")
    set_write_threshold(node, args.write_threshold, ctx.daemon.events.emit)

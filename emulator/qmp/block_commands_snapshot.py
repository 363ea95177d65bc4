"""blockdev-snapshot-sync and blockdev-snapshot: put an overlay on a node while the guest writes.

Both are actions of a transaction; the commands are transactions of one. The overlay is opened without a backing file
while the guest still writes. Then requests are kept out, the old node is flushed, the overlay gets it as its backing
file, and everybody who used the old node uses the overlay: one step, for devices, exports and parent nodes alike.
After the commit the old node is made read-only, as QEMU makes it.

An image that blockdev-snapshot-sync created stays on disk when the transaction fails, as with QEMU: it may be somebody
else's by then.

Where we differ: an overlay on a node that has no users would, in QEMU, be closed as soon as it is made, and the name
that was just given to it be gone. Here it belongs to the user then, until blockdev-del.

Source: QEMU ``qapi/block-core.json`` (BlockdevSnapshotSync, BlockdevSnapshot), ``blockdev.c``
(external_snapshot_action), ``block.c`` (bdrv_append, bdrv_img_create).
"""

from __future__ import annotations

import enum

from livedisk.emulator.block.blockers import check_not_busy
from livedisk.emulator.block.driver import DRIVERS
from livedisk.emulator.block.gate import image_options
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.options import CacheOptions
from livedisk.emulator.block.permissions import Perm, Role
from livedisk.emulator.block.reopen import set_read_only
from livedisk.emulator.errors import BlockError
from livedisk.emulator.qmp.announce import announce
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.filenames import filename
from livedisk.emulator.qmp.lookup import find_node
from livedisk.emulator.qmp.new_images import create_in_storage, host_path
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType
from livedisk.emulator.qmp.registry import command
from livedisk.emulator.qmp.transaction import Run, action, run_single


class NewImageMode(enum.StrEnum):
    """Where the overlay's image comes from: made here, or there already."""

    EXISTING = "existing"
    ABSOLUTE_PATHS = "absolute-paths"


class BlockdevSnapshotSync(QapiStruct, kw_only=True):
    """``device`` (an id) or ``node-name`` says what is snapshotted; the overlay's image is ``snapshot-file``."""

    device: str | UnsetType = UNSET
    node_name: str | UnsetType = UNSET
    snapshot_file: str
    snapshot_node_name: str | UnsetType = UNSET
    format: str = "qcow2"
    mode: NewImageMode = NewImageMode.ABSOLUTE_PATHS


class BlockdevSnapshot(QapiStruct):
    """``overlay`` is an open node without a backing file, to be put on ``node``."""

    node: str
    overlay: str


@command("blockdev-snapshot-sync", allow_preconfig=True)
async def blockdev_snapshot_sync(ctx: Context, args: BlockdevSnapshotSync) -> None:
    """Make an image, open it, and put it on a node."""
    await run_single(ctx, "blockdev-snapshot-sync", args)


@command("blockdev-snapshot", allow_preconfig=True, features=("allow-write-only-overlay",))
async def blockdev_snapshot(ctx: Context, args: BlockdevSnapshot) -> None:
    """Put an open node on another."""
    await run_single(ctx, "blockdev-snapshot", args)


@action("blockdev-snapshot-sync")
async def prepare_snapshot_sync(ctx: Context, args: BlockdevSnapshotSync, run: Run) -> None:
    """Create and open the overlay, then as `prepare_snapshot`."""
    old = find_node(ctx, args.device, args.node_name)
    check_not_busy(old)
    if args.snapshot_node_name is UNSET:
        if args.node_name is not UNSET:
            raise BlockError("New overlay node-name missing")
    elif args.snapshot_node_name in ctx.daemon.graph.nodes:
        raise BlockError("New overlay node-name already in use")
    if args.mode is not NewImageMode.EXISTING:
        await create_image(args.snapshot_file, args.format, old)
    overlay = await _open_overlay(ctx, args, old)
    run.afterwards.append(lambda: ctx.daemon.graph.release(overlay))
    await _put_on_top(ctx, old, overlay, run)


@action("blockdev-snapshot")
async def prepare_snapshot(ctx: Context, args: BlockdevSnapshot, run: Run) -> None:
    """Check the overlay and put it on the node."""
    old = find_node(ctx, args.node, args.node)
    check_not_busy(old)
    overlay = find_node(ctx, args.overlay, args.overlay)
    await _put_on_top(ctx, old, overlay, run)


async def create_image(name: str, fmt: str, backing: Node) -> None:
    """Make an image of format ``fmt`` over ``backing``, as large as that is now. Raises BlockError in QEMU's words."""
    driver = DRIVERS.get(fmt)
    if driver is None:
        raise BlockError(f"Unknown file format '{fmt}'")
    if fmt != "qcow2":
        if driver.supports_backing or fmt != "raw":
            raise BlockError(f"Format driver '{fmt}' does not support image creation")
        raise BlockError(f"Backing file not supported for file format '{fmt}'")
    path = host_path(name)
    below = filename(backing)
    if below == path:
        raise BlockError("Error: Trying to create an image with the same filename as the backing file")
    # Imported here: creation is not needed to start up.
    from livedisk.emulator.drivers.qcow2.create import CreateOptions, create_file

    options = CreateOptions(size=backing.size, backing_file=below, backing_fmt=backing.options.driver)
    announce(name if path is None else path, fmt, backing.size, below, backing.options.driver)
    if path is None:
        await create_in_storage(backing.graph, name, fmt, options)
    else:
        await create_file(path, options)


async def _open_overlay(ctx: Context, args: BlockdevSnapshotSync, old: Node) -> Node:
    """Open the image without its backing file, with the settings of the old node."""
    options = image_options(
        old,
        args.snapshot_file,
        args.format,
        read_only=old.read_only,
        discard=old.discard_mode,
        cache=CacheOptions(direct=old.cache_direct, no_flush=old.cache_no_flush),
        node_name=args.snapshot_node_name,
    )
    # An overlay on an inactive node is no more this process's than the node is, nor is the file that it stands in.
    return await ctx.daemon.graph.open(options, inactive=not old.active)


async def _put_on_top(ctx: Context, old: Node, overlay: Node, run: Run) -> None:
    """Drain and flush ``old``, make it the backing file of ``overlay``, and give ``overlay`` its users."""
    graph = ctx.daemon.graph
    if any(edge.perm & Perm.CONSISTENT_READ for edge in overlay.parents):
        raise BlockError("The overlay is already in use")
    check_not_busy(overlay)
    if overlay.backing is not None or overlay.filtered is not None:
        raise BlockError("The overlay already has a backing image")
    if not overlay.driver.supports_backing:
        raise BlockError("The overlay does not support backing images")
    await run.drain(old)
    if not old.read_only:
        await old.flush()
    unused = not old.parents
    edge = graph.attach_child(overlay, old, "backing", Role.COW, run.steps)
    graph.replace_node(old, overlay, run.steps, but=[edge])
    if unused:
        overlay_was_owned = overlay.monitor_owned
        overlay.monitor_owned = True
        run.steps.add(abort=lambda: setattr(overlay, "monitor_owned", overlay_was_owned))
    run.on_success.append(lambda: set_read_only(graph, old, True))

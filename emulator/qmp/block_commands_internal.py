"""blockdev-snapshot-internal-sync and blockdev-snapshot-delete-internal-sync: snapshots inside an image.

The first is an action of a transaction too: the node stays drained until the transaction is over, so that snapshots of several
disks are of one instant. A transaction that fails deletes what it made. Source: QEMU ``blockdev.c``
(internal_snapshot_action, qmp_blockdev_snapshot_delete_internal_sync); messages asked from QEMU 10.0.2.
"""

from __future__ import annotations

import errno
import logging
import os
import time

import msgspec

from livedisk.emulator.block.blockers import check_not_busy
from livedisk.emulator.block.driver import Moment
from livedisk.emulator.block.internal_snapshots import find, keeper
from livedisk.emulator.block.node import Node
from livedisk.emulator.errors import BlockError
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.lookup import find_node
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType
from livedisk.emulator.qmp.query_block import SnapshotInfo
from livedisk.emulator.qmp.registry import command
from livedisk.emulator.qmp.transaction import Run, action, run_single

log = logging.getLogger(__name__)


class BlockdevSnapshotInternal(QapiStruct):
    """``device``: a device or a node that no other stands on. Ids are given by the format."""

    device: str
    name: str


@command("blockdev-snapshot-internal-sync", allow_preconfig=True)
async def blockdev_snapshot_internal_sync(ctx: Context, args: BlockdevSnapshotInternal) -> None:
    """Keep what a node shows now, inside its image."""
    await run_single(ctx, "blockdev-snapshot-internal-sync", args)


@action("blockdev-snapshot-internal-sync")
async def prepare_internal_snapshot(ctx: Context, args: BlockdevSnapshotInternal, run: Run) -> None:
    """Drain, make the snapshot, and delete it again if the transaction fails."""
    node = _root(ctx, args.device)
    await run.drain(node)
    check_not_busy(node)
    if node.read_only:
        raise BlockError(f"Device '{args.device}' is read only")
    image = keeper(node)
    if image is None:
        raise BlockError(
            f"Block format '{node.options.driver}' used by device '{args.device}' does not support internal snapshots"
        )
    if not args.name:
        raise BlockError("Name is empty")
    if find(image, None, args.name) is not None:
        raise BlockError(f"Snapshot with name '{args.name}' already exists on device '{args.device}'")
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    try:
        made = await image.driver.snapshot_create(args.name, Moment(seconds, nanoseconds // 1000 * 1000))
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise BlockError(f"Failed to create snapshot '{args.name}' on device '{args.device}': {reason}") from error
    failed: list[str] = []
    run.steps.add(abort=lambda: failed.append(made["id"]))

    async def take_back() -> None:
        for id in failed:
            try:
                await image.driver.snapshot_delete(id)
            except OSError:
                log.exception("node '%s': snapshot '%s' could not be deleted again", image.name, args.name)

    run.afterwards.append(take_back)


class BlockdevSnapshotDeleteInternal(QapiStruct, kw_only=True):
    """``id`` and ``name``: the snapshot that has both, as far as they are given."""

    device: str
    id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET


@command("blockdev-snapshot-delete-internal-sync", allow_preconfig=True)
async def blockdev_snapshot_delete_internal_sync(ctx: Context, args: BlockdevSnapshotDeleteInternal) -> SnapshotInfo:
    """Forget a snapshot inside a node's image. Returns what it was."""
    node = _root(ctx, args.device)
    id = args.id if isinstance(args.id, str) else None
    name = args.name if isinstance(args.name, str) else None
    if id is None and name is None:
        raise BlockError("Name or id must be provided")
    async with ctx.daemon.graph.drained(node):
        check_not_busy(node)
        image = keeper(node)
        if image is None:
            raise BlockError(f"Failed to get a snapshot list: {os.strerror(errno.ENOTSUP)}")
        gone = find(image, id, name)
        if gone is None:
            shown = ["null" if word is None else word for word in (id, name)]
            raise BlockError(
                f"Snapshot with id '{shown[0]}' and name '{shown[1]}' does not exist on device '{args.device}'"
            )
        image.check_writable()
        await image.driver.snapshot_delete(gone["id"])
    return msgspec.convert(gone, SnapshotInfo)


def _root(ctx: Context, device: str) -> Node:
    node = find_node(ctx, device, device)
    if any(isinstance(edge.parent, Node) for edge in node.parents):
        raise BlockError("Need a root block node")
    return node

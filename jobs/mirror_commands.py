"""blockdev-mirror and drive-mirror: what they take, what they refuse, and what they make of it.

Source: QEMU ``qapi/block-core.json``, ``blockdev.c`` (blockdev_mirror_common); every message was asked from QEMU 10.0.2.
"""

from __future__ import annotations

from livedisk.emulator.block.blockers import check_not_busy
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Node
from livedisk.emulator.device.policy import OnError
from livedisk.emulator.errors import BlockError, NodeNotFound
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.lookup import find_node
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UInt32, UnsetType
from livedisk.emulator.qmp.registry import command
from livedisk.jobs.commands import MirrorCopyMode
from livedisk.jobs.copy import LANES, STEP
from livedisk.jobs.filters import skip_filters
from livedisk.jobs.mirror import Backing, MirrorJob, Plan, Sync, check_root, default_granularity, may_replace
from livedisk.jobs.targets import NewImageMode, create_target, existing_format, open_target


class MirrorOptions(QapiStruct, kw_only=True):
    """What both commands take. ``granularity``, ``buf-size``: bytes; ``speed``: bytes a second."""

    job_id: str | UnsetType = UNSET
    device: str
    target: str
    replaces: str | UnsetType = UNSET
    sync: Sync
    speed: int = 0
    granularity: UInt32 = 0
    buf_size: int = 0
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    copy_mode: MirrorCopyMode = MirrorCopyMode.BACKGROUND
    auto_finalize: bool = True
    auto_dismiss: bool = True


class BlockdevMirror(MirrorOptions, kw_only=True):
    """``target``: a node."""

    filter_node_name: str | UnsetType = UNSET


class DriveMirror(MirrorOptions, kw_only=True):
    """``target``: a file, which is made unless ``mode`` is existing."""

    format: str | UnsetType = UNSET
    node_name: str | UnsetType = UNSET
    mode: NewImageMode = NewImageMode.ABSOLUTE_PATHS
    unmap: bool = True


@command("blockdev-mirror", allow_preconfig=True)
async def blockdev_mirror(ctx: Context, args: BlockdevMirror) -> None:
    """Mirror a node to another."""
    source = find_node(ctx, args.device, args.device)
    check_root(source)
    target = find_node(ctx, args.target, args.target)
    await _start(
        ctx,
        args,
        source,
        target,
        filter_name=args.filter_node_name,
        stale=args.sync is Sync.FULL,
        backing=Backing.LEAVE,
    )


@command("drive-mirror", allow_preconfig=True)
async def drive_mirror(ctx: Context, args: DriveMirror) -> None:
    """Mirror a node to an image that this command makes or opens."""
    source = find_node(ctx, args.device, args.device)
    check_root(source)
    check_not_busy(source)
    image = skip_filters(source)
    existing = args.mode is NewImageMode.EXISTING
    if args.replaces is not UNSET and args.node_name is UNSET:
        raise BlockError("a node-name must be provided when replacing a named node of the graph")
    fmt = args.format
    if not isinstance(fmt, str):
        fmt = await existing_format(source, args.target) if existing else image.options.driver
    sync = _settled(args.sync, source)
    if not existing:
        backing = {Sync.TOP: image.backing.node if image.backing is not None else None, Sync.NONE: source}.get(sync)
        shown = skip_filters(backing) if backing is not None else None
        await create_target(ctx.daemon.graph, args.target, fmt, source.size, shown)
    target = await open_target(ctx, args.target, fmt, args.node_name, source)
    try:
        await _start(
            ctx,
            args,
            source,
            target,
            filter_name=UNSET,
            unmap=args.unmap,
            stale=existing and sync is Sync.FULL,
            backing=Backing.OPEN if existing else Backing.SOURCE,
        )
    except BaseException:
        await ctx.daemon.graph.release(target)
        raise


def _settled(sync: Sync, source: Node) -> Sync:
    """Without a backing file the top is all there is."""
    return Sync.FULL if sync is Sync.TOP and skip_filters(source).backing is None else sync


async def _start(
    ctx: Context,
    args: MirrorOptions,
    source: Node,
    target: Node,
    *,
    filter_name: str | UnsetType,
    stale: bool,
    backing: Backing,
    unmap: bool = True,
) -> None:
    """Check the arguments, set the job up, start it. Raises BlockError and what setting up raises."""
    _check_granularity(args.granularity)
    check_not_busy(source)
    check_not_busy(target)
    sync = _settled(args.sync, source)
    replaces = args.replaces if isinstance(args.replaces, str) else None
    if replaces is not None:
        _check_replaced(ctx.daemon.graph, source, replaces)
    if sync in (Sync.INCREMENTAL, Sync.BITMAP):
        raise BlockError(f"Sync mode '{sync}' not supported")
    if args.buf_size < 0:
        raise BlockError("Invalid parameter 'buf-size'")
    if skip_filters(source) is skip_filters(target):
        raise BlockError("Can't mirror node into itself")
    image = skip_filters(source)
    plan = Plan(
        id=args.job_id if isinstance(args.job_id, str) else None,
        base=image.backing.node if sync is Sync.TOP and image.backing is not None else None,
        nothing=sync is Sync.NONE,
        stale=stale and sync is Sync.FULL,
        granularity=args.granularity or default_granularity(target),
        memory=args.buf_size or LANES * STEP,
        speed=args.speed,
        on_source_error=args.on_source_error,
        on_target_error=args.on_target_error,
        unmap=unmap,
        copy_mode=args.copy_mode,
        filter_name=filter_name,
        replaces=replaces,
        backing=backing,
        auto_finalize=args.auto_finalize,
        auto_dismiss=args.auto_dismiss,
    )
    job = MirrorJob(ctx.daemon.graph, source, target, plan)
    await job.set_up(ctx)
    job.start()


def _check_granularity(granularity: int) -> None:
    if granularity and not 512 <= granularity <= 64 << 20:
        raise BlockError("Parameter 'granularity' expects a value in range [512B, 64MB]")
    if granularity & (granularity - 1):
        raise BlockError("Parameter 'granularity' expects a power of 2")


def _check_replaced(graph: Graph, source: Node, name: str) -> None:
    """Raise BlockError or NodeNotFound unless ``replaces`` names a node whose users may go over to the target."""
    wanted = graph.nodes.get(name)
    if wanted is None:
        raise NodeNotFound(f"Failed to find node with node-name='{name}'")
    check_not_busy(wanted)
    if not may_replace(source, wanted):
        raise BlockError(
            f"Cannot replace '{name}' by a node mirrored from '{source.name}', because it cannot be guaranteed that doing "
            "so would not lead to an abrupt change of visible data"
        )

"""blockdev-backup and drive-backup: what they take, what they refuse, and what they make of it.

Both are actions of a transaction; the commands are transactions of one. The source is drained from the preparation to the
end of the transaction: several disks are backed up as they are at one instant. With completion-mode *grouped* the jobs of a
transaction succeed or fail together. Jobs start when everything could be prepared, the last action's first, as in QEMU.

Ours alone: ``on-cbw-error`` (QEMU 10.1 has it, too, and lets the guest's write fail by default) and ``cbw-timeout``. The
format of an existing target of drive-backup is not believed from its content, as QEMU believes it.

Source: QEMU ``qapi/block-core.json`` (BackupCommon, DriveBackup, BlockdevBackup), ``blockdev.c`` (do_backup_common,
drive_backup_action, blockdev_backup_action); every message was asked from QEMU 10.0.2.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from livedisk.emulator.block.bitmaps import DirtyBitmap
from livedisk.emulator.block.blockers import Operation, check_not_busy
from livedisk.emulator.block.driver import DRIVERS, Driver
from livedisk.emulator.block.gate import image_options
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.options import CacheOptions
from livedisk.emulator.block.permissions import Role
from livedisk.emulator.block.types import DetectZeroes, Discard
from livedisk.emulator.device.policy import OnError
from livedisk.emulator.drivers.copy_before_write import OnCbwError
from livedisk.emulator.errors import BlockError
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.lookup import find_node
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, Size, UInt32, UnsetType
from livedisk.emulator.qmp.registry import command
from livedisk.emulator.qmp.transaction import ActionCompletionMode, Run, action, run_single
from livedisk.jobs.backup import BackupJob, BitmapMode, Plan
from livedisk.jobs.filters import skip_filters
from livedisk.jobs.job import Group
from livedisk.jobs.mirror import Sync
from livedisk.jobs.targets import NewImageMode, create_target, existing_format

MAX_WORKERS = (1 << 31) - 1


class BackupPerf(QapiStruct):
    """How a backup works. ``max-workers``: copies at once at most (no more than ours are ever made); ``max-chunk`` (0: no limit),
    ``min-cluster-size``: bytes. ``use-copy-range``: whether the kernel may copy from file to file; unlike QEMU it may, unless
    told otherwise."""

    use_copy_range: bool = True
    max_workers: int = 64
    max_chunk: int = 0
    min_cluster_size: Size = 0


class BackupOptions(QapiStruct, kw_only=True):
    """What both commands take. ``speed``: bytes a second; ``cbw-timeout``: seconds, 0: none."""

    job_id: str | UnsetType = UNSET
    device: str
    target: str
    sync: Sync
    speed: int = 0
    bitmap: str | UnsetType = UNSET
    bitmap_mode: BitmapMode | UnsetType = UNSET
    compress: bool = False
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT
    cbw_timeout: UInt32 = 0
    auto_finalize: bool = True
    auto_dismiss: bool = True
    filter_node_name: str | UnsetType = UNSET
    discard_source: bool = False
    x_perf: Annotated[BackupPerf | UnsetType, msgspec.Meta(extra={"features": ("unstable",)})] = UNSET


class BlockdevBackup(BackupOptions, kw_only=True):
    """``target``: a node."""


class DriveBackup(BackupOptions, kw_only=True):
    """``target``: a file, which is made unless ``mode`` is existing."""

    format: str | UnsetType = UNSET
    mode: NewImageMode = NewImageMode.ABSOLUTE_PATHS


@command("blockdev-backup", allow_preconfig=True)
async def blockdev_backup(ctx: Context, args: BlockdevBackup) -> None:
    """Back a node up to another."""
    await run_single(ctx, "blockdev-backup", args)


@command("drive-backup", allow_preconfig=True, features=("deprecated",))
async def drive_backup(ctx: Context, args: DriveBackup) -> None:
    """Back a node up to an image that this command makes or opens."""
    await run_single(ctx, "drive-backup", args)


@action("blockdev-backup", grouped=True)
async def prepare_blockdev_backup(ctx: Context, args: BlockdevBackup, run: Run) -> None:
    """Set the job up."""
    source = find_node(ctx, args.device, args.device)
    target = find_node(ctx, args.target, args.target)
    await run.drain(source)
    await _set_up(ctx, args, args.sync, source, target, run)


@action("drive-backup", grouped=True)
async def prepare_drive_backup(ctx: Context, args: DriveBackup, run: Run) -> None:
    """Make and open the target, then as `prepare_blockdev_backup`. A file that was made stays when the transaction fails."""
    source = find_node(ctx, args.device, args.device)
    existing = args.mode is NewImageMode.EXISTING
    fmt = args.format
    if not isinstance(fmt, str):
        fmt = await existing_format(source, args.target) if existing else source.options.driver
    check_not_busy(source, Operation.BACK_UP)
    await run.drain(source)
    image = skip_filters(source)
    below = image.backing.node if image.backing is not None else None
    sync = Sync.FULL if args.sync is Sync.TOP and below is None else args.sync
    backing = {Sync.TOP: below, Sync.NONE: source}.get(sync)
    if not existing:
        shown = skip_filters(backing) if backing is not None and backing.implicit else backing
        await create_target(ctx.daemon.graph, args.target, fmt, source.size, shown)
    target = await _open_target(ctx, args.target, fmt, source, over=source if sync is Sync.NONE else None)
    run.afterwards.append(lambda: ctx.daemon.graph.release(target))
    await _set_up(ctx, args, sync, source, target, run)


async def _open_target(ctx: Context, path: str, fmt: str, source: Node, *, over: Node | None) -> Node:
    """Open an image for writing, ``over`` a node or with the backing file that its header names. Raises BlockError or OSError."""
    graph = ctx.daemon.graph
    options = image_options(
        source,
        path,
        fmt,
        discard=Discard.UNMAP,
        detect_zeroes=DetectZeroes.UNMAP,
        cache=CacheOptions(direct=source.cache_direct, no_flush=source.cache_no_flush),
    )
    can_stand = DRIVERS[options.driver].supports_backing
    if over is None and can_stand:
        options = msgspec.structs.replace(options, backing=UNSET)
    target = await graph.open(options)
    if over is not None:
        try:
            if not can_stand:
                raise BlockError(f"Driver '{fmt}' of node '{target.name}' does not support backing files")
            graph.attach_child(target, over, "backing", Role.COW)
        except BaseException:
            await graph.release(target)
            raise
    return target


async def _set_up(ctx: Context, args: BackupOptions, sync: Sync, source: Node, target: Node, run: Run) -> None:
    """Check the arguments, set the job up, have it started at the end of the transaction."""
    perf = args.x_perf if isinstance(args.x_perf, BackupPerf) else BackupPerf()
    sync, bitmap, mode = _bitmap(args, sync, source)
    if source is target:
        raise BlockError("Source and target cannot be the same")
    if args.compress and type(skip_filters(target).driver).write_compressed is Driver.write_compressed:
        raise BlockError("Compression is not supported for this drive ")
    check_not_busy(source, Operation.BACK_UP)
    check_not_busy(target, Operation.BACK_UP)
    if not 1 <= perf.max_workers <= MAX_WORKERS:
        raise BlockError(f"max-workers must be between 1 and {MAX_WORKERS}")
    if perf.max_chunk < 0:
        raise BlockError("max-chunk must be zero (which means no limit) or positive")
    plan = Plan(
        id=args.job_id if isinstance(args.job_id, str) else None,
        sync=sync,
        bitmap=bitmap,
        bitmap_mode=mode,
        speed=args.speed,
        compress=args.compress,
        discard_source=args.discard_source,
        offload=perf.use_copy_range,
        max_workers=perf.max_workers,
        max_chunk=perf.max_chunk,
        min_cluster_size=perf.min_cluster_size,
        on_source_error=args.on_source_error,
        on_target_error=args.on_target_error,
        on_cbw_error=args.on_cbw_error,
        cbw_timeout=args.cbw_timeout,
        filter_name=args.filter_node_name,
        auto_finalize=args.auto_finalize,
        auto_dismiss=args.auto_dismiss,
    )
    job = BackupJob(ctx.daemon.graph, source, target, plan)
    await job.set_up(ctx)
    if run.properties.completion_mode is ActionCompletionMode.GROUPED:
        group = run.shared.setdefault(Group, job.group)
        if group is not job.group:
            group.adopt(job)
    run.undo_by(lambda: job.cancel(force=True))

    async def start() -> None:
        job.start()
        await job.at_rest()  # the drain holds it, as QEMU's does

    run.on_success.insert(0, start)


def _bitmap(args: BackupOptions, sync: Sync, source: Node) -> tuple[Sync, DirtyBitmap | None, BitmapMode]:
    """What is copied, the bitmap, and what becomes of it. Raises BlockError."""
    mode = args.bitmap_mode
    if sync in (Sync.BITMAP, Sync.INCREMENTAL) and not isinstance(args.bitmap, str):
        raise BlockError(f"must provide a valid bitmap name for '{sync}' sync mode")
    if sync is Sync.INCREMENTAL:
        if mode not in (UNSET, BitmapMode.ON_SUCCESS):
            raise BlockError(f"Bitmap sync mode must be '{BitmapMode.ON_SUCCESS}' when using sync mode '{sync}'")
        sync, mode = Sync.BITMAP, BitmapMode.ON_SUCCESS
    if not isinstance(args.bitmap, str):
        if mode is not UNSET:
            raise BlockError("Cannot specify bitmap sync mode without a bitmap")
        return sync, None, BitmapMode.ON_SUCCESS
    bitmap = source.bitmaps.find(args.bitmap)
    if bitmap is None:
        raise BlockError(f"Bitmap '{args.bitmap}' could not be found")
    if not isinstance(mode, BitmapMode):
        raise BlockError("Bitmap sync mode must be given when providing a bitmap")
    bitmap.check_usable(allow_read_only=True)
    if sync is Sync.NONE:
        raise BlockError(f"sync mode '{sync}' does not produce meaningful bitmap outputs")
    if mode is BitmapMode.NEVER and sync is not Sync.BITMAP:
        raise BlockError(f"Bitmap sync mode '{mode}' has no meaningful effect when combined with sync mode '{sync}'")
    return sync, bitmap, mode

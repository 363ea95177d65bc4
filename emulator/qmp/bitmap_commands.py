"""block-dirty-bitmap-add, -remove, -clear, -enable, -disable, -merge, and x-debug-block-dirty-bitmap-sha256.

All but the last are actions of a transaction; the commands are transactions of one. Each action takes effect when it is
prepared, so that the next one builds on it, and is taken back if a later one fails. A bitmap that a transaction removes is
busy until the end: it is neither usable nor is its name free, as with QEMU.

A change of a persistent bitmap is in the image before the command is answered (`Driver.sync_bitmaps`), so that a crash does
not undo it; QEMU stores bitmaps when the image is closed.

Source: QEMU ``qapi/block-core.json``, ``block/monitor/bitmap-qmp-cmds.c``, ``blockdev.c``. QEMU 10.0.2 crashes on a merge of
no bitmaps; here it merges nothing.
"""

from __future__ import annotations

from livedisk.emulator.block.bitmaps import MIN_GRANULARITY, DirtyBitmap, Undo
from livedisk.emulator.block.node import Node
from livedisk.emulator.errors import BlockError, NodeNotFound
from livedisk.emulator.exports.options import BitmapOrStr
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.lookup import find_node
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UInt32, UnsetType
from livedisk.emulator.qmp.registry import command
from livedisk.emulator.qmp.transaction import Run, action, run_single


class BlockDirtyBitmap(QapiStruct):
    """A bitmap by its node (or device) and its own name."""

    node: str
    name: str


class BlockDirtyBitmapAdd(BlockDirtyBitmap):
    """``granularity`` in bytes; the cluster size, between 4 and 64 KiB, where it is not given."""

    granularity: UInt32 | UnsetType = UNSET
    persistent: bool = False
    disabled: bool = False


class BlockDirtyBitmapMerge(QapiStruct):
    """``bitmaps`` (of ``node``, or of others by name) are added to ``target``."""

    node: str
    target: str
    bitmaps: list[BitmapOrStr]


class BlockDirtyBitmapSha256(QapiStruct):
    """The hash of a bitmap's bits."""

    sha256: str


@command("block-dirty-bitmap-add", allow_preconfig=True)
async def block_dirty_bitmap_add(ctx: Context, args: BlockDirtyBitmapAdd) -> None:
    """Start a bitmap, which records writes to the node from now on."""
    await run_single(ctx, "block-dirty-bitmap-add", args)


@command("block-dirty-bitmap-remove", allow_preconfig=True)
async def block_dirty_bitmap_remove(ctx: Context, args: BlockDirtyBitmap) -> None:
    """End a bitmap, and take it out of the image that stores it."""
    await run_single(ctx, "block-dirty-bitmap-remove", args)


@command("block-dirty-bitmap-clear", allow_preconfig=True)
async def block_dirty_bitmap_clear(ctx: Context, args: BlockDirtyBitmap) -> None:
    """Make everything clean."""
    await run_single(ctx, "block-dirty-bitmap-clear", args)


@command("block-dirty-bitmap-enable", allow_preconfig=True)
async def block_dirty_bitmap_enable(ctx: Context, args: BlockDirtyBitmap) -> None:
    """Record writes from now on."""
    await run_single(ctx, "block-dirty-bitmap-enable", args)


@command("block-dirty-bitmap-disable", allow_preconfig=True)
async def block_dirty_bitmap_disable(ctx: Context, args: BlockDirtyBitmap) -> None:
    """Record no more writes."""
    await run_single(ctx, "block-dirty-bitmap-disable", args)


@command("block-dirty-bitmap-merge", allow_preconfig=True)
async def block_dirty_bitmap_merge(ctx: Context, args: BlockDirtyBitmapMerge) -> None:
    """Add what several bitmaps say to another one; all or none."""
    await run_single(ctx, "block-dirty-bitmap-merge", args)


@command("x-debug-block-dirty-bitmap-sha256", allow_preconfig=True, features=("unstable",))
async def block_dirty_bitmap_sha256(ctx: Context, args: BlockDirtyBitmap) -> BlockDirtyBitmapSha256:
    """The hash of a bitmap's bits, as QEMU has it."""
    _, bitmap = find_bitmap(ctx, args.node, args.name)
    return BlockDirtyBitmapSha256(sha256=bitmap.sha256())


def find_bitmap(ctx: Context, node_name: str, name: str) -> tuple[Node, DirtyBitmap]:
    """A bitmap of a node or of a device's node. Raises BlockError in QEMU's words."""
    try:
        node = find_node(ctx, node_name, node_name)
    except NodeNotFound:
        raise NodeNotFound(f"Node '{node_name}' not found") from None
    return node, node.bitmaps.get(name)


# -- the actions -------------------------------------------------------------------------------------------------------
@action("block-dirty-bitmap-add")
async def prepare_add(ctx: Context, args: BlockDirtyBitmapAdd, run: Run) -> None:
    """Make the bitmap; undone by removing it."""
    if not args.name:
        raise BlockError("Bitmap name cannot be empty")
    node = find_node(ctx, args.node, args.node)
    await run.still(node)
    granularity = args.granularity if isinstance(args.granularity, int) else node.bitmaps.default_granularity()
    if granularity < MIN_GRANULARITY or granularity & (granularity - 1):
        raise BlockError(f"Granularity must be power of 2 and at least {MIN_GRANULARITY}")
    if args.persistent:
        node.driver.check_bitmap_storable(args.name, granularity)
    bitmap = node.bitmaps.create(granularity, args.name, disabled=args.disabled, persistent=args.persistent)
    run.steps.add(abort=lambda: node.bitmaps.remove(bitmap))
    await _changed(node, bitmap, run)


@action("block-dirty-bitmap-remove")
async def prepare_remove(ctx: Context, args: BlockDirtyBitmap, run: Run) -> None:
    """Set the bitmap aside; it goes when the transaction succeeds."""
    node, bitmap = find_bitmap(ctx, args.node, args.name)
    await run.still(node)
    bitmap.check_removable()
    bitmap.busy = bitmap.removing = True

    def undo() -> None:
        bitmap.busy = bitmap.removing = False

    run.steps.add(commit=lambda: node.bitmaps.remove(bitmap), abort=undo)
    await _changed(node, bitmap, run)


@action("block-dirty-bitmap-clear")
async def prepare_clear(ctx: Context, args: BlockDirtyBitmap, run: Run) -> None:
    """Clear the bitmap; undone with what was written since."""
    node, bitmap = find_bitmap(ctx, args.node, args.name)
    await run.still(node)
    bitmap.check_usable()
    _undoable(bitmap, run)
    bitmap.clear()
    await _changed(node, bitmap, run)


@action("block-dirty-bitmap-enable")
async def prepare_enable(ctx: Context, args: BlockDirtyBitmap, run: Run) -> None:
    """Have writes recorded."""
    node, bitmap = find_bitmap(ctx, args.node, args.name)
    await run.still(node)
    bitmap.check_usable(allow_read_only=True)
    if bitmap.disabled:
        bitmap.enable()
        run.steps.add(abort=bitmap.disable)
    await _changed(node, bitmap, run)


@action("block-dirty-bitmap-disable")
async def prepare_disable(ctx: Context, args: BlockDirtyBitmap, run: Run) -> None:
    """Have no writes recorded. Undone as if it had recorded all the time."""
    node, bitmap = find_bitmap(ctx, args.node, args.name)
    await run.still(node)
    bitmap.check_usable(allow_read_only=True)
    if not bitmap.disabled:
        undo = Undo(bitmap)
        bitmap.disable()
        # The nameless one goes on recording: what it has is added on the way back.
        run.steps.add(commit=undo.drop, abort=bitmap.enable)
        run.steps.add(abort=undo.back)
    await _changed(node, bitmap, run)


@action("block-dirty-bitmap-merge")
async def prepare_merge(ctx: Context, args: BlockDirtyBitmapMerge, run: Run) -> None:
    """Add the sources to the target; it stays as it is if one of them cannot be used."""
    node, target = find_bitmap(ctx, args.node, args.target)
    others = [find_bitmap(ctx, one.node, one.name)[0] for one in args.bitmaps if not isinstance(one, str)]
    await run.still(node, *others)
    sources: list[DirtyBitmap] = []
    for source in args.bitmaps:
        bitmap = node.bitmaps.get(source) if isinstance(source, str) else find_bitmap(ctx, source.node, source.name)[1]
        bitmap.check_usable(allow_read_only=True)
        if bitmap.size != target.size:
            raise BlockError(
                f"Bitmaps are of different sizes (destination size is {target.size}, source size is {bitmap.size}) "
                "and can't be merged"
            )
        sources.append(bitmap)
    target.check_usable()
    _undoable(target, run)
    for bitmap in sources:
        target.merge(bitmap)
    await _changed(node, target, run)


def _undoable(bitmap: DirtyBitmap, run: Run) -> None:
    undo = Undo(bitmap)
    run.steps.add(commit=undo.drop, abort=undo.back)


async def _changed(node: Node, bitmap: DirtyBitmap, run: Run) -> None:
    """The image that stores the bitmap follows: now, or not at all (then the action fails); and again once the outcome
    stands."""
    if bitmap.persistent:
        run.afterwards.append(node.driver.sync_bitmaps)
        await node.driver.sync_bitmaps()

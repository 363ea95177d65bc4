"""``livedisk img convert``: a copy of an image, maybe in another format, as with ``qemu-img convert``.

Data is read, looked through for zeroes, and written; with ``-C`` the kernel copies it, where both images are files. By ``-W``
several ranges are under way at once, and not written in order. Source: QEMU ``qemu-img.c`` (img_convert, convert_*).
``-o size=`` gives the output a size of its own; qemu-img 10.0 takes it and does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

import click
import msgspec

from livedisk.emulator.cli.img import (
    RAW_OPTIONS,
    SETTINGS,
    create_qcow2,
    create_raw,
    creation_options,
    creation_words,
    img,
    run_to_end,
    size_of,
    switch_of,
)
from livedisk.emulator.cli.img_options import (
    PROGRESS,
    QUIET,
    RATE,
    SNAPSHOT,
    CacheMode,
    cache_mode,
    cache_option,
    format_option,
    image_name,
    image_options,
)
from livedisk.emulator.errors import BlockError, LiveDiskError, ParameterError

if TYPE_CHECKING:
    from livedisk.emulator.block.backend import BlockBackend
    from livedisk.emulator.block.node import Node
    from livedisk.emulator.block.throttle import Member
    from livedisk.emulator.cli.img_open import Images, Progress

_STEP: Final = 2 << 20
"""Bytes copied at once: in memory for each copy that is under way."""
_MAX_SPARSE: Final = 16 << 20
_MAX_LANES: Final = 16


class Order(msgspec.Struct, kw_only=True):
    """What convert is asked for."""

    image: str
    output: str
    fmt: str | None
    target: str
    words: tuple[str, ...]
    backing: str | None
    backing_fmt: str | None
    existing: bool
    compress: bool
    sparse: int
    lanes: int
    offload: bool
    bitmaps: bool
    skip_broken: bool
    force_share: bool
    snapshot: str | None
    cache: CacheMode | None
    source_cache: CacheMode | None
    rate: str | None


@img.command("convert", context_settings=SETTINGS)
@format_option("-f", "--source-format", "fmt", help="The format of IMAGE; what its header says if not given.")
@SNAPSHOT
@click.option(
    "-O",
    "--output-format",
    "--target-format",
    "target",
    metavar="FORMAT",
    help="The format of OUTPUT: qcow2 or raw.  [default: raw]",
)
@click.option(
    "-o",
    "--target-options",
    "words",
    metavar="NAME=VALUE,...",
    multiple=True,
    help="Creation options of OUTPUT, as those of create; help lists them.",
)
@click.option(
    "-B",
    "--backing",
    "backing",
    metavar="FILE",
    help="Give OUTPUT this backing file, which reads as that of IMAGE, if any.",
)
@click.option("-F", "--backing-format", "backing_fmt", metavar="FORMAT", help="The backing file's format.")
@click.option(
    "-n", "--no-create", "existing", is_flag=True, help="OUTPUT is there, and is written to; it is not made anew."
)
@click.option(
    "--target-image-opts", "by_options", is_flag=True, help="With -n: OUTPUT is the options of a node, as -blockdev's."
)
@cache_option("-t", "--target-cache", "cache", of="OUTPUT")
@cache_option("-T", "--source-cache", "source_cache")
@RATE
@click.option("--target-is-zero", is_flag=True, help="With -n: OUTPUT reads as zeroes, which need not be written.")
@click.option("-c", "--compress", "compress", is_flag=True, help="Write compressed clusters.")
@click.option(
    "-S",
    "--sparse-size",
    "sparse",
    metavar="SIZE",
    help="Leave zeroes of so many bytes out; 0: write all zeroes, too. 4k if not given.",
)
@click.option(
    "-m",
    "--parallel",
    "lanes",
    type=int,
    metavar="NUMBER",
    help="Copies under way at once, with -W: 1 to 16.  [default: 8]",
)
@click.option(
    "-W",
    "--oob-writes",
    "unordered",
    is_flag=True,
    help="Let writes be out of order, so that several copies are under way at once.",
)
@click.option(
    "-C",
    "--copy-range-offloading",
    "offload",
    is_flag=True,
    help="Let the kernel copy data, without a look for zeroes in it.",
)
@click.option("--bitmaps", is_flag=True, help="Copy persistent dirty bitmaps, too.")
@click.option("--skip-broken-bitmaps", "skip_broken", is_flag=True, help="With --bitmaps: leave out inconsistent ones.")
@PROGRESS
@QUIET
@click.option("-U", "--force-share", is_flag=True, help="Copy although a writer has IMAGE open.")
@image_options
@click.argument("image", required=False, callback=image_name)
@click.argument("output", required=False)
def convert_command(
    fmt: str | None,
    snapshot: str | None,
    target: str | None,
    words: tuple[str, ...],
    backing: str | None,
    backing_fmt: str | None,
    existing: bool,
    by_options: bool,
    cache: str | None,
    source_cache: str | None,
    rate: str | None,
    target_is_zero: bool,
    compress: bool,
    sparse: str | None,
    lanes: int | None,
    unordered: bool,
    offload: bool,
    bitmaps: bool,
    skip_broken: bool,
    progress: bool,
    quiet: bool,
    force_share: bool,
    image: str | None,
    output: str | None,
) -> None:
    """Copy IMAGE to OUTPUT, maybe into another format. What reads as zeroes takes no room in OUTPUT."""

    async def work() -> int:
        from livedisk.emulator.cli.images import ImageOptions
        from livedisk.emulator.cli.img_help import asks_for_help, creation_help
        from livedisk.emulator.cli.img_open import LANES, Progress, check_format

        made_as = target or "raw"
        if asks_for_help(words) and made_as in ("raw", "qcow2"):
            click.echo(creation_help(made_as, in_file=output is not None))
            return 0
        if image is None or output is None:
            raise ParameterError("Must specify image file name")
        if by_options and target is not None:
            raise ParameterError("--target-image-opts and -O are mutually exclusive")
        if by_options and not existing:
            raise ParameterError("--target-image-opts requires use of -n flag")
        given = size_of("buffer size for sparse output", sparse) if sparse is not None else 4096
        if given % 512 or given > _MAX_SPARSE:
            raise ParameterError(
                "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to "
                f"{_MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
            )
        if lanes is not None and not 1 <= lanes <= _MAX_LANES:
            raise ParameterError(f"Invalid number of coroutines specified. Must be between 1 and {_MAX_LANES}.")
        if offload and sparse is not None:
            raise ParameterError("Cannot enable copy offloading when -S is used")
        if offload and compress:
            raise ParameterError("Cannot enable copy offloading when -c is used")
        if target_is_zero and not existing:
            raise ParameterError("--target-is-zero requires use of -n flag")
        if existing and words:
            raise ParameterError("-o has no effect when skipping image creation")
        if skip_broken and not bitmaps:
            raise ParameterError("Use of --skip-broken-bitmaps requires --bitmaps")
        check_format(made_as, "Unknown file format")
        if made_as not in ("raw", "qcow2"):
            raise BlockError(f"Format driver '{made_as}' does not support image creation")
        if snapshot is not None and bitmaps:
            raise ParameterError("Cannot use --bitmaps with -l: an internal snapshot has none")
        order = Order(
            image=image,
            output=ImageOptions(output) if by_options else output,
            fmt=fmt,
            target=made_as,
            snapshot=snapshot,
            cache=cache_mode(cache),
            source_cache=cache_mode(source_cache, "source cache"),
            rate=rate,
            words=words,
            backing=backing,
            backing_fmt=backing_fmt,
            existing=existing,
            compress=compress,
            sparse=given,
            lanes=(lanes or LANES) if unordered else 1,
            offload=offload,
            bitmaps=bitmaps,
            skip_broken=skip_broken,
            force_share=force_share,
        )
        shown = Progress(progress and not quiet)
        await _convert(order, shown)
        shown.end()
        return 0

    run_to_end(work)


async def _convert(order: Order, shown: Progress) -> None:
    from livedisk.emulator.cli.images import ImageOptions
    from livedisk.emulator.cli.img_open import images, rate_limit, show_snapshot

    async with images() as made:
        limit = rate_limit(order.rate)
        source = await made.open(order.image, order.fmt, force_share=order.force_share, cache=order.source_cache)
        if order.snapshot is not None:
            await show_snapshot(source.node, order.snapshot)
        found = _bitmaps_to_copy(order, source.node) if order.bitmaps else []
        backed = False
        if not order.existing:
            backed = await _create(order, source)
        by_options = isinstance(order.output, ImageOptions)
        target = await made.open(order.output, None if by_options else order.target, writable=True, cache=order.cache)
        kind = target.node.driver.name
        if order.compress and kind != "qcow2":
            raise BlockError("Compression not supported for this file format")
        if order.bitmaps and kind != "qcow2":
            raise BlockError(f"Format driver '{kind}' does not support bitmaps")
        if target.size < source.size:
            raise BlockError("output file is smaller than input file")
        copying = _Copying(order, made, source, target, limit, backed=backed)
        await copying.run(shown)
        for bitmap in found:
            _copy_bitmap(bitmap, target.node)
        if found:
            await target.node.driver.sync_bitmaps()
        await target.flush()


# -- making the target -------------------------------------------------------------------------------------------------
async def _create(order: Order, source: BlockBackend) -> bool:
    """Make the output; whether it has a backing file. Raises LiveDiskError, OSError."""
    try:
        if order.target == "raw":
            given = creation_words(order.words, RAW_OPTIONS) | (
                {} if order.backing is None else {"backing_file": order.backing}
            )
            given.setdefault("size", str(source.size))
            await create_raw(order.output, given, switch_of("nocow", given.get("nocow", "off")))
            return False
        return await _create_qcow2(order, source.size)
    except LiveDiskError as error:
        if isinstance(error, ParameterError):
            raise
        hint = getattr(error, "hint", "")
        raise BlockError(f"{order.output}: error while converting {order.target}: {error}", hint=hint) from None


async def _create_qcow2(order: Order, size: int) -> bool:
    given = creation_words(order.words)
    for name, value in (("backing_file", order.backing), ("backing_fmt", order.backing_fmt)):
        if value is not None:
            given[name] = value
    if "backing_file" in given and "backing_fmt" not in given:
        raise ParameterError("Use of backing file requires explicit backing format")
    given.setdefault("size", str(size))
    nocow = switch_of("nocow", given.pop("nocow", "off"))
    options = await creation_options(given, order.output)
    await create_qcow2(order.output, options, nocow=nocow)
    return bool(options.backing_file)


# -- copying -----------------------------------------------------------------------------------------------------------
class _Copying:
    """One copy. ``backed``: where the source itself holds nothing, the target's backing file reads as the source's."""

    def __init__(
        self,
        order: Order,
        made: Images,
        source: BlockBackend,
        target: BlockBackend,
        limit: Member | None,
        *,
        backed: bool,
    ) -> None:
        self._order = order
        self._made = made
        self._limit = limit
        self._source = source
        self._target = target
        self._backed = backed

    async def run(self, shown: Progress) -> None:
        """Raises BlockError, which says which side failed."""
        total, done = self._source.size, 0
        under_way: set[asyncio.Task[int]] = set()
        try:
            async for offset, length in self._ranges():
                if len(under_way) >= self._order.lanes:
                    done += await _first_done(under_way)
                    shown.show(done, total)
                under_way.add(asyncio.get_running_loop().create_task(self._copy(offset, length)))
            while under_way:
                done += await _first_done(under_way)
                shown.show(done, total)
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _ranges(self) -> AsyncIterator[tuple[int, int]]:
        from livedisk.emulator.block.copy import PIECE, grain_of
        from livedisk.emulator.block.status import layer_status

        step = PIECE if self._order.offload else _STEP
        grain = grain_of(self._target.node)
        offset, end = 0, self._source.size
        while offset < end:
            if not self._backed:
                # Much of a sparse image is told by one look; what is told as data is cut into pieces.
                yield offset, min(step, end - offset)
                offset += step
                continue
            status = await layer_status(self._source.node, offset, min(step, end - offset))
            length = status.length
            if status.allocated:
                # Whole clusters, which alone can be compressed: what is beside reads the same in both.
                start = offset // grain * grain
                length = min(-(-(offset + length) // grain) * grain, end) - offset
                yield start, offset + length - start
            offset += length

    async def _copy(self, offset: int, length: int) -> int:
        from livedisk.emulator.block.status import block_status
        from livedisk.emulator.block.throttle import Direction

        order = self._order
        if self._limit is not None:
            status = await block_status(self._source.node, offset, length)
            if not status.zero or status.length < length or order.sparse == 0:
                await self._limit.admit(Direction.WRITE, length)
        await copy_piece(
            self._source,
            self._target,
            offset,
            length,
            granule=0 if order.offload else order.sparse,
            compressed=order.compress,
            leave_zeroes=not self._backed and order.sparse > 0,
            offload=order.offload,
            zeroes_as_data=order.sparse == 0,
        )
        await self._made.settle(self._target)
        return length


async def _first_done(under_way: set[asyncio.Task[int]]) -> int:
    ended, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
    under_way -= ended
    return sum(task.result() for task in ended)


async def copy_piece(
    source: BlockBackend,
    target: BlockBackend,
    offset: int,
    length: int,
    *,
    granule: int = 0,
    compressed: bool = False,
    leave_zeroes: bool = False,
    offload: bool = True,
    zeroes_as_data: bool = False,
) -> None:
    """`block.copy.copy_range`. Raises BlockError in qemu-img's words."""
    from livedisk.emulator.block.copy import CopyFailed, Side, copy_range

    assert source.root is not None
    assert target.root is not None
    try:
        await copy_range(
            source.root,
            target.root,
            offset,
            length,
            granule=granule,
            compressed=compressed,
            leave_zeroes=leave_zeroes,
            offload=offload,
            zeroes_as_data=zeroes_as_data,
        )
    except CopyFailed as failed:
        doing = "reading" if failed.side is Side.SOURCE else "writing"
        raise BlockError(f"error while {doing} at byte {offset}: {failed.error.strerror or failed.error}") from None


# -- bitmaps -----------------------------------------------------------------------------------------------------------
def _bitmaps_to_copy(order: Order, source: Node) -> list[object]:
    """Those of the source that the output gets. Raises BlockError."""
    found: list[object] = []
    for bitmap in reversed([*source.bitmaps]):  # the oldest first
        if not bitmap.persistent:
            continue
        if bitmap.inconsistent:
            if order.skip_broken:
                click.echo(f"livedisk img: warning: Skipping inconsistent bitmap '{bitmap.name}'", err=True)
                continue
            raise BlockError(
                f"Cannot copy inconsistent bitmap '{bitmap.name}'",
                hint="Try --skip-broken-bitmaps, or use 'livedisk img bitmap --remove'",
            )
        found.append(bitmap)
    return found


def _copy_bitmap(bitmap: object, target: Node) -> None:
    from livedisk.emulator.block.bitmaps import DirtyBitmap

    assert isinstance(bitmap, DirtyBitmap)
    assert bitmap.name is not None
    target.driver.check_bitmap_storable(bitmap.name, bitmap.granularity)
    made = target.bitmaps.create(bitmap.granularity, bitmap.name, persistent=True)
    made.merge(bitmap)
    if bitmap.disabled:
        made.disable()

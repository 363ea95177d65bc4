"""``livedisk img resize``, ``commit``, ``rebase``: an image's size, and what it stands on, while nobody uses it. qemu-img's
options and words. Source: QEMU ``qemu-img.c`` (img_resize, img_commit, img_rebase)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from livedisk.emulator.cli.img import IMAGE, SETTINGS, img, run_to_end
from livedisk.emulator.cli.img_options import (
    CACHE,
    FORMAT,
    PROGRESS,
    QUIET,
    RATE,
    cache_mode,
    cache_option,
    image_options,
)
from livedisk.emulator.errors import BlockError, LiveDiskError, ParameterError, reason_of

if TYPE_CHECKING:
    from livedisk.emulator.block.backend import BlockBackend
    from livedisk.emulator.block.graph import Graph
    from livedisk.emulator.block.node import Edge, Node
    from livedisk.emulator.block.throttle import Member
    from livedisk.emulator.cli.img_open import Images, Progress
    from livedisk.emulator.cli.img_options import CacheMode

_STEP: Final = 2 << 20


# -- resize ------------------------------------------------------------------------------------------------------------
@img.command("resize", context_settings=SETTINGS | {"ignore_unknown_options": True})
@FORMAT
@click.option(
    "--preallocation", "prealloc", metavar="MODE", default="off", help="Of what is new: off, metadata, falloc, full."
)
@click.option("--shrink", is_flag=True, help="Allow the image to become smaller; what is cut off is lost.")
@QUIET
@image_options
@IMAGE
@click.argument("size")
def resize_command(fmt: str | None, prealloc: str, shrink: bool, quiet: bool, image: str, size: str) -> None:
    """Give IMAGE another SIZE in bytes (suffixes k, M, G, T, P, E); with + or - before it: by so much."""

    async def work() -> int:
        from livedisk.emulator.block.types import Preallocation
        from livedisk.emulator.cli.img_open import images, number_of

        sign = size[0] if size[:1] in ("+", "-") else ""
        number = number_of(size.removeprefix(sign))
        if prealloc not in [mode.value for mode in Preallocation]:
            raise ParameterError(f"Invalid preallocation mode '{prealloc}'")
        mode = Preallocation(prealloc)
        async with images() as made:
            node = (await made.open(image, fmt, writable=True)).node
            target = node.size + number if sign == "+" else node.size - number if sign == "-" else number
            if target <= 0:
                raise ParameterError("New image size must be positive")
            if target <= node.size and mode is not Preallocation.OFF:
                raise ParameterError("Preallocation can only be used for growing images")
            if target < node.size and not shrink:
                raise BlockError(
                    "Use the --shrink option to perform a shrink operation.",
                    hint="livedisk img: warning: Shrinking an image will delete all data beyond the shrunken image's end. "
                    "Before performing such an operation, make sure there is no important data there.",
                )
            async with made.graph.drained(node):
                await node.truncate(target, prealloc=mode)
        if not quiet:
            click.echo("Image resized.")
        return 0

    run_to_end(work)


# -- commit ------------------------------------------------------------------------------------------------------------
@img.command("commit", context_settings=SETTINGS)
@FORMAT
@click.option(
    "-b",
    "--base",
    "base",
    metavar="FILE",
    help="Commit into this image of the chain, not the next one; IMAGE keeps its data.",
)
@click.option("-d", "--drop", "keep", is_flag=True, help="Do not empty IMAGE afterwards.")
@RATE
@CACHE
@PROGRESS
@QUIET
@image_options
@IMAGE
def commit_command(
    fmt: str | None,
    base: str | None,
    keep: bool,
    rate: str | None,
    cache: str | None,
    progress: bool,
    quiet: bool,
    image: str,
) -> None:
    """Write what IMAGE holds into its backing file, which grows if it is smaller. IMAGE holds nothing afterwards."""

    async def work() -> int:
        from livedisk.emulator.cli.img_open import Progress, images, rate_limit

        async with images() as made:
            limit = rate_limit(rate)
            top = await made.open(image, fmt, writable=True, cache=cache_mode(cache))
            edge = _edge_to(made.graph, top.node, image, base)
            shown = Progress(progress and not quiet)
            async with _above(made.graph, edge) as target:
                made.write_as(top, target)
                await _write_down(made, top, target, limit, shown)
            if not keep and base is None:
                await top.node.driver.make_empty()
            shown.end()
        if not quiet:
            click.echo("Image committed.")
        return 0

    run_to_end(work)


def _edge_to(graph: Graph, top: Node, image: str, base: str | None) -> Edge:
    """What the image, or one below it, has below it as ``base``. Raises BlockError."""
    from livedisk.emulator.qmp.filenames import combine, filename

    edge = top.backing
    if edge is None:
        raise BlockError("Image does not have a backing file")
    if base is None:
        return edge
    while edge is not None:
        if filename(edge.node) in (base, combine(image, base)):
            return edge
        edge = edge.node.backing
    raise BlockError(f"Did not find '{base}' in the backing chain of '{image}'")


@asynccontextmanager
async def _above(graph: Graph, edge: Edge) -> AsyncIterator[BlockBackend]:
    """While inside, the images above have nothing below them, and what was there can be written to."""
    from livedisk.emulator.block.backend import BlockBackend
    from livedisk.emulator.block.permissions import Perm, Role
    from livedisk.emulator.block.reopen import set_read_only

    above, base = edge.parent, edge.node
    backend = BlockBackend(graph)
    graph.attach_root(backend, base, Perm.NONE, Perm.ALL)
    try:
        await set_read_only(graph, base, False)
        graph.detach_child(edge)
        try:
            graph.set_root_permissions(backend, Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE, Perm.ALL)
            yield backend
            graph.set_root_permissions(backend, Perm.NONE, Perm.ALL)
        finally:
            graph.attach_child(above, base, "backing", Role.COW)  # type: ignore[arg-type]
        await set_read_only(graph, base, True)
    finally:
        await graph.detach_root(backend)


async def _write_down(
    made: Images, top: BlockBackend, base: BlockBackend, limit: Member | None, shown: Progress
) -> None:
    """Copy what the images above hold. Their zeroes become zeroes below, too. Raises BlockError, OSError."""
    from livedisk.emulator.block.status import block_status
    from livedisk.emulator.block.throttle import Direction
    from livedisk.emulator.cli.img_convert import copy_piece

    size = top.size
    if base.size < size:
        async with made.graph.drained(base.node):
            await base.node.truncate(size, exact=False)
    offset = 0
    while offset < size:
        status = await block_status(top.node, offset, min(size - offset, _STEP))
        if status.allocated:
            if limit is not None:
                await limit.admit(Direction.WRITE, status.length)
            await copy_piece(top, base, offset, status.length)
            await made.settle(base)
        offset += status.length
        shown.show(offset, size)
    await base.flush()


# -- rebase ------------------------------------------------------------------------------------------------------------
@img.command("rebase", context_settings=SETTINGS)
@FORMAT
@click.option("-b", "--backing", "backing", metavar="FILE", help="The new backing file; an empty name: none.")
@click.option("-F", "--backing-format", "backing_fmt", metavar="FORMAT", help="The new backing file's format.")
@click.option(
    "-u",
    "--backing-unsafe",
    "unsafe",
    is_flag=True,
    help="Change the name only: the new backing file is known to read as the old one.",
)
@click.option("-c", "--compress", "compress", is_flag=True, help="Write what is copied into IMAGE compressed.")
@CACHE
@cache_option("-T", "--backing-cache", "backing_cache", of="the new backing file")
@click.option("-U", "--force-share", is_flag=True, help="Read the backing files although a writer has them open.")
@PROGRESS
@QUIET
@image_options
@IMAGE
def rebase_command(
    fmt: str | None,
    backing: str | None,
    backing_fmt: str | None,
    unsafe: bool,
    compress: bool,
    cache: str | None,
    backing_cache: str | None,
    force_share: bool,
    progress: bool,
    quiet: bool,
    image: str,
) -> None:
    """Give IMAGE another backing file. What reads otherwise on it is written into IMAGE first, so that IMAGE reads as before."""

    async def work() -> int:
        from livedisk.emulator.cli.img_open import Progress, check_format, images
        from livedisk.emulator.qmp.filenames import combine, filename

        if backing is None and not unsafe:
            raise ParameterError("Must specify backing file (-b) or use unsafe mode (-u)")
        if backing_fmt is not None:
            check_format(backing_fmt, "Invalid format name:")
        async with images() as made:
            # What the header says is below may not be there any more.
            alone: dict[str, Any] = {"backing": None} if unsafe else {}
            mode, backing_mode = cache_mode(cache), cache_mode(backing_cache, "source cache")
            top = await made.open(image, fmt, writable=True, cache=mode, **alone)
            if compress and top.node.driver.name != "qcow2":
                raise BlockError("Compression not supported for this file format")
            name = backing or ""
            if name and backing_fmt is None:
                raise BlockError(f"Could not change the backing file to '{name}': backing format must be specified")
            if not unsafe:
                below = combine(filename(top.node), name) if name else ""
                new = await _new_backing(made, below, backing_fmt, force_share=force_share, cache=backing_mode)
                shown = Progress(progress and not quiet)
                await _Rebase(made, top, new, compress=compress).run(shown)
                shown.end()
            try:
                await top.node.driver.change_backing_file(name or None, backing_fmt if name else None)
            except OSError as error:
                raise BlockError(f"Could not change the backing file to '{name}': {error.strerror}") from None
        return 0

    run_to_end(work)


async def _new_backing(
    made: Images, path: str, fmt: str | None, *, force_share: bool, cache: CacheMode | None
) -> BlockBackend | None:
    """``path`` "": there is to be none."""
    if not path:
        return None
    try:
        return await made.open(path, fmt, force_share=force_share, cache=cache)
    except (LiveDiskError, OSError) as error:
        raise BlockError(f"Could not open new backing file '{path}': {reason_of(error)}") from None


class _Rebase:
    """Writes into an image what would read otherwise on the new backing file, cluster by cluster."""

    def __init__(self, made: Images, top: BlockBackend, new: BlockBackend | None, *, compress: bool) -> None:
        from livedisk.emulator.block.copy import grain_of

        self._made = made
        self._top = top
        self._new = new
        self._compress = compress
        self._grain = max(grain_of(top.node), 4096)

    async def run(self, shown: Progress) -> None:
        """Raises BlockError, OSError."""
        from livedisk.emulator.block.status import layer_status

        top, offset = self._top, 0
        while offset < top.size:
            status = await layer_status(top.node, offset, min(top.size - offset, _STEP))
            if not status.allocated:
                await self._keep(offset, status.length)
            offset += status.length
            shown.show(offset, top.size)
        await top.flush()

    async def _keep(self, offset: int, length: int) -> None:
        from livedisk.emulator.block.status import block_status

        top = self._top
        if self._new is None:
            there = False
        else:
            inside = max(min(length, self._new.size - offset), 0)
            there = inside > 0 and not _all_zero(await block_status(self._new.node, offset, inside), inside)
        if not there and _all_zero(await block_status(top.node, offset, length), length):
            return
        old, new = bytearray(length), bytearray(length)
        await top.read(offset, memoryview(old))
        if self._new is not None and offset < self._new.size:
            inside = min(length, self._new.size - offset)
            await self._new.read(offset, memoryview(new)[:inside])
        start = offset // self._grain * self._grain
        for at in range(start, offset + length, self._grain):
            low, high = max(at - offset, 0), min(at + self._grain - offset, length)
            if old[low:high] != new[low:high]:
                await self._write(offset + low, memoryview(old)[low:high])

    async def _write(self, offset: int, data: memoryview) -> None:
        from livedisk.emulator.block.node import is_zero

        whole = offset % self._grain == 0 and (len(data) == self._grain or offset + len(data) == self._top.size)
        if is_zero(data):
            await self._top.write_zeroes(offset, len(data))
        elif self._compress and whole:
            await self._top.node.write_compressed(offset, data)
        else:
            await self._top.write(offset, data)
        await self._made.settle(self._top)


def _all_zero(status: object, length: int) -> bool:
    from livedisk.emulator.block.status import BlockStatus

    assert isinstance(status, BlockStatus)
    return status.zero and status.length >= length

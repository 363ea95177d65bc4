"""``livedisk img bitmap``: persistent dirty bitmaps of an image that nobody is using, as with ``qemu-img bitmap``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, TypeVar

import click

from livedisk.emulator.cli.img import IMAGE, SETTINGS, img, opened, run_to_end, size_of
from livedisk.emulator.cli.img_options import format_option, image_options
from livedisk.emulator.errors import BlockError

if TYPE_CHECKING:
    from livedisk.emulator.block.bitmaps import DirtyBitmap
    from livedisk.emulator.block.node import Node


F = TypeVar("F", bound=Callable[..., Any])


def _noted(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Keep the verbs in the order in which they were given."""
    if value:
        actions: list[tuple[str, str]] = context.meta.setdefault("actions", [])
        sources = value if isinstance(value, tuple) else ("",)
        actions.extend((parameter.name or "", source) for source in sources)
    return value


def _verb(name: str, text: str) -> Callable[[F], F]:
    return click.option(f"--{name}", name, is_flag=True, callback=_noted, expose_value=False, help=text)


@img.command("bitmap", context_settings=SETTINGS)
@_verb("add", "Start a bitmap.")
@_verb("remove", "Take it out of the image.")
@_verb("clear", "Make everything clean.")
@_verb("enable", "Have writes recorded when the image is used.")
@_verb("disable", "Have no writes recorded.")
@click.option(
    "--merge",
    multiple=True,
    metavar="SOURCE",
    callback=_noted,
    expose_value=False,
    help="Add what the bitmap SOURCE says (repeatable).",
)
@click.option(
    "-b", "--source-file", "source_file", metavar="FILE", help="The image that has SOURCE; IMAGE itself if not given."
)
@click.option(
    "-F",
    "--source-format",
    "source_fmt",
    metavar="FORMAT",
    help="The format of FILE; what its header says if not given.",
)
@click.option("-g", "--granularity", "granularity", metavar="SIZE", help="Of a new bitmap: a power of two from 512.")
@format_option("-f", "--format", "fmt", help="The format of IMAGE; what its header says if not given.")
@image_options
@IMAGE
@click.argument("bitmap")
@click.pass_context
def bitmap_command(
    context: click.Context,
    source_file: str | None,
    source_fmt: str | None,
    granularity: str | None,
    fmt: str | None,
    image: str,
    bitmap: str,
) -> None:
    """Do what is asked for, in the order of the options, to the dirty bitmap BITMAP of IMAGE."""
    actions: list[tuple[str, str]] = context.meta.get("actions", [])
    verbs = {verb for verb, _ in actions}
    if not actions:
        raise click.UsageError("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")
    if granularity is not None and "add" not in verbs:
        raise click.UsageError("granularity only supported with --add")
    if source_file is not None and "merge" not in verbs:
        raise click.UsageError("Merge bitmap source file only supported with --merge")

    async def work() -> int:
        step = None if granularity is None else size_of("granularity", granularity)
        async with AsyncExitStack() as stack:
            node = await stack.enter_async_context(opened(image, fmt, writable=True))
            source = node
            if source_file is not None:
                source = await stack.enter_async_context(opened(source_file, source_fmt))
            for verb, name in actions:
                try:
                    _act(node, bitmap, verb, step, source.bitmaps.get(name) if name else None)
                except BlockError as error:
                    raise BlockError(f"Operation {verb} on bitmap {bitmap} failed: {error}", hint=error.hint) from None
            await node.driver.sync_bitmaps()
        return 0

    run_to_end(work)


def _act(node: Node, name: str, verb: str, granularity: int | None, source: DirtyBitmap | None) -> None:
    from livedisk.emulator.block.bitmaps import MIN_GRANULARITY

    bitmaps = node.bitmaps
    if verb == "add":
        size = bitmaps.default_granularity() if granularity is None else granularity
        if size < MIN_GRANULARITY or size & (size - 1):
            raise BlockError(f"Granularity must be power of 2 and at least {MIN_GRANULARITY}")
        if bitmaps.find(name) is None:
            node.driver.check_bitmap_storable(name, size)
        bitmaps.create(size, name, persistent=True)
        return
    bitmap = bitmaps.get(name)
    if verb == "remove":
        bitmap.check_removable()
        bitmaps.remove(bitmap)
        return
    bitmap.check_usable()
    if verb == "clear":
        bitmap.clear()
    elif verb == "enable":
        bitmap.enable()
    elif verb == "disable":
        bitmap.disable()
    else:
        assert source is not None
        source.check_usable(allow_read_only=True)
        if source.size != bitmap.size:
            raise BlockError(
                f"Bitmaps are of different sizes (destination size is {bitmap.size}, source size is {source.size}) "
                "and can't be merged"
            )
        bitmap.merge(source)

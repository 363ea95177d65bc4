"""``livedisk img measure``: how much room an image needs in its storage, as with ``qemu-img measure``.

Source: QEMU ``block/qcow2.c`` (qcow2_measure, qcow2_calc_prealloc_size, qcow2_refcount_metadata_size), ``block/qcow2-bitmap.c``
(qcow2_get_persistent_dirty_bitmap_size), ``block/raw-format.c``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from livedisk.emulator.cli.img import (
    OUTPUT,
    SETTINGS,
    creation_options,
    creation_words,
    img,
    print_json,
    run_to_end,
    size_of,
)
from livedisk.emulator.cli.img_options import SNAPSHOT, format_option, image_name, image_options
from livedisk.emulator.errors import BlockError, ParameterError, reason_of

if TYPE_CHECKING:
    from livedisk.emulator.block.node import Node
    from livedisk.emulator.drivers.qcow2.create import CreateOptions

_ENTRY: Final = 8
_DIRECTORY_ENTRY: Final = 24


@dataclass(frozen=True)
class Measure:
    """Bytes. ``bitmaps``: what its persistent bitmaps would add, None where the new image can have none of the source's."""

    required: int
    fully_allocated: int
    bitmaps: int | None = None


@img.command("measure", context_settings=SETTINGS)
@format_option("-f", "--format", "fmt", help="The format of IMAGE; what its header says if not given.")
@click.option(
    "-O",
    "--target-format",
    "target",
    metavar="FORMAT",
    default="raw",
    show_default=True,
    help="The new image's format.",
)
@click.option("-o", "words", metavar="NAME=VALUE,...", multiple=True, help="Creation options of the new image.")
@SNAPSHOT
@click.option("-s", "--size", "size", metavar="SIZE", help="Measure an image of that size instead of a copy of IMAGE.")
@click.option("-U", "--force-share", is_flag=True, help="Look although a writer has the image open.")
@OUTPUT
@image_options
@click.argument("image", callback=image_name, required=False)
def measure_command(
    fmt: str | None,
    target: str,
    words: tuple[str, ...],
    snapshot: str | None,
    size: str | None,
    force_share: bool,
    output: str,
    image: str | None,
) -> None:
    """Say how much room a copy of IMAGE, or a new image of --size bytes, takes: as it is, and with all of it allocated."""

    async def work() -> int:
        from livedisk.emulator.cli.img_open import check_format, images, show_snapshot

        if size is not None and image is not None:
            raise ParameterError("--size N cannot be used together with a filename.")
        if size is None and image is None:
            raise ParameterError("Either --size N or one filename must be specified.")
        check_format(target, "Unknown file format")
        if target not in ("qcow2", "raw"):
            raise BlockError(f"Block driver '{target}' does not support size measurement")
        if image is None:
            assert size is not None
            found = await _measure(target, words, size_of("image size", size), None)
        else:
            async with images() as made:
                node = (await made.open(image, fmt, force_share=force_share)).node
                if snapshot is not None:
                    await show_snapshot(node, snapshot)
                found = await _measure(target, words, node.size, node)
        if output == "json":
            members: dict[str, Any] = {} if found.bitmaps is None else {"bitmaps": found.bitmaps}
            print_json(members | {"required": found.required, "fully-allocated": found.fully_allocated})
            return 0
        click.echo(f"required size: {found.required}\nfully allocated size: {found.fully_allocated}")
        if found.bitmaps is not None:
            click.echo(f"bitmaps size: {found.bitmaps}")
        return 0

    run_to_end(work)


async def _measure(target: str, words: tuple[str, ...], size: int, source: Node | None) -> Measure:
    if target == "raw":
        given = creation_words(words, ("size", "preallocation", "nocow"))
        if "size" in given and source is None:
            raise ParameterError("The image size must be specified only once")
        return Measure(-(-size // 512) * 512, -(-size // 512) * 512)
    given = creation_words(words)
    given["size"] = str(size)
    backed = given.pop("backing_file", None) is not None
    given.pop("backing_fmt", None)
    options = await creation_options(given, "")
    return await measure_qcow2(options, source, backed=backed)


async def measure_qcow2(options: CreateOptions, source: Node | None, *, backed: bool) -> Measure:
    """Room for a qcow2 image with the data of ``source`` (None: without any). ``backed``: with a backing file, of which nobody
    knows how much it holds already. Raises BlockError."""
    from livedisk.emulator.block.types import Preallocation
    from livedisk.emulator.drivers.qcow2.create import Version, check_options

    check_options(options)
    cluster = options.cluster_size
    virtual = _up(options.size, cluster)
    full = _fully_allocated(options, virtual)
    data, bitmaps = 0, None
    if options.preallocation in (Preallocation.FULL, Preallocation.FALLOC) or (source is not None and backed):
        data = virtual
    elif source is not None:
        data = await _data_of(source, cluster)
    if source is not None and options.version is not Version.V2 and source.driver.name == "qcow2":
        bitmaps = _room_of_bitmaps(source, cluster)
    return Measure(full - virtual + data, full, bitmaps)


async def _data_of(source: Node, cluster: int) -> int:
    """Bytes of the clusters in which the source has data."""
    from livedisk.emulator.block.status import block_status

    offset = found = 0
    while offset < source.size:
        try:
            status = await block_status(source, offset, source.size - offset)
        except OSError as error:
            raise BlockError(f"Unable to get block status: {reason_of(error)}") from None
        if status.data and not status.zero and status.allocated:
            # Whole clusters: a run that begins inside one counts it, and the next run begins behind it.
            end = min(_up(offset + status.length, cluster), _up(source.size, cluster))
            found += end - offset // cluster * cluster
            offset = end
        else:
            offset += status.length
    return found


def _room_of_bitmaps(source: Node, cluster: int) -> int:
    total = directory = 0
    for bitmap in source.bitmaps:
        if not bitmap.persistent or bitmap.inconsistent or bitmap.name is None:
            continue
        clusters = _up(_up(_up(bitmap.size, bitmap.granularity) // bitmap.granularity, 8) // 8, cluster) // cluster
        total += clusters * cluster + _up(clusters * _ENTRY, cluster)
        directory += _up(_DIRECTORY_ENTRY + len(bitmap.name.encode()), 8)
    return total + _up(directory, cluster)


def _fully_allocated(options: CreateOptions, virtual: int) -> int:
    cluster = options.cluster_size
    entry = 2 * _ENTRY if options.extended_l2 else _ENTRY
    entries = _up(virtual // cluster, cluster // entry)
    tables = _up(entries * entry // cluster, cluster // _ENTRY)
    metadata = cluster + entries * entry + tables * _ENTRY
    return virtual + metadata + _refcounts((metadata + virtual) // cluster, cluster, options.refcount_bits)


def _refcounts(clusters: int, cluster: int, bits: int) -> int:
    """Bytes of blocks and table that count so many clusters and themselves."""
    blocks = table = 0
    total = -1
    while total != clusters + blocks + table:
        total = clusters + blocks + table
        blocks = -(-total // (cluster * 8 // bits))
        table = -(-blocks // (cluster // _ENTRY))
    return (blocks + table) * cluster


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


__all__ = ["Measure", "measure_command", "measure_qcow2"]

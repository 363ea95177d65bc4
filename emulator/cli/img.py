"""``livedisk img``: make, check, repair, copy and look at images that nobody is using.

The words of the options, the JSON and the exit codes are qemu-img's, so that scripts may call either. What it prints for
people is close to qemu-img's, not equal.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Container, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click
import msgspec

from livedisk.emulator.cli.img_options import (
    FORMAT,
    QUIET,
    SOURCE_CACHE,
    CacheMode,
    cache_mode,
    format_option,
    image_name,
    image_options,
)
from livedisk.emulator.errors import BlockError, LiveDiskError, ParameterError, reason_of

if TYPE_CHECKING:
    from livedisk.emulator.block.node import Node
    from livedisk.emulator.drivers.qcow2.check import CheckResult
    from livedisk.emulator.drivers.qcow2.create import CreateOptions

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
OUTPUT = click.option(
    "--output", type=click.Choice(["human", "json"]), default="human", show_default=True, help="For people or programs."
)
IMAGE = click.argument("image", type=click.Path(), callback=image_name)

CHECK_HELP = """Check the qcow2 image IMAGE, which must not be in use, and repair it if asked to.

-r leaks frees clusters that nothing refers to. -r all also repairs errors, and rebuilds refcounts that are lost; data is
never changed, but what a damaged table no longer says cannot be brought back.

\b
Exit status (qemu-img's):
  0  no errors are left
  1  the check could not be finished, or the image could not be opened
  2  the image is damaged
  3  clusters are leaked, nothing else is wrong
"""


class _Group(click.Group):
    """Usage errors end with 1, as qemu-img's: 2 means that an image is damaged, or could not be compared."""

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            error.show()
            sys.exit(1)
        except click.Abort:
            click.echo("Aborted!", err=True)
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


@click.group("img", cls=_Group, context_settings=SETTINGS)
def img() -> None:
    """Make, check, repair, convert, compare and look at images. Options, JSON and exit codes are qemu-img's."""


def run_to_end(work: Callable[[], Coroutine[Any, Any, int]]) -> None:
    """Run a command's work; errors go to standard error."""
    try:
        code = asyncio.run(work())
    except (LiveDiskError, OSError) as error:
        click.echo(f"livedisk img: {reason_of(error)}", err=True)
        hint = getattr(error, "hint", "")
        if hint:
            click.echo(hint, err=True)
        code = getattr(error, "code", 1)
    sys.exit(code)


# -- create ------------------------------------------------------------------------------------------------------------
_LEGACY = {
    "backing_file": "backing_file",
    "backing_fmt": "backing_fmt",
    "cluster_size": "cluster_size",
    "compat": "version",
    "compression_type": "compression_type",
    "data_file": "data_file",
    "data_file_raw": "data_file_raw",
    "extended_l2": "extended_l2",
    "lazy_refcounts": "lazy_refcounts",
    "nocow": "nocow",
    "preallocation": "preallocation",
    "refcount_bits": "refcount_bits",
    "size": "size",
}
"""qemu-img's creation options, and what `CreateOptions` calls them (nocow is told to the file)."""
_VERSIONS = {"0.10": "v2", "1.1": "v3"}


@img.command("create", context_settings=SETTINGS)
@click.option(
    "-f",
    "--format",
    "fmt",
    metavar="FORMAT",
    default="qcow2",
    show_default=True,
    help="The image's format: qcow2 or raw.",
)
@click.option(
    "-o",
    "--options",
    "words",
    metavar="NAME=VALUE,...",
    multiple=True,
    help="Creation options, as qemu-img's; help lists them.",
)
@click.option("-b", "--backing", "backing", metavar="FILE", help="The backing file.")
@click.option(
    "-F", "--backing-format", "backing_fmt", metavar="FORMAT", help="The backing file's format; needed with -b."
)
@click.option(
    "-u",
    "--backing-unsafe",
    "unsafe",
    is_flag=True,
    help="Do not look at the backing file, which need not be there.",
)
@QUIET
@click.argument("image", required=False)
@click.argument("size", required=False)
def create_command(
    fmt: str,
    words: tuple[str, ...],
    backing: str | None,
    backing_fmt: str | None,
    unsafe: bool,
    quiet: bool,
    image: str | None,
    size: str | None,
) -> None:
    """Make the image IMAGE of SIZE bytes (suffixes k, M, G, T, P, E; may be left out with a backing file).

    \b
    Creation options (-o) of qcow2: backing_file, backing_fmt, cluster_size, compat (0.10 or 1.1), compression_type (zlib,
    zstd), data_file, data_file_raw, extended_l2, lazy_refcounts, nocow, preallocation (off, metadata, falloc, full),
    refcount_bits, size; of raw: nocow, preallocation, size.
    """

    async def work() -> int:
        from livedisk.emulator.cli.img_help import asks_for_help, creation_help
        from livedisk.emulator.cli.img_open import check_format

        asked, what = asks_for_help(words), "" if image is None else f"{image}: "
        if image is None and not asked:
            raise ParameterError("Expecting image file name")
        check_format(fmt, f"{what}Unknown file format")
        if fmt not in ("qcow2", "raw"):
            raise BlockError(f"{what}Format driver '{fmt}' does not support image creation")
        if asked or image is None:
            click.echo(creation_help(fmt, in_file=image is not None))
            return 0
        given = creation_words(words, _LEGACY if fmt == "qcow2" else RAW_OPTIONS)
        if size is not None and "size" in given:
            raise ParameterError("The image size must be specified only once")
        for name, value in (("backing_file", backing), ("backing_fmt", backing_fmt), ("size", size)):
            if value is not None:
                given[name] = value
        nocow = switch_of("nocow", given.get("nocow", "off"))
        try:
            line = await (
                _create_qcow2(image, given, nocow, unsafe) if fmt == "qcow2" else create_raw(image, given, nocow)
            )
        except _StorageError as error:
            raise BlockError(f"{image}: {error}", hint=error.hint) from error
        if not quiet:
            click.echo(f"Formatting '{image}', fmt={fmt} {line}{' nocow=on' if nocow else ''}")
        return 0

    run_to_end(work)


RAW_OPTIONS = ("nocow", "preallocation", "size")
"""qemu-img's creation options of a raw file."""


async def _create_qcow2(image: str, given: dict[str, str], nocow: bool, unsafe: bool) -> str:
    """Make the image; what qemu-img says of it. Raises LiveDiskError, OSError."""
    given = {name: value for name, value in given.items() if name != "nocow"}
    if "backing_file" in given and "backing_fmt" in given and not unsafe:
        found = await _backing_size(image, given["backing_file"], given["backing_fmt"])
        given.setdefault("size", str(found))
    if unsafe and "size" not in given:
        raise BlockError("Image creation needs a size parameter")
    options = await creation_options(given, image)
    await create_qcow2(image, options, nocow=nocow)
    return _described(options, given)


async def create_qcow2(name: str, options: CreateOptions, *, nocow: bool) -> None:
    """Into a file, or into what is there already where that is not one of this host's."""
    from livedisk.emulator.drivers.qcow2.create import create_file

    path = _host_path(name)
    if path is not None:
        await create_file(path, options, nocow=nocow)
    else:
        await _create_in_storage(name, "qcow2", options)


def _host_path(name: str) -> str | None:
    """The file of this host that ``name`` means; None: what is there already, such as an export. Raises BlockError."""
    from livedisk.emulator.cli.images import is_path
    from livedisk.emulator.qmp.new_images import host_path
    from livedisk.emulator.qmp.registry import load_plugins

    load_plugins()
    return name if is_path(name) else host_path(name)


async def _create_in_storage(name: str, fmt: str, options: CreateOptions) -> None:
    from livedisk.emulator.daemon import Daemon
    from livedisk.emulator.qmp.new_images import create_in_storage

    daemon = Daemon()
    try:
        await create_in_storage(daemon.graph, name, fmt, options)
    except (BlockError, OSError) as error:
        raise _StorageError(reason_of(error), hint=getattr(error, "hint", "")) from error
    finally:
        await daemon.close()


class _StorageError(BlockError):
    """What is there already could not be made an image; the text does not name it."""


async def create_raw(image: str, given: dict[str, str], nocow: bool) -> str:
    """Make a raw file, or zero the first sector of what is there already where that is not one of this host's; what qemu-img says
    of it. Raises LiveDiskError, OSError."""
    from livedisk.emulator.block.graph import Graph
    from livedisk.emulator.block.types import Preallocation
    from livedisk.emulator.drivers.file_create import BlockdevCreateOptionsFile, create
    from livedisk.emulator.drivers.qcow2.create import CreateOptions

    if "backing_file" in given or "backing_fmt" in given:
        raise BlockError(f"{image}: Backing file not supported for file format 'raw'")
    if "size" not in given:
        raise BlockError(f"{image}: Image creation needs a size parameter")
    size, mode = size_of("image size", given["size"]), given.get("preallocation", "off")
    if mode not in [one.value for one in Preallocation]:
        raise ParameterError(f"{image}: Parameter 'preallocation' does not accept value '{mode}'")
    size = -(-size // 512) * 512
    path = _host_path(image)
    if path is None:
        await _create_in_storage(image, "raw", CreateOptions(size=size))
    else:
        options = BlockdevCreateOptionsFile(
            driver="file", filename=path, size=size, preallocation=Preallocation(mode), nocow=nocow
        )
        await create(Graph(), options)
    return f"size={size}" + (f" preallocation={mode}" if "preallocation" in given else "")


def creation_words(words: tuple[str, ...], known: Container[str] = _LEGACY) -> dict[str, str]:
    """What ``-o`` says, by name. Raises ParameterError for a name that is not ``known``."""
    from livedisk.emulator.qmp.keyval import split_fields

    found: dict[str, str] = {}
    for text in words:
        for item in split_fields(text):
            name, equals, value = item.partition("=")
            if name == "encryption" or name.startswith("encrypt."):
                raise ParameterError(f"'{name}': encryption of qcow2 images is not supported")
            if name not in known:
                raise ParameterError(f"Invalid parameter '{name}'")
            found[name] = value if equals else "on"
    return found


def switch_of(name: str, text: str) -> bool:
    if text not in ("on", "off"):
        raise ParameterError(f"Parameter '{name}' expects 'on' or 'off'")
    return text == "on"


def size_of(name: str, text: str) -> int:
    from livedisk.emulator.qmp.visit import parse_size

    size = parse_size(text)
    if size is None or size >= 1 << 63:
        raise ParameterError(f"Invalid {name} specified: '{text}'")
    return size


async def creation_options(given: dict[str, str], image: str) -> CreateOptions:
    """Typed options from qemu-img's words. Raises ParameterError, BlockError."""
    from livedisk.emulator.drivers.qcow2.create import CreateOptions

    typed: dict[str, Any] = {}
    for name, text in given.items():
        target = _LEGACY[name]
        if target in ("size", "cluster_size"):
            typed[target] = size_of("image size" if target == "size" else target, text)
        elif target == "refcount_bits":
            typed[target] = size_of(target, text)
        elif target in ("data_file_raw", "extended_l2", "lazy_refcounts"):
            typed[target] = switch_of(name, text)
        else:
            typed[target] = _VERSIONS.get(text, text) if target == "version" else text
    if "backing_file" in typed:
        if "backing_fmt" not in typed:
            raise BlockError("Backing file specified without backing format")
        if "size" not in typed:
            typed["size"] = await _backing_size(image, typed["backing_file"], typed["backing_fmt"])
    if "size" not in typed:
        raise BlockError("Image creation needs a size parameter")
    typed["size"] = -(-typed["size"] // 512) * 512
    try:
        return msgspec.convert({name.replace("_", "-"): value for name, value in typed.items()}, CreateOptions)
    except msgspec.ValidationError as error:
        raise ParameterError(f"Invalid creation options: {error}") from None


async def _backing_size(image: str, backing: str, fmt: str) -> int:
    from livedisk.emulator.qmp.filenames import combine

    try:
        async with opened(combine(image, backing), fmt) as node:
            return node.size
    except LiveDiskError as error:
        raise BlockError(f"{image}: {error}\nCould not open backing image.", hint=error.hint) from None


def _described(options: CreateOptions, given: dict[str, str]) -> str:
    """The options in qemu-img's order: those that it gives a default, and those that were given."""
    words = [f"cluster_size={options.cluster_size}", f"extended_l2={_on_off(options.extended_l2)}"]
    words += [f"preallocation={given['preallocation']}"] if "preallocation" in given else []
    words += [f"compression_type={options.compression_type}", f"size={size_of('image size', given['size'])}"]
    words += [f"{name}={given[name]}" for name in ("data_file", "data_file_raw") if name in given]
    words += [f"{name}={given[name].replace(',', ',,')}" for name in ("backing_file", "backing_fmt") if name in given]
    words += [f"compat={given['compat']}"] if "compat" in given else []
    return " ".join(
        [*words, f"lazy_refcounts={_on_off(options.lazy_refcounts)}", f"refcount_bits={options.refcount_bits}"]
    )


def _on_off(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


# -- opening -----------------------------------------------------------------------------------------------------------
@asynccontextmanager
async def opened(
    path: str,
    fmt: str | None,
    *,
    writable: bool = False,
    force_share: bool = False,
    cache: CacheMode | None = None,
) -> AsyncIterator[Node]:
    """The image open in a graph of its own; ``fmt`` "file" is the file, or the export that an NBD name means, itself; None:
    what the image is."""
    from livedisk.emulator.cli.img_open import images

    async with images() as made:
        backend = await made.open(path, fmt, writable=writable, force_share=force_share, cache=cache)
        yield backend.node


# -- check -------------------------------------------------------------------------------------------------------------
@img.command("check", help=CHECK_HELP, context_settings=SETTINGS)
@format_option("-f", "--format", "fmt", help="The image's format; only qcow2 can be checked.")
@click.option("-r", "--repair", "repair_what", type=click.Choice(["leaks", "all"]), help="Repair leaks, or all errors.")
@SOURCE_CACHE
@image_options
@QUIET
@click.option("-U", "--force-share", is_flag=True, help="Check although a writer has the image open.")
@OUTPUT
@IMAGE
def check_command(
    fmt: str | None,
    repair_what: str | None,
    cache: str | None,
    quiet: bool,
    force_share: bool,
    output: str,
    image: str,
) -> None:
    if (fmt or _look(image)) != "qcow2":
        click.echo("livedisk img: This image format does not support checks", err=True)
        sys.exit(63)
    if force_share and repair_what:
        raise click.UsageError("-U shares the image with a writer, -r writes to it: choose one")
    report = (lambda _: None) if quiet or output == "json" else click.echo
    shown = None if quiet else output

    async def work() -> int:
        mode = cache_mode(cache, "source cache")
        writable = repair_what is not None
        async with opened(image, "file", writable=writable, force_share=force_share, cache=mode) as node:
            return await _check(node, image, repair_what, report, shown)

    run_to_end(work)


def _look(image: str) -> str:
    """What to check an image as. One that is named like qcow2 is taken for it, however damaged its header is."""
    from livedisk.emulator.drivers.qcow2.header import probe

    if image.endswith((".qcow2", ".qcow")) or not os.path.isfile(image):
        return "qcow2"
    with open(image, "rb") as file:
        return "qcow2" if probe(file.read(512)) else "raw"


async def _check(
    node: Node, image: str, repair_what: str | None, report: Callable[[str], Any], output: str | None
) -> int:
    """Check the image in ``node``; gives the exit code. ``output``: how the result is told, None: not at all."""
    from livedisk.emulator.drivers.qcow2.check import CheckFailed, check
    from livedisk.emulator.drivers.qcow2.repair import Fix, repair

    try:
        if repair_what is None:
            result = await check(node, report)
        else:
            fixed = await repair(node, Fix.LEAKS if repair_what == "leaks" else Fix.ALL, report)
            result = fixed
            if fixed.leaks_fixed or fixed.corruptions_fixed:
                result = await check(node, report)
                result.leaks_fixed, result.corruptions_fixed = fixed.leaks_fixed, fixed.corruptions_fixed
    except CheckFailed as error:
        click.echo(f"livedisk img: Check failed: {error}", err=True)
        return 1
    except OSError as error:
        click.echo(f"livedisk img: Check failed: {image}: {reason_of(error)}", err=True)
        return 1
    if output == "json":
        print_json(result.to_json(image))
    elif output is not None:
        click.echo(_summary(result))
    return 1 if result.check_errors else 2 if result.corruptions else 3 if result.leaks else 0


def _summary(result: CheckResult) -> str:
    lines: list[str] = []
    if result.leaks_fixed or result.corruptions_fixed:
        lines.append(f"Repaired: {result.leaks_fixed} leaked clusters, {result.corruptions_fixed} corruptions.")
    if not result.corruptions and not result.leaks and not result.check_errors:
        lines.append("No errors were found on the image.")
    if result.corruptions:
        lines.append(f"{result.corruptions} errors were found on the image.")
        lines.append("Data may be corrupted, or further writes to the image may corrupt it.")
    if result.leaks:
        lines.append(f"{result.leaks} leaked clusters were found on the image.")
        lines.append("This means waste of disk space, but no harm to data.")
    if result.check_errors:
        lines.append(f"{result.check_errors} internal errors have occurred during the check.")
    total, used = result.total_clusters, result.allocated_clusters
    if total and used:
        lines.append(
            f"{used}/{total} = {used * 100 / total:.2f}% allocated, "
            f"{result.fragmented_clusters * 100 / used:.2f}% fragmented, "
            f"{result.compressed_clusters * 100 / used:.2f}% compressed clusters"
        )
    if result.image_end_offset:
        lines.append(f"Image end offset: {result.image_end_offset}")
    return "\n".join(lines)


def print_json(value: Any) -> None:
    from livedisk.emulator.qmp.encode import encode_pretty

    click.echo(encode_pretty(value).decode("ascii").replace("\r\n", "\n"), nl=False)


# -- info --------------------------------------------------------------------------------------------------------------
@img.command("info", context_settings=SETTINGS)
@FORMAT
@click.option("-U", "--force-share", is_flag=True, help="Look although a writer has the image open.")
@click.option("-b", "--backing-chain", is_flag=True, help="Also all backing files, from the top down.")
@image_options
@OUTPUT
@IMAGE
def info_command(fmt: str | None, force_share: bool, backing_chain: bool, output: str, image: str) -> None:
    """Say what IMAGE is."""

    async def work() -> int:
        from livedisk.emulator.cli.images import is_path
        from livedisk.emulator.cli.img_open import images

        found: list[dict[str, Any]] = []
        # Only who asks for the chain needs it to be there.
        alone: dict[str, Any] = {} if backing_chain else {"backing": None}
        async with images() as made:
            top = (await made.open(image, fmt, force_share=force_share, **alone)).node
            node: Node | None = top
            while node is not None:
                found.append(await _graph_info(node))
                node = node.backing.node if backing_chain and node.backing is not None else None
            if top.backing is None and is_path(image):
                found[0]["filename"] = image  # not by the options that keep its backing file out
        if output == "json":
            print_json(found if backing_chain else found[0])
        else:
            click.echo("\n\n".join(_described_info(info) for info in found))
        return 0

    run_to_end(work)


async def _graph_info(node: Node) -> dict[str, Any]:
    """QEMU's BlockGraphInfo: an image, and what it stands in; not what it stands on."""
    from livedisk.emulator.qmp.query_block import node_info

    children = [
        {"name": name, "info": await _graph_info(edge.node)}
        for name, edge in node.children.items()
        if name != "backing"
    ]
    info: dict[str, Any] = msgspec.to_builtins((await node_info(node, deep=False)).image)
    return {"children": children, **info}


def _disk_size(info: dict[str, Any]) -> str:
    from livedisk.emulator.qmp.hmp_block import human_size

    return f"disk size: {human_size(info['actual-size']) if 'actual-size' in info else 'unavailable'}"


def _described_child(info: dict[str, Any], path: str) -> list[str]:
    from livedisk.emulator.qmp.hmp_block import human_size

    size = info["virtual-size"]
    lines = [
        f"Child node '{path}':",
        f"    filename: {info['filename']}",
        f"    protocol type: {info['format']}",
        f"    file length: {human_size(size)} ({size} bytes)",
    ]
    lines.append(f"    {_disk_size(info)}")
    data = info.get("format-specific", {}).get("data", {})
    if data:
        lines += ["    Format specific information:", *_members(data, "        ")]
    return lines + [
        line for child in info["children"] for line in _described_child(child["info"], f"{path}/{child['name']}")
    ]


def _described_info(info: dict[str, Any]) -> str:
    from livedisk.emulator.qmp.hmp_block import human_size, snapshot_table

    size = info["virtual-size"]
    lines = [
        f"image: {info['filename']}",
        f"file format: {info['format']}",
        f"virtual size: {human_size(size)} ({size} bytes)",
    ]
    lines.append(_disk_size(info))
    if "cluster-size" in info:
        lines.append(f"cluster_size: {info['cluster-size']}")
    if "backing-filename" in info:
        full = info.get("full-backing-filename", info["backing-filename"])
        actual = "" if full == info["backing-filename"] else f" (actual path: {full})"
        lines.append(f"backing file: {info['backing-filename']}{actual}")
    if "backing-filename-format" in info:
        lines.append(f"backing file format: {info['backing-filename-format']}")
    if info.get("snapshots"):
        lines += ["Snapshot list:", *snapshot_table(info["snapshots"])]
    data = info.get("format-specific", {}).get("data", {})
    if data:
        lines.append("Format specific information:")
        lines += _members(data, "    ")
    for child in info["children"]:
        lines += _described_child(child["info"], f"/{child['name']}")
    return "\n".join(lines)


def _members(data: dict[str, Any] | list[Any], indent: str) -> list[str]:
    """A value that has parts, a line each, as qemu-img lays them out."""
    lines: list[str] = []
    named = data.items() if isinstance(data, dict) else ((f"[{index}]", value) for index, value in enumerate(data))
    for name, value in named:
        title = indent + name.replace("-", " ") + ":"
        if isinstance(value, dict | list):
            lines += [title, *_members(value, indent + "    ")]
        else:
            lines.append(f"{title} {_word(value)}")
    return lines


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- map ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Extent:
    """A range that is alike in everything but its place: qemu-img's MapEntry without start and length."""

    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    offset: int | None = None
    filename: str | None = None


@img.command("map", context_settings=SETTINGS)
@FORMAT
@click.option("-U", "--force-share", is_flag=True, help="Look although a writer has the image open.")
@click.option("-s", "--start-offset", "start_offset", metavar="OFFSET", help="Begin there.")
@click.option("-l", "--max-length", "max_length", metavar="LENGTH", help="Look at so many bytes at most.")
@image_options
@OUTPUT
@IMAGE
def map_command(
    fmt: str | None,
    force_share: bool,
    start_offset: str | None,
    max_length: str | None,
    output: str,
    image: str,
) -> None:
    """Say where each part of IMAGE stands: in which image of the chain, and at which offset."""

    async def work() -> int:
        low = size_of("start offset", start_offset) if start_offset is not None else 0
        most = size_of("max length", max_length) if max_length is not None else 1 << 63
        async with opened(image, fmt, force_share=force_share) as node:
            try:
                extents = [found async for found in _extents(node, low, min(node.size, low + most))]
            except OSError as error:
                raise BlockError(f"Could not read file metadata: {reason_of(error)}") from None
        if output == "json":
            nothing = (low, 0, _Extent(0, present=False, zero=False, data=False, compressed=False))
            rows = [_map_entry(*found) for found in extents or [nothing]]
            click.echo("[" + ",\n".join(rows) + "]")
            return 0
        click.echo(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
        for start, length, extent in extents:
            if extent.compressed:
                raise BlockError("File contains external, encrypted or compressed clusters.")
            if extent.data and not extent.zero:
                places = (start, length, extent.offset or 0)
                click.echo("".join(f"{_hex(number):<16}" for number in places) + str(extent.filename))
        return 0

    run_to_end(work)


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"


def _map_entry(start: int, length: int, extent: _Extent) -> str:
    entry: dict[str, Any] = {"start": start, "length": length, "depth": extent.depth, "present": extent.present}
    entry |= {"zero": extent.zero, "data": extent.data, "compressed": extent.compressed}
    if extent.offset is not None:
        entry["offset"] = extent.offset
    return "{ " + json.dumps(entry)[1:-1] + "}"


async def _extents(node: Node, start: int, end: int) -> AsyncIterator[tuple[int, int, _Extent]]:
    """The image from ``start`` to ``end`` in ranges that are alike, as far as possible joined."""
    length, current = 0, None
    while start + length < end:
        at = start + length
        step, extent = await _extent(node, at, end - at)
        if current is not None and _continues(current, length, extent):
            length += step
            continue
        if current is not None:
            yield start, length, current
        start, length, current = at, step, extent
    if current is not None:
        yield start, length, current


def _continues(current: _Extent, length: int, extent: _Extent) -> bool:
    """Whether ``extent`` goes on where ``current`` ends."""
    return replace(current, offset=None if current.offset is None else current.offset + length) == extent


async def _extent(node: Node, offset: int, length: int) -> tuple[int, _Extent]:
    """The first range from ``offset`` on: its length, and what it is."""
    from livedisk.emulator.block.status import Status, layer_status

    depth, image = 0, node
    while True:
        status = await layer_status(image, offset, length)
        length = status.length
        if status.flags & (Status.DATA | Status.ZERO) or image.backing is None:
            break
        depth, image = depth + 1, image.backing.node
    placed = bool(status.flags & Status.OFFSET_VALID)
    return length, _Extent(
        depth,
        present=status.allocated,
        zero=status.zero,
        data=status.data,
        compressed=bool(status.flags & Status.COMPRESSED),
        offset=status.offset if placed else None,
        filename=status.file.driver.filename if placed and status.file is not None else None,
    )


# Here, because it needs what stands above.
from livedisk.emulator.cli import (  # noqa: E402
    img_bitmap,
    img_chain,
    img_compare,
    img_convert,
    img_measure,
    img_snapshot,
)

__all__ = [
    "IMAGE",
    "OUTPUT",
    "RAW_OPTIONS",
    "SETTINGS",
    "create_qcow2",
    "create_raw",
    "creation_options",
    "creation_words",
    "img",
    "img_bitmap",
    "img_chain",
    "img_compare",
    "img_convert",
    "img_measure",
    "img_snapshot",
    "opened",
    "print_json",
    "run_to_end",
    "size_of",
    "switch_of",
]

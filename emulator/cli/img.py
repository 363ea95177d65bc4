"""``livedisk img``: make, check, repair and look at qcow2 images that nobody is using.

The words of the options, the JSON and the exit codes are qemu-img's, so that scripts may call either. What it prints for
people is close to qemu-img's, not equal.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click
import msgspec

from livedisk.emulator.errors import BlockError, LiveDiskError, ParameterError

if TYPE_CHECKING:
    from livedisk.emulator.block.node import Node
    from livedisk.emulator.drivers.qcow2.check import CheckResult
    from livedisk.emulator.drivers.qcow2.create import CreateOptions

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_OUTPUT = click.option(
    "--output", type=click.Choice(["human", "json"]), default="human", show_default=True, help="For people or programs."
)
IMAGE = click.argument("image", type=click.Path())

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


@click.group("img", context_settings=SETTINGS)
def img() -> None:
    """Make, check, repair and look at qcow2 images. Options, JSON and exit codes are qemu-img's."""


def run_to_end(work: Callable[[], Coroutine[Any, Any, int]]) -> None:
    """Run a command's work; errors go to standard error."""
    try:
        code = asyncio.run(work())
    except (LiveDiskError, OSError) as error:
        reason = str(error)
        if isinstance(error, OSError) and error.filename:
            reason = f"{error.filename}: {error.strerror}"
        click.echo(f"livedisk img: {reason}", err=True)
        hint = getattr(error, "hint", "")
        if hint:
            click.echo(hint, err=True)
        code = 1
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
    "fmt",
    type=click.Choice(["qcow2"]),
    default="qcow2",
    expose_value=False,
    help="The image's format; only qcow2 can be made.",
)
@click.option("-o", "words", metavar="NAME=VALUE,...", multiple=True, help="Creation options, as qemu-img's.")
@click.option("-b", "backing", metavar="FILE", help="The backing file.")
@click.option("-F", "backing_fmt", metavar="FORMAT", help="The backing file's format; needed with -b.")
@click.option("-q", "quiet", is_flag=True, help="Print nothing.")
@IMAGE
@click.argument("size", required=False)
def create_command(
    words: tuple[str, ...], backing: str | None, backing_fmt: str | None, quiet: bool, image: str, size: str | None
) -> None:
    """Make the qcow2 image IMAGE of SIZE bytes (suffixes k, M, G, T, P, E; may be left out with a backing file).

    \b
    Creation options (-o): backing_file, backing_fmt, cluster_size, compat (0.10 or 1.1), compression_type (zlib, zstd),
    data_file, data_file_raw, extended_l2, lazy_refcounts, nocow, preallocation (off, metadata, falloc, full),
    refcount_bits, size.
    """

    async def work() -> int:
        given = _creation_words(words)
        if size is not None and "size" in given:
            raise ParameterError("The image size must be specified only once")
        for name, value in (("backing_file", backing), ("backing_fmt", backing_fmt), ("size", size)):
            if value is not None:
                given[name] = value
        nocow = switch_of("nocow", given.pop("nocow", "off"))
        options = await _creation_options(given, image)
        await _create(image, options, nocow=nocow)
        if not quiet:
            click.echo(f"Formatting '{image}', fmt=qcow2 {_described(options)}")
        return 0

    run_to_end(work)


async def _create(name: str, options: CreateOptions, *, nocow: bool) -> None:
    """Into a file, or into what is there already where that is not one of this host's."""
    from livedisk.emulator.cli.images import is_path
    from livedisk.emulator.daemon import Daemon
    from livedisk.emulator.drivers.qcow2.create import create_file
    from livedisk.emulator.qmp.new_images import create_in_storage, host_path

    daemon = Daemon()
    path = name if is_path(name) else host_path(name)
    if path is not None:
        await create_file(path, options, nocow=nocow)
        return
    try:
        await create_in_storage(daemon.graph, name, "qcow2", options)
    finally:
        await daemon.close()


def _creation_words(words: tuple[str, ...]) -> dict[str, str]:
    from livedisk.emulator.qmp.keyval import split_fields

    found: dict[str, str] = {}
    for text in words:
        for item in split_fields(text):
            name, equals, value = item.partition("=")
            if name == "encryption" or name.startswith("encrypt."):
                raise ParameterError(f"'{name}': encryption of qcow2 images is not supported")
            if name not in _LEGACY:
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


async def _creation_options(given: dict[str, str], image: str) -> CreateOptions:
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

    async with opened(combine(image, backing), fmt) as node:
        return node.size


def _described(options: CreateOptions) -> str:
    values = msgspec.to_builtins(options)
    return " ".join(f"{name.replace('-', '_')}={_on_off(value)}" for name, value in values.items())


def _on_off(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


# -- opening -----------------------------------------------------------------------------------------------------------
@asynccontextmanager
async def opened(
    name: str, fmt: str | None, *, writable: bool = False, force_share: bool = False
) -> AsyncIterator[Node]:
    """The image open in a graph of its own; ``fmt`` "file" is the file, or the export that an NBD name means, itself;
    None: what the image is."""
    from livedisk.emulator.block.backend import BlockBackend
    from livedisk.emulator.block.permissions import Perm
    from livedisk.emulator.cli.images import image_options
    from livedisk.emulator.daemon import Daemon
    from livedisk.emulator.qmp.registry import load_plugins

    load_plugins()
    graph = (daemon := Daemon()).graph
    backend = BlockBackend(graph)
    try:
        options = await image_options(daemon, name, fmt)
        options = msgspec.structs.replace(options, read_only=not writable, force_share=force_share)
        node = await graph.open(options)
        perm = Perm.CONSISTENT_READ | (Perm.WRITE | Perm.RESIZE if writable else Perm.NONE)
        # Who looks at the bare file of a format shares it as the format would: with nobody who writes.
        bare = fmt == "file" and not force_share
        shared = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED if bare else Perm.ALL
        graph.attach_root(backend, node, perm, shared)
        yield node
    finally:
        await graph.detach_root(backend)
        await graph.close()


# -- check -------------------------------------------------------------------------------------------------------------
@img.command("check", help=CHECK_HELP, context_settings=SETTINGS)
@click.option("-f", "fmt", metavar="FORMAT", default="qcow2", help="The image's format; only qcow2 can be checked.")
@click.option("-r", "repair_what", type=click.Choice(["leaks", "all"]), help="Repair leaks, or all errors.")
@click.option("-q", "quiet", is_flag=True, help="Print nothing but errors.")
@click.option("-U", "--force-share", is_flag=True, help="Check although a writer has the image open.")
@_OUTPUT
@IMAGE
def check_command(fmt: str, repair_what: str | None, quiet: bool, force_share: bool, output: str, image: str) -> None:
    if fmt != "qcow2":
        click.echo("livedisk img: This image format does not support checks", err=True)
        sys.exit(63)
    if force_share and repair_what:
        raise click.UsageError("-U shares the image with a writer, -r writes to it: choose one")
    report = (lambda _: None) if quiet or output == "json" else click.echo
    run_to_end(
        lambda: _check(image, repair_what, report, quiet=quiet, as_json=output == "json", force_share=force_share)
    )


async def _check(
    image: str,
    repair_what: str | None,
    report: Callable[[str], Any],
    *,
    quiet: bool,
    as_json: bool,
    force_share: bool,
) -> int:
    from livedisk.emulator.drivers.qcow2.check import CheckFailed, check
    from livedisk.emulator.drivers.qcow2.repair import Fix, repair

    async with opened(image, "file", writable=repair_what is not None, force_share=force_share) as node:
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
    if as_json:
        _print_json(result.to_json(image))
    elif not quiet:
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


def _print_json(value: Any) -> None:
    from livedisk.emulator.qmp.encode import encode_pretty

    click.echo(encode_pretty(value).decode("ascii").replace("\r\n", "\n"), nl=False)


# -- info --------------------------------------------------------------------------------------------------------------
@img.command("info", context_settings=SETTINGS)
@click.option("-f", "fmt", metavar="FORMAT", help="The image's format; what its header says if not given.")
@click.option("-U", "--force-share", is_flag=True, help="Look although a writer has the image open.")
@click.option("--backing-chain", is_flag=True, help="Also all backing files, from the top down.")
@_OUTPUT
@IMAGE
def info_command(fmt: str | None, force_share: bool, backing_chain: bool, output: str, image: str) -> None:
    """Say what IMAGE is."""

    async def work() -> int:
        from livedisk.emulator.qmp.query_block import node_info

        found: list[dict[str, Any]] = []
        async with opened(image, fmt, force_share=force_share) as top:
            node: Node | None = top
            while node is not None:
                found.append(msgspec.to_builtins((await node_info(node, deep=False)).image))
                node = node.backing.node if backing_chain and node.backing is not None else None
        if output == "json":
            _print_json(found if backing_chain else found[0])
        else:
            click.echo("\n\n".join(_described_info(info) for info in found))
        return 0

    run_to_end(work)


def _described_info(info: dict[str, Any]) -> str:
    from livedisk.emulator.qmp.hmp_block import human_size

    size = info["virtual-size"]
    lines = [
        f"image: {info['filename']}",
        f"file format: {info['format']}",
        f"virtual size: {human_size(size)} ({size} bytes)",
    ]
    lines.append(f"disk size: {human_size(info['actual-size']) if 'actual-size' in info else 'unavailable'}")
    if "cluster-size" in info:
        lines.append(f"cluster_size: {info['cluster-size']}")
    if "backing-filename" in info:
        full = info.get("full-backing-filename", info["backing-filename"])
        actual = "" if full == info["backing-filename"] else f" (actual path: {full})"
        lines.append(f"backing file: {info['backing-filename']}{actual}")
    if "backing-filename-format" in info:
        lines.append(f"backing file format: {info['backing-filename-format']}")
    lines += [f"snapshot: {entry['id']} {entry['name']}" for entry in info.get("snapshots", [])]
    data = info.get("format-specific", {}).get("data", {})
    if data:
        lines.append("Format specific information:")
        lines += _members(data, "    ")
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
@click.option("-f", "fmt", metavar="FORMAT", help="The image's format; what its header says if not given.")
@click.option("-U", "--force-share", is_flag=True, help="Look although a writer has the image open.")
@_OUTPUT
@IMAGE
def map_command(fmt: str | None, force_share: bool, output: str, image: str) -> None:
    """Say where each part of IMAGE stands: in which image of the chain, and at which offset."""

    async def work() -> int:
        async with opened(image, fmt, force_share=force_share) as node:
            extents = [found async for found in _extents(node)]
        if output == "json":
            rows = [_map_entry(start, length, extent) for start, length, extent in extents]
            click.echo("[" + ",\n".join(rows) + "]")
            return 0
        click.echo(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
        for start, length, extent in extents:
            if extent.compressed:
                raise BlockError("File contains external, encrypted or compressed clusters.")
            if extent.data and not extent.zero:
                click.echo(f"{_hex(start):<16}{_hex(length):<16}{_hex(extent.offset or 0):<16}{extent.filename}")
        return 0

    run_to_end(work)


def _hex(number: int) -> str:
    """As C's %#x has it."""
    return f"{number:#x}" if number else "0"


def _map_entry(start: int, length: int, extent: _Extent) -> str:
    entry: dict[str, Any] = {"start": start, "length": length, "depth": extent.depth, "present": extent.present}
    entry |= {"zero": extent.zero, "data": extent.data, "compressed": extent.compressed}
    if extent.offset is not None:
        entry["offset"] = extent.offset
    return "{ " + json.dumps(entry)[1:-1] + "}"


async def _extents(node: Node) -> AsyncIterator[tuple[int, int, _Extent]]:
    """The whole image in ranges that are alike, as far as possible joined."""
    start, length, current = 0, 0, None
    while start + length < node.size:
        at = start + length
        step, extent = await _extent(node, at, node.size - at)
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
from livedisk.emulator.cli import img_bitmap, img_snapshot  # noqa: E402

__all__ = ["IMAGE", "SETTINGS", "img", "img_bitmap", "img_snapshot", "opened", "run_to_end", "size_of", "switch_of"]

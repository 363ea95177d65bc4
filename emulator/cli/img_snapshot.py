"""``livedisk img snapshot`` and ``livedisk img amend``: what changes inside an image that nobody uses. qemu-img's options."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from livedisk.emulator.cli.img import IMAGE, SETTINGS, img, opened, run_to_end, size_of, switch_of
from livedisk.emulator.cli.img_options import (
    CACHE,
    FORMAT,
    PROGRESS,
    QUIET,
    cache_mode,
    format_option,
    image_options,
)
from livedisk.emulator.errors import BlockError, ParameterError

if TYPE_CHECKING:
    from livedisk.emulator.block.node import Node
    from livedisk.emulator.drivers.qcow2.driver import Qcow2

PROGRAM = "livedisk img"


@img.command("snapshot", context_settings=SETTINGS)
@click.option("-l", "--list", "action", flag_value="list", help="List the snapshots.")
@click.option("-c", "--create", "create", metavar="NAME", help="Make a snapshot.")
@click.option(
    "-a", "--apply", "apply", metavar="SNAPSHOT", help="Make the image what it was; what was written since is lost."
)
@click.option("-d", "--delete", "delete", metavar="SNAPSHOT", help="Delete a snapshot.")
@FORMAT
@QUIET
@click.option("-U", "--force-share", is_flag=True, help="List although a writer has the image open.")
@image_options
@IMAGE
def snapshot_command(
    action: str | None,
    create: str | None,
    apply: str | None,
    delete: str | None,
    fmt: str | None,
    quiet: bool,
    force_share: bool,
    image: str,
) -> None:
    """Make, apply, delete or list (which is what happens without an option) the snapshots inside IMAGE.

    SNAPSHOT is a snapshot's name; -a also takes an id.
    """
    if sum(one is not None for one in (action, create, apply, delete)) > 1:
        click.echo(f"{PROGRAM}: Cannot mix '-l', '-a', '-c', '-d'", err=True)
        sys.exit(1)

    async def work() -> int:
        changes = create is not None or apply is not None or delete is not None
        async with opened(image, fmt, writable=changes, force_share=force_share and not changes) as node:
            if create is not None:
                await _create(node, create)
            elif apply is not None:
                await _apply(node, apply)
            elif delete is not None:
                await _delete(node, delete)
            elif not quiet:
                _list(node)
        return 0

    run_to_end(work)


def _list(node: Node) -> None:
    from livedisk.emulator.qmp.hmp_block import snapshot_table

    found = [dict(one) for one in node.driver.snapshots()]
    if found:
        click.echo("Snapshot list:")
        click.echo("\n".join(snapshot_table(found)))


async def _create(node: Node, name: str) -> None:
    from livedisk.emulator.block.driver import Moment

    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    try:
        await node.driver.snapshot_create(name, Moment(seconds, nanoseconds // 1000 * 1000))
    except OSError as error:
        raise BlockError(f"Could not create snapshot '{name}': {error.strerror}") from error


async def _apply(node: Node, name: str) -> None:
    from livedisk.emulator.block.internal_snapshots import find

    found = find(node, name, None) or find(node, None, name)
    try:
        if found is None:
            raise BlockError("Failed to load snapshot: No such file or directory")
        await node.driver.snapshot_apply(found["id"])
    except (OSError, BlockError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BlockError(f"Could not apply snapshot '{name}': {reason}") from error


async def _delete(node: Node, name: str) -> None:
    from livedisk.emulator.block.internal_snapshots import find

    found = find(node, None, name)
    if found is None:
        raise BlockError(f"Could not delete snapshot '{name}': snapshot not found")
    await node.driver.snapshot_delete(found["id"])


# -- amend -------------------------------------------------------------------------------------------------------------
_FIXED = ("cluster_size", "preallocation", "compression_type", "extended_l2", "encryption", "encrypt.format")
_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


@img.command("amend", context_settings=SETTINGS)
@click.option(
    "-o",
    "--options",
    "words",
    metavar="NAME=VALUE,...",
    multiple=True,
    help="What is to be, as qemu-img's; help lists what there is.",
)
@format_option("-f", "--format", "fmt", help="The image's format; only qcow2 can be amended.")
@CACHE
@PROGRESS
@QUIET
@image_options
@IMAGE
def amend_command(
    words: tuple[str, ...], fmt: str | None, cache: str | None, progress: bool, quiet: bool, image: str
) -> None:
    """Change properties of the qcow2 image IMAGE.

    \b
    compat (0.10 or 1.1), data_file_raw=off, lazy_refcounts, refcount_bits, size.
    """
    if not words:
        click.echo(f"{PROGRAM}: Must specify options (-o)", err=True)
        sys.exit(1)
    if fmt not in (None, "qcow2"):
        click.echo(f"{PROGRAM}: Format driver '{fmt}' does not support option amendment", err=True)
        sys.exit(1)

    async def work() -> int:
        from livedisk.emulator.cli.img_help import amend_help, asks_for_help
        from livedisk.emulator.cli.img_open import Progress

        if asks_for_help(words):
            click.echo(amend_help("qcow2"))
            return 0
        mode = cache_mode(cache)
        wanted = _amendments(words)
        shown = Progress(progress and not quiet)
        async with opened(image, fmt, writable=True, cache=mode) as node:
            if node.driver.name != "qcow2":
                raise BlockError(f"Format driver '{node.driver.name}' does not support option amendment")
            await _check(node, wanted)
            driver: Any = node.driver
            await _before_width(driver, wanted)
        if "refcount_bits" in wanted:
            from livedisk.emulator.drivers.qcow2.repair import change_refcount_width

            async with opened(image, "file", writable=True, cache=mode) as file:
                await change_refcount_width(file, wanted["refcount_bits"])
        async with opened(image, fmt, writable=True, cache=mode) as node:
            driver = node.driver
            await _after_width(node, driver, wanted)
        shown.end()
        return 0

    run_to_end(work)


def _amendments(words: tuple[str, ...]) -> dict[str, Any]:
    from livedisk.emulator.qmp.keyval import split_fields

    found: dict[str, Any] = {}
    for item in (item for text in words for item in split_fields(text)):
        name, equals, value = item.partition("=")
        value = value if equals else "on"
        if name in ("backing_file", "backing_fmt"):
            raise BlockError("Cannot amend the backing file", hint="You can use 'qemu-img rebase' instead.")
        if name in _FIXED:
            raise ParameterError(f"Invalid parameter '{name}'", hint="This option is only supported for image creation")
        if name in ("lazy_refcounts", "data_file_raw"):
            found[name] = switch_of(name, value)
        elif name == "size":
            found[name] = size_of("image size", value)
        elif name == "refcount_bits":
            found[name] = size_of(name, value)
        elif name == "compat":
            if value not in _VERSIONS:
                raise ParameterError(f"Unknown compatibility level {value}")
            found[name] = _VERSIONS[value]
        elif name == "data_file":
            raise BlockError("data-file can only be set for images that use an external data file")
        else:
            raise ParameterError(f"Invalid parameter '{name}'")
    return found


async def _check(node: Node, wanted: dict[str, Any]) -> None:
    """Refuse, before anything is changed, what cannot be. Raises BlockError in QEMU's words."""
    from livedisk.emulator.drivers.qcow2.amend import check_downgrade

    driver: Any = node.driver
    header = driver.image.header
    version = wanted.get("compat", header.version)
    bits = wanted.get("refcount_bits")
    if wanted.get("data_file_raw") and not header.data_file_raw:
        raise BlockError("data-file-raw cannot be set on existing images")
    if bits is not None:
        if not 1 <= bits <= 64 or bits & (bits - 1):
            raise BlockError("Refcount width must be a power of two and may not exceed 64 bits")
        if version < 3 and bits != 16:
            raise BlockError(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)"
            )
    if wanted.get("lazy_refcounts") and version < 3:
        raise BlockError(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
        )
    if version < header.version and bits is None:
        await check_downgrade(driver.image)


async def _before_width(driver: Qcow2, wanted: dict[str, Any]) -> None:
    from livedisk.emulator.drivers.qcow2 import amend

    header = driver.image.header
    if wanted.get("compat", 0) > header.version:
        await amend.upgrade(driver)
    if wanted.get("data_file_raw") is False and header.data_file_raw:
        await amend.stop_raw_data_file(driver)


async def _after_width(node: Node, driver: Qcow2, wanted: dict[str, Any]) -> None:
    from livedisk.emulator.drivers.qcow2 import amend

    if "lazy_refcounts" in wanted and driver.image.header.version >= 3:
        await amend.set_lazy_refcounts(driver, on=wanted["lazy_refcounts"])
    if "size" in wanted:
        await node.truncate(wanted["size"])
    if wanted.get("compat", 3) < driver.image.header.version:
        await amend.downgrade(driver)

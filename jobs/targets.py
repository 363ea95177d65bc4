"""The target images of drive-mirror and drive-backup: made and opened by the command itself. Source: QEMU ``blockdev.c``
(qmp_drive_mirror, drive_backup_action), ``block.c`` (bdrv_img_create)."""

from __future__ import annotations

import enum
import os

from livedisk.emulator.block.descriptors import open_file
from livedisk.emulator.block.driver import DRIVERS
from livedisk.emulator.block.gate import claimed_format, image_options, protocol_options
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.imagelock import give_up
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.options import CacheOptions
from livedisk.emulator.errors import BlockError
from livedisk.emulator.qmp.announce import announce
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.filenames import filename
from livedisk.emulator.qmp.new_images import create_in_storage, host_path
from livedisk.emulator.qmp.qapi import UnsetType


class NewImageMode(enum.StrEnum):
    """Where a target's image comes from (QEMU's NewImageMode)."""

    EXISTING = "existing"
    ABSOLUTE_PATHS = "absolute-paths"


async def create_target(graph: Graph, name: str, fmt: str, size: int, backing: Node | None) -> None:
    """Make an image of ``size`` bytes, over ``backing`` if given. Raises BlockError in QEMU's words, or OSError."""
    driver = DRIVERS.get(fmt)
    if driver is None or driver.internal:
        raise BlockError(f"Unknown file format '{fmt}'")
    path = host_path(name)
    plain = fmt == "raw" or (fmt == "file" if path is not None else fmt != "qcow2" and bool(driver.protocols))
    if plain and backing is not None:
        raise BlockError(f"Backing file not supported for file format '{fmt}'")
    if not plain and fmt != "qcow2":
        raise BlockError(f"Format driver '{fmt}' does not support image creation")
    # Imported here: creation is not needed to start up.
    from livedisk.emulator.drivers.qcow2.create import CreateOptions, create_file

    options, shown = CreateOptions(size=size), name if path is None else path
    if backing is None:
        announce(shown, fmt, size)
    else:
        below = filename(backing)
        if below == path:
            raise BlockError("Error: Trying to create an image with the same filename as the backing file")
        options = CreateOptions(size=size, backing_file=below, backing_fmt=backing.options.driver)
        announce(shown, fmt, size, below, backing.options.driver)
    if path is None:
        await create_in_storage(graph, name, fmt, options)
    elif plain:
        fd, lease = open_file(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            os.ftruncate(fd, size)
        finally:
            give_up(fd, lease)
    else:
        await create_file(path, options)


async def existing_format(source: Node, path: str) -> str:
    """The format of an existing target for which none was given: raw, if it looks like no other. QEMU believes what the content
    claims, which a guest may have written. Raises BlockError or OSError."""
    found = await claimed_format(source, protocol_options(source, path))
    if found is not None:
        raise BlockError(f"Parameter 'format' is missing: '{path}' looks like {found}, which is not believed")
    return "raw"


async def open_target(ctx: Context, path: str, fmt: str, name: str | UnsetType, source: Node) -> Node:
    """Open an image for writing, without its backing file, with the settings of ``source``. Raises BlockError or OSError."""
    options = image_options(
        source,
        path,
        fmt,
        discard=source.discard_mode,
        cache=CacheOptions(direct=source.cache_direct, no_flush=source.cache_no_flush),
        node_name=name,
    )
    return await ctx.daemon.graph.open(options)

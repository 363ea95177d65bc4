"""The target images of drive-mirror and drive-backup: made and opened by the command itself. Source: QEMU ``blockdev.c``
(qmp_drive_mirror, drive_backup_action), ``block.c`` (bdrv_img_create)."""

from __future__ import annotations

import enum
import os
import re
from typing import Final

from livedisk.emulator.block.descriptors import open_file
from livedisk.emulator.block.driver import DRIVERS
from livedisk.emulator.block.gate import claimed_format, image_options, protocol_options
from livedisk.emulator.block.imagelock import give_up
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.options import CacheOptions
from livedisk.emulator.errors import BlockError
from livedisk.emulator.qmp.announce import announce
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.filenames import filename
from livedisk.emulator.qmp.qapi import UnsetType

_PROTOCOL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


class NewImageMode(enum.StrEnum):
    """Where a target's image comes from (QEMU's NewImageMode)."""

    EXISTING = "existing"
    ABSOLUTE_PATHS = "absolute-paths"


async def create_target(path: str, fmt: str, size: int, backing: Node | None) -> None:
    """Make an image of ``size`` bytes, over ``backing`` if given. Raises BlockError in QEMU's words, or OSError."""
    driver = DRIVERS.get(fmt)
    if driver is None or driver.internal:
        raise BlockError(f"Unknown file format '{fmt}'")
    path = host_path(path)
    if fmt in ("raw", "file"):
        if backing is not None:
            raise BlockError(f"Backing file not supported for file format '{fmt}'")
        announce(path, fmt, size)
        fd, lease = open_file(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            os.ftruncate(fd, size)
        finally:
            give_up(fd, lease)
        return
    if fmt != "qcow2":
        raise BlockError(f"Format driver '{fmt}' does not support image creation")
    # Imported here: creation is not needed to start up.
    from livedisk.emulator.drivers.qcow2.create import CreateOptions, create_file

    options = CreateOptions(size=size)
    if backing is not None:
        name = filename(backing)
        if name == path:
            raise BlockError("Error: Trying to create an image with the same filename as the backing file")
        options = CreateOptions(size=size, backing_file=name, backing_fmt=backing.options.driver)
    announce(path, fmt, size, *((name, backing.options.driver) if backing is not None else ()))
    await create_file(path, options)


async def existing_format(source: Node, path: str) -> str:
    """The format of an existing target for which none was given: raw, if it looks like no other. QEMU believes what the content
    claims, which a guest may have written. Raises BlockError or OSError."""
    found = await claimed_format(source, protocol_options(source, path))
    if found is not None:
        raise BlockError(f"Parameter 'format' is missing: '{path}' looks like {found}, which is not believed")
    return "raw"


def host_path(name: str) -> str:
    """The path of a file to be made. Raises BlockError if ``name`` is not that of a file on this host."""
    protocol = _PROTOCOL.match(name)
    if protocol is None:
        return name
    if protocol.group(1) != "file":
        known = DRIVERS.get(protocol.group(1))
        if known is None:
            raise BlockError(f"Unknown protocol '{protocol.group(1)}'")
        raise BlockError(f"Protocol driver '{known.name}' does not support image creation")
    return name[len("file:") :]


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

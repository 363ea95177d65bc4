"""The target images of drive-mirror and drive-backup: made and opened by the command itself. Source: QEMU ``blockdev.c``
(qmp_drive_mirror, drive_backup_action), ``block.c`` (bdrv_img_create)."""

from __future__ import annotations

import enum
import os
from typing import Any

from livedisk.emulator.block.driver import DRIVERS
from livedisk.emulator.block.node import Node
from livedisk.emulator.errors import BlockError
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.filenames import filename
from livedisk.emulator.qmp.qapi import UnsetType


class NewImageMode(enum.StrEnum):
    """Where a target's image comes from (QEMU's NewImageMode)."""

    EXISTING = "existing"
    ABSOLUTE_PATHS = "absolute-paths"


async def create_target(path: str, fmt: str, size: int, backing: Node | None) -> None:
    """Make an image of ``size`` bytes, over ``backing`` if given. Raises BlockError in QEMU's words, or OSError."""
    driver = DRIVERS.get(fmt)
    if driver is None or driver.internal:
        raise BlockError(f"Unknown file format '{fmt}'")
    if fmt == "raw":
        if backing is not None:
            raise BlockError("Backing file not supported for file format 'raw'")
        with open(path, "wb") as file:
            os.truncate(file.fileno(), size)
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
    await create_file(path, options)


async def open_target(ctx: Context, path: str, fmt: str, name: str | UnsetType, source: Node) -> Node:
    """Open an image for writing, without its backing file, with the settings of ``source``. Raises BlockError or OSError."""
    options: dict[str, Any] = {
        "driver": fmt,
        "file": {"driver": "file", "filename": path},
        "discard": str(source.discard_mode),
        "cache": {"direct": source.cache_direct, "no-flush": source.cache_no_flush},
    }
    if isinstance(name, str):
        options["node-name"] = name
    driver = DRIVERS.get(fmt)
    if driver is not None and driver.supports_backing:
        options["backing"] = None
    return await ctx.daemon.graph.open(ctx.daemon.parse_options(options))

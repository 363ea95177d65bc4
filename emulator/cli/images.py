"""What an image is called on a command line, and what node that means: for ``img`` and ``serve``.

A name is a path; or ``file:PATH``; a URI of an export (``nbd://...``); ``json:{...}``, the options of a node; or what names a
filter and what it stands on (``blkdebug:RULES:IMAGE``, ``blkverify:RAW:IMAGE``). A path that only looks like one of these is
written ``./json:...``.

The format of an image that nobody named is what its header says; but a header that leads to other files is only believed in a
file that is named like an image (a guest may have written it into a raw disk).
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from livedisk.emulator.errors import BlockError, LiveDiskError

if TYPE_CHECKING:
    from livedisk.emulator.block.graph import Graph
    from livedisk.emulator.block.options import BlockdevOptions
    from livedisk.emulator.daemon import Daemon

log = logging.getLogger(__name__)
_LOOKED_AT = 2 << 20
"""Bytes at the start of an image that its format is told by."""


class ImageOptions(str):
    """No name, but the options of an image's node, ``key=value,...`` or JSON: what ``--image-opts`` makes of an IMAGE."""

    __slots__ = ()


def is_path(name: str) -> bool:
    """Whether a name is that of a file of this host, without anything before it."""
    from livedisk.emulator.block.driver import DRIVERS, Driver

    if isinstance(name, ImageOptions):
        return False

    def names(driver: type[Driver]) -> bool:
        reads_names = driver.parse_filename.__func__ is not Driver.parse_filename.__func__  # type: ignore[attr-defined]
        return protocol in driver.protocols or (driver.name == protocol and reads_names)

    protocol, colon, _ = name.partition(":")
    if not colon or os.path.exists(name):
        return True
    return not (protocol in ("file", "json") or any(map(names, DRIVERS.values())))


async def image_options(daemon: Daemon, name: str, fmt: str | None) -> BlockdevOptions:
    """Options of the image that ``name`` means, of format ``fmt``; None: of the one it is of; "file": of what it is stored in.

    Raises LiveDiskError or OSError.
    """
    from livedisk.emulator.block.driver import DRIVERS, driver_class

    try:
        storage = await _described(daemon, name) if isinstance(name, ImageOptions) else _named(daemon, name)
    except LiveDiskError as error:
        raise BlockError(f"Could not open '{name}': {error}", hint=error.hint) from error
    if DRIVERS[storage.driver].is_format:  # json:{...} says all of the image
        below = getattr(storage, "file", None)
        if fmt == "file" and isinstance(below, msgspec.Struct):
            return below  # type: ignore[return-value]
        if fmt not in (None, storage.driver):
            raise BlockError(f"'{name}' is of format '{storage.driver}', not '{fmt}'")
        return storage
    if fmt is None and (isinstance(name, ImageOptions) or name.startswith("json:")):
        return storage  # who says so much says what he wants: nothing is guessed, as with QEMU
    if fmt is None:
        fmt = choose_format(name) if is_path(name) else await _look(daemon.graph, storage, name)
    if fmt in ("file", storage.driver):
        return storage
    make: Callable[..., BlockdevOptions] = driver_class(fmt).Options
    return make(driver=fmt, file=storage)


def _named(daemon: Daemon, name: str) -> BlockdevOptions:
    from livedisk.emulator.block.gate import nested, protocol_options, with_storage

    if name.startswith("json:"):
        # Not by the gate's reader: its answer for a driver that is not there is that of options, not of a file name.
        try:
            given = json.loads(name[5:])
        except ValueError as error:
            raise BlockError(f"Could not parse the JSON options: {error}") from None
        if not isinstance(given, dict):
            raise BlockError("Invalid JSON object given")
        return daemon.parse_options(with_storage(nested(given)))
    if not is_path(name):
        return protocol_options(daemon.graph, name)
    device = os.path.exists(name) and stat.S_ISBLK(os.stat(name).st_mode)
    return daemon.parse_options({"driver": "host_device" if device else "file", "filename": name})


async def _described(daemon: Daemon, text: ImageOptions) -> BlockdevOptions:
    """What ``--image-opts`` gave. As for qemu-img, a ``file`` without a driver is a file of the host, and an image without one
    is of the format that its ``file`` looks like. Raises LiveDiskError, OSError."""
    from livedisk.emulator.block.options import BlockdevOptions
    from livedisk.emulator.device.drive_options import typed
    from livedisk.emulator.qmp.keyval import HelpRequested, parse_text
    from livedisk.emulator.qmp.visit import KEYVAL, visit

    try:
        values, syntax = parse_text(text)
    except HelpRequested:
        raise BlockError("the options are those of -blockdev") from None
    below = values.get("file")
    if isinstance(below, dict):
        values["file"] = below = {"driver": "file"} | below
        if "driver" not in values:
            storage = visit(BlockdevOptions, below, syntax)
            values["driver"] = await _look(daemon.graph, storage, getattr(storage, "filename", text))
    return typed(values) if syntax is KEYVAL else visit(BlockdevOptions, values, syntax)


async def _look(graph: Graph, storage: BlockdevOptions, name: str) -> str:
    node = await graph.open(msgspec.structs.replace(storage, read_only=True))
    try:
        start = bytearray(min(_LOOKED_AT, node.size))
        await node.read(0, memoryview(start))
    finally:
        await graph.release(node)
    return judge(bytes(start), name)


def choose_format(path: str) -> str:
    """The format of the image in a file that nobody named. Raises LiveDiskError, OSError."""
    with open(path, "rb") as file:
        return judge(file.read(_LOOKED_AT), path)


def judge(start: bytes, name: str) -> str:
    """The format of an image that starts so. Raises LiveDiskError."""
    from livedisk.emulator.drivers.qcow2.header import Purpose, parse_header, probe

    if not probe(start):
        if name.endswith((".qcow2", ".qcow")) and is_path(name):
            raise LiveDiskError(f"{name} is named like a qcow2 image but is none; say -f raw to serve its bytes")
        log.warning("no format given (-f); taking %s as raw", name)
        return "raw"
    header = parse_header(start, Purpose.READ)
    if (header.backing_file or header.has_data_file) and not name.endswith((".qcow2", ".qcow")):
        raise LiveDiskError(
            f"{name} starts with a qcow2 header that names another file "
            f"({header.backing_file or header.data_file}). A guest could have written it into a raw disk: "
            "say -f qcow2 if you trust it, else -f raw"
        )
    log.info("no format given (-f); the header says qcow2")
    return "qcow2"

"""What is handed over: devices, exports, dirty bitmaps; told by the source, made by the destination, undone if it fails."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final

import msgspec
from bitarray import bitarray

from livedisk.emulator.block.activity import activate, inactivate
from livedisk.emulator.block.bitmaps import MIN_GRANULARITY, DirtyBitmap
from livedisk.emulator.block.node import Node
from livedisk.emulator.device.virtio_blk import VirtioBlk
from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.exports.device_export import DeviceExport
from livedisk.emulator.exports.node_export import NodeExport
from livedisk.emulator.exports.options import NbdExportOptions, RemoveMode
from livedisk.emulator.qmp.context import Daemon
from livedisk.emulator.qmp.visit import JSON
from livedisk.jobs.migration.wire import (
    Bitmap,
    BitmapBits,
    DeviceState,
    Disk,
    Hello,
    Message,
    MigrationError,
    Served,
)

log = logging.getLogger(__name__)

_PIECE: Final = 1 << 20
"""Bytes of packed bits in one message."""
_LONGEST: Final = 256 << 20
"""Bytes of bits that a bitmap may have: a disk of 128 TiB at 64 KiB."""

Export = DeviceExport | NodeExport


# -- the source --------------------------------------------------------------------------------------------------------


def disks(daemon: Daemon) -> list[Disk]:
    """Every device."""
    return [
        Disk(
            path=device.path,
            node=_node_name(device.backend.node),
            size=device.size,
            read_only=device.read_only,
            options={**msgspec.to_builtins(device.options), "drive": _node_name(device.backend.node)},
        )
        for device in daemon.devices
    ]


def _node_name(node: Node) -> str:
    """The node that the user knows: below filters that a job put there."""
    while node.implicit and node.filtered is not None:
        node = node.filtered.node
    return node.name


def exports(daemon: Daemon, ids: Sequence[str]) -> list[Served]:
    """The exports of these ids. Raises MigrationError for one that is not there."""
    found = []
    for ident in ids:
        export = daemon.exports.find(ident)
        if not isinstance(export, DeviceExport | NodeExport):
            raise MigrationError(f"Export '{ident}' is not found")
        found.append(
            Served(
                id=ident,
                name=export.name,
                description=export.description,
                writable=not export.read_only,
                device=export.device.path if isinstance(export, DeviceExport) else "",
                node=_node_name(export.node),
            )
        )
    return found


def device_states(daemon: Daemon) -> Iterator[DeviceState]:
    """What drivers changed."""
    for device in daemon.devices:
        yield DeviceState(path=device.path, write_cache=device.write_cache)


def bitmaps(daemon: Daemon, nodes: Sequence[str]) -> Iterator[Bitmap | BitmapBits]:
    """Every user's bitmap of the nodes. Raises MigrationError for one that is busy or inconsistent."""
    for name in nodes:
        for bitmap in daemon.graph.find(name).bitmaps:
            if bitmap.name is not None:
                yield from _packed(name, bitmap)


def _packed(node: str, bitmap: DirtyBitmap) -> Iterator[Bitmap | BitmapBits]:
    assert bitmap.name is not None
    if bitmap.busy or bitmap.inconsistent:
        state = "in use by another operation" if bitmap.busy else "inconsistent"
        raise MigrationError(f"Bitmap '{bitmap.name}' of node '{node}' is {state} and cannot be migrated")
    data = bitmap.bits.tobytes()
    packed = zlib.compress(data, 1)
    yield Bitmap(
        node=node,
        name=bitmap.name,
        granularity=bitmap.granularity,
        size=bitmap.size,
        length=len(packed),
        persistent=bitmap.persistent,
        recording=not bitmap.disabled,
    )
    for start in range(0, len(packed), _PIECE):
        yield BitmapBits(packed[start : start + _PIECE])


# -- the destination ---------------------------------------------------------------------------------------------------


def check(daemon: Daemon, hello: Hello) -> None:
    """Whether all of it can be taken. Raises MigrationError with everything that is wrong."""
    wrong = [reason for disk in hello.disks if (reason := _unfit(daemon, disk))]
    for served in hello.exports:
        if daemon.exports.server is None:
            wrong.append("no NBD server runs for the exports: nbd-server-start makes one")
            break
        if daemon.exports.find(served.id) is not None or daemon.exports.server.find(served.name) is not None:
            wrong.append(f"there is an export '{served.id}' or one named '{served.name}' already")
        elif not served.device and served.node not in daemon.graph.nodes:
            wrong.append(f"export '{served.id}' needs a node '{served.node}', which is not here")
    if wrong:
        raise MigrationError("; ".join(wrong))


def _unfit(daemon: Daemon, disk: Disk) -> str:
    """Why this disk cannot be taken; "" where it can."""
    device = daemon.devices.find(disk.path)
    if device is None:
        node = daemon.graph.nodes.get(disk.node)
        if node is None:
            return f"{disk.path} needs a node '{disk.node}', which is not here"
        size, read_only = node.size, node.read_only
    else:
        size, read_only = device.size, device.read_only
        given = msgspec.to_builtins(device.options)
        for name in ("logical_block_size", "serial"):
            if (mine := given.get(name)) != disk.options.get(name):
                return f"{disk.path} has {name} {mine!r} here, {disk.options.get(name)!r} on the source"
    if size // 512 * 512 != disk.size:
        return f"{disk.path} has {size} bytes here, {disk.size} on the source"
    if read_only and not disk.read_only:
        return f"{disk.path} is read-only here"
    return ""


class Arrival:
    """What has arrived, and what was made of it; `undo` takes it back, newest first."""

    def __init__(self, daemon: Daemon, hello: Hello) -> None:
        self._daemon = daemon
        self._hello = hello
        self._devices: list[DeviceState] = []
        self._bitmaps: list[tuple[Bitmap, bytearray]] = []
        self._undo: list[Callable[[], Awaitable[None]]] = []
        self._paused: list[Export] = []

    def take(self, message: Message) -> None:
        """Keep a message until the switch. Raises MigrationError for one that has no place here."""
        if isinstance(message, DeviceState):
            self._devices.append(message)
        elif isinstance(message, Bitmap):
            grain = message.granularity
            if grain < MIN_GRANULARITY or grain & (grain - 1) or message.size < 0:
                raise MigrationError(f"bitmap '{message.name}' has {grain} bytes a bit and {message.size} bytes")
            if message.size // grain > 8 * _LONGEST or message.length > _LONGEST:
                raise MigrationError(f"bitmap '{message.name}' is too large")
            self._bitmaps.append((message, bytearray()))
        elif isinstance(message, BitmapBits) and self._bitmaps:
            bitmap, data = self._bitmaps[-1]
            data += message.data
            if len(data) > bitmap.length:
                raise MigrationError(f"bitmap '{bitmap.name}' is longer than it said")
        else:
            raise MigrationError(f"{type(message).__name__} came where it has no place")

    async def activate(self, ends: Sequence[str]) -> None:
        """Take everything over, ready to run. Raises LiveDiskError or OSError; then `undo` is due."""
        for ident in ends:
            await self._daemon.exports.delete(ident, RemoveMode.HARD)
        await self._take_images()
        for disk in self._hello.disks:
            await self._take_device(disk)
        told = {disk.path for disk in self._hello.disks}
        for device in self._daemon.devices:
            if device.path not in told:
                self._undo.append(_withdrawal(device))
                device.claim()
        for state in self._devices:
            self._daemon.devices.get(state.path).set_write_cache(state.write_cache)
        for bitmap, data in self._bitmaps:
            await self._make_bitmap(bitmap, bytes(data))
        for served in self._hello.exports:
            await self._make_export(served)

    async def _take_images(self) -> None:
        """Nodes were opened inactive while the guest was awaited."""
        graph = self._daemon.graph
        for node in list(graph.nodes.values()):
            if not node.active:
                self._undo.append(_inactivation(node))
                await activate(graph, node)

    async def _take_device(self, disk: Disk) -> None:
        devices = self._daemon.devices
        device = devices.find(disk.path)
        if device is None:
            device = await devices.add(disk.options, JSON)
            self._undo.append(_deletion(self._daemon, device))
        else:
            self._undo.append(_withdrawal(device))
        device.claim()

    async def _make_bitmap(self, told: Bitmap, packed: bytes) -> None:
        node = self._daemon.graph.find(told.node)
        if node.size != told.size:
            raise MigrationError(f"bitmap '{told.name}' is of {told.size} bytes, node '{told.node}' has {node.size}")
        length = -(-told.size // told.granularity)
        unpacker = zlib.decompressobj()
        try:
            data = unpacker.decompress(packed, length // 8 + 1)
        except zlib.error as error:
            raise MigrationError(f"bitmap '{told.name}' cannot be unpacked: {error}") from None
        if len(data) != -(-length // 8):
            raise MigrationError(f"bitmap '{told.name}' has {len(data)} bytes of bits, not {-(-length // 8)}")
        if told.persistent:
            node.driver.check_bitmap_storable(told.name, told.granularity)
        bitmap = node.bitmaps.create(told.granularity, told.name, disabled=not told.recording)
        self._undo.append(_removal(node, bitmap))
        bits = bitarray(endian="little")
        bits.frombytes(data)
        bitmap.adopt(bits[:length])
        bitmap.persistent = told.persistent
        if told.persistent:
            await node.driver.sync_bitmaps()

    async def _make_export(self, served: Served) -> None:
        exports = self._daemon.exports
        target = self._daemon.devices.get(served.device).path if served.device else served.node
        options = NbdExportOptions(
            id=served.id,
            node_name=target,
            name=served.name,
            description=served.description,
            writable=served.writable,
        )
        await exports.add(options)
        self._undo.append(_withdrawn(self._daemon, served.id))
        export = exports.find(served.id)
        assert isinstance(export, DeviceExport | NodeExport)
        assert exports.server is not None
        # A node's clients are not held by the run state; nobody may write before the source has given up.
        exports.server.pause(export)
        self._paused.append(export)

    def start(self) -> None:
        """The source has given up: let clients in."""
        self._undo.clear()
        server = self._daemon.exports.server
        for export in self._paused:
            if server is not None and server.find(export.name) is export:
                server.resume(export)
        self._paused.clear()

    async def undo(self) -> None:
        """Take back what `activate` made."""
        while self._undo:
            step = self._undo.pop()
            try:
                await asyncio.shield(step())
            except (LiveDiskError, OSError) as error:
                log.warning("undoing a migration: %s", error)


def _deletion(daemon: Daemon, device: VirtioBlk) -> Callable[[], Awaitable[None]]:
    return lambda: daemon.devices.delete(device.path)


def _inactivation(node: Node) -> Callable[[], Awaitable[None]]:
    return lambda: inactivate(node.graph, node)


def _withdrawal(device: VirtioBlk) -> Callable[[], Awaitable[None]]:
    async def withdraw() -> None:
        device.withdraw()

    return withdraw


def _removal(node: Node, bitmap: DirtyBitmap) -> Callable[[], Awaitable[None]]:
    async def remove() -> None:
        node.bitmaps.remove(bitmap)
        if bitmap.persistent:
            await node.driver.sync_bitmaps()

    return remove


def _withdrawn(daemon: Daemon, ident: str) -> Callable[[], Awaitable[None]]:
    return lambda: daemon.exports.delete(ident, RemoveMode.HARD)

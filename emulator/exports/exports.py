"""All exports by id, and the NBD server that they are served by.

One server at a time, as with QEMU: nbd-server-start makes it, nbd-server-stop ends it and every export. An export is
made while it runs, on a node (`NodeExport`) or on a device (`DeviceExport`: its guest door), and ends by
block-export-del, by nbd-server-stop, or with its device. BLOCK_EXPORT_DELETED says that it is gone: nothing of it is
under way any more and the node is free.

Source: QEMU ``blockdev-nbd.c``, ``block/export/export.c``, ``nbd/server.c`` (nbd_export_create); every message was
asked from QEMU 10.0.2.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from livedisk.emulator.block.activity import activate
from livedisk.emulator.block.bitmaps import DirtyBitmap
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Node
from livedisk.emulator.device.tree import DeviceTree
from livedisk.emulator.device.virtio_blk import VirtioBlk
from livedisk.emulator.errors import BlockError, LiveDiskError, NodeNotFound
from livedisk.emulator.exports.device_export import DeviceExport
from livedisk.emulator.exports.listen import listen
from livedisk.emulator.exports.node_export import NodeExport
from livedisk.emulator.exports.options import (
    BlockExportInfo,
    BlockExportType,
    DirtyBitmapRef,
    NbdExportOptions,
    NbdServerAdd,
    NbdServerOptions,
    NbdServerStart,
    RemoveMode,
)
from livedisk.emulator.qmp.events import event
from livedisk.emulator.qmp.object_commands import Objects
from livedisk.emulator.qmp.qapi import QapiStruct
from livedisk.nbd.export import Export

if TYPE_CHECKING:
    from livedisk.nbd.server import NbdServer
    from livedisk.nbd.tls import ServerTls

log = logging.getLogger(__name__)

_IDENTIFIER: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")
_LONGEST: Final = 4096
"""NBD_MAX_STRING_SIZE, bytes."""
_SOON: Final = 1.0
"""Seconds that a deletion is waited for before the command returns without it; the event follows in any case."""


class ExportError(LiveDiskError):
    """An export, or the NBD server, was refused."""


@event("BLOCK_EXPORT_DELETED")
class BlockExportDeleted(QapiStruct):
    """The export is gone and its id may be used again."""

    id: str


class _Record:
    """One export as clients of QMP know it. ``bitmaps``: those it shows, which are busy as long as it is there. ``removal``: the
    task that ends it, once it was deleted."""

    def __init__(self, ident: str, served: NodeExport | DeviceExport, bitmaps: list[DirtyBitmap]) -> None:
        self.id = ident
        self.served = served
        self.bitmaps = bitmaps
        self.removal: asyncio.Task[None] | None = None


class BlockExports:
    """Every export of one daemon.

    ``emit``: sends an event. ``known_iothread``: whether an iothread object of that name exists. ``objects``: where TLS
    credentials are found.
    """

    def __init__(
        self,
        graph: Graph,
        devices: DeviceTree,
        emit: Callable[[msgspec.Struct], None],
        known_iothread: Callable[[str], bool],
        objects: Objects,
    ) -> None:
        self._objects = objects
        self._graph = graph
        self._devices = devices
        self._emit = emit
        self._known_iothread = known_iothread
        self._records: dict[str, _Record] = {}
        self._max_connections = 0
        self.server: NbdServer | None = None
        """The NBD server while it runs."""
        devices.before_delete.append(self._device_goes)

    # -- the server --------------------------------------------------------------------------------------------------
    async def start_server(self, options: NbdServerOptions | NbdServerStart) -> NbdServer:
        """Listen. Raises `ExportError` or `ListenError` in QEMU's words."""
        if self.server is not None:
            raise ExportError("NBD server already running")
        tls = self._tls(options)
        # Imported here: many daemons are started to be controlled long before they serve, and start-up counts.
        from livedisk.nbd.server import NbdServer

        server = NbdServer(
            max_connections=options.max_connections, handshake_seconds=options.handshake_max_seconds, tls=tls
        )
        address = options.addr if isinstance(options, NbdServerOptions) else options.addr.data
        try:
            await listen(server, address)
        except LiveDiskError:
            await server.close(0)
            raise
        self.server = server
        self._max_connections = options.max_connections
        return server

    def _tls(self, options: NbdServerOptions | NbdServerStart) -> ServerTls | None:
        authz = options.tls_authz if isinstance(options.tls_authz, str) else None
        if not isinstance(options.tls_creds, str):
            if authz is not None:
                # QEMU takes this and checks nobody; a rule that is not applied is worse than none.
                raise ExportError("Parameter 'tls-authz' needs 'tls-creds'")
            return None
        # Imported here: few servers have TLS, and start-up counts.
        from livedisk.emulator.tls.credentials import server_tls

        return server_tls(self._objects, options.tls_creds, authz)

    async def stop_server(self) -> None:
        """nbd-server-stop: disconnect everybody and end every export. Raises `ExportError` if there is no server."""
        if self.server is None:
            raise ExportError("NBD server not running")
        await self.close()

    async def close(self) -> None:
        """As `stop_server`, where it is not known whether one runs."""
        server, self.server = self.server, None
        if server is None:
            return
        for record in self._records.values():
            record.served.close_door()
        await server.close()
        for record in reversed(list(self._records.values())):
            if record.removal is not None:
                await record.removal
            else:
                await self._end(record)

    # -- making ------------------------------------------------------------------------------------------------------
    async def add(self, options: NbdExportOptions) -> None:
        """block-export-add. ``node-name`` may also be a device's id, where no node has that name.

        Raises ExportError, NodeNotFound, PermissionConflict or BlockError; then nothing is left.
        """
        self._check_id(options.id)
        node = self._graph.nodes.get(options.node_name)
        target = node or self._devices.find(options.node_name)
        if target is None:
            raise NodeNotFound(f"Cannot find device='' nor node-name='{options.node_name}'")
        if options.writable and _read_only(target):
            raise ExportError("Cannot export read-only node as writable")
        if isinstance(options.iothread, str) and not self._known_iothread(options.iothread):
            raise ExportError(f'iothread "{options.iothread}" not found')
        if isinstance(target, Node) and not options.allow_inactive:
            await activate(self._graph, target)
        self._make(target, options)

    async def add_legacy(self, options: NbdServerAdd) -> None:
        """nbd-server-add: a device, or a node. Read-only ones are served read-only, whatever ``writable`` says.

        Raises as `add` does.
        """
        name = options.name if isinstance(options.name, str) else options.device
        drive = self._devices.drives.find(options.device)
        target = drive.node if drive is not None else self._devices.find(options.device)
        target = target or self._graph.nodes.get(options.device)
        if target is None:
            raise NodeNotFound(f"Cannot find device='{options.device}' nor node-name='{options.device}'")
        self._check_id(name)
        wanted = NbdExportOptions(
            id=name,
            node_name=options.device,
            name=name,
            description=options.description,
            writable=options.writable and not _read_only(target),
            bitmaps=[options.bitmap] if isinstance(options.bitmap, str) else [],
        )
        if isinstance(target, Node):
            await activate(self._graph, target)
        self._make(target, wanted)

    def _check_id(self, ident: str) -> None:
        if not _IDENTIFIER.match(ident):
            raise ExportError("Invalid block export id")
        if ident in self._records:
            raise ExportError(f"Block export id '{ident}' is already in use")

    def _make(self, target: Node | VirtioBlk, options: NbdExportOptions) -> None:
        server = self.server
        if server is None:
            raise ExportError("NBD server not running")
        name = options.name if isinstance(options.name, str) else options.node_name
        description = options.description if isinstance(options.description, str) else ""
        if len(name.encode(errors="surrogateescape")) > _LONGEST:
            raise ExportError(f"export name '{name}' too long")
        if len(description.encode(errors="surrogateescape")) > _LONGEST:
            raise ExportError(f"description '{description}' too long")
        if server.find(name) is not None:
            raise ExportError(f"NBD server already has export named '{name}'")
        node = target.backend.node if isinstance(target, VirtioBlk) else target
        bitmaps = [self._bitmap(wanted, node, writable=options.writable) for wanted in options.bitmaps]
        served = self._served(target, name, description, options, bitmaps)
        server.add(served)
        for bitmap in bitmaps:
            bitmap.busy = True
        self._records[options.id] = _Record(options.id, served, bitmaps)

    def _bitmap(self, wanted: str | DirtyBitmapRef, node: Node, *, writable: bool) -> DirtyBitmap:
        """The bitmap that an export of ``node`` is to show: of the node or of what shows through it, or of any node by name.
        Raises BlockError or NodeNotFound in QEMU's words."""
        if isinstance(wanted, str):
            bitmap = _in_chain(node, wanted)
            # Whoever reads would see the bitmap change without the disk that he is shown.
            if not writable and not bitmap.node.read_only and not bitmap.disabled:
                raise BlockError(f"Enabled bitmap '{wanted}' incompatible with readonly export")
        else:
            found = self._graph.nodes.get(wanted.node) or self._device_node(wanted.node)
            if found is None:
                raise NodeNotFound(f"Node '{wanted.node}' not found")
            bitmap = found.bitmaps.get(wanted.name)
        bitmap.check_usable(allow_read_only=True)
        return bitmap

    def _device_node(self, ident: str) -> Node | None:
        device = self._devices.find(ident)
        return device.backend.node if device is not None else None

    def _served(
        self,
        target: Node | VirtioBlk,
        name: str,
        description: str,
        options: NbdExportOptions,
        bitmaps: list[DirtyBitmap],
    ) -> NodeExport | DeviceExport:
        # max-connections=1 is how an operator says that clients do not share an export.
        shared_clients = self._max_connections != 1
        if isinstance(target, VirtioBlk):
            return DeviceExport(
                target,
                name,
                description=description,
                writable=options.writable,
                writethrough=options.writethrough,
                with_depth=options.allocation_depth,
                bitmaps=bitmaps,
                shared_clients=shared_clients,
            )
        export = NodeExport(
            self._graph,
            name,
            description=description,
            writable=options.writable,
            writethrough=options.writethrough,
            with_depth=options.allocation_depth,
            bitmaps=bitmaps,
            shared_clients=shared_clients,
            allow_inactive=options.allow_inactive,
        )
        export.attach(target)
        return export

    # -- ending ------------------------------------------------------------------------------------------------------
    async def delete(self, ident: str, mode: RemoveMode) -> None:
        """block-export-del and nbd-server-remove. ``safe`` refuses while clients are attached; ``hard`` disconnects
        them now. Raises `ExportError`.

        Returns when the export is gone, or after a second if requests under way keep it; BLOCK_EXPORT_DELETED says
        when.
        """
        record = self._records.get(ident)
        if record is None:
            raise ExportError(f"Export '{ident}' is not found")
        if record.removal is not None:
            raise ExportError(f"Export '{ident}' is already shutting down")
        assert self.server is not None  # exports end with the server
        if mode is RemoveMode.SAFE and self.server.clients(record.served):
            raise ExportError(f"export '{ident}' still in use", hint="Use mode='hard' to force client disconnect")
        record.removal = asyncio.get_running_loop().create_task(self._remove(self.server, record))
        await asyncio.wait((record.removal,), timeout=_SOON)

    async def _remove(self, server: NbdServer, record: _Record) -> None:
        record.served.close_door()
        if server.find(record.served.name) is record.served:
            await server.remove_now(record.served.name)
        await self._end(record)

    async def _end(self, record: _Record) -> None:
        await record.served.close()
        for bitmap in record.bitmaps:
            bitmap.busy = False
        del self._records[record.id]
        self._emit(BlockExportDeleted(id=record.id))

    async def _device_goes(self, device: VirtioBlk) -> None:
        """A device is about to be deleted: its doors go first."""
        server = self.server
        for record in list(self._records.values()):
            if isinstance(record.served, DeviceExport) and record.served.device is device and server is not None:
                if record.removal is None:
                    record.removal = asyncio.get_running_loop().create_task(self._remove(server, record))
                await record.removal

    # -- looking -----------------------------------------------------------------------------------------------------
    def query(self) -> list[BlockExportInfo]:
        """query-block-exports: every export, newest first."""
        return [
            BlockExportInfo(
                id=record.id,
                type=BlockExportType.NBD,
                node_name=record.served.node.name,
                shutting_down=record.removal is not None,
            )
            for record in reversed(self._records.values())
        ]

    def find(self, ident: str) -> Export | None:
        """What is served under that export id."""
        record = self._records.get(ident)
        return None if record is None else record.served


def _in_chain(node: Node, name: str) -> DirtyBitmap:
    """The bitmap of that name, of the node or of the first one below that shows through it and has one."""
    shown: Node | None = node
    while shown is not None:
        found = shown.bitmaps.find(name)
        if found is not None:
            return found
        edge = shown.filtered or shown.backing
        shown = edge.node if edge is not None else None
    raise BlockError(f"Bitmap '{name}' is not found")


def _read_only(target: Node | VirtioBlk) -> bool:
    return target.read_only

"""What the NBD server and exports are told, typed once for QMP and the command line.

Source: QEMU ``qapi/block-export.json``, ``qapi/sockets.json``.
"""

from __future__ import annotations

import enum
from typing import Annotated

from livedisk.emulator.block.sockets import (
    Fd,
    FdAddress,
    Inet,
    InetAddress,
    Unix,
    UnixAddress,
    Vsock,
    VsockAddress,
)
from livedisk.emulator.qmp.qapi import UNSET, Meta, QapiStruct, UInt32, UnsetType

DEFAULT_CONNECTIONS = 100
"""Clients at one time where ``max-connections`` does not say; 0 would be any number."""
DEFAULT_HANDSHAKE = 10
"""Seconds in which a client must have chosen an export; 0 would be any time."""


class LegacyAddress(QapiStruct):
    """QMP's older shape of the same: the address proper is in ``data``."""


class InetLegacy(LegacyAddress, tag="inet", tag_field="type"):
    """``{"type": "inet", "data": {...}}``."""

    data: Inet


class UnixLegacy(LegacyAddress, tag="unix", tag_field="type"):
    """``{"type": "unix", "data": {...}}``."""

    data: Unix


class VsockLegacy(LegacyAddress, tag="vsock", tag_field="type"):
    """``{"type": "vsock", "data": {...}}``."""

    data: Vsock


class FdLegacy(LegacyAddress, tag="fd", tag_field="type"):
    """``{"type": "fd", "data": {...}}``."""

    data: Fd


class NbdServerBase(QapiStruct):
    """The server without its address."""

    handshake_max_seconds: UInt32 = DEFAULT_HANDSHAKE
    tls_creds: str | UnsetType = UNSET
    tls_authz: str | UnsetType = UNSET
    max_connections: UInt32 = DEFAULT_CONNECTIONS


class NbdServerOptions(NbdServerBase, kw_only=True):
    """``--nbd-server``."""

    addr: InetAddress | UnixAddress | VsockAddress | FdAddress


class NbdServerStart(NbdServerBase, kw_only=True):
    """nbd-server-start's arguments."""

    addr: InetLegacy | UnixLegacy | VsockLegacy | FdLegacy


class DirtyBitmapRef(QapiStruct):
    """A dirty bitmap of any node, by the node's name and its own."""

    node: str
    name: str


BitmapOrStr = Annotated[str | DirtyBitmapRef, Meta(extra={"qapi": "BlockDirtyBitmapOrStr"})]


class BlockExportOptions(QapiStruct):
    """What every type of export takes.

    ``writethrough``: every write is on stable storage before it is answered. ``iothread``, ``fixed-iothread``: there
    is one loop, so that an existing iothread's name changes nothing. ``allow-inactive``: the node need not be active; while it
    is not, writes are refused. Without, it is activated.
    """

    id: str
    node_name: str
    fixed_iothread: bool = False
    iothread: str | UnsetType = UNSET
    writethrough: bool = False
    writable: bool = False
    allow_inactive: bool = False


class NbdExportOptions(BlockExportOptions, tag="nbd", tag_field="type"):
    """An export by the NBD server. ``name`` defaults to the node's name."""

    name: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    bitmaps: list[BitmapOrStr] = []
    allocation_depth: bool = False


class NbdServerAdd(QapiStruct):
    """nbd-server-add's arguments: a device (its guest door) or a node."""

    device: str
    name: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    writable: bool = False
    bitmap: Annotated[str | UnsetType, Meta(extra={"features": ("deprecated",)})] = UNSET


class RemoveMode(enum.StrEnum):
    """Whether an export that has clients is removed (QEMU's BlockExportRemoveMode)."""

    SAFE = "safe"
    HARD = "hard"


class NbdServerRemove(QapiStruct):
    """nbd-server-remove's arguments: the export's name."""

    name: str
    mode: RemoveMode = RemoveMode.SAFE


class BlockExportDel(QapiStruct):
    """block-export-del's arguments."""

    id: str
    mode: RemoveMode = RemoveMode.SAFE


class BlockExportType(enum.StrEnum):
    """The types this build has."""

    NBD = "nbd"


class BlockExportInfo(QapiStruct):
    """One export. ``shutting-down``: it was deleted, and waits for requests under way."""

    id: str
    type: BlockExportType
    node_name: str
    shutting_down: bool

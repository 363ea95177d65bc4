"""The options of `nbd`. Source: QEMU ``qapi/block-core.json`` (BlockdevOptionsNbd)."""

from __future__ import annotations

from typing import Annotated

import msgspec

from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.block.sockets import FdAddress, InetAddress, UnixAddress, VsockAddress

Seconds = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32, extra={"qapi": "uint32"})]


class NbdOptions(BlockdevOptions):
    """What a node on an NBD export takes."""

    server: InetAddress | UnixAddress | VsockAddress | FdAddress
    """Where the server is. A descriptor (``fd``) is one of a connected socket; there is no reconnecting to it."""
    export: str | msgspec.UnsetType = msgspec.UNSET
    """The export's name; absent: the server's default export."""
    tls_creds: str | msgspec.UnsetType = msgspec.UNSET
    """The id of the TLS credentials; absent: no TLS."""
    tls_hostname: str | msgspec.UnsetType = msgspec.UNSET
    """The name that the server's certificate must have; absent: the host's."""
    x_dirty_bitmap: Annotated[str | msgspec.UnsetType, msgspec.Meta(extra={"features": ("unstable",)})] = msgspec.UNSET
    """A meta context to be shown as block status in place of base:allocation: with ``qemu:dirty-bitmap:NAME`` dirty ranges
    look like holes."""
    reconnect_delay: Seconds = 0
    """For how many seconds of an outage requests wait for the server to come back, rather than fail."""
    open_timeout: Seconds = 0
    """For how many seconds to try to connect when the node is opened; 0: once."""

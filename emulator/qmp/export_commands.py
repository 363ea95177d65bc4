"""Commands on the NBD server and exports. Source: QEMU ``qapi/block-export.json``."""

from __future__ import annotations

from livedisk.emulator.block.sockets import FdAddress, InetAddress, UnixAddress, VsockAddress
from livedisk.emulator.exports.options import (
    BlockExportDel,
    BlockExportInfo,
    NbdExportOptions,
    NbdServerAdd,
    NbdServerRemove,
    NbdServerStart,
)
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType
from livedisk.emulator.qmp.registry import command


@command("nbd-server-start", allow_preconfig=True)
async def nbd_server_start(ctx: Context, args: NbdServerStart) -> None:
    """Listen for NBD clients."""
    await ctx.daemon.exports.start_server(args)


@command("nbd-server-stop", allow_preconfig=True)
async def nbd_server_stop(ctx: Context) -> None:
    """Disconnect all clients, end all exports, listen no more."""
    await ctx.daemon.exports.stop_server()


class NbdServerInfo(QapiStruct):
    """Where the server listens, and whether clients must use TLS; nothing of it if none runs."""

    addresses: list[InetAddress | UnixAddress | VsockAddress | FdAddress] | UnsetType = UNSET
    tls: bool | UnsetType = UNSET


@command("x-query-nbd-server", allow_preconfig=True)
async def x_query_nbd_server(ctx: Context) -> NbdServerInfo:
    """The NBD server that runs. Ours: QEMU cannot be asked."""
    server = ctx.daemon.exports.server
    if server is None:
        return NbdServerInfo()
    found: list[InetAddress | UnixAddress | VsockAddress | FdAddress] = []
    for address in server.addresses:
        if isinstance(address, tuple):
            found.append(InetAddress(host=address[0], port=str(address[1])))
        elif isinstance(address, str):
            found.append(UnixAddress(path=address))
    return NbdServerInfo(addresses=found, tls=server.requires_tls)


@command("nbd-server-add", allow_preconfig=True, features=("deprecated",))
async def nbd_server_add(ctx: Context, args: NbdServerAdd) -> None:
    """Export a device (its guest door: subject to stop and cont) or a node (not)."""
    await ctx.daemon.exports.add_legacy(args)


@command("nbd-server-remove", allow_preconfig=True, features=("deprecated",))
async def nbd_server_remove(ctx: Context, args: NbdServerRemove) -> None:
    """End an export by its name."""
    await ctx.daemon.exports.delete(args.name, args.mode)


@command("block-export-add", allow_preconfig=True)
async def block_export_add(ctx: Context, args: NbdExportOptions) -> None:
    """Export a node."""
    await ctx.daemon.exports.add(args)


@command("block-export-del", allow_preconfig=True)
async def block_export_del(ctx: Context, args: BlockExportDel) -> None:
    """End an export by its id."""
    await ctx.daemon.exports.delete(args.id, args.mode)


@command("query-block-exports", allow_preconfig=True)
async def query_block_exports(ctx: Context) -> list[BlockExportInfo]:
    """Every export."""
    return ctx.daemon.exports.query()

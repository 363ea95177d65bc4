"""QMP: the wire, typed commands, introspection, events, the human monitor, and a client.

    qapi.py       how types are written: msgspec Structs and QAPI's integers, alternates, unions
    model.py      those types read as a tree
    visit.py      the one walker over that tree: input checks in QEMU's words, for JSON and for key=value
    keyval.py     key=value,... as QEMU's command line has it
    registry.py   commands: @command("name") on a typed coroutine; plugins
    events.py     events: @event("NAME") on a Struct; the hub that limits and sends them
    schema.py     query-qmp-schema from the same types
    wire.py       bytes in, JSON values and QEMU's parse errors out; JSON as QEMU prints it
    monitor.py    greeting, negotiation, ids, in-band queue, out-of-band execution
    server.py     character devices: sockets by path, TCP, descriptor; stdio
    control.py    the commands of the monitor itself
    hmp.py        the human monitor
    client.py     an asyncio QMP client
    context.py    what a command is handed

To add a command, anywhere that is imported before the daemon serves (``*_commands.py`` beside this file, a package
named in the entry-point group ``livedisk.plugins``)::

    class BlockResize(QapiStruct, kw_only=True):    # a member with a default is optional
        device: str | UnsetType = UNSET
        node_name: str | UnsetType = UNSET
        size: int                                   # QAPI's int (64 bit signed); UInt32, Size, ... come from qapi.py

    @command("block_resize")                        # allow_oob=, allow_preconfig=, success_response=, features=
    async def block_resize(ctx: Context, args: BlockResize) -> None:
        ...                                         # raise BlockError("...") to refuse; return a Struct, list or str to answer

``ctx.daemon`` is the running emulator (`context.Daemon`; add what you need there), ``ctx.monitor`` the monitor the
command came by. Events: ``ctx.daemon.events.emit(BlockExportDeleted(id=...))``.

In-band commands run one at a time over all monitors, as in QEMU: until a command returns, no other command starts,
except out-of-band ones.

A command-line option is read with the same types: ``keyval.parse_option(ExportOptions, "nbd,id=e0,node-name=n",
implied="type")``. Refusals are `ParameterError`, whose ``hint`` goes on a line of its own.

The union of all drivers' options: `blockdev.py` makes ``BlockdevOptions`` (``emulator/block/options.py``) stand for
it wherever it is used as a type, and defines the alternates BlockdevRef and BlockdevRefOrNull.
"""

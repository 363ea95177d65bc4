"""The human monitor's commands on objects, devices, character devices and the run state.

Source: QEMU ``qom/qom-hmp-cmds.c``, ``system/qdev-monitor.c``, ``chardev/char-hmp-cmds.c``, ``monitor/hmp-cmds.c``; asked from
QEMU 10.0.2. Where we differ: ``info qtree`` and ``info qom-tree`` show the devices that there are here, without buses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.node import Node
from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp import qom
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.encode import encode_pretty
from livedisk.emulator.qmp.hmp import hmp_command
from livedisk.emulator.qmp.hmp_block import human_size, snapshot_table
from livedisk.emulator.qmp.hmp_commands import ask, passed_on
from livedisk.emulator.qmp.keyval import parse_opts, parse_text
from livedisk.emulator.qmp.registry import registry
from livedisk.emulator.qmp.visit import KEYVAL

Args = dict[str, Any]


# -- objects -----------------------------------------------------------------------------------------------------------
@hmp_command("qom-list", args="path:s?", params="path", help="list QOM properties")
async def qom_list(ctx: Context, args: Args) -> str:
    if "path" not in args:
        return "/\n"
    return "".join(f"{one['name']} ({one['type']})\n" for one in await ask(ctx, "qom-list", path=args["path"]))


@hmp_command("qom-get", args="path:s,property:s", params="path property", help="print QOM property")
async def qom_get(ctx: Context, args: Args) -> str:
    return encode_pretty(await ask(ctx, "qom-get", **args)).decode().replace("\r\n", "\n")


@hmp_command(
    "qom-set",
    args="json:-j,path:s,property:s,value:S",
    params="[-j] path property value",
    help="set QOM property.\n\t\t\t-j: the value is specified in json format.",
)
async def qom_set(ctx: Context, args: Args) -> str:
    value: Any = args["value"]
    if "json" in args:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise LiveDiskError(f"JSON parse error, {error}") from None
    else:
        value = await _as_typed(ctx, args["path"], args["property"], value)
    await ask(ctx, "qom-set", path=args["path"], property=args["property"], value=value)
    return ""


async def _as_typed(ctx: Context, path: str, name: str, text: str) -> Any:
    """The value as the property's type has it: a number or a switch where it is one."""
    present = await ask(ctx, "qom-get", path=path, property=name)
    if isinstance(present, bool):
        return text in ("on", "yes", "true", "y")
    if isinstance(present, int):
        try:
            return int(text, 0)
        except ValueError:
            return text
    return text


@hmp_command(
    "object_add", args="object:S", params="[qom-type=]type,id=str[,prop=value][,...]", help="create QOM object"
)
async def object_add(ctx: Context, args: Args) -> str:
    values, syntax = parse_text(args["object"], "qom-type")
    await registry.get("object-add").run(ctx, values, syntax)
    return ""


hmp_command("object_del", args="id:s", params="id", help="destroy QOM object")(passed_on("object-del"))


@hmp_command("info iothreads", help="show iothreads")
async def info_iothreads(ctx: Context, args: Args) -> str:
    lines = []
    for one in await ask(ctx, "query-iothreads"):
        lines.append(f"{one['id']}:\n  thread_id={one['thread-id']}\n")
        names = ("poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch")
        lines += [f"  {name}={one[name]}\n" for name in names]
    return "".join(lines)


@hmp_command("info qom-tree", args="path:s?", params="[path]", help="show QOM composition tree")
async def info_qom_tree(ctx: Context, args: Args) -> str:
    path, found = qom.resolve(ctx.daemon, args.get("path", "/machine"))
    return "".join(_branches(path.rpartition("/")[2], found, 0))


def _branches(name: str, found: qom.QomObject, depth: int) -> Iterator[str]:
    yield f"{'  ' * depth}/{name} ({found.type})\n"
    for child in sorted(found.children):
        yield from _branches(child, found.children[child], depth + 1)


@hmp_command("info qtree", args="brief:-b", params="[-b]", help="show device tree (-b: brief, omit properties)")
async def info_qtree(ctx: Context, args: Args) -> str:
    lines = ["bus: main-system-bus\n", "  type System\n"]
    for device in ctx.daemon.devices:
        lines.append(f'  dev: virtio-blk-pci, id "{device.id}"\n')
        if "brief" in args:
            continue
        found = qom.resolve(ctx.daemon, device.path)[1]
        own = [name for name in found.properties if name not in qom.common_properties()]
        lines += [f"    {name} = {_shown(found.properties[name])}\n" for name in own]
    return "".join(lines)


def _shown(one: qom.Property) -> str:
    """A property's value as QEMU prints it for people."""
    value = one.get()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value} ({human_size(value)})" if one.type == "size" else f"{value} ({value & (1 << 64) - 1:#x})"
    return f'"{value}"'


# -- devices -----------------------------------------------------------------------------------------------------------
@hmp_command(
    "device_add",
    args="device:S",
    params="driver[,prop=value][,...]",
    help="add device, like -device on the command line",
)
async def device_add(ctx: Context, args: Args) -> str:
    await ctx.daemon.devices.add(parse_opts(args["device"], "driver"), KEYVAL)
    return ""


hmp_command("device_del", args="id:s", params="device", help="remove device")(passed_on("device_del"))


@hmp_command("stop|s", help="stop emulation")
async def stop(ctx: Context, args: Args) -> str:
    await ask(ctx, "stop")
    return ""


@hmp_command("cont|c", help="resume emulation")
async def cont(ctx: Context, args: Args) -> str:
    await ask(ctx, "cont")
    return ""


@hmp_command("info uuid", help="show the current VM UUID")
async def info_uuid(ctx: Context, args: Args) -> str:
    return f"{(await ask(ctx, 'query-uuid'))['UUID']}\n"


@hmp_command("info kvm", help="show KVM information")
async def info_kvm(ctx: Context, args: Args) -> str:
    return "kvm support: not compiled\n"


@hmp_command("info snapshots", help="show the currently saved VM snapshots")
async def info_snapshots(ctx: Context, args: Args) -> str:
    """Internal snapshots of the drives and nodes that users see. None is of a whole machine, so all are partial."""
    parts = ["List of snapshots present on all disks:\nNone\n"]
    for node in await ask(ctx, "query-named-block-nodes", flat=True):
        own = ctx.daemon.graph.nodes[node["node-name"]]
        snapshots = node["image"].get("snapshots")
        if not snapshots or any(isinstance(edge.parent, Node) for edge in own.parents):
            continue
        users = [edge.parent for edge in own.parents if isinstance(edge.parent, BlockBackend)]
        name = next((user.user_name for user in users if user.user_name), "")
        lines = "".join(f"{line}\n" for line in snapshot_table(snapshots))
        parts.append(f"\nList of partial (non-loadable) snapshots on '{name}':\n{lines}")
    if len(parts) == 1:
        return "There is no snapshot available.\n"
    return "".join(parts)


# -- character devices -------------------------------------------------------------------------------------------------
@hmp_command("chardev-add", args="args:s", params="args", help="add chardev")
async def chardev_add(ctx: Context, args: Args) -> str:
    from livedisk.emulator.qmp.chardev import parse_chardev

    options = parse_chardev(args["args"])
    if ctx.daemon.chardev(options.id) is not None:
        raise LiveDiskError(f"attempt to add duplicate property '{options.id}' to object (type 'container')")
    await ctx.daemon.open_chardev(options)
    return ""


@hmp_command("chardev-change", args="id:s,args:s", params="id args", help="change chardev")
async def chardev_change(ctx: Context, args: Args) -> str:
    from livedisk.emulator.qmp.chardev import parse_chardev

    if "id" in parse_opts(args["args"], "backend"):
        raise LiveDiskError("Unexpected 'id' parameter")
    options = parse_chardev(f"{args['args']},id={args['id']}")
    if ctx.daemon.chardev(options.id) is None:
        raise LiveDiskError(f"Chardev '{options.id}' does not exist")
    if ctx.daemon.chardev_is_busy(options.id):
        raise LiveDiskError("Chardev user does not support chardev hotswap")
    await ctx.daemon.close_chardev(options.id)
    await ctx.daemon.open_chardev(options)
    return ""


hmp_command("chardev-remove", args="id:s", params="id", help="remove chardev")(passed_on("chardev-remove"))


hmp_command("chardev-send-break", args="id:s", params="id", help="send a break on chardev")(
    passed_on("chardev-send-break")
)


hmp_command(
    "ringbuf_write", args="device:s,data:s", params="device data", help="Write to a ring buffer character device"
)(passed_on("ringbuf-write"))


@hmp_command(
    "ringbuf_read", args="device:s,size:i", params="device size", help="Read from a ring buffer character device"
)
async def ringbuf_read(ctx: Context, args: Args) -> str:
    """Characters that would disturb a terminal are written as escapes."""
    text: str = await ask(ctx, "ringbuf-read", **args)
    escaped = text.replace("\\", "\\\\")
    return "".join(one if one.isprintable() or one in "\n\t" else f"\\u{ord(one):04x}" for one in escaped) + "\n"


@hmp_command("info chardev", help="show the character devices")
async def info_chardev(ctx: Context, args: Args) -> str:
    return "".join(f"{one['label']}: filename={one['filename']}\n" for one in await ask(ctx, "query-chardev"))


# -- descriptors -------------------------------------------------------------------------------------------------------
hmp_command(
    "getfd", args="fdname:s", params="getfd name", help="receive a file descriptor via SCM rights and assign it a name"
)(passed_on("getfd"))


hmp_command(
    "closefd",
    args="fdname:s",
    params="closefd name",
    help="close a file descriptor previously passed via SCM rights",
)(passed_on("closefd"))

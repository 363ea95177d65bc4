"""The human monitor's commands on drives and on what runs on them. Each says what a QMP command says, in QEMU's words.

drive_add, drive_del, commit, block_resize, block_stream, block_job_*, drive_mirror, drive_backup, snapshot_*, nbd_server_*,
block_set_io_throttle, eject and change (there are no removable media: both refuse). Source: QEMU
``block/monitor/block-hmp-cmds.c``, ``hmp-commands.hx``; asked from QEMU 10.0.2.
"""

from __future__ import annotations

import re
from typing import Any

from livedisk.emulator.device import drive_options
from livedisk.emulator.errors import DeviceNotFound, LiveDiskError
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.hmp import HmpError, hmp_command
from livedisk.emulator.qmp.hmp_commands import ask, passed_on
from livedisk.emulator.qmp.keyval import parse_opts, parse_text
from livedisk.emulator.qmp.registry import registry, to_wire

Args = dict[str, Any]


# -- drives ------------------------------------------------------------------------------------------------------------
@hmp_command(
    "drive_add",
    args="node:-n,pci_addr:s,opts:s",
    params="[-n] [[<domain>:]<bus>:]<slot>\n[file=file][,if=type][,bus=n]\n[,unit=m][,media=d][,index=i]\n"
    "[,snapshot=on|off][,cache=on|off]\n[,readonly=on|off][,copy-on-read=on|off]",
    help="add drive to PCI storage controller",
)
async def drive_add(ctx: Context, args: Args) -> str:
    """With ``-n`` a node, as blockdev-add; else a drive that waits for a device."""
    if "node" in args:
        return await _node_add(ctx, args["opts"])
    devices, graph = ctx.daemon.devices, ctx.daemon.graph
    said: list[str] = []
    try:
        values = parse_opts(args["opts"])
        if values.setdefault("if", "none") not in ("none",):
            raise HmpError(f"Can't hot-add drive to type {_bus_number(values['if'])}\n")
        spec = await drive_options.read(graph, values, [drive.spec for drive in devices.drives], said.append)
        await devices.drives.add(spec)
    except (LiveDiskError, OSError) as error:
        raise HmpError(f"{_text(error)}\n") from error
    return "".join(f"warning: {line}\n" for line in said) + "OK\n"


def _bus_number(name: str) -> int:
    known = ("none", "ide", "scsi", "floppy", "pflash", "mtd", "sd", "virtio", "xen")
    if name not in known:
        raise HmpError(f"unsupported bus type '{name}'\n")
    return known.index(name)


async def _node_add(ctx: Context, text: str) -> str:
    values, syntax = parse_text(text)
    if "node-name" not in values:
        raise HmpError("'node-name' needs to be specified\n")
    try:
        await registry.get("blockdev-add").run(ctx, values, syntax)
    except (LiveDiskError, OSError) as error:
        raise HmpError(f"{_text(error)}\n") from error
    return ""


def _text(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    hint = getattr(error, "hint", "")
    return f"{error}\n{hint}" if hint else str(error)


@hmp_command("drive_del", args="id:B", params="device", help="remove host block device")
async def drive_del(ctx: Context, args: Args) -> str:
    """A drive, or a node that the user made."""
    name = args["id"]
    try:
        if name in ctx.daemon.graph.nodes:
            await ask(ctx, "blockdev-del", node_name=name)
        else:
            await ctx.daemon.devices.drives.remove(name)
    except LiveDiskError as error:
        raise HmpError(f"{error}\n") from error
    return ""


@hmp_command(
    "commit",
    args="device:B",
    params="device|all",
    help="commit changes to the disk images (if -snapshot is used) or backing files",
)
async def commit(ctx: Context, args: Args) -> str:
    """Write what an image holds into its backing file; it stays on top, and keeps what it has."""
    from livedisk.emulator.qmp.commit_whole import commit_into_backing

    name, drives = args["device"], ctx.daemon.devices.drives
    if name == "all":
        for one in drives:
            if one.node is not None and one.node.backing is not None:
                try:
                    await commit_into_backing(ctx.daemon.graph, one.node)
                except (LiveDiskError, OSError) as error:
                    return f"'commit' error for 'all': {_text(error)}\n"
        return ""
    drive = drives.find(name)
    if drive is None:
        return f"Device '{name}' not found\n"
    if drive.node is None:
        return f"Device '{name}' has no medium\n"
    try:
        await commit_into_backing(ctx.daemon.graph, drive.node)
    except (LiveDiskError, OSError) as error:
        return f"'commit' error for '{name}': {_text(error)}\n"
    return ""


@hmp_command("block_resize", args="device:B,size:o", params="device size", help="resize a block image")
async def block_resize(ctx: Context, args: Args) -> str:
    await ask(ctx, "block_resize", device=args["device"], size=args["size"])
    return ""


# -- jobs --------------------------------------------------------------------------------------------------------------
@hmp_command(
    "block_stream",
    args="device:B,speed:o?,base:s?",
    params="device [speed [base]]",
    help="copy data from a backing file into a block device",
)
async def block_stream(ctx: Context, args: Args) -> str:
    # As QEMU: its job is called as its device is.
    await ask(ctx, "block-stream", job_id=args["device"], **args)
    return ""


hmp_command(
    "block_job_set_speed",
    args="device:B,speed:o",
    params="device speed",
    help="set maximum speed for a background block operation",
)(passed_on("block-job-set-speed"))


hmp_command(
    "block_job_cancel",
    args="force:-f,device:B",
    params="[-f] device",
    help="stop an active background block operation (use -f\n\t\t\t if you want to abort the operation immediately\n"
    "\t\t\t instead of keep running until data is in sync)",
)(passed_on("block-job-cancel"))


hmp_command("block_job_pause", args="device:B", params="device", help="pause an active background block operation")(
    passed_on("block-job-pause")
)


hmp_command("block_job_resume", args="device:B", params="device", help="resume a paused background block operation")(
    passed_on("block-job-resume")
)


hmp_command("block_job_complete", args="device:B", params="device", help="stop an active background block operation")(
    passed_on("block-job-complete")
)


def _copy(args: Args) -> dict[str, Any]:
    """What drive_mirror and drive_backup say of their target."""
    wanted = {"device": args["device"], "target": args["target"], "sync": "full" if "full" in args else "top"}
    wanted["mode"] = "existing" if "reuse" in args else "absolute-paths"
    return wanted | ({"format": args["format"]} if "format" in args else {})


_TARGET = (
    "\t\t\tThe -n flag requests QEMU to reuse the image found\n"
    "\t\t\tin new-image-file, instead of recreating it from scratch.\n"
    "\t\t\tThe -f flag requests QEMU to copy the whole disk,\n"
    "\t\t\tso that the result does not need a backing file.\n"
)


@hmp_command(
    "drive_mirror",
    args="reuse:-n,full:-f,device:B,target:s,format:s?",
    params="[-n] [-f] device target [format]",
    help="initiates live storage\n\t\t\tmigration for a device. The device's contents are\n"
    "\t\t\tcopied to the new image file, including data that\n\t\t\tis written after the command is started.\n"
    + _TARGET
    + "\t\t\t",
)
async def drive_mirror(ctx: Context, args: Args) -> str:
    await ask(ctx, "drive-mirror", unmap=True, **_copy(args))
    return ""


@hmp_command(
    "drive_backup",
    args="reuse:-n,full:-f,compress:-c,device:B,target:s,format:s?",
    params="[-n] [-f] [-c] device target [format]",
    help="initiates a point-in-time\n\t\t\tcopy for a device. The device's contents are\n"
    "\t\t\tcopied to the new image file, excluding data that\n\t\t\tis written after the command is started.\n"
    + _TARGET
    + "\t\t\tThe -c flag requests QEMU to compress backup data\n\t\t\t(if the target format supports it).\n\t\t\t",
)
async def drive_backup(ctx: Context, args: Args) -> str:
    await ask(ctx, "drive-backup", compress="compress" in args, **_copy(args))
    return ""


# -- snapshots ---------------------------------------------------------------------------------------------------------
@hmp_command(
    "snapshot_blkdev",
    args="reuse:-n,device:B,snapshot-file:s?,format:s?",
    params="[-n] device [new-image-file] [format]",
    help="initiates a live snapshot\n\t\t\tof device. If a new image file is specified, the\n"
    "\t\t\tnew image file will become the new root image.\n\t\t\tIf format is specified, the snapshot file will\n"
    "\t\t\tbe created in that format.\n\t\t\tThe default format is qcow2.  The -n flag requests QEMU\n"
    "\t\t\tto reuse the image found in new-image-file, instead of\n\t\t\trecreating it from scratch.",
)
async def snapshot_blkdev(ctx: Context, args: Args) -> str:
    mode = "existing" if args.pop("reuse", False) else "absolute-paths"
    await ask(ctx, "blockdev-snapshot-sync", mode=mode, **args)
    return ""


hmp_command(
    "snapshot_blkdev_internal",
    args="device:B,name:s",
    params="device name",
    help="take an internal snapshot of device.\n\t\t\tThe format of the image used by device must\n"
    "\t\t\tsupport it, such as qcow2.\n\t\t\t",
)(passed_on("blockdev-snapshot-internal-sync"))


hmp_command(
    "snapshot_delete_blkdev_internal",
    args="device:B,name:s,id:s?",
    params="device name [id]",
    help="delete an internal snapshot of device.\n\t\t\tIf id is specified, qemu will try delete\n"
    "\t\t\tthe snapshot matching both id and name.\n\t\t\tThe format of the image used by device must\n"
    "\t\t\tsupport it, such as qcow2.\n\t\t\t",
)(passed_on("blockdev-snapshot-delete-internal-sync"))


# -- the NBD server ----------------------------------------------------------------------------------------------------
@hmp_command(
    "nbd_server_start",
    args="all:-a,writable:-w,uri:s",
    params="nbd_server_start [-a] [-w] host:port",
    help="serve block devices on the given host and port",
)
async def nbd_server_start(ctx: Context, args: Args) -> str:
    """With ``-a`` every drive is served, under its name."""
    if "writable" in args and "all" not in args:
        raise LiveDiskError("-w only valid together with -a")
    await ask(ctx, "nbd-server-start", addr=_address(args["uri"]))
    if "all" in args:
        for drive in ctx.daemon.devices.drives:
            if drive.node is None:
                continue
            try:
                await ask(ctx, "nbd-server-add", device=drive.name, writable="writable" in args)
            except LiveDiskError:
                await ask(ctx, "nbd-server-stop")
                raise
    return ""


def _address(text: str) -> dict[str, Any]:
    if text.startswith("unix:"):
        if not text[5:]:
            raise LiveDiskError("invalid Unix socket address")
        return {"type": "unix", "data": {"path": text[5:]}}
    match = re.fullmatch(r"(?:tcp:)?(\[[^\]]*\]|[^:]*):([^,:]+)", text)
    if match is None:
        raise LiveDiskError(f"error parsing address '{text}'")
    return {"type": "inet", "data": {"host": match[1].strip("[]"), "port": match[2]}}


hmp_command(
    "nbd_server_add",
    args="writable:-w,device:B,name:s?",
    params="nbd_server_add [-w] device [name]",
    help="export a block device via NBD",
)(passed_on("nbd-server-add"))


@hmp_command(
    "nbd_server_remove",
    args="force:-f,name:s",
    params="nbd_server_remove [-f] name",
    help="remove an export previously exposed via NBD",
)
async def nbd_server_remove(ctx: Context, args: Args) -> str:
    force = {"mode": "hard"} if args.pop("force", False) else {}
    await ask(ctx, "nbd-server-remove", **args, **force)
    return ""


@hmp_command("nbd_server_stop", params="nbd_server_stop", help="stop serving block devices using the NBD protocol")
async def nbd_server_stop(ctx: Context, args: Args) -> str:
    await ask(ctx, "nbd-server-stop")
    return ""


# -- others ------------------------------------------------------------------------------------------------------------
@hmp_command(
    "block_set_io_throttle",
    args="device:B,bps:l,bps_rd:l,bps_wr:l,iops:l,iops_rd:l,iops_wr:l",
    params="device bps bps_rd bps_wr iops iops_rd iops_wr",
    help="change I/O throttle limits for a block drive",
)
async def block_set_io_throttle(ctx: Context, args: Args) -> str:
    to_wire(await registry.execute(ctx, "block_set_io_throttle", args))
    return ""


def _no_removable(ctx: Context, name: str) -> LiveDiskError:
    if ctx.daemon.devices.drives.find(name) is None:
        return DeviceNotFound(f"Device '{name}' not found")
    return LiveDiskError(f"Device '{name}' is not removable")


@hmp_command(
    "eject", args="force:-f,device:B", params="[-f] device", help="eject a removable medium (use -f to force it)"
)
async def eject(ctx: Context, args: Args) -> str:
    raise _no_removable(ctx, args["device"])


@hmp_command(
    "change",
    args="device:B,force:-f,target:F,arg:s?,read-only-mode:s?",
    params="device [-f] filename [format [read-only-mode]]",
    help="change a removable medium, optional format, use -f to force the operation",
)
async def change(ctx: Context, args: Args) -> str:
    raise _no_removable(ctx, args["device"])

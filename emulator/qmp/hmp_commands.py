"""The built-in commands of the human monitor: help, quit, and what ``info`` shows. Each prints what a QMP command
answers.

Source: QEMU ``monitor/hmp-cmds.c``, ``system/runstate-hmp-cmds.c``, ``block/monitor/block-hmp-cmds.c``.
"""

from __future__ import annotations

from typing import Any

from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.hmp import COMMANDS, Handler, HmpError, hmp_command
from livedisk.emulator.qmp.hmp_block import print_block_info
from livedisk.emulator.qmp.registry import registry, to_wire


async def ask(ctx: Context, command: str, **arguments: Any) -> Any:
    """What a QMP command answers, as JSON values. Raises what it raises."""
    members = {name.replace("_", "-"): value for name, value in arguments.items()}
    return to_wire(await registry.execute(ctx, command, members))


def passed_on(command: str) -> Handler:
    """What handles a line whose arguments are those of a QMP command, and prints nothing."""

    async def handle(ctx: Context, args: dict[str, Any]) -> str:
        await ask(ctx, command, **args)
        return ""

    return handle


@hmp_command("help|?", args="name:S?", params="[cmd]", help="show the help")
async def show_help(ctx: Context, args: dict[str, Any]) -> str:
    """All commands, all of ``info``, or one."""
    words = args.get("name", "").split()
    if not words:
        rows = {id(row): row for row in COMMANDS.values() if not row.group}
    elif words == ["info"]:
        rows = {id(row): row for row in COMMANDS.values() if row.group}
    else:
        name = " ".join(words[:2]) if words[0] == "info" else words[0]
        if name not in COMMANDS:
            raise HmpError(f"unknown command: '{name}'\n")
        rows = {0: COMMANDS[name]}
    return "".join(row.usage for row in sorted(rows.values(), key=lambda row: row.names[0]))


@hmp_command("info", args="item:s?", params="[subcommand]", help="show various information about the system state")
async def show_info(ctx: Context, args: dict[str, Any]) -> str:
    """Only its help is ever asked for: a line ``info X`` runs the command of that name."""
    return await show_help(ctx, {"name": "info"})


@hmp_command("quit|q", help="quit the emulator", is_last=True)
async def quit_emulator(ctx: Context, args: dict[str, Any]) -> str:
    await ask(ctx, "quit")
    return ""


@hmp_command("info version", help="show the version of QEMU")
async def info_version(ctx: Context, args: dict[str, Any]) -> str:
    info = await ask(ctx, "query-version")
    version = info["qemu"]
    return f"{version['major']}.{version['minor']}.{version['micro']}{info['package']}\n"


@hmp_command("info name", help="show the current VM name")
async def info_name(ctx: Context, args: dict[str, Any]) -> str:
    info = await ask(ctx, "query-name")
    return f"{info['name']}\n" if "name" in info else ""


@hmp_command("info status", help="show the current VM status (running|paused)")
async def info_status(ctx: Context, args: dict[str, Any]) -> str:
    info = await ask(ctx, "query-status")
    text = f"VM status: {'running' if info['running'] else 'paused'}"
    if not info["running"] and info["status"] != "paused":
        text += f" ({info['status']})"
    return f"{text}\n"


@hmp_command("info block-jobs", help="show progress of ongoing block device operations")
async def info_block_jobs(ctx: Context, args: dict[str, Any]) -> str:
    # Jobs come as a plugin; where there is none, no job can be active.
    jobs = await ask(ctx, "query-block-jobs") if "query-block-jobs" in registry else []
    if not jobs:
        return "No active jobs\n"
    lines = []
    for job in jobs:
        kind = "Streaming device" if job["type"] == "stream" else f"Type {job['type']}, device"
        progress = f"Completed {job['offset']} of {job['len']} bytes, speed limit {job['speed']} bytes/s"
        lines.append(f"{kind} {job['device']}: {progress}\n")
    return "".join(lines)


@hmp_command("info blockstats", help="show block device statistics")
async def info_blockstats(ctx: Context, args: dict[str, Any]) -> str:
    """Devices that have a name."""
    members = ["rd_bytes", "wr_bytes", "rd_operations", "wr_operations", "flush_operations"]
    members += ["wr_total_time_ns", "rd_total_time_ns", "flush_total_time_ns", "rd_merged", "wr_merged"]
    lines = []
    for device in await ask(ctx, "query-blockstats"):
        if not device["device"]:
            continue
        stats = [f"{name}={device['stats'][name]}" for name in members]
        idle = device["stats"].get("idle_time_ns")
        stats += [] if idle is None else [f"idle_time_ns={idle}"]
        lines.append(
            f"{device['device']}: {' '.join(stats)} \n" if idle is None else f"{device['device']}: {' '.join(stats)}\n"
        )
    return "".join(lines)


@hmp_command(
    "info block",
    args="nodes:-n,verbose:-v,device:B?",
    params="[-n] [-v] [device]",
    help="show info of one block device or all block devices (-n: show named nodes; -v: show details)",
)
async def info_block(ctx: Context, args: dict[str, Any]) -> str:
    """Devices; nodes if asked for, or if no device has the name."""
    wanted, verbose, nodes = args.get("device"), "verbose" in args, "nodes" in args
    devices = [] if nodes else await ask(ctx, "query-block")
    chosen = [device for device in devices if wanted in (None, device["device"])]
    parts = [print_block_info(device, device.get("inserted"), verbose=verbose) for device in chosen]
    if chosen or (wanted is None and not nodes):
        # As QEMU: the blank line stands before each but the first of all, also of those not shown.
        blank = "" if not chosen or chosen[0] is devices[0] else "\n"
        return blank + "\n".join(parts)
    named = await ask(ctx, "query-named-block-nodes")
    shown = [node for node in named if wanted in (None, node["node-name"])]
    blank = "\n" if shown and shown[0] is not named[0] else ""
    return blank + "\n".join(print_block_info(None, node, verbose=verbose) for node in shown)

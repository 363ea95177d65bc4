"""The human monitor's commands on migration.

Source: QEMU ``migration/migration-hmp-cmds.c``; asked from QEMU 10.0.2. Where we differ: ``migrate`` never waits for the
end (QEMU's does on a terminal, without ``-d``, and then holds the monitor); ``info migrate`` tells nothing of memory.
"""

from __future__ import annotations

from typing import Any

from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.hmp import hmp_command
from livedisk.emulator.qmp.hmp_commands import ask, passed_on

Args = dict[str, Any]


@hmp_command(
    "migrate",
    args="detach:-d,resume:-r,uri:s",
    params="[-d] [-r] uri",
    help="migrate to URI (using -d to not wait for completion)\n\t\t\t -r to resume a paused postcopy migration",
)
async def migrate(ctx: Context, args: Args) -> str:
    await ask(ctx, "migrate", uri=args["uri"], **({"resume": True} if "resume" in args else {}))
    return "" if "detach" in args else "terminal does not allow synchronous migration, continuing detached\n"


@hmp_command("migrate_cancel", help="cancel the current VM migration")
async def migrate_cancel(ctx: Context, args: Args) -> str:
    await ask(ctx, "migrate_cancel")
    return ""


@hmp_command("migrate_continue", args="state:s", params="state", help="Continue migration from the given paused state")
async def migrate_continue(ctx: Context, args: Args) -> str:
    await _with_values(ctx, "migrate-continue", args["state"], {"state": args["state"]})
    return ""


hmp_command(
    "migrate_incoming", args="uri:s", params="uri", help="Continue an incoming migration from an -incoming defer"
)(passed_on("migrate-incoming"))


@hmp_command(
    "migrate_set_capability",
    args="capability:s,state:b",
    params="capability state",
    help="Enable/Disable the usage of a capability for migration",
)
async def migrate_set_capability(ctx: Context, args: Args) -> str:
    wanted = {"capabilities": [{"capability": args["capability"], "state": args["state"]}]}
    await _with_values(ctx, "migrate-set-capabilities", args["capability"], wanted)
    return ""


async def _with_values(ctx: Context, command: str, word: str, arguments: dict[str, Any]) -> None:
    """Run a command whose argument is a word of a list; QEMU says of any other that it is invalid."""
    try:
        await ask(ctx, command, **arguments)
    except LiveDiskError as error:
        if f"does not accept value '{word}'" in str(error):
            raise LiveDiskError(f"invalid parameter value: {word}") from None
        raise


@hmp_command("info migrate", help="show migration status")
async def info_migrate(ctx: Context, args: Args) -> str:
    told = await ask(ctx, "query-migrate")
    if "status" not in told:
        return ""
    why = f" ({told['error-desc']})" if "error-desc" in told else ""
    lines = [f"Migration status: {told['status']}{why}", f"total time: {told.get('total-time', 0)} ms"]
    for name, shown in (("downtime", "downtime"), ("setup-time", "setup")):
        if name in told:
            lines.append(f"{shown}: {told[name]} ms")
    return "".join(f"{line}\n" for line in lines)


@hmp_command("info migrate_capabilities", help="show current migration capabilities")
async def info_migrate_capabilities(ctx: Context, args: Args) -> str:
    found = await ask(ctx, "query-migrate-capabilities")
    return "".join(f"{one['capability']}: {'on' if one['state'] else 'off'}\n" for one in found)

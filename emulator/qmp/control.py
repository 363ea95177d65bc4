"""The commands of the monitor itself. Importing this module registers them.

qmp_capabilities, query-version, query-commands, query-qmp-schema, query-name, quit, human-monitor-command,
query-yank, yank. Source: QEMU ``qapi/control.json``, ``qapi/misc.json``, ``qapi/introspect.json``,
``qapi/yank.json``.
"""

from __future__ import annotations

import enum
from typing import cast

from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp import yank
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.events import event, known_events
from livedisk.emulator.qmp.monitor import Capability
from livedisk.emulator.qmp.qapi import QapiStruct
from livedisk.emulator.qmp.registry import command, registry
from livedisk.emulator.qmp.schema import SchemaInfo, schema
from livedisk.emulator.qmp.version import VersionInfo, version_info


class QmpCapabilities(QapiStruct):
    enable: list[Capability] = []


@command("qmp_capabilities", allow_preconfig=True)
async def qmp_capabilities(ctx: Context, args: QmpCapabilities) -> None:
    """Leave negotiation. Raises CommandNotFound if it is complete."""
    if ctx.monitor is None:
        raise LiveDiskError("qmp_capabilities is for QMP monitors")
    ctx.monitor.negotiate(args.enable)


@command("query-version", allow_preconfig=True)
async def query_version(ctx: Context) -> VersionInfo:
    return version_info()


class CommandInfo(QapiStruct):
    name: str


@command("query-commands", allow_preconfig=True)
async def query_commands(ctx: Context) -> list[CommandInfo]:
    """All commands by name."""
    return [CommandInfo(name=name) for name in sorted(known.name for known in registry)]


@command("query-qmp-schema", allow_preconfig=True)
async def query_qmp_schema(ctx: Context) -> list[SchemaInfo]:
    return cast(list[SchemaInfo], schema(registry, known_events()))


class NameInfo(QapiStruct):
    name: str | None = None


@command("query-name", allow_preconfig=True)
async def query_name(ctx: Context) -> NameInfo:
    return NameInfo(name=ctx.daemon.name)


class ShutdownCause(enum.StrEnum):
    """Why the emulator ends, as far as livedisk knows causes."""

    HOST_ERROR = "host-error"
    HOST_QMP_QUIT = "host-qmp-quit"
    HOST_SIGNAL = "host-signal"


@event("SHUTDOWN")
class Shutdown(QapiStruct):
    """The emulator ends. ``guest`` is always false: there is no guest that could shut itself down."""

    guest: bool
    reason: ShutdownCause


@command("quit", allow_preconfig=True)
async def quit_emulator(ctx: Context) -> None:
    """End the emulator. SHUTDOWN is emitted before the reply, as QEMU does."""
    ctx.daemon.quit(ShutdownCause.HOST_QMP_QUIT)


class HumanMonitorCommand(QapiStruct):
    command_line: str
    cpu_index: int | None = None


@command("human-monitor-command")
async def human_monitor_command(ctx: Context, args: HumanMonitorCommand) -> str:
    """Run a line of the human monitor and return what it prints."""
    # Imported here: few daemons ever run the human monitor.
    from livedisk.emulator.qmp.hmp import run_line

    if args.cpu_index is not None:
        raise LiveDiskError("Parameter 'cpu-index' expects a CPU number")
    return await run_line(ctx, args.command_line)


class YankInstanceBase(QapiStruct, tag_field="type"):
    """Something whose connection can be cut."""


class BlockNodeInstance(YankInstanceBase, tag="block-node"):
    node_name: str


class ChardevInstance(YankInstanceBase, tag="chardev"):
    id: str


class MigrationInstance(YankInstanceBase, tag="migration"):
    pass


YankInstance = BlockNodeInstance | ChardevInstance | MigrationInstance


class Yank(QapiStruct):
    instances: list[YankInstance]


def _yank_key(instance: YankInstance) -> yank.Key:
    if isinstance(instance, BlockNodeInstance):
        return "block-node", instance.node_name
    return ("chardev", instance.id) if isinstance(instance, ChardevInstance) else ("migration", "")


@command("yank", allow_oob=True)
async def yank_connections(ctx: Context, args: Yank) -> None:
    """Cut the connections of the named instances, all or none, even while a command hangs on one of them."""
    yank.yank([_yank_key(instance) for instance in args.instances])


@command("query-yank", allow_oob=True)
async def query_yank(ctx: Context) -> list[YankInstance]:
    return [_yank_instance(kind, name) for kind, name in yank.instances()]


def _yank_instance(kind: str, name: str) -> YankInstance:
    if kind == "block-node":
        return BlockNodeInstance(node_name=name)
    return ChardevInstance(id=name) if kind == "chardev" else MigrationInstance()

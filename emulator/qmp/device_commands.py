"""Commands on devices and the run state: device_add, device_del, stop, cont, query-status, query-blockstats.

Source: QEMU ``qapi/qdev.json``, ``qapi/misc.json``, ``qapi/run-state.json``, ``qapi/block-core.json``; messages asked
from QEMU 10.0.2.
"""

from __future__ import annotations

from typing import Any

from livedisk.emulator.device.blockstats import BlockStats, device_stats, drive_stats, node_stats
from livedisk.emulator.device.drives import Drive
from livedisk.emulator.device.runstate import State
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType
from livedisk.emulator.qmp.registry import Command, command, registry
from livedisk.emulator.qmp.visit import JSON, Syntax


class DeviceAdd(QapiStruct):
    """The model, and where and as what it appears. Besides these, any property of the model."""

    driver: str
    bus: str | UnsetType = UNSET
    id: str | UnsetType = UNSET


class _DeviceAddCommand(Command):
    """device_add's further arguments are the model's properties, which introspection does not list (QAPI's
    ``gen: false``): the device tree reads them itself."""

    async def run(self, ctx: Context, arguments: dict[str, Any], syntax: Syntax = JSON) -> Any:
        await ctx.daemon.devices.add(arguments, syntax)


async def device_add(ctx: Context, args: DeviceAdd) -> None:
    """Make a device."""
    raise NotImplementedError("_DeviceAddCommand runs it")


registry.add(_DeviceAddCommand("device_add", device_add, features=("json-cli", "json-cli-hotplug")))


class DeviceDel(QapiStruct):
    """The device's id or QOM path."""

    id: str


@command("device_del")
async def device_del(ctx: Context, args: DeviceDel) -> None:
    """End a device and its exports. DEVICE_DELETED says that it is gone."""
    await ctx.daemon.devices.delete(args.id)


@command("stop")
async def stop(ctx: Context) -> None:
    """Hold the guest's I/O. On return none is in flight and all is flushed."""
    await ctx.daemon.run_state.stop()


@command("cont")
async def cont(ctx: Context) -> None:
    """Let the guest's I/O go on; requests that failed under the policy ``stop`` are tried again."""
    await ctx.daemon.run_state.resume()


class StatusInfo(QapiStruct):
    """Whether the guest runs, and why not."""

    running: bool
    status: State


@command("query-status", allow_preconfig=True)
async def query_status(ctx: Context) -> StatusInfo:
    """The run state."""
    state = ctx.daemon.run_state
    return StatusInfo(running=state.running, status=state.state)


class QueryBlockstats(QapiStruct):
    """``query-nodes``: every node instead of every device."""

    query_nodes: bool = False


@command("query-blockstats", allow_preconfig=True)
async def query_blockstats(ctx: Context, args: QueryBlockstats) -> list[BlockStats]:
    """Statistics of every device, or of every node, oldest first."""
    if args.query_nodes:
        return [node_stats(node) for node in ctx.daemon.graph.nodes.values()]
    blocks = ctx.daemon.devices.blocks()
    return [drive_stats(one) if isinstance(one, Drive) else device_stats(one) for one in blocks]

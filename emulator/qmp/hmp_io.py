"""The human monitor's ``qemu-io``: one of qemu-io's commands at a node or a device.

As in QEMU, what a command prints goes to the daemon's standard output when it came in by human-monitor-command, whose answer is
then empty; only what the block layer refuses is answered. A person at the human monitor sees all of it there.

Who is spoken to keeps its block device as long as a request is under way in it (one that a breakpoint holds); what such a request
prints comes with the next command to the same node or device, or goes to standard output.

Source: QEMU ``block/monitor/block-hmp-cmds.c`` (hmp_qemu_io).
"""

from __future__ import annotations

import asyncio
import errno
import sys
from typing import Any

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.debug import breakpoints
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.device.virtio_blk import VirtioBlk
from livedisk.emulator.errors import DeviceNotFound, LiveDiskError
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.hmp import hmp_command
from livedisk.emulator.qmp.lookup import find_node
from livedisk.emulator.qmp.qapi import UNSET
from livedisk.emulator.qmp.qemu_io import Channel, Target, execute


class IoTargets:
    """``busy``: those that requests are under way in; ``tags``: of the breakpoints that were set; both by name."""

    def __init__(self) -> None:
        self.busy: dict[str, Target] = {}
        self.tags: dict[str, set[str]] = {}
        self._watchers: set[asyncio.Task[None]] = set()

    def keep(self, name: str, target: Target) -> None:
        """Let go of the target when its requests are done."""
        self.busy[name] = target
        watcher = asyncio.ensure_future(self._watch(name, target))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)

    async def _watch(self, name: str, target: Target) -> None:
        while target.pending:
            await asyncio.wait(set(target.pending))
        if self.busy.get(name) is target:
            del self.busy[name]
            show(target)
            await let_go(target)

    async def close(self) -> None:
        """The daemon ends: nothing may be under way any more."""
        for target in list(self.busy.values()):
            for tag in target.tags:
                found = breakpoints(target.node)
                if found is not None and found.is_suspended(tag):
                    found.resume(tag)
        if self._watchers:
            await asyncio.wait(set(self._watchers))


def show(target: Target) -> None:
    """Everything to standard output."""
    sys.stdout.write("".join(line for _, line in target.output))
    sys.stdout.flush()
    target.output = []


async def let_go(target: Target) -> None:
    """Take the command's block device off its node."""
    if target.backend.root is not None:
        await target.node.graph.detach_root(target.backend)


def _targets(ctx: Context) -> IoTargets:
    found = ctx.daemon.extensions.setdefault(IoTargets, IoTargets())
    assert isinstance(found, IoTargets)
    return found


@hmp_command(
    "qemu-io",
    args="qdev:-d,device:B,command:s",
    params='[-d] [device] "[command]"',
    help="run a qemu-io command on a block device\n"
    "\t\t\t-d: [device] is a device ID rather than a drive ID or node name",
)
async def qemu_io(ctx: Context, args: dict[str, Any]) -> str:
    name, known = args["device"], _targets(ctx)
    device = _device(ctx, name, wanted="qdev" in args)
    key = device.path if device is not None else name
    target = known.busy.pop(key, None)
    if target is None:
        target = _of_device(device) if device is not None else _of_node(ctx, name)
    target.tags = known.tags.setdefault(key, set())
    try:
        await execute(target, args["command"])
    except LiveDiskError as error:
        target.tell("\n".join(filter(None, (str(error), error.hint))))
    finally:
        lines, target.output = target.output, []
        if target.pending:
            known.keep(key, target)
        else:
            await let_go(target)
    if ctx.monitor is None:
        return "".join(line for _, line in lines)
    sys.stdout.write("".join(line for channel, line in lines if channel is Channel.OUTPUT))
    sys.stdout.flush()
    return "".join(line for channel, line in lines if channel is Channel.MONITOR)


def _device(ctx: Context, name: str, *, wanted: bool) -> VirtioBlk | None:
    """The device that is meant; ``wanted``: it must be one."""
    if wanted:
        device = ctx.daemon.devices.find(name)
        if device is None:
            raise DeviceNotFound(f"Device '{name}' not found")
        return device
    return ctx.daemon.devices.find_drive(name)


class BesideGuest(BlockBackend):
    """A second way in to a device's node, with the rights of the device: open also while the guest is held."""

    def __init__(self, device: VirtioBlk) -> None:
        super().__init__(device.backend.node.graph, description=device.backend.description)
        self.device = device

    def _check(self, node: Node, offset: int, length: int, need: Perm) -> None:
        super()._check(node, offset, length, Perm.NONE)
        edge = self.device.backend.root
        if need and (edge is None or not edge.perm & need):
            raise PermissionError(errno.EPERM, f"{self.description} has no write permission on node '{node.name}'")


def _of_device(device: VirtioBlk) -> Target:
    backend = BesideGuest(device)
    graph, edge = device.backend.node.graph, device.backend.root
    assert edge is not None
    graph.attach_root(backend, device.backend.node, Perm.NONE, Perm.ALL)
    return Target(backend, device.accounting, granted=edge.perm)


def _of_node(ctx: Context, name: str) -> Target:
    """Of a drive that no device is on, or of a node."""
    graph, drive = ctx.daemon.graph, ctx.daemon.devices.drives.find(name)
    node = find_node(ctx, UNSET if drive is None else name, name)
    backend = BlockBackend(graph)
    graph.attach_root(backend, node, Perm.NONE, Perm.ALL)
    return Target(backend, None if drive is None else drive.accounting)

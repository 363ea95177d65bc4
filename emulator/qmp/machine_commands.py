"""What clients ask of a whole machine when they connect, and commands on where nodes run.

There are no CPUs and no accelerator: the answers say so, so that tools which ask on connecting go on. All I/O runs in one event
loop, so putting a node into an iothread checks the names and changes nothing. Source: QEMU ``qapi/machine.json``,
``qapi/machine-target.json``, ``qapi/misc.json``, ``qapi/block-core.json``; messages asked from QEMU 10.0.2.
"""

from __future__ import annotations

import platform
from typing import Any

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.errors import BlockError, LiveDiskError, NodeNotFound
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.object_commands import Iothread
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, StrOrNull, UnsetType
from livedisk.emulator.qmp.registry import command


class KvmInfo(QapiStruct):
    """Hardware virtualization."""

    enabled: bool
    present: bool


@command("query-kvm")
async def query_kvm(ctx: Context) -> KvmInfo:
    """There is none, and nothing that could use it."""
    return KvmInfo(enabled=False, present=False)


class TargetInfo(QapiStruct):
    """The architecture that is emulated."""

    arch: str


@command("query-target")
async def query_target(ctx: Context) -> TargetInfo:
    """The host's: no other is emulated."""
    return TargetInfo(arch=platform.machine())


@command("query-cpus-fast")
async def query_cpus_fast(ctx: Context) -> list[dict[str, Any]]:
    """No CPU."""
    return []


class XBlockdevSetIothread(QapiStruct, kw_only=True):
    """``iothread``: an object's id, or null for the main loop. ``force``: also where the node is in use."""

    node_name: str
    iothread: StrOrNull
    force: bool = False


@command("x-blockdev-set-iothread", allow_preconfig=True, features=("unstable",))
async def x_blockdev_set_iothread(ctx: Context, args: XBlockdevSetIothread) -> None:
    """Say where a node's I/O runs: here always in the one event loop, by whatever name."""
    node = ctx.daemon.graph.nodes.get(args.node_name)
    if node is None:
        raise NodeNotFound(f"Failed to find node with node-name='{args.node_name}'")
    if not args.force and any(isinstance(edge.parent, BlockBackend) for edge in node.parents):
        raise BlockError(
            f"Node {args.node_name} is associated with a BlockBackend and could be in use "
            "(use force=true to override this check)"
        )
    if isinstance(args.iothread, str) and ctx.daemon.objects.find(args.iothread, Iothread) is None:
        raise LiveDiskError(f"Cannot find iothread {args.iothread}")


class QueryCommandLineOptions(QapiStruct):
    """``option``: only this one."""

    option: str | UnsetType = UNSET


class CommandLineParameterInfo(QapiStruct, kw_only=True):
    """One parameter of an option."""

    name: str
    type: str
    help: str | UnsetType = UNSET


class CommandLineOptionInfo(QapiStruct):
    """One option of the command line."""

    option: str
    parameters: list[CommandLineParameterInfo]


@command("query-command-line-options", allow_preconfig=True)
async def query_command_line_options(ctx: Context, args: QueryCommandLineOptions) -> list[CommandLineOptionInfo]:
    """The options of the daemon's command line. The parameters of those that describe a node, an export or a device are in
    query-qmp-schema, as the types of commands."""
    names = list(ctx.daemon.option_names)
    if isinstance(args.option, str):
        if args.option not in names:
            raise LiveDiskError(f"invalid option name: {args.option}")
        names = [args.option]
    parameters = ctx.daemon.option_parameters
    return [
        CommandLineOptionInfo(
            option=name, parameters=[CommandLineParameterInfo(name=key, type=kind) for key, kind in parameters(name)]
        )
        for name in names
    ]

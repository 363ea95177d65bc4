"""The composition root: one emulator, with its graph, devices, exports, monitors and objects.

Everything else is handed what it needs; only this module knows all of it. The command line (``cli/``) fills a `Daemon`
option by option, in the order it decides, and then lets it `serve`::

    daemon = Daemon()
    await daemon.add_blockdev({"driver": "qcow2", "node-name": "disk", "file": {...}})
    await daemon.open_chardev(options)
    daemon.add_monitor(options)
    daemon.start()
    await daemon.serve()            # until `quit`
    await daemon.close()

Whatever was opened is closed by `close`, in the order in which nothing still in use goes first: no more commands, no
more clients, no more guest, then the nodes, each of which writes back what it holds. `close` closes all of it even
where part of that fails, and says what failed.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from livedisk.emulator import drivers
from livedisk.emulator.block.activity import activate_all
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.device.runstate import RunState, State
from livedisk.emulator.device.tree import DeviceTree
from livedisk.emulator.errors import LiveDiskError, ParameterError
from livedisk.emulator.exports.exports import BlockExports
from livedisk.emulator.qmp import (
    bitmap_commands,
    block_commands,
    block_commands_internal,
    block_commands_snapshot,
    blockdev,
    chardev_commands,
    child_commands,
    control,
    descriptor_commands,
    device_commands,
    export_commands,
    latency_commands,
    machine_commands,
    object_commands,
    qom_commands,
    query_block,
    query_graph,
    query_uuid,
    throttle_commands,
)
from livedisk.emulator.qmp.block_events import BlockImageCorrupted, QuorumFailure, QuorumReportBad
from livedisk.emulator.qmp.chardev import Chardev, MonitorOptions, backend_name
from livedisk.emulator.qmp.chardev_log import Log, Logged
from livedisk.emulator.qmp.context import Context, Extension
from livedisk.emulator.qmp.control import Shutdown, ShutdownCause
from livedisk.emulator.qmp.events import EventHub
from livedisk.emulator.qmp.monitor import Dispatcher, Frontend, QmpMonitor
from livedisk.emulator.qmp.object_commands import Iothread, Objects
from livedisk.emulator.qmp.qapi import UNSET
from livedisk.emulator.qmp.registry import registry
from livedisk.emulator.qmp.server import Device, open_chardev
from livedisk.emulator.qmp.visit import JSON, Syntax, visit
from livedisk.emulator.tls import authz, credentials
from livedisk.nbd.client_connection import Secure

log = logging.getLogger(__name__)

COMMANDS = (
    authz,
    bitmap_commands,
    block_commands,
    block_commands_internal,
    block_commands_snapshot,
    blockdev,
    child_commands,
    chardev_commands,
    control,
    credentials,
    descriptor_commands,
    device_commands,
    drivers,
    export_commands,
    latency_commands,
    machine_commands,
    object_commands,
    query_block,
    query_graph,
    query_uuid,
    qom_commands,
    throttle_commands,
)
"""Modules that register commands, events, drivers and option types by being imported."""

RECURSION = 10_000
"""Nested Python calls, which take about 4 MiB of the stack at most."""
NO_UUID = "00000000-0000-0000-0000-000000000000"


class Daemon:
    """One emulator; the `Daemon` that commands see (``qmp/context.py``).

    ``name`` and ``uuid`` are only told to whoever asks. ``state`` is the run state until `start`.
    """

    def __init__(self, *, name: str | None = None, uuid: str = NO_UUID, state: State = State.PRELAUNCH) -> None:
        # A request on the slow path goes down a chain by nested calls, a few for each image; so does opening one.
        sys.setrecursionlimit(max(sys.getrecursionlimit(), RECURSION))
        self.name = name
        self.uuid = uuid
        self.option_names: tuple[str, ...] = ()
        self.option_parameters: Callable[[str], list[tuple[str, str]]] = lambda option: []
        self.graph = Graph()
        self.events = EventHub()
        self.objects = Objects()
        self.run_state = RunState(self.events.emit, self._flush_all, state)
        self.devices = DeviceTree(self.graph, self.run_state, self.events.emit, self._is_iothread)
        self.exports = BlockExports(self.graph, self.devices, self.events.emit, self._is_iothread, self.objects)
        self.graph.parse_options = self.parse_options
        self.run_state.before_run.append(lambda: activate_all(self.graph))
        self.run_state.on_change.append(self._expect_guest)
        throttle_commands.connect(self.graph.throttle_groups, self.objects)
        self.graph.client_tls = self._client_tls
        self.graph.on_corruption.append(self._announce_corruption)
        self.graph.on_vote.append(self._announce_vote)
        self.extensions: dict[type, Extension] = {}
        self._dispatcher = Dispatcher()
        self._chardevs: dict[str, Device] = {}
        self._logs: dict[str, Log] = {}
        self._monitored: set[str] = set()
        self._end = asyncio.Event()

    # -- filling it --------------------------------------------------------------------------------------------------
    def parse_options(self, options: dict[str, Any]) -> BlockdevOptions:
        """Options of a node, as JSON has them, checked and typed. Raises ParameterError."""
        return visit(BlockdevOptions, options, JSON)

    async def add_blockdev(self, options: BlockdevOptions) -> None:
        """Open a node that the user owns. Raises BlockError or OSError."""
        await block_commands.blockdev_add(Context(self), options)

    async def add_device(self, values: dict[str, Any], syntax: Syntax) -> None:
        """Make a device. Raises LiveDiskError."""
        await self.devices.add(values, syntax)

    async def open_chardev(self, options: Chardev) -> None:
        """Open a character device; with ``wait=on`` returns when its first client is there. Raises LiveDiskError."""
        if options.id in self._chardevs:
            raise ParameterError(f"Duplicate ID '{options.id}' for chardev")
        written = Log(options) if options.logfile is not None else None
        try:
            self._chardevs[options.id] = await open_chardev(options, info=log.info, objects=self.objects)
        except BaseException:
            if written is not None:
                written.close()
            raise
        if written is not None:
            self._logs[options.id] = written

    def chardevs(self) -> Iterable[tuple[str, str]]:
        """Every character device: its id, and the name of its back-end."""
        return [(name, backend_name(device.options)) for name, device in self._chardevs.items()]

    async def close_chardev(self, name: str) -> None:
        """Close a character device that no monitor speaks on."""
        await self._chardevs.pop(name).close()
        written = self._logs.pop(name, None)
        if written is not None:
            written.close()

    def chardev(self, name: str) -> Device | None:
        """The character device of that id."""
        return self._chardevs.get(name)

    def chardev_is_busy(self, name: str) -> bool:
        """Whether a monitor speaks on it."""
        return name in self._monitored

    def add_monitor(self, options: MonitorOptions) -> None:
        """Let a monitor speak on a character device. Raises ParameterError in QEMU's words."""
        name = options.chardev
        if name not in self._chardevs:
            raise ParameterError(f'chardev "{name}" not found')
        if name in self._monitored:
            raise ParameterError(f"chardev '{name}' is already in use")
        monitor: Frontend
        if options.mode == "control":
            monitor = QmpMonitor(self, registry, self._dispatcher, pretty=bool(options.pretty))
        else:
            # Imported here: few daemons have a human monitor.
            from livedisk.emulator.qmp.hmp import HumanMonitor

            monitor = HumanMonitor(self, self._dispatcher)
        self.plug(name, monitor)

    def plug(self, name: str, frontend: Frontend) -> None:
        """Put a frontend on a character device, which is in use from here on. Raises ParameterError in QEMU's words."""
        if name not in self._chardevs:
            raise ParameterError(f'chardev "{name}" not found')
        if name in self._monitored:
            raise ParameterError(f"chardev '{name}' is already in use")
        self._monitored.add(name)
        written = self._logs.get(name)
        self._chardevs[name].attach(frontend if written is None else Logged(frontend, written))

    async def exclusively(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something in turn with the monitors' commands: none of them runs meanwhile."""
        await self._dispatcher.exclusively(work)

    # -- life --------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Let the guest run."""
        self.run_state.start()

    async def serve(self) -> None:
        """Return when something asked the emulator to `quit`."""
        await self._end.wait()

    def quit(self, reason: str) -> None:
        """Announce SHUTDOWN and let `serve` return. The second time does nothing."""
        if not self._end.is_set():
            self._end.set()
            self.events.emit(Shutdown(guest=False, reason=ShutdownCause(reason)))

    async def close(self) -> None:
        """Close everything; every image is complete on return. Raises LiveDiskError saying what could not be closed."""
        failures: list[str] = []

        async def attempt(what: str, call: Callable[[], Awaitable[None]]) -> None:
            try:
                await call()
            except (OSError, LiveDiskError) as error:
                failures.append(f"{what}: {error}")

        await attempt("monitors", self._dispatcher.close)
        for extension in list(self.extensions.values()):
            await attempt(type(extension).__name__.lower(), extension.close)
        await attempt("exports", self.exports.close)
        await attempt("devices", self.devices.close)
        await attempt("nodes", self.graph.close)
        self.events.close()
        for name, chardev in self._chardevs.items():
            await attempt(f"chardev {name}", chardev.close)
        for written in self._logs.values():
            written.close()
        if failures:
            raise LiveDiskError("; ".join(failures))

    # -- what parts ask of the whole -----------------------------------------------------------------------------------
    async def _flush_all(self) -> None:
        """Put every acknowledged write on stable storage. Every node has its turn; the first failure is raised at the end."""
        failures: list[OSError] = []
        for node in list(self.graph.nodes.values()):
            top = not node.parents or any(not isinstance(edge.parent, Node) for edge in node.parents)
            if top and not node.read_only and self._is_open(node):
                try:
                    await node.flush()
                except OSError as error:
                    if self._is_open(node):
                        failures.append(error)
        if failures:
            raise failures[0]

    def _is_open(self, node: Node) -> bool:
        """False once it was closed, a job's for example, while others were flushed: what it had is on stable storage then."""
        return self.graph.nodes.get(node.name) is node

    def _client_tls(self, creds: str, hostname: str | None) -> Secure:
        return credentials.client_tls(self.objects, creds, hostname).secure

    def _expect_guest(self, state: State) -> None:
        self.graph.opens_inactive = state is State.INMIGRATE

    def _is_iothread(self, name: str) -> bool:
        return self.objects.find(name, Iothread) is not None

    def _announce_vote(self, what: str, told: dict[str, Any]) -> None:
        self.events.emit(QuorumFailure(**told) if what == "failure" else QuorumReportBad(**told))

    def _announce_corruption(self, node: Node, text: str, offset: int | None, size: int | None, fatal: bool) -> None:
        self.events.emit(
            BlockImageCorrupted(
                device="",
                node_name=node.name,
                msg=text,
                offset=UNSET if offset is None else offset,
                size=UNSET if size is None else size,
                fatal=fatal,
            )
        )

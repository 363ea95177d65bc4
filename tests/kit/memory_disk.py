"""A disk in memory with a driver of its own, for tests of whatever stands above a node.

`MemoryDriver` keeps a bytearray and can be told to misbehave: `faults` are raised one a request, `gate` holds every
request until it is set. `flushes` counts. `Bench` is a graph, a run state, devices and exports around such disks, as
the daemon has them, with the events that they emit.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from typing import Any

import msgspec

from livedisk.emulator.block.driver import DRIVERS, Driver, register
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.block.types import Kind, Preallocation, Segment, ZeroFlags
from livedisk.emulator.device.runstate import RunState, State
from livedisk.emulator.device.tree import DeviceTree
from livedisk.emulator.device.virtio_blk import VirtioBlk
from livedisk.emulator.exports.exports import BlockExports
from livedisk.emulator.qmp.object_commands import Objects
from livedisk.emulator.qmp.visit import JSON


class MemoryOptions(BlockdevOptions):
    """``size`` in bytes; ``slow_zeroes``: write_zeroes has no quick way."""

    size: int = 1 << 20
    slow_zeroes: bool = False


class MemoryDriver(Driver):
    """Bytes, faults and a gate."""

    name = "test-memory"
    Options = MemoryOptions
    options: MemoryOptions

    def __init__(self, node: Node, options: Any) -> None:
        super().__init__(node, options)
        self.bytes = bytearray(options.size)
        self.faults: deque[int] = deque()
        self.gate: asyncio.Event | None = None
        self.flushes = 0
        self.under_way = 0
        self.log: list[str] = []

    async def open(self) -> None:
        """Nothing to open."""

    @property
    def size(self) -> int:
        return len(self.bytes)

    def map(self, offset: int, length: int) -> Segment:
        return Segment(Kind.OPAQUE, length)

    async def _enter(self, what: str) -> None:
        self.log.append(what)
        self.under_way += 1
        try:
            if self.gate is not None:
                await self.gate.wait()
            if self.faults:
                number = self.faults.popleft()
                if number:
                    raise OSError(number, os.strerror(number))
        finally:
            self.under_way -= 1

    async def read(self, offset: int, view: memoryview) -> None:
        await self._enter("read")
        view[:] = self.bytes[offset : offset + len(view)]

    async def write(self, offset: int, data: memoryview) -> None:
        await self._enter("write")
        self.bytes[offset : offset + len(data)] = data

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        if self.options.slow_zeroes:
            await super().write_zeroes(offset, length, flags)
        await self._enter(f"zero {flags!r}")
        self.bytes[offset : offset + length] = bytes(length)

    async def discard(self, offset: int, length: int) -> None:
        await self._enter("discard")

    async def flush(self) -> None:
        await self._enter("flush")
        self.flushes += 1

    async def truncate(self, size: int, *, exact: bool, prealloc: Preallocation) -> None:
        self.bytes[:] = self.bytes[:size].ljust(size, b"\0")


if MemoryDriver.name not in DRIVERS:
    register(MemoryDriver)


class Bench:
    """What the daemon puts together, without monitors. Make it inside a running loop."""

    def __init__(self, *, running: bool = True, iothreads: tuple[str, ...] = ()) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.graph = Graph()
        self.run_state = RunState(self._emit, self._flush)
        self.devices = DeviceTree(self.graph, self.run_state, self._emit, iothreads.__contains__)
        self.exports = BlockExports(self.graph, self.devices, self._emit, iothreads.__contains__, Objects())
        if running:
            self.run_state.move(State.RUNNING)

    def _emit(self, data: msgspec.Struct) -> None:
        self.events.append((type(data).__name__, msgspec.to_builtins(data)))

    async def _flush(self) -> None:
        for node in list(self.graph.nodes.values()):
            await node.flush()

    @property
    def event_names(self) -> list[str]:
        return [name for name, _ in self.events]

    async def disk(self, name: str = "disk", **options: Any) -> MemoryDriver:
        """A new node on memory; its driver."""
        options.setdefault("discard", "unmap")
        wanted = msgspec.convert({"driver": "test-memory", "node-name": name, **options}, MemoryOptions)
        node = await self.graph.add(wanted)
        assert isinstance(node.driver, MemoryDriver)
        return node.driver

    async def device(self, drive: str = "disk", id: str = "virtio0", **properties: Any) -> VirtioBlk:
        """A device by device_add's arguments; ``_`` stands for itself, so use ``**{"share-rw": True}``."""
        return await self.devices.add({"driver": "virtio-blk-pci", "drive": drive, "id": id, **properties}, JSON)

    async def close(self) -> None:
        await self.exports.close()
        await self.devices.close()
        await self.graph.close()

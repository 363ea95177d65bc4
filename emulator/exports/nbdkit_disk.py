"""A graph of nodes for callers on other threads: what `nbdkit_plugin` serves.

The event loop, and with it the whole graph, lives in a thread of its own. `Client`'s methods are called by nbdkit's
threads, one a request; each hands its request to the loop and waits. Most are answered in the loop's next turn by the
fast path, without a task.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import uvloop

from livedisk.emulator import drivers
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.errors import BlockError, NodeNotFound
from livedisk.emulator.exports.contexts import BASE_ALLOCATION
from livedisk.emulator.exports.node_export import NodeExport
from livedisk.emulator.qmp import blockdev
from livedisk.emulator.qmp.keyval import parse_option
from livedisk.emulator.qmp.visit import JSON, visit
from livedisk.nbd.export import DATA, HOLE, MISS

REGISTERED = (blockdev, drivers)
"""Imported for what they register: the drivers, and the union of their options."""

MAX_EXTENTS = 1024
"""Extents in one answer; the client asks again for the rest."""

R = TypeVar("R")


def node_options(text: str) -> BlockdevOptions:
    """A node in the syntax of ``-blockdev``. Raises ParameterError in QEMU's words, or BlockError without a name."""
    options = parse_option(BlockdevOptions, text, implied="driver")
    if not isinstance(options.node_name, str):
        raise BlockError("'node-name' must be specified for the root node")
    return options


def file_options(path: str, format: str) -> BlockdevOptions:
    """The node "disk": an image of that format in a file. Raises ParameterError."""
    storage = {"driver": "file", "filename": path}
    values = {**storage} if format == "file" else {"driver": format, "file": storage}
    return visit(BlockdevOptions, {**values, "node-name": "disk"}, JSON)


class Disk:
    """Nodes opened in a loop of their own, from `start` to `stop`. The last node is the default one."""

    def __init__(self, nodes: list[BlockdevOptions]) -> None:
        self._options = nodes
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._graph: Graph | None = None

    # -- life --------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Open every node. Raises BlockError or OSError."""
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="livedisk", daemon=True)
        self._thread.start()
        try:
            self.run(self._open())
        except BaseException:
            self.stop()
            raise

    async def _open(self) -> None:
        self._graph = Graph()
        self._graph.parse_options = lambda values: visit(BlockdevOptions, values, JSON)
        for options in self._options:
            await self._graph.add(options)

    def stop(self) -> None:
        """Write back, close every node, end the loop."""
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        try:
            if self._graph is not None:
                self.run(self._graph.close())
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
            self._loop = self._thread = self._graph = None

    # -- for callers on other threads ------------------------------------------------------------------------------------
    def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Run a coroutine in the loop and wait for it."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def soon(self, call: Callable[[], None]) -> None:
        """Run a function in the loop's next turn."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(call)

    def task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a coroutine, from within the loop."""
        assert self._loop is not None
        return self._loop.create_task(work)

    def names(self) -> list[str]:
        """Nodes that were named on the command line."""
        return [str(options.node_name) for options in self._options]

    @property
    def default(self) -> str:
        """The node served under the empty name."""
        return self.names()[-1]

    def connect(self, name: str, *, writable: bool) -> Client:
        """A new client of the node of that name ("": the default one). Raises NodeNotFound or PermissionConflict."""
        return self.run(self._connect(name or self.default, writable))

    async def _connect(self, name: str, writable: bool) -> Client:
        graph = self._graph
        assert graph is not None
        if name not in self.names():
            raise NodeNotFound(f"no export '{name}'; there are: {', '.join(self.names())}")
        node: Node = graph.nodes[name]
        export = NodeExport(graph, name, writable=writable and not node.read_only)
        export.attach(node)
        return Client(self, export)


class Client:
    """One connection's view of a node. Offsets and lengths are bytes; failures are OSError. Not for the loop's own
    thread."""

    def __init__(self, disk: Disk, export: NodeExport) -> None:
        self._disk = disk
        self._export = export
        self.writable = not export.read_only
        self.description = f"{export.node.options.driver} node {export.name}"

    @property
    def size(self) -> int:
        """Bytes."""
        return self._export.size

    @property
    def block_size(self) -> tuple[int, int, int]:
        """Smallest, preferred, largest request; nbdkit wants powers of two for the first two."""
        export = self._export
        return export.min_block, export.preferred_block, export.max_payload

    def close(self) -> None:
        """Leave the graph."""
        self._disk.run(self._export.close())

    def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view``."""
        self._fast_or_slow(lambda: self._try_read(offset, view), lambda: self._export.read(offset, view))

    def _try_read(self, offset: int, view: memoryview) -> int:
        outcome = self._export.try_read(offset, view)
        if outcome == HOLE:
            view[:] = bytes(len(view))
            return DATA
        return outcome

    def write(self, offset: int, view: memoryview, *, fua: bool) -> None:
        """Write ``view``."""
        export = self._export
        self._fast_or_slow(
            lambda: MISS if fua else export.try_write(offset, view),
            lambda: export.write(offset, view, fua=fua),
        )

    def _fast_or_slow(self, fast: Callable[[], int], slow: Callable[[], Coroutine[Any, Any, None]]) -> None:
        done: Future[None] = Future()

        def attempt() -> None:
            try:
                if fast() != MISS:
                    done.set_result(None)
                    return
            except OSError:
                pass  # fails again, with its reason, in the slow path
            self._disk.task(slow()).add_done_callback(finish)

        def finish(task: asyncio.Task[None]) -> None:
            error = task.exception()
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        self._disk.soon(attempt)
        done.result()

    def flush(self) -> None:
        """To stable storage."""
        self._disk.run(self._export.flush())

    def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """Discard."""
        self._disk.run(self._export.trim(offset, length, fua=fua))

    def zero(self, offset: int, length: int, *, fua: bool, may_unmap: bool, fast: bool) -> None:
        """Write zeroes; with ``fast`` raises ENOTSUP where that is slow."""
        self._disk.run(self._export.write_zeroes(offset, length, fua=fua, may_unmap=may_unmap, fast=fast))

    def cache(self, offset: int, length: int) -> None:
        """Prefetch."""
        self._disk.run(self._export.cache(offset, length))

    def extents(self, offset: int, length: int, *, one: bool) -> list[tuple[int, int, int]]:
        """``(offset, length, flags)`` of the extents from ``offset`` on, flags as in base:allocation."""
        limit = 1 if one else MAX_EXTENTS
        found = self._disk.run(self._export.block_status(BASE_ALLOCATION, offset, length, limit))
        result: list[tuple[int, int, int]] = []
        for extent in found:
            result.append((offset, extent.length, extent.flags))
            offset += extent.length
        return result

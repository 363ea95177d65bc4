"""A disk under test: a graph with one backend on it, opened from options as QMP takes them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import livedisk.emulator.drivers  # registers them
import livedisk.emulator.qmp.blockdev  # noqa: F401  joins their options into one type
from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.qmp.visit import JSON, visit

ALL_WRITES = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE


def parse(options: Mapping[str, Any]) -> BlockdevOptions:
    """Options as a JSON object, typed."""
    return visit(BlockdevOptions, dict(options), JSON)


def new_graph() -> Graph:
    graph = Graph()
    graph.parse_options = parse
    return graph


@asynccontextmanager
async def opened(
    options: Mapping[str, Any], perm: Perm = ALL_WRITES, shared: Perm = Perm.ALL
) -> AsyncIterator[BlockBackend]:
    """The disk's backend, attached with these permissions; everything is closed afterwards."""
    graph = new_graph()
    try:
        node = await graph.open(parse({"node-name": "disk", **options}))
        backend = BlockBackend(graph, "test")
        try:
            graph.attach_root(backend, node, perm, shared)
        except BaseException:
            await graph.release(node)
            raise
        yield backend
    finally:
        await graph.close()


async def read(backend: BlockBackend, offset: int, length: int) -> bytes:
    """What the slow path reads."""
    buffer = bytearray(b"\xa5" * length)
    await backend.read(offset, memoryview(buffer))
    return bytes(buffer)

"""What blockdev-create and x-blockdev-amend take, whatever the driver; `Driver.create_options` and `amend_options` add the rest.

A driver that can make images overrides `Driver.create_options` and `Driver.create`. Its options' module is imported when it is
asked for: a daemon that makes no image does not load what makes them. Source: QEMU ``qapi/block-core.json``
(BlockdevCreateOptions, BlockdevAmendOptions).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.errors import NodeNotFound

if TYPE_CHECKING:
    from livedisk.emulator.block.graph import Graph
    from livedisk.emulator.block.node import Node


class BlockdevCreateOptions(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """``driver`` says who makes the image; a driver that makes none takes nothing else."""

    driver: str


class BlockdevAmendOptions(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """``driver`` is the image's own; what may be amended is the driver's to say."""

    driver: str


@asynccontextmanager
async def taken(graph: Graph, ref: Any) -> AsyncIterator[Node]:
    """The node that a reference leads to, held for writing an image into it: nobody else writes or resizes it meanwhile.

    ``ref``: a node's name, or the options of one to open for as long. Raises NodeNotFound, BlockError, PermissionConflict or
    OSError.
    """
    node = await graph.open(ref) if isinstance(ref, BlockdevOptions) else _named(graph, ref)
    backend, needed = BlockBackend(graph), Perm.WRITE | Perm.RESIZE
    try:
        graph.attach_root(backend, node, needed, Perm.ALL)
    except BaseException:
        await graph.release(node)
        raise
    try:
        # In two steps, so that a conflict is told as QEMU tells it: of what we need, not of what others do.
        graph.set_root_permissions(backend, needed, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED)
        yield node
    finally:
        await graph.detach_root(backend)


def _named(graph: Graph, name: str) -> Node:
    if name not in graph.nodes:
        raise NodeNotFound(f"Cannot find device='{name}' nor node-name='{name}'")
    return graph.nodes[name]

"""Putting a filter on a node while guests write, and taking it away: what every job does first and last.

The filter is opened on the node while requests still go to the node itself. Then they are kept out, and every user of the
node becomes a user of the filter, in one step. A filter that the user did not name is ``implicit``: queries look through
it. Source: QEMU ``block.c`` (bdrv_insert_node, bdrv_drop_filter).
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from livedisk.emulator.block.driver import driver_class
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.block.types import Discard


async def insert_filter(
    graph: Graph, driver: str, below: Node, name: str | msgspec.UnsetType, **options: object
) -> Node:
    """Open ``driver`` on ``below`` and give it the users of ``below``. ``name``: the filter's, or UNSET for a hidden one.

    Raises BlockError, PermissionConflict or OSError; nothing is left then.
    """
    node = await open_filter(graph, driver, below, name, **options)
    await put_on(graph, node, below)
    return node


async def open_filter(graph: Graph, driver: str, below: Node, name: str | msgspec.UnsetType, **options: object) -> Node:
    """The first half of `insert_filter`: the filter stands on ``below``, without users."""
    options_class = driver_class(driver).Options
    child = "backing" if "backing" in options_class.__struct_fields__ else "file"
    make: Callable[..., BlockdevOptions] = options_class
    given = {"driver": driver, "node_name": name, "discard": Discard.UNMAP, child: below.name, **options}
    node = await graph.open(make(**given))
    node.implicit = name is msgspec.UNSET
    return node


async def put_on(graph: Graph, node: Node, below: Node) -> None:
    """The second half: the users of ``below`` become the filter's. If they cannot, the filter is closed."""
    try:
        async with graph.drained(below):
            graph.replace_node(below, node)
    except BaseException:
        await graph.release(node)
        raise


async def remove_filter(graph: Graph, node: Node) -> None:
    """Give the filter's users back to the node below, and close it. Nobody holds it but them."""
    edge = node.filtered
    if edge is None:  # it had no users, and was closed when the job let go of it
        return
    async with graph.drained(node):
        graph.replace_node(node, edge.node)
    await graph.release(node)


def under(node: Node) -> Node | None:
    """What shows through ``node``: a filter's child or a backing file, or None."""
    edge = node.filtered or node.backing
    return edge.node if edge is not None else None


def skip_filters(node: Node) -> Node:
    """The first node from here down that is no filter."""
    while node.filtered is not None:
        node = node.filtered.node
    return node

"""x-debug-query-block-graph: all nodes and edges with their permissions, for drawing.

Source: QEMU ``qapi/block-core.json`` (XDbgBlockGraph), ``block.c`` (bdrv_get_xdbg_block_graph). Order and numbering
are QEMU's: everything is found oldest first and listed newest first.
"""

from __future__ import annotations

import enum

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.node import Edge, Node
from livedisk.emulator.block.permissions import BlockPermission, Perm
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.qapi import QapiStruct
from livedisk.emulator.qmp.registry import command


class XDbgBlockGraphNodeType(enum.StrEnum):
    """What a node of the picture is."""

    BLOCK_BACKEND = "block-backend"
    BLOCK_JOB = "block-job"
    BLOCK_DRIVER = "block-driver"


class XDbgBlockGraphNode(QapiStruct):
    """``name``: the node's, or the device's that uses the backend."""

    id: int
    type: XDbgBlockGraphNodeType
    name: str


class XDbgBlockGraphEdge(QapiStruct):
    """``parent`` and ``child`` are ids; ``perm`` is what the parent needs, ``shared-perm`` what it allows others."""

    parent: int
    child: int
    name: str
    perm: list[BlockPermission]
    shared_perm: list[BlockPermission]


class XDbgBlockGraph(QapiStruct):
    """The picture."""

    nodes: list[XDbgBlockGraphNode]
    edges: list[XDbgBlockGraphEdge]


class _Drawing:
    """Numbers what it meets, in the order of meeting."""

    def __init__(self) -> None:
        self._ids: dict[object, int] = {}
        self.nodes: list[XDbgBlockGraphNode] = []
        self.edges: list[XDbgBlockGraphEdge] = []

    def number(self, thing: object) -> int:
        return self._ids.setdefault(thing, len(self._ids) + 1)

    def knows(self, thing: object) -> bool:
        return thing in self._ids

    def add(self, thing: object, kind: XDbgBlockGraphNodeType, name: str) -> None:
        self.nodes.insert(0, XDbgBlockGraphNode(id=self.number(thing), type=kind, name=name))

    def connect(self, edge: Edge) -> None:
        drawn = XDbgBlockGraphEdge(
            parent=self.number(_drawn(edge.parent)),
            child=self.number(edge.node),
            name=edge.name,
            perm=_listed(edge.perm),
            shared_perm=_listed(edge.shared),
        )
        self.edges.insert(0, drawn)


def _drawn(parent: object) -> object:
    """What stands in the picture for an edge's parent: a job, once, for all its holds."""
    return (parent.owner or parent) if isinstance(parent, BlockBackend) else parent


def _listed(perm: Perm) -> list[BlockPermission]:
    return [BlockPermission[bit.name] for bit in reversed(Perm) if bit.name and perm & bit]


@command("x-debug-query-block-graph", allow_preconfig=True, features=("unstable",))
async def x_debug_query_block_graph(ctx: Context) -> XDbgBlockGraph:
    """The graph as it stands."""
    drawing = _Drawing()
    graph = ctx.daemon.graph
    for backend in graph.backends:
        _draw_backend(drawing, backend)
    for node in graph.nodes.values():
        _draw_node(drawing, node)
    return XDbgBlockGraph(nodes=drawing.nodes, edges=drawing.edges)


def _draw_backend(drawing: _Drawing, backend: BlockBackend) -> None:
    kind = XDbgBlockGraphNodeType.BLOCK_JOB if backend.of_job else XDbgBlockGraphNodeType.BLOCK_BACKEND
    drawn = _drawn(backend)
    if not drawing.knows(drawn):
        drawing.add(drawn, kind, backend.name)
    if backend.root is not None:
        drawing.connect(backend.root)


def _draw_node(drawing: _Drawing, node: Node) -> None:
    drawing.add(node, XDbgBlockGraphNodeType.BLOCK_DRIVER, node.name)
    for edge in reversed(node.children.values()):
        drawing.connect(edge)

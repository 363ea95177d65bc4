"""Finding one's way in a backing chain by what users call its images."""

from __future__ import annotations

import os

from livedisk.emulator.block.node import Edge, Node
from livedisk.emulator.qmp.filenames import Names
from livedisk.jobs.filters import skip_filters, under


def chain(top: Node) -> list[Node]:
    """``top`` and all that shows through it, filters included."""
    nodes = [top]
    while (below := under(nodes[-1])) is not None:
        nodes.append(below)
    return nodes


def links(top: Node, bottom: Node) -> list[Edge]:
    """The edges from ``top`` down to ``bottom``."""
    edges: list[Edge] = []
    while top is not bottom:
        edge = top.filtered or top.backing
        assert edge is not None
        edges.append(edge)
        top = edge.node
    return edges


def with_filters(base: Node, top: Node) -> Node:
    """The highest node of ``top``'s chain that shows what ``base`` shows: the last filter on it, or ``base`` itself."""
    return next(layer for layer in chain(top) if skip_filters(layer) is skip_filters(base))


def find_backing(top: Node, name: str) -> Node | None:
    """The image below ``top`` that ``name`` means: as the image above it records it, or as a path (QEMU's
    bdrv_find_backing_image)."""
    names = Names()
    layer: Node | None = skip_filters(top)
    while layer is not None and layer.backing is not None:
        below = skip_filters(layer.backing.node)
        known = {layer.driver.backing_filename(), names.full_backing(layer), names[below]}
        if name in known or _same_file(layer, name, below.driver.filename):
            return below
        layer = below
    return None


def _same_file(image: Node, name: str, path: str) -> bool:
    """Whether a name that is relative to the image means the file at ``path``."""
    if not path or ":" in name.partition("/")[0]:
        return False
    folder = os.path.dirname(image.driver.filename)
    return os.path.realpath(os.path.join(folder, name)) == os.path.realpath(path)


def overlays(node: Node) -> list[Edge]:
    """The backing edges by which images stand on ``node``, filters between them skipped."""
    found: list[Edge] = []
    for edge in node.parents:
        if isinstance(edge.parent, Node):
            if edge.parent.backing is edge and not edge.parent.driver.is_filter:
                found.append(edge)
            elif edge.parent.filtered is edge:
                found += overlays(edge.parent)
    return found

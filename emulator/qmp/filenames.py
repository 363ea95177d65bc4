"""What a node is called in terms of files: the name one would open to get the same node.

A plain file name (or URI) serves where opening it, with the node's format, would give the same nodes below; that is so
unless an option changes what the node shows (raw's offset) or its backing file is not the one that its header names.
Otherwise the name is ``json:{...}``, the options of the whole tree. A filter that a job put there, and that no user
named, is called what it shows. Source: QEMU ``block.c`` (bdrv_refresh_filename,
bdrv_backing_overridden, append_strong_runtime_options); members stand in QEMU's order, so that names compare as text.

A node's name depends on its children's. They are named first, each once, without recursion: chains can be long.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator
from functools import cache, cached_property
from typing import Any

import msgspec

from livedisk.emulator.block.driver import DRIVERS
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.qmp.encode import encode

_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
"""``nbd:``, ``json:``, ``file:`` at a name's start. Source: QEMU's path_has_protocol."""
_WEAK = {
    "null-co": {"latency-ns"},
    "null-aio": {"latency-ns"},
    "file": None,
    "host_device": None,
    "qcow2": None,
    "copy-on-read": {"bottom"},
    "nbd": {"reconnect-delay", "open-timeout", "x-dirty-bitmap"},
    "blklogwrites": {"log-super-update-interval"},
    "preallocate": None,
}
"""Options of a driver's own that do not change what the node shows; None: none of them does."""


def filename(node: Node) -> str:
    """The node's name as QEMU gives it: plain where that is enough, else ``json:{...}``."""
    return Names()[node]


class Names:
    """The names of nodes at one moment, each found once, however many nodes share what is below them.

    Made for one query and dropped with it: a change of the graph changes names.
    """

    def __init__(self) -> None:
        self._known: dict[Node, _Named] = {}

    def __getitem__(self, node: Node) -> str:
        return self._named(node).name

    def full_backing(self, node: Node) -> str | None:
        """The backing file that the image's header names, resolved against the image's own place; None without one, or where
        that place has no folders (an export)."""
        recorded = node.driver.backing_filename()
        if not recorded:
            return None
        base = self._storage(node)
        stands_alone = recorded.startswith("/") or _PROTOCOL.match(recorded)
        if not stands_alone and any(base.partition(":")[0] in driver.protocols for driver in DRIVERS.values()):
            return None
        return combine(base, recorded)

    def _storage(self, node: Node) -> str:
        """The plain name of the file under a format, even where options keep it from standing for the node."""
        while node.children:
            edge = node.children.get("file") or node.filtered
            if edge is None:
                return ""
            node = edge.node
        return self._named(node).exact

    def _named(self, node: Node) -> _Named:
        for below in _children_first(node, self._known):
            children = {name: self._known[edge.node] for name, edge in below.children.items()}
            shown = below.filtered
            self._known[below] = (
                children[shown.name] if below.implicit and shown is not None else _Named(below, children)
            )
        return self._known[node]


def combine(base: str, name: str) -> str:
    """``name`` as it is meant in an image called ``base``: absolute names and ``protocol:`` stand for themselves."""
    if name.startswith("/") or _PROTOCOL.match(name) or "/" not in base:
        return name
    return os.path.join(os.path.dirname(base), name)


class _Named:
    """One node's names, from those of its children.

    ``overridden``: its backing file is not the one that opening it by its name would find. ``exact``: the plain name,
    or "". ``options``: those that open the node anew, children included (QEMU's full_open_options).
    """

    def __init__(self, node: Node, children: dict[str, _Named]) -> None:
        strong = _strong_options(node)
        self.overridden = self._is_overridden(node, children.get("backing"))
        self.exact = self._exact(node, children, strong)
        self.options: dict[str, Any] = {"driver": node.options.driver, **strong}
        own = _own_options(node)
        if "filename" in own:
            self.options["filename"] = own["filename"]
        for name, child in children.items():
            if name.startswith("children."):
                self.options.setdefault("children", []).append(child.options)
            elif name != "backing" or self.overridden:
                self.options[name] = child.options
        if self.overridden and node.backing is None:
            self.options["backing"] = None

    @cached_property
    def name(self) -> str:
        return self.exact or "json:" + encode(self.options).decode().rstrip()

    def _is_overridden(self, node: Node, child: _Named | None) -> bool:
        recorded = node.driver.backing_filename() or ""
        if node.backing is None or child is None:
            return bool(recorded)
        silent = getattr(node.options, "backing", msgspec.UNSET) is msgspec.UNSET
        if silent and node.backing.node.opened_by is node and recorded == node.opened_backing:
            return False  # it is what the header led to
        return recorded != child.name

    def _exact(self, node: Node, children: dict[str, _Named], strong: dict[str, Any]) -> str:
        own = node.driver.exact_filename({name: child.exact for name, child in children.items()}, strong)
        if own is not None:
            return own
        if not node.children:
            return "" if strong else node.driver.filename
        if node.driver.named_as_child:
            return next(iter(children.values())).name
        file = children.get("file")
        if node.driver.is_filter or file is None or strong or self.overridden:
            return ""
        below = node.file.node.driver
        is_storage = not (below.is_format or below.is_filter) or below.filename_children
        return file.exact if is_storage else ""


def _children_first(node: Node, known: Container[Node]) -> Iterator[Node]:
    """``node`` and everything below it that is not known yet, each once, children before parents."""
    if node in known:
        return
    seen = {node}
    path = [(node, iter(node.children.values()))]
    while path:
        current, edges = path[-1]
        child = next((edge.node for edge in edges if edge.node not in seen and edge.node not in known), None)
        if child is None:
            path.pop()
            yield current
        else:
            seen.add(child)
            path.append((child, iter(child.children.values())))


@cache
def _own_members(cls: type[BlockdevOptions]) -> tuple[tuple[str, str, Any], ...]:
    """What a driver's options add to the generic ones: (name in Python, name on the wire, default)."""
    generic = set(BlockdevOptions.__struct_fields__)
    fields = msgspec.structs.fields(cls)
    return tuple((info.name, info.encode_name, info.default) for info in fields if info.name not in generic)


def _own_options(node: Node) -> dict[str, Any]:
    """The options that the driver adds to the generic ones, as given, under their names on the wire."""
    own = {}
    for attribute, name, default in _own_members(type(node.options)):
        value = getattr(node.options, attribute)
        given = value is not msgspec.UNSET and value != default
        if given and name not in (*node.children, "file", "backing", "children"):
            plain = msgspec.to_builtins(value)
            if isinstance(plain, dict):  # QEMU keeps options flat
                own.update({f"{name}.{inner}": part for inner, part in plain.items()})
            else:
                own[name] = plain
    return own


def _strong_options(node: Node) -> dict[str, Any]:
    """Those of the driver's own options that change what the node shows."""
    weak = _WEAK.get(node.options.driver, set())
    if weak is None:
        return {}
    return {name: value for name, value in _own_options(node).items() if name not in weak}

"""What a node is called in terms of files: the name one would open to get the same node.

A plain file name (or URI) serves where opening it, with the node's format, would give the same nodes below; that is
so unless an option changes what the node shows (raw's offset) or its backing file is not the one that its header
names. Otherwise the name is ``json:{...}``, the options of the whole tree. Source: QEMU ``block.c``
(bdrv_refresh_filename, bdrv_backing_overridden, append_strong_runtime_options); members stand in QEMU's order, so
that names compare as text.
"""

from __future__ import annotations

import os
import re
from typing import Any

import msgspec

from livedisk.emulator.block.node import Node
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.qmp.encode import encode

_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
"""``nbd:``, ``json:``, ``file:`` at a name's start. Source: QEMU's path_has_protocol."""
_WEAK = {"null-co": {"latency-ns"}, "null-aio": {"latency-ns"}, "file": None, "host_device": None, "qcow2": None}
"""Options of a driver's own that do not change what the node shows; None: none of them does."""


def filename(node: Node) -> str:
    """The node's name as QEMU gives it: plain where that is enough, else ``json:{...}``; "" for the null drivers'
    like."""
    exact = exact_filename(node)
    return exact or "json:" + encode(full_options(node)).decode().rstrip()


def exact_filename(node: Node) -> str:
    """The plain name, or "" where there is none that stands for the node."""
    driver = node.driver
    if not node.children:
        return driver.filename if "filename" in _own_options(node) or not _strong_options(node) else ""
    if driver.is_filter or "file" not in node.children or _strong_options(node) or backing_overridden(node):
        return ""
    child = node.file.node
    protocol = not (child.driver.is_format or child.driver.is_filter)
    return exact_filename(child) if protocol else ""


def full_options(node: Node) -> dict[str, Any]:
    """The options that open the node anew, children included (QEMU's full_open_options)."""
    options: dict[str, Any] = {"driver": node.options.driver, **_strong_options(node)}
    own = _own_options(node)
    if "filename" in own:
        options["filename"] = own["filename"]
    overridden = backing_overridden(node)
    for name, edge in node.children.items():
        if name != "backing" or overridden:
            options[name] = full_options(edge.node)
    if overridden and node.backing is None:
        options["backing"] = None
    return options


def backing_overridden(node: Node) -> bool:
    """Whether the backing file is not the one that opening the image by its name would find."""
    recorded = node.driver.backing_filename() or ""
    if node.backing is None:
        return bool(recorded)
    child = node.backing.node
    silent = getattr(node.options, "backing", msgspec.UNSET) is msgspec.UNSET
    if silent and child.opened_by is node and recorded == node.opened_backing:
        return False  # it is what the header led to
    return recorded != filename(child)


def full_backing_filename(node: Node) -> str | None:
    """The backing file that the image's header names, resolved against the image's own place; None without one."""
    recorded = node.driver.backing_filename()
    if not recorded:
        return None
    return combine(exact_filename_of_storage(node), recorded)


def exact_filename_of_storage(node: Node) -> str:
    """The plain name of the file under a format, even where options keep it from standing for the node."""
    while node.children:
        edge = node.children.get("file") or node.filtered
        if edge is None:
            return ""
        node = edge.node
    return exact_filename(node)


def combine(base: str, name: str) -> str:
    """``name`` as it is meant in an image called ``base``: absolute names and ``protocol:`` stand for themselves."""
    if name.startswith("/") or _PROTOCOL.match(name) or "/" not in base:
        return name
    return os.path.join(os.path.dirname(base), name)


def _own_options(node: Node) -> dict[str, Any]:
    """The options that the driver adds to the generic ones, as given, under their names on the wire."""
    generic = set(BlockdevOptions.__struct_fields__)
    own = {}
    for info in msgspec.structs.fields(type(node.options)):
        value = getattr(node.options, info.name)
        given = value is not msgspec.UNSET and value != info.default
        if info.name not in generic and info.encode_name not in (*node.children, "file", "backing") and given:
            own[info.encode_name] = msgspec.to_builtins(value)
    return own


def _strong_options(node: Node) -> dict[str, Any]:
    """Those of the driver's own options that change what the node shows."""
    weak = _WEAK.get(node.options.driver, set())
    if weak is None:
        return {}
    return {name: value for name, value in _own_options(node).items() if name not in weak}

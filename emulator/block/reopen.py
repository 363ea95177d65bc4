"""Reopen: change the options of nodes, and what their children are, in one step or not at all.

`reopen` is blockdev-reopen: every option that is not given goes back to its default. `set_read_only` changes that one
option and keeps the rest. Both run the same way:

    plan      which nodes change (a child that inherits changes with its parent), to which settings and children
    prepare   each driver gets ready (`Driver.reopen_prepare`), parents first; nothing has changed yet
    switch    settings, edges and permissions change together, synchronously
    commit    or, if anything above raised, everything goes back

While this runs, no request reaches any of the nodes. What may change: whatever the driver's ``reopen_prepare``
accepts, the generic options but ``node-name``, ``driver`` and ``force-share``, and the ``file`` and ``backing``
children. A child that is described inside its parent (not a reference by name) can be reopened through it; a reference
that names another node replaces the child.

Source: QEMU ``block.c`` (bdrv_reopen_queue_child, bdrv_reopen_prepare, bdrv_reopen_parse_file_or_backing). Where we
differ: an empty list of nodes is nothing to do, QEMU 10 aborts; a node that is made writable takes the children that it
describes along, even where its options now name them, as it does when it is made read-only (QEMU then refuses).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Edge, Node
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.block.permissions import Role
from livedisk.emulator.block.settings import Settings, settle
from livedisk.emulator.block.transaction import Transaction
from livedisk.emulator.errors import BlockError

UNSET = msgspec.UNSET
REPLACEABLE = ("file", "backing")
"""Children that a reopen can replace."""


@dataclass(eq=False)
class _Change:
    """One node's part: new options and settings, and the children that change (None: no child any more)."""

    node: Node
    options: BlockdevOptions
    settings: Settings
    children: dict[str, Node | None] = field(default_factory=dict)

    @property
    def turns_read_only(self) -> bool:
        return self.settings.read_only and not self.node.read_only


async def reopen(graph: Graph, wanted: Mapping[Node, BlockdevOptions]) -> None:
    """Give the nodes these options, all or none. Raises BlockError in QEMU's words, or OSError."""
    plan = _Plan(graph)
    for node, options in wanted.items():
        plan.replace_options(node, options, None)
    await _run(graph, plan.changes)


async def set_read_only(graph: Graph, node: Node, read_only: bool) -> None:
    """Make a node, and the children that inherit it, read-only or writable. Raises BlockError or OSError."""
    if node.read_only is read_only:
        return
    plan = _Plan(graph)
    plan.change(node, msgspec.structs.replace(node.options, read_only=read_only), _inherited(node))
    await _run(graph, plan.changes)


def _inherited(node: Node) -> Settings | None:
    """The settings of the parent that describes the node, or None if it has none (any more)."""
    parent = node.opened_by
    if parent is None or not any(edge.parent is parent for edge in node.parents):
        return None
    return Settings.of(parent)


class _Plan:
    """Collects the changes, parents first; the last request for a node counts."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.changes: dict[Node, _Change] = {}

    def replace_options(self, node: Node, options: BlockdevOptions, inherited: Settings | None) -> None:
        """All options of the node become ``options``; children given inside it are taken in too."""
        change = self.change(node, options, inherited)
        silent = node.driver.supports_backing and getattr(options, "backing", UNSET) is UNSET
        if silent and (node.backing is not None or node.driver.backing_filename()):
            # An absent option means its default, and that would be to open what the header names; ask for the choice.
            raise BlockError(f"backing is missing for '{node.name}'")
        if options.driver != node.options.driver:
            raise BlockError("Cannot change the option 'driver'")
        if options.node_name not in (UNSET, node.name):
            raise BlockError("Cannot change the option 'node-name'")
        for name in dict.fromkeys((*REPLACEABLE, *node.children)):
            reference = getattr(options, name.replace("-", "_"), UNSET)
            if reference is not UNSET:
                self._child(change, name, reference)

    def change(self, node: Node, options: BlockdevOptions, inherited: Settings | None) -> _Change:
        """Note new options for the node, and what follows for the children that inherit from it."""
        if options.force_share not in (UNSET, node.force_share):
            raise BlockError("Cannot change the option 'force-share'")
        if options.active is not node.options.active:
            reset = options.active is UNSET
            raise BlockError(
                "Option 'active' cannot be reset to its default value"
                if reset
                else "Cannot change the option 'active'",
                hint="Use blockdev-set-active.",
            )
        settings = settle(options, inherited, node.opened_role if inherited else Role.NONE)
        if settings.force_share != node.force_share:
            raise BlockError("Cannot change the option 'force-share'")
        change = self.changes[node] = _Change(node, options, settings)
        for edge in node.children.values():
            child = edge.node
            if child.opened_by is node and settle(child.options, settings, edge.role) != Settings.of(child):
                self.change(child, child.options, settings)
        return change

    def _child(self, change: _Change, name: str, reference: Any) -> None:
        node = change.node
        edge = node.children.get(name)
        if isinstance(reference, BlockdevOptions):
            if edge is None or edge.node.opened_by is not node or edge.node.options.driver != reference.driver:
                raise BlockError(f"Cannot change the option '{name}.driver'")
            self.replace_options(edge.node, reference, change.settings)
            return
        new = None if reference is None else self._graph.find(reference)
        old = edge.node if edge is not None else None
        if new is not None and (new is node or node in self._graph.below(new)):
            raise BlockError(f"Making '{new.name}' a {name} child of '{node.name}' would create a cycle")
        if new is old:
            return
        if old is not None and old.implicit:
            if old.filtered is not None and old.filtered.node is new:
                return  # the user sees through a job's filter, and asks for what is there
            raise BlockError(f"Cannot replace implicit {name} child of {node.name}")
        if name not in REPLACEABLE or (name == "file" and (old is None or new is None)):
            raise BlockError(f"Cannot change the option '{name}'")
        change.children[name] = new


async def _run(graph: Graph, changes: dict[Node, _Change]) -> None:
    """Prepare, switch, commit; or put everything back."""
    if not changes:
        return
    dropped = [
        change.node.children[name].node
        for change in changes.values()
        for name in change.children
        if name in change.node.children
    ]
    async with graph.drained(*changes):
        try:
            with Transaction() as tran:
                for change in changes.values():
                    change.node.reopening = change.settings
                    await _prepare(change, tran)
                _switch(graph, changes, tran)
        finally:
            for node in changes:
                node.reopening = None
        for node in dropped:
            await graph.release(node)


async def _prepare(change: _Change, tran: Transaction) -> None:
    node = change.node
    if not node.read_only:
        await node.flush()
    await node.driver.reopen_prepare(change.options, read_only=change.settings.read_only)
    tran.add(commit=node.driver.reopen_commit, abort=node.driver.reopen_abort)


def _switch(graph: Graph, changes: dict[Node, _Change], tran: Transaction) -> None:
    closing = [change.node for change in changes.values() if change.turns_read_only]
    for change in changes.values():
        _apply(change, tran)
    detach: list[Edge] = []
    move: list[tuple[Edge, Node]] = []
    attach: list[tuple[Node, Node, str, Role]] = []
    for change in changes.values():
        for name, new in change.children.items():
            edge = change.node.children.get(name)
            if edge is None:
                assert new is not None
                attach.append((change.node, new, name, Role.COW))
            elif new is None:
                detach.append(edge)
            else:
                move.append((edge, new))
    graph.rewire(tran, detach=detach, move=move, attach=attach, closing=closing)


def _apply(change: _Change, tran: Transaction) -> None:
    node, old_options, old_settings = change.node, change.node.options, Settings.of(change.node)

    def undo() -> None:
        node.options = old_options
        old_settings.apply(node)

    tran.add(abort=undo)
    node.options = change.options
    change.settings.apply(node)

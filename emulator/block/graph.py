"""All nodes of one daemon: open, delete, attach, replace, permissions, drain, reopen.

Changes of structure are synchronous, and so atomic towards the event loop and every guest request: edges are moved,
permissions
are recomputed for the whole graph (graphs are small), conflicts raise, and the `Transaction` puts everything back.
Opening and closing
files awaits; it happens before and after.

Names: a node without a name gets ``#blockNNN`` as QEMU's id generator makes them (``util/id.c``). Inheritance of
cache, read-only and
discard to children that are described inside their parent: QEMU ``block.c`` (bdrv_inherited_options,
bdrv_backing_options).
"""

from __future__ import annotations

import errno
import os
import random
import re
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.blockers import check_not_busy
from livedisk.emulator.block.driver import Driver, driver_class
from livedisk.emulator.block.node import Edge, Node, Parent
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.block.permissions import CHANGES, Perm, Role, check_edges, inactive_perms, perm_names
from livedisk.emulator.block.settings import Settings, settle
from livedisk.emulator.block.slow_drain import told_if_slow
from livedisk.emulator.block.throttle import DrainListener, ThrottleGroups
from livedisk.emulator.block.transaction import Transaction
from livedisk.emulator.errors import BlockError, NodeNotFound
from livedisk.nbd.client_connection import Secure

_WELL_FORMED = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")
MAX_LENGTH = (1 << 63) - (1 << 30)
"""Bytes of the largest image (QEMU's BDRV_MAX_LENGTH): ranges rounded to whole blocks stay below 2^63."""
MAX_DEPTH = 500
"""Images that may stand on each other when they are opened; each takes a few frames of Python's stack."""
MAX_NAME = 31
"""Characters in a node name (QEMU: sizeof node_name - 1)."""


class Graph:
    """Nodes by name, and the backends through which requests enter.

    ``reserved``: callables that say whether a name is taken by something other than a node (a device); ``on_change``:
    called after any change of
    structure; ``on_vote``: told where children of a quorum fail or differ ("bad"), or there is none ("failure");
    ``throttle_groups``: who shares limits; ``drain_listeners``: nodes that hold requests back on their own;
    ``on_corruption``: told of damage found in an image at run time (node, text, offset and size in bytes or None,
    whether the image is unusable now); ``parse_options``: turns the dict of a ``json:{...}`` filename into typed options (set by
    the daemon: this layer knows nothing of QMP); ``client_tls``: turns the id of TLS credentials and the name that the server
    must prove (None: any that it has) into what does the TLS handshake on a connection (set by the daemon, too).
    """

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.backends: list[BlockBackend] = []
        self.reserved: list[Callable[[str], bool]] = []
        self.opens_inactive = False
        """Whether the images of nodes that the user opens are another process's yet: a guest is to come from there."""
        self.on_change: list[Callable[[], None]] = []
        self.on_corruption: list[Callable[[Node, str, int | None, int | None, bool], None]] = []
        self.parse_options: Callable[[dict[str, Any]], BlockdevOptions] | None = None
        self.client_tls: Callable[[str, str | None], Secure] | None = None
        self.on_vote: list[Callable[[str, dict[str, Any]], None]] = []
        self.throttle_groups = ThrottleGroups()
        self.drain_listeners: dict[Node, DrainListener] = {}
        self._drains: list[_Drain] = []
        self._serial = 0

    @property
    def graph(self) -> Graph:
        """Itself: who only needs a node's graph can be handed either."""
        return self

    # -- names -----------------------------------------------------------------------------------------------------
    def find(self, name: str) -> Node:
        """The node of that name. Raises NodeNotFound in QEMU's words."""
        try:
            return self.nodes[name]
        except KeyError:
            raise NodeNotFound(f"Cannot find device='' nor node-name='{name}'") from None

    def _new_name(self, wanted: str | msgspec.UnsetType) -> str:
        if isinstance(wanted, str):
            self.check_new_name(wanted)
            return wanted
        while True:
            name = f"#block{self._serial}{random.randrange(100):02d}"
            self._serial += 1
            if name not in self.nodes:
                return name

    def check_new_name(self, name: str) -> None:
        """Raise BlockError, in QEMU's words, if a new node cannot have this name."""
        if not _WELL_FORMED.match(name):
            raise BlockError(f"Invalid node-name: '{name}'")
        if any(taken(name) for taken in self.reserved):
            raise BlockError(f"node-name={name} is conflicting with a device id")
        if name in self.nodes:
            raise BlockError(f"Duplicate nodes with node-name='{name}'")
        if len(name) > MAX_NAME:
            raise BlockError("Node name too long")

    # -- opening -----------------------------------------------------------------------------------------------------
    async def add(self, options: BlockdevOptions) -> Node:
        """blockdev-add: open a node that the user owns. Raises BlockError or OSError; on failure nothing is left."""
        node = await self.open(options, inactive=self.opens_inactive)
        node.monitor_owned = True
        return node

    async def open(
        self,
        options: BlockdevOptions,
        *,
        parent: Node | None = None,
        role: Role = Role.NONE,
        inactive: bool = False,
    ) -> Node:
        """Open a node and the children described inside it. It has no parent yet: `attach_root`, `attach_child` or
        `release` it. ``inactive``: another process has the images, whatever the options say (`activity.py`)."""
        if _depth(parent) > MAX_DEPTH:
            raise BlockError(f"More than {MAX_DEPTH} images stand on each other")
        cls = driver_class(options.driver)
        node = Node(self, self._new_name(options.node_name), options)
        node.opened_by, node.opened_role = parent, role
        settle(options, Settings.of(parent) if parent is not None else None, role).apply(node)
        node.opened_inactive = inactive
        node.active = not inactive and options.active is not False
        node.driver = cls(node, options)
        self.nodes[node.name] = node
        try:
            await node.driver.open()
            if node.driver.size > MAX_LENGTH:
                await node.driver.close()
                raise BlockError(f"Could not refresh total sector count: {os.strerror(errno.EFBIG)}")
        except BaseException:
            await self._abandon(node)
            raise
        node.opened_backing = node.driver.backing_filename()
        self.changed()
        return node

    async def _abandon(self, node: Node) -> None:
        """Take down a node whose `open` failed."""
        self.nodes.pop(node.name, None)
        for edge in list(node.children.values()):
            self._detach(edge)
            await self.release(edge.node)
        self.refresh_permissions()

    async def open_child(self, node: Node, ref: Any, name: str, role: Role) -> Edge:
        """Attach the child that ``ref`` gives: an existing node's name, or options of a node to open under ``node``."""
        if isinstance(ref, str):
            if ref not in self.nodes:
                raise NodeNotFound(f"Cannot find device='{ref}' nor node-name='{ref}'")
            child = self.nodes[ref]
        elif isinstance(ref, BlockdevOptions):
            # QEMU opens the file before it looks at the node's option "active", and what else the node needs after it.
            inactive = node.opened_inactive if name == "file" else not node.active
            child = await self.open(ref, parent=node, role=role, inactive=inactive)
            if name == "file":  # made before its format, as QEMU makes it: queries tell nodes in this order
                self.nodes[node.name] = self.nodes.pop(node.name)
        else:
            raise BlockError(f'A block device must be specified for "{name}"')
        try:
            return self.attach_child(node, child, name, role)
        except BaseException:
            # A named node is not ours to close; it may even be ``node``, half open.
            if not isinstance(ref, str):
                await self.release(child)
            raise

    # -- structure (synchronous) -------------------------------------------------------------------------------------
    def attach_child(self, parent: Node, child: Node, name: str, role: Role, tran: Transaction | None = None) -> Edge:
        """Make ``child`` a child of ``parent``. Raises BlockError on a cycle or a conflict of permissions."""
        if parent is child or parent in self.below(child):
            raise BlockError(f"Making '{child.name}' a {name} child of '{parent.name}' would create a cycle")
        edge = Edge(parent, child, name, role)
        with _Nested(tran) as steps:
            self._link(edge, steps)
            self.refresh_permissions(steps)
        self.changed()
        return edge

    def attach_root(
        self,
        backend: BlockBackend,
        node: Node,
        perm: Perm,
        shared: Perm,
        tran: Transaction | None = None,
        name: str = "root",
    ) -> Edge:
        """Put ``backend`` on ``node`` with these permissions; ``name`` is the edge's. Raises PermissionConflict or LockError."""
        edge = Edge(backend, node, name, Role.FILTERED | Role.PRIMARY)
        edge.perm, edge.shared = perm, shared
        with _Nested(tran) as steps:
            backend.root = edge
            self.backends.append(backend)
            node.parents.append(edge)
            steps.add(abort=lambda: self._unlink_root(backend, edge))
            self.refresh_permissions(steps)
        self.changed()
        return edge

    def set_root_permissions(self, backend: BlockBackend, perm: Perm, shared: Perm) -> None:
        """Change what a backend needs and shares. On a conflict nothing changes."""
        edge = backend.root
        assert edge is not None
        if backend.resting is not None:
            backend.resting = perm, shared
            return
        old = edge.perm, edge.shared
        with Transaction() as steps:
            edge.perm, edge.shared = perm, shared
            steps.add(abort=lambda: _set_perms(edge, *old))
            self.refresh_permissions(steps)
        self.changed()

    def _unlink_root(self, backend: BlockBackend, edge: Edge) -> None:
        backend.root = None
        if backend in self.backends:
            self.backends.remove(backend)
        edge.node.parents.remove(edge)

    async def detach_root(self, backend: BlockBackend) -> None:
        """Take the backend off its node; a node without any user left is closed. Nothing may be in flight."""
        edge = backend.root
        if edge is None:
            return
        self._unlink_root(backend, edge)
        backend.refresh()
        self.refresh_permissions()
        self.changed()
        await self.release(edge.node)

    def _link(self, edge: Edge, steps: Transaction) -> None:
        parent = edge.parent
        assert isinstance(parent, Node)
        parent.children[edge.name] = edge
        edge.node.parents.append(edge)
        steps.add(abort=lambda: self._detach(edge))

    def _detach(self, edge: Edge) -> None:
        parent = edge.parent
        if isinstance(parent, Node) and parent.children.get(edge.name) is edge:
            del parent.children[edge.name]
        if edge in edge.node.parents:
            edge.node.parents.remove(edge)

    def detach_child(self, edge: Edge, tran: Transaction | None = None) -> None:
        """Remove an edge between nodes. The child stays open: `release` it after the transaction."""
        _check_not_frozen(edge)
        assert isinstance(edge.parent, Node)
        place = edge.node.parents.index(edge)
        with _Nested(tran) as steps:
            self._detach(edge)
            steps.add(abort=lambda: self._reattach(edge, place))
            self.refresh_permissions(steps)
        self.changed()

    def _reattach(self, edge: Edge, place: int) -> None:
        assert isinstance(edge.parent, Node)
        edge.parent.children[edge.name] = edge
        edge.node.parents.insert(place, edge)

    def replace_edge(self, edge: Edge, new: Node, tran: Transaction | None = None) -> None:
        """Let one edge lead to another node. Raises BlockError if it is frozen, PermissionConflict on a conflict."""
        self.replace_edges([edge], new, tran)

    def replace_node(self, old: Node, new: Node, tran: Transaction | None = None, *, but: Iterable[Edge] = ()) -> None:
        """Let every parent of ``old`` lead to ``new`` instead, but the edges in ``but`` and those that come from
        below ``new``."""
        keep = set(but)
        under = {id(node) for node in self.below(new)} | {id(new)}
        edges = [
            edge
            for edge in old.parents
            if edge not in keep and not (isinstance(edge.parent, Node) and id(edge.parent) in under)
        ]
        self.replace_edges(edges, new, tran)

    def replace_edges(self, edges: list[Edge], new: Node, tran: Transaction | None = None) -> None:
        """Move edges to ``new`` in one step."""
        for edge in edges:
            _check_not_frozen(edge)
            if edge.parent is new or (isinstance(edge.parent, Node) and edge.parent in self.below(new)):
                raise BlockError(
                    f"Making '{new.name}' a {edge.name} child of '{_name_of(edge.parent)}' would create a cycle"
                )
        with _Nested(tran) as steps:
            for edge in edges:
                self._move(edge, new, steps)
            self.refresh_permissions(steps)
        self.changed()

    def _move(self, edge: Edge, new: Node, steps: Transaction) -> None:
        old, place = edge.node, edge.node.parents.index(edge)

        def undo() -> None:
            edge.node.parents.remove(edge)
            edge.node = old
            old.parents.insert(place, edge)
            edge.parent.child_replaced(edge)

        old.parents.remove(edge)
        edge.node = new
        new.parents.append(edge)
        steps.add(abort=undo)
        edge.parent.child_replaced(edge)

    def rewire(
        self,
        tran: Transaction,
        *,
        detach: Iterable[Edge] = (),
        move: Iterable[tuple[Edge, Node]] = (),
        attach: Iterable[tuple[Node, Node, str, Role]] = (),
        closing: Collection[Node] = (),
    ) -> None:
        """Change several edges between nodes as one step: permissions are asked only of the outcome.

        ``attach``: (parent, child, name, role). ``closing``: nodes that turn read-only in the same step. Raises
        BlockError if an edge is frozen, PermissionConflict or LockError on a conflict; the caller's ``tran`` undoes.
        """
        for edge in detach:
            _check_not_frozen(edge)
            place = edge.node.parents.index(edge)
            tran.add(abort=lambda edge=edge, place=place: self._reattach(edge, place))  # type: ignore[misc]
            self._detach(edge)
            edge.parent.child_replaced(edge)
        for edge, new in move:
            _check_not_frozen(edge)
            self._move(edge, new, tran)
        for parent, child, name, role in attach:
            self._link(Edge(parent, child, name, role), tran)
        self.refresh_permissions(tran, closing)
        self.changed()

    # -- closing -----------------------------------------------------------------------------------------------------
    async def delete(self, name: str) -> None:
        """blockdev-del. Raises BlockError, in QEMU's words, if the node is in use or not the user's own."""
        node = self.nodes.get(name)
        if node is None:
            raise NodeNotFound(f"Failed to find node with node-name='{name}'")
        if any(isinstance(edge.parent, BlockBackend) and not edge.parent.of_job for edge in node.parents):
            raise BlockError(f"Node {name} is in use")
        check_not_busy(node)
        if not node.monitor_owned:
            raise BlockError(f"Node {name} is not owned by the monitor")
        if node.parents:
            raise BlockError(f"Block device {name} is in use")
        node.monitor_owned = False
        await self.release(node)

    async def release(self, node: Node) -> None:
        """Close the node, and what it alone uses below, if nobody uses it any more."""
        if node.parents or node.monitor_owned or self.nodes.get(node.name) is not node:
            return
        del self.nodes[node.name]
        failures: list[BaseException] = []
        try:
            await node.driver.close()
        except BaseException as error:
            failures.append(error)
        node.bitmaps.forget()
        for edge in list(node.children.values()):
            self._detach(edge)
            try:
                await self.release(edge.node)
            except BaseException as error:
                failures.append(error)
        self.refresh_permissions()
        self.changed()
        if failures:
            raise failures[0]

    async def close(self) -> None:
        """Take every backend off, then close every node, parents first. Nothing is in flight.

        What cannot be closed keeps nothing else from being closed: other images must get to the disk what they hold. The
        first failure is raised at the end.
        """
        failures: list[BaseException] = []
        detached: set[BlockBackend] = set()
        while self.nodes:
            # Whoever closes in an orderly way, a job's end for example, may take hold of a node while another is closed.
            for backend in [backend for backend in self.backends if backend not in detached]:
                detached.add(backend)
                try:
                    await self.detach_root(backend)
                except BaseException as error:
                    failures.append(error)
            top = next((node for node in self.nodes.values() if not node.parents), None)
            if top is None:
                if self.nodes:  # no cycles: somebody holds them all
                    holders = sorted({edge.parent_description for node in self.nodes.values() for edge in node.parents})
                    failures.append(BlockError(f"Nodes could not be closed: {', '.join(holders)} holds them"))
                break
            top.monitor_owned = False
            try:
                await self.release(top)
            except BaseException as error:
                failures.append(error)
        if failures:
            raise failures[0]

    # -- looking -----------------------------------------------------------------------------------------------------
    def below(self, node: Node) -> list[Node]:
        """All nodes reachable from ``node``, without itself, each once."""
        found: dict[int, Node] = {}
        todo = [edge.node for edge in node.children.values()]
        while todo:
            child = todo.pop()
            if id(child) not in found:
                found[id(child)] = child
                todo.extend(edge.node for edge in child.children.values())
        return list(found.values())

    def backends_above(self, nodes: Iterable[Node]) -> list[BlockBackend]:
        """Every backend whose requests can reach one of the nodes."""
        found: list[BlockBackend] = []
        todo: list[Node] = list(nodes)
        seen: set[int] = set()
        while todo:
            node = todo.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            for edge in node.parents:
                if isinstance(edge.parent, Node):
                    todo.append(edge.parent)
                elif isinstance(edge.parent, BlockBackend) and edge.parent not in found:
                    found.append(edge.parent)
        return found

    def changed(self) -> None:
        """The structure or a node's options changed: flat maps are stale, watchers are told."""
        for drain in self._drains:
            drain.extend()
        for backend in self.backends:
            backend.refresh()
        for watcher in list(self.on_change):
            watcher()

    def resized(self, node: Node) -> None:
        """A node has a new size: tell the backends above it whose own size that changes."""
        for backend in self.backends_above([node]):
            if backend.size != backend.known_size:
                backend.refresh()
                for callback in list(backend.on_resize):
                    callback()

    # -- drain -----------------------------------------------------------------------------------------------------
    @asynccontextmanager
    async def drained(self, *nodes: Node) -> AsyncIterator[None]:
        """While inside, no request of any backend reaches one of these nodes, and none is in flight. Without nodes:
        the whole graph. Backends that come to stand above the nodes meanwhile are held, too."""
        drain = _Drain(self, nodes)
        self._drains.append(drain)
        try:
            drain.extend()
            with told_if_slow(self, drain.what, lambda: drain.blocking):
                # Looked at anew each time: the drain may have come to hold more while one was waited for.
                while True:
                    if busy := next((backend for backend in drain.held if backend.in_flight), None):
                        await busy.idle()
                    elif working := self._working_above(nodes):
                        await working.settle()
                    else:
                        break
            yield
        finally:
            self._drains.remove(drain)
            drain.end()

    def _working_above(self, nodes: Collection[Node]) -> Driver | None:
        """A driver that works by itself on one of the nodes (on any, if none are given)."""
        for node in self.nodes.values():
            if node.driver.working() and (not nodes or any(one is node or one in self.below(node) for one in nodes)):
                return node.driver
        return None

    # -- permissions -------------------------------------------------------------------------------------------------
    def refresh_permissions(self, steps: Transaction | None = None, closing: Collection[Node] = ()) -> None:
        """Recompute every edge's permissions from the backends down; check; let drivers take or drop locks.

        ``closing``: nodes that a reopen is just making read-only; a writer on them is told so.

        Raises PermissionConflict or LockError with everything as it was (the caller undoes its own change of
        structure).
        """
        with _Nested(steps) as tran:
            wanted: dict[Edge, tuple[Perm, Perm]] = {}
            changed: list[tuple[Node, Perm, Perm]] = []
            for node in self._parents_first():
                perm, shared = Perm.NONE, Perm.ALL
                for edge in node.parents:
                    if edge not in wanted:
                        wanted[edge] = edge.perm, edge.shared
                    perm |= wanted[edge][0]
                    shared &= wanted[edge][1]
                check_edges(node.parents, wanted)
                self._check_access(node, wanted, closing)
                for edge in node.children.values():
                    below, below_shared = node.driver.child_perms(edge, perm, shared)
                    if not node.active:
                        below, below_shared = inactive_perms(below, below_shared)
                    wanted[edge] = below, Perm.ALL if edge.node.force_share else below_shared
                if (perm, shared) != (node.perm, node.shared):
                    changed.append((node, perm, shared))
            for node, perm, shared in changed:
                node.driver.prepare_perms(perm, shared)
                tran.add(
                    commit=lambda node=node, perm=perm, shared=shared: node.driver.commit_perms(perm, shared),  # type: ignore[misc]
                    abort=lambda node=node, old=(node.perm, node.shared): _restore_node(node, *old),  # type: ignore[misc]
                )
                node.perm, node.shared = perm, shared
            for edge, (perm, shared) in wanted.items():
                old = edge.perm, edge.shared
                if old != (perm, shared):
                    _set_perms(edge, perm, shared)
                    tran.add(abort=lambda edge=edge, old=old: _set_perms(edge, *old))  # type: ignore[misc]

    def _check_access(self, node: Node, wanted: dict[Edge, tuple[Perm, Perm]], closing: Collection[Node]) -> None:
        needs_write = any(wanted[edge][0] & (Perm.WRITE | Perm.WRITE_UNCHANGED) for edge in node.parents)
        if needs_write and node.read_only:
            if node in closing:
                raise BlockError(f"Read-only block node '{node.name}' cannot support read-write users")
            raise BlockError("Block node is read-only")
        needs = Perm.NONE
        for edge in node.parents:
            needs |= wanted[edge][0]
            if not node.active and isinstance(edge.parent, Node) and edge.parent.active:
                raise BlockError(f"Inactive '{node.name}' can't be a {edge.name} child of active '{edge.parent.name}'")
        if not node.active and (denied := needs & CHANGES):
            raise BlockError(f"Permission '{perm_names(denied)}' unavailable on inactive node")
        # The last block may reach past the end: writing it grows the file.
        if needs & Perm.WRITE and not needs & Perm.RESIZE and node.size % node.driver.request_alignment:
            raise BlockError(
                "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment"
            )

    def _parents_first(self) -> Iterator[Node]:
        """Every node, each after all of its parents (the graph has no cycles)."""
        done: set[int] = set()

        def visit(node: Node) -> Iterator[Node]:
            if id(node) in done:
                return
            for edge in node.parents:
                if isinstance(edge.parent, Node):
                    yield from visit(edge.parent)
            if id(node) not in done:
                done.add(id(node))
                yield node

        known = list(self.nodes.values())
        for node in known:
            yield from visit(node)


class _Drain:
    """One drained section: its nodes (none: all), the backends that it holds, and those below them that it told."""

    def __init__(self, graph: Graph, nodes: tuple[Node, ...]) -> None:
        self._graph = graph
        self._nodes = nodes
        self.held: list[BlockBackend] = []
        self._told: list[DrainListener] = []

    @property
    def what(self) -> str:
        """What it waits for, in words."""
        names = ", ".join(f"'{node.name}'" for node in self._nodes)
        return f"nothing is in flight on {f'node {names}' if names else 'any node'}"

    @property
    def blocking(self) -> list[Node]:
        """Where requests are, or may be, that it waits for."""
        busy = [backend for backend in self.held if backend.in_flight]
        jobs = [backend.owner for backend in busy if backend.of_job]  # which may wait for any of their nodes
        busy += [backend for backend in self._graph.backends if backend.of_job and backend.owner in jobs]
        return [backend.root.node for backend in busy if backend.root is not None] or [
            node for node in self._graph.nodes.values() if node.driver.working()
        ]

    def extend(self) -> None:
        """Hold what stands above the nodes now and is not held yet."""
        graph = self._graph
        for backend in graph.backends_above(self._nodes) if self._nodes else graph.backends:
            if backend not in self.held:
                self.held.append(backend)
                backend.quiesce()
        for node, listener in graph.drain_listeners.items():
            if listener not in self._told and any(backend in self.held for backend in graph.backends_above([node])):
                self._told.append(listener)
                listener.drain_begin()

    def end(self) -> None:
        """Let everybody go on."""
        for backend in self.held:
            backend.unquiesce()
        for listener in self._told:
            listener.drain_end()


class _Nested:
    """A transaction of one's own, or the caller's if there is one: then only the caller commits or aborts."""

    def __init__(self, outer: Transaction | None) -> None:
        self._outer = outer
        self._own = Transaction() if outer is None else outer

    def __enter__(self) -> Transaction:
        return self._own

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: Any) -> None:
        if self._outer is None:
            self._own.__exit__(kind, error, tb)


def _depth(node: Node | None) -> int:
    """How many nodes are being opened one inside the other."""
    depth = 0
    while node is not None:
        node = node.opened_by
        depth += 1
    return depth


def _check_not_frozen(edge: Edge) -> None:
    if edge.frozen:
        raise BlockError(
            f"Cannot change frozen '{edge.name}' link from '{_name_of(edge.parent)}' to '{edge.node.name}'"
        )


def _set_perms(edge: Edge, perm: Perm, shared: Perm) -> None:
    edge.perm, edge.shared = perm, shared


def _restore_node(node: Node, perm: Perm, shared: Perm) -> None:
    node.driver.abort_perms()
    node.perm, node.shared = perm, shared


def _name_of(parent: Parent) -> str:
    return parent.name if isinstance(parent, Node) else parent.description

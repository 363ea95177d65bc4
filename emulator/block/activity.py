"""Which process an image belongs to: activating and inactivating nodes (blockdev-set-active).

An inactive node has everything on its image and holds no lock on it, so that another process may open it for writing. It
may be looked at, but not written: no user gets permission to, nor does it take any from its children. A node is only
inactive if all nodes above it are: `Graph.refresh_permissions` keeps that, whatever changes.

* Inactivating goes from the top down: the node, then those below that no active node stands on. Users that may rest
  (`BlockBackend.may_rest`) lose their permissions and get them back when the node is activated. A user who may write
  and may not rest stands in the way; so does a guest that runs, where QEMU 10.0 would abort at its next write.
* Activating goes from the bottom up, and reads every image anew. It fails where another process has the image;
  what is below is active by then, as with QEMU.

Source: QEMU ``block.c`` (bdrv_activate, bdrv_inactivate_recurse), ``block/block-backend.c`` (blk_root_inactivate).
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.transaction import Transaction
from livedisk.emulator.errors import BlockError

if TYPE_CHECKING:
    from livedisk.emulator.block.graph import Graph


async def activate(graph: Graph, node: Node) -> None:
    """Take the image, and those below, back. Raises LockError, another BlockError or OSError; then the node is as it was."""
    for edge in list(node.children.values()):
        await activate(graph, edge.node)
    if node.active:
        return
    async with graph.drained(node):
        rested = [(user, user.resting) for user in _users(node) if user.resting is not None]
        with Transaction() as steps:
            node.active = True
            steps.add(abort=lambda: _set_active(node, False))
            for user, (perm, shared) in rested:
                _wake(user)
                steps.add(abort=lambda user=user, perm=perm, shared=shared: _rest(user, perm, shared))  # type: ignore[misc]
            graph.refresh_permissions(steps)
        try:
            for below in graph.below(node):
                below.driver.measure_again()  # it may have been active all the time, under this one that was not
            await node.driver.activate()
        except BaseException:
            node.active = False
            for user, (perm, shared) in rested:
                _rest(user, perm, shared)
            graph.refresh_permissions()
            raise
    graph.changed()


async def inactivate(graph: Graph, node: Node) -> None:
    """Give the image, and those below that nobody else uses, up. Raises BlockError or OSError."""
    if _stands_under_active(node):
        raise BlockError("Node has active parent node")
    await _inactivate(graph, node, "Failed to inactivate node")


async def activate_all(graph: Graph) -> None:
    """Every node. Raises as `activate` does, for the first that fails."""
    for node in list(graph.nodes.values()):
        await activate(graph, node)


async def inactivate_all(graph: Graph) -> None:
    """Every node. Raises as `inactivate` does, for the first that fails; what was before it is inactive."""
    for node in list(graph.nodes.values()):
        if graph.nodes.get(node.name) is node and not _stands_under_active(node):
            await _inactivate(graph, node, "Failed to inactivate all nodes")


async def _inactivate(graph: Graph, node: Node, what: str) -> None:
    if not node.active or _stands_under_active(node):
        return
    for user in _users(node):
        if not user.may_rest():
            raise BlockError(
                f"{what}: {os.strerror(errno.EPERM)}", hint=f"{user.description} may write to '{node.name}'."
            )
    async with graph.drained(node):
        await node.driver.inactivate()
        for user in _users(node):
            assert user.root is not None
            _rest(user, user.root.perm, user.root.shared)
        node.active = False
        graph.refresh_permissions()
    graph.changed()
    for edge in list(node.children.values()):
        await _inactivate(graph, edge.node, what)


def _users(node: Node) -> list[BlockBackend]:
    return [edge.parent for edge in node.parents if isinstance(edge.parent, BlockBackend)]


def _stands_under_active(node: Node) -> bool:
    return any(isinstance(edge.parent, Node) and edge.parent.active for edge in node.parents)


def _set_active(node: Node, active: bool) -> None:
    node.active = active


def _rest(user: BlockBackend, perm: Perm, shared: Perm) -> None:
    assert user.root is not None
    user.resting = perm, shared
    user.root.perm, user.root.shared = Perm.NONE, Perm.ALL


def _wake(user: BlockBackend) -> None:
    assert user.root is not None
    assert user.resting is not None
    user.root.perm, user.root.shared = user.resting
    user.resting = None

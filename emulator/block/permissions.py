"""What a user of a node needs from it, and what it tolerates in the node's other users.

Every edge carries two sets: ``perm`` (needed) and ``shared`` (allowed to others). Two edges to one node conflict when
one needs what
the other does not share. A node's own needs towards its children follow from what its parents need of it: the
``child_perms``
of its driver, mostly one of the three defaults here. Source: QEMU ``block.c`` (bdrv_*_default_perms),
``include/block/block-common.h``.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from livedisk.emulator.errors import PermissionConflict

if TYPE_CHECKING:
    from livedisk.emulator.block.node import Edge


class Perm(enum.IntFlag):
    """Permissions on a node; the values are QEMU's, and so the byte offsets of its image locks."""

    NONE = 0
    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8
    ALL = 15


CHANGES = Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE
"""What only an active node gives."""


class BlockPermission(enum.StrEnum):
    """One permission, in introspection's spelling."""

    CONSISTENT_READ = "consistent-read"
    WRITE = "write"
    WRITE_UNCHANGED = "write-unchanged"
    RESIZE = "resize"


class Role(enum.IntFlag):
    """What an edge is for (QEMU's BdrvChildRole)."""

    NONE = 0
    DATA = 1
    METADATA = 2
    FILTERED = 4
    COW = 8
    PRIMARY = 16
    IMAGE = DATA | METADATA | PRIMARY


_NAMES = {
    Perm.CONSISTENT_READ: "consistent read",
    Perm.WRITE: "write",
    Perm.WRITE_UNCHANGED: "write unchanged",
    Perm.RESIZE: "resize",
}


def perm_names(perm: Perm) -> str:
    """QEMU's words for a set of permissions, comma separated."""
    return ", ".join(text for bit, text in _NAMES.items() if perm & bit) or "none"


def filter_perms(perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
    """A filter passes on what its parents need and share."""
    return perm, shared


def backing_perms(perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
    """A backing file is only read; it may change below only if the parents can bear changing data."""
    below = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
    if shared & Perm.WRITE:
        below |= Perm.WRITE | Perm.RESIZE
    return perm & Perm.CONSISTENT_READ, below


def storage_perms(role: Role, perm: Perm, shared: Perm, *, writable: bool) -> tuple[Perm, Perm]:
    """The file (or data file) below a format: metadata is the format's alone, data may grow the file."""
    if role & Role.METADATA:
        if writable:
            perm |= Perm.WRITE | Perm.RESIZE
        perm |= Perm.CONSISTENT_READ
        shared &= ~(Perm.WRITE | Perm.RESIZE)
    if role & Role.DATA:
        shared &= ~Perm.RESIZE
        if perm & Perm.WRITE_UNCHANGED:
            perm |= Perm.WRITE
        if perm & Perm.WRITE:
            perm |= Perm.RESIZE
    return perm, shared


def inactive_perms(perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
    """What an inactive node needs of a child: only to look. Who has the image now may write it."""
    return perm & ~CHANGES, shared | Perm.WRITE | Perm.RESIZE


def check_edges(edges: list[Edge], wanted: dict[Edge, tuple[Perm, Perm]]) -> None:
    """Raise `PermissionConflict` if two of the edges to one node do not allow each other.

    ``wanted`` gives the future (perm, shared) of every edge.
    """
    for a in edges:
        for b in edges:
            denied = wanted[a][0] & ~wanted[b][1]
            if a is not b and denied:
                node = a.node.name
                raise PermissionConflict(
                    f"Permission conflict on node '{node}': permissions '{perm_names(Perm(denied))}' are both required by "
                    f"{a.parent_description} (uses node '{node}' as '{a.name}' child) and unshared by "
                    f"{b.parent_description} (uses node '{node}' as '{b.name}' child)."
                )

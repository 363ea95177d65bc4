"""How a driver says where bytes are: segments, and offsets that cannot be confused.

A driver's `map` answers one `Segment` for the start of a range; the one generic path in `node.py` moves the bytes.
Block status,
``map``, copy offload and "is it allocated above the base?" come from the same answer.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple, NewType

if TYPE_CHECKING:
    from livedisk.emulator.block.hostfile import HostFile
    from livedisk.emulator.block.node import Edge

GuestOffset = NewType("GuestOffset", int)
"""A byte offset in what a node shows to its parent."""
HostOffset = NewType("HostOffset", int)
"""A byte offset in the thing that a node stores its bytes in (a child node, or a host file)."""


SECTOR = 512
"""Bytes: what disks, and so the sizes of all nodes, are counted in."""


def whole_sectors(size: int) -> int:
    """``size`` (bytes) rounded up to whole sectors, as QEMU shows every image; what it adds reads as zeroes."""
    return -(-size // SECTOR) * SECTOR


class Kind(enum.IntEnum):
    """What a node holds in a range (QEMU's BDRV_BLOCK_* flags, told apart)."""

    DATA = 0
    """Bytes stand at (source, offset)."""
    ZERO = 1
    """The node itself says: zeroes."""
    UNALLOCATED = 2
    """The node says nothing: the backing file decides, or zeroes where there is none or it has ended."""
    COMPRESSED = 3
    """Stored compressed: only the driver can read it."""
    OPAQUE = 4
    """The driver must be asked: it reads in a way of its own (null, nbd, a throttle, a fault injector)."""


class Segment(NamedTuple):
    """The answer of `map`: the first ``length`` bytes of the range asked for are alike.

    ``source`` and ``offset`` are given for DATA (and for ZERO with preallocated clusters, for information).
    ``in_place`` promises
    that a write to this range may go straight to ``(source, offset)``: the bytes are this node's own, not shared with a
    snapshot, and need no metadata change.
    """

    kind: Kind
    length: int
    source: Edge | HostFile | None = None
    offset: HostOffset = HostOffset(0)
    in_place: bool = False


class NotMapped(Exception):
    """`map` would have to read metadata: await the driver's ``load(offset, length)``, then ask again."""


class ZeroFlags(enum.IntFlag):
    """How zeroes may be written (QEMU's BDRV_REQ_MAY_UNMAP and BDRV_REQ_NO_FALLBACK)."""

    NONE = 0
    MAY_UNMAP = 1
    """The range may become a hole."""
    NO_FALLBACK = 2
    """Raise ENOTSUP, having changed nothing, rather than write zeroes out byte by byte."""


class Preallocation(enum.StrEnum):
    """QEMU's PreallocMode."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


class DetectZeroes(enum.StrEnum):
    """QEMU's BlockdevDetectZeroesOptions."""

    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


class Discard(enum.StrEnum):
    """QEMU's BlockdevDiscardOptions: whether a node passes discards on."""

    IGNORE = "ignore"
    UNMAP = "unmap"

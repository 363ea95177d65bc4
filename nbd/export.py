"""What an NBD server asks of the thing it serves: the `Export` protocol.

The server core knows nothing of block graphs. Whatever is served (a node, a guest device, a test's bytearray)
implements this Protocol. Two ways in:

* ``try_read`` and ``try_write`` are the *fast path*: synchronous, called inline from the receive loop, they either
  do the whole request at once without blocking or do nothing and answer `MISS`. No object is made per request.
* the coroutines are the *slow path*: whatever the fast path declined. They may run concurrently with each other
  and finish in any order.

Invariants: the server checks range, read-only and payload limits before either way is called, so ``0 <= offset`` and
``offset + length <= size`` hold and ``length > 0`` (but see `flush`). Offsets and lengths are bytes. Requests on the fast path
are multiples of ``min_block``; those on the slow path need not be: like QEMU, the server advertises block sizes but serves
clients that do not keep to them, so an export with large blocks reads, modifies and writes.
Failures are `OSError` with an ``errno`` that the server maps to an NBD error (proto.md, "Error values").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

MISS: Final = 0
"""Fast path declined; nothing happened; take the coroutine."""
DATA: Final = 1
"""Fast path done; for a read the view is filled."""
HOLE: Final = 2
"""Fast read done: the whole range reads as zeroes and the view was *not* touched."""


Ended = Callable[[OSError | None, Sequence[tuple[int, int]]], None]
"""Told of the end of a started request: its error or None, and which parts of a read are zeroes, as (start, length)."""
Start = Callable[[int, memoryview, Ended], bool]
"""``(offset, view, ended)``; the view is the export's until ``ended``, which is never called from within."""


@dataclass(frozen=True, slots=True)
class Extent:
    """One run of a meta context's answer: ``length`` bytes share ``flags`` (proto.md, "NBD_REPLY_TYPE_BLOCK_STATUS")."""

    length: int
    flags: int


class Export(Protocol):
    """Something that can be served over NBD.

    Attributes
    ----------
    name: the name a client asks for (UTF-8, at most 4096 bytes).
    description: text for NBD_INFO_DESCRIPTION and NBD_OPT_LIST, or "".
    size: bytes; read once per client at negotiation and again for every range check (a resize may change it).
    read_only: whether writes are refused with EPERM.
    can_multi_conn: whether a flush on one connection covers writes acknowledged on every other.
    can_fast_zero: whether ``write_zeroes(fast=True)`` means anything.
    min_block, preferred_block, max_payload: NBD_INFO_BLOCK_SIZE, bytes.
    contexts: the meta context names served, in order, for example ``("base:allocation", "qemu:allocation-depth")``.
    try_read, try_write: the fast path; attributes rather than methods so that an implementation may swap them.
    """

    name: str
    description: str
    read_only: bool
    can_multi_conn: bool
    can_fast_zero: bool
    min_block: int
    preferred_block: int
    max_payload: int

    @property
    def size(self) -> int: ...

    @property
    def contexts(self) -> Sequence[str]: ...

    try_read: Callable[[int, memoryview], int]
    """``(offset, view) -> MISS | DATA | HOLE``: fill ``view`` with the bytes at ``offset``."""

    try_write: Callable[[int, memoryview], int]
    """``(offset, view) -> MISS | DATA``: write ``view`` at ``offset`` (no FUA). The view is only valid during the call."""

    # An export may have two more attributes, for what it neither does at once nor works on itself, but passes on to somebody
    # else: ``start_read(offset, view, ended)`` and ``start_write(offset, data, ended)``, of type `Start` or None. They begin
    # the request, answer True, and call ``ended`` when it is over; or answer False, having done nothing, and the coroutine is
    # taken. The server asks them for plain requests (no flags) of up to ``max_payload`` that `try_read` or `try_write` missed.

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes at ``offset``."""

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Write ``data`` at ``offset``; with ``fua`` return only when it is on stable storage. ``data`` stays valid
        until the coroutine returns."""

    async def flush(self) -> None:
        """Put every write that was acknowledged before this call on stable storage."""

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """Discard; the content of the range becomes undefined."""

    async def write_zeroes(self, offset: int, length: int, *, fua: bool, may_unmap: bool, fast: bool) -> None:
        """Zero the range. ``may_unmap`` false is NBD_CMD_FLAG_NO_HOLE. With ``fast`` raise ENOTSUP at once, having
        changed nothing, where it would be no faster than writing zeroes."""

    async def cache(self, offset: int, length: int) -> None:
        """Prefetch (NBD_CMD_CACHE)."""

    async def block_status(self, context: str, offset: int, length: int, limit: int) -> list[Extent]:
        """Describe at most ``limit`` extents of one of ``contexts`` from ``offset`` on; at least one extent, in order,
        adjacent extents differing in flags. The extents never pass ``offset + length`` and may stop short of it."""

    def client_connected(self, client: object) -> None:
        """A client chose this export. Raises OSError to refuse it."""

    def client_gone(self, client: object) -> None:
        """That client's connection ended."""

"""Memory of the server: a pool of equal buffers for receiving and replying, and the budget that bounds the rest.

Why these numbers. The batch buffers are 2 MiB and a little, so that the largest request of the usual tools (qemu-img
convert moves 2 MiB at a time) still goes through the fast path; only touched pages cost memory. The server keeps two in use
for all connections together; a connection takes one for itself only while it holds an incomplete large request, and one
while the client does not read a large reply. A connection may have 128 requests and 64 MiB in the slow path (QEMU: 16
requests of up to 32 MiB each), all connections together 256 MiB; but one request is always granted, so that no client can
starve another by hoarding. A client that stalls therefore costs at most two buffers, its budget, and what the kernel holds
for its socket.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Final

BUFFER_SIZE: Final = (2 << 20) + 4096
"""Bytes of a pooled buffer: a request or reply of 2 MiB with its header."""

_SPARE: Final = 8
_MAPPED: Final = 1 << 20
_SKEW: Final = 36


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what clients may have under way in the slow path; bytes count payloads and reply data."""

    requests_per_connection: int = 128
    bytes_per_connection: int = 64 << 20
    bytes_in_total: int = 256 << 20


def fresh(size: int) -> memoryview:
    """``size`` bytes of memory. A large piece costs nothing until it is touched, which is why it is not a bytearray:
    that is filled with zeroes at once, and a client could make us do it by merely announcing a payload."""
    if size < _MAPPED:
        return memoryview(bytearray(size))
    return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _skewed(size: int) -> memoryview:
    """``size`` bytes that begin a little behind the start of a page.

    Behind the header of a request or reply, data would otherwise land 16 to 28 bytes into a page. Processors take 2 to 4 times
    as long for a copy whose target is ahead of its source by 1 to 31 bytes modulo 4096 (each load seems to depend on the store
    before it), and the sources here, pages of the page cache or of a socket, start at 0. Measured: a 256 KiB read of cached
    data takes 118 us into offset 16 or 28, and 31 us into offset 0 or 32 and above; to receive 128 KiB behind a request's 28
    bytes takes 27 us where the request stands at 0, and 12 us at 36.
    """
    return fresh(size + _SKEW)[_SKEW:]


class BufferPool:
    """Hands out `BUFFER_SIZE` byte buffers as memoryviews, and keeps a few of those given back."""

    def __init__(self) -> None:
        self._spare: list[memoryview] = []

    def take(self) -> memoryview:
        """A buffer with any content."""
        return self._spare.pop() if self._spare else _skewed(BUFFER_SIZE)

    def give(self, buffer: memoryview) -> None:
        """Take back a whole buffer that nobody uses any more."""
        if len(self._spare) < _SPARE:
            self._spare.append(buffer)

    def take_part(self, size: int) -> memoryview:
        """``size`` bytes of a buffer that is the caller's alone; for longer pieces, whose fresh pages would cost as much as the
        copy of what they hold."""
        return self.take()[:size] if size <= BUFFER_SIZE else fresh(size)

    def give_part(self, part: memoryview) -> None:
        """Take back what `take_part` gave, when nobody uses it any more. Other memory is let go."""
        whole = memoryview(part.obj)
        if len(whole) == BUFFER_SIZE + _SKEW:
            self.give(whole[_SKEW:])


class Budget:
    """The bytes that the slow path of all connections of a server holds."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.held = 0


class Account:
    """One connection's share of a `Budget`: requests in flight and bytes held."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.requests = 0
        self.held = 0

    def admit(self, cost: int) -> bool:
        """Charge one request of ``cost`` bytes if the limits allow it now."""
        limits = self._budget.limits
        if self.requests and (
            self.requests >= limits.requests_per_connection
            or self.held + cost > limits.bytes_per_connection
            or self._budget.held + cost > limits.bytes_in_total
        ):
            return False
        self.requests += 1
        self.held += cost
        self._budget.held += cost
        return True

    def release(self, cost: int) -> None:
        """Give back what `admit` charged."""
        self.requests -= 1
        self.held -= cost
        self._budget.held -= cost

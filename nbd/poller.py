"""Adaptive polling: after serving a client, look again for a moment before going to sleep.

Waking a sleeping process costs more than a small request does. So when a connection was served, the poller tries the
active connections again and again without blocking, for up to ``max_ns`` nanoseconds after the last success, and only then
returns to the event loop.

When polling pays is learnt from polling: once it was in vain, the next wake-up is served without it, then the next two, four and
so on up to `MAX_SKIPS`; one success, and it is on again. So a client with pauses is not polled for, an idle server sleeps, and
where the client cannot answer *because* the server holds the processor (a busy machine), polling stops as well. That last case
is why this is not QEMU's rule of ``poll-max-ns``, which goes by how soon the wake-up came: there it comes at once, and QEMU
concludes that it should poll longer.

Requests that an export passes on to another server are answered there: the connections to such servers (`UPSTREAM`) are polled
along, so that a request, what becomes of it there, and its answer need no turn of the event loop in between.

Everything else in the loop goes on: the poller returns to it at the latest every `TURN_NS`, and does not poll at all while
requests are in the slow path (their threads and callbacks need the loop, and the interpreter lock).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic_ns
from typing import Final, Protocol

DEFAULT_MAX_NS: Final = 64_000
"""Twice QEMU's default: waking up the client, which it does before it answers, takes 30 to 50 us on virtual machines."""
TURN_NS: Final = 500_000
"""The longest time before the event loop gets a turn while clients keep the poller busy."""
MAX_SKIPS: Final = 64
"""Wake-ups served without polling after polling was in vain again and again."""
_FORGET_NS: Final = 2_000_000
"""A connection that was silent this long is no longer polled."""


UPSTREAM: Final[dict[Upstream, None]] = {}
"""Connections of clients in this process that wait for answers to requests passed on."""


class Upstream(Protocol):
    """What a client's connection offers to the pollers of this process."""

    def poll(self) -> bool:
        """Try once to send and to receive without blocking; whether anything moved."""


class Pollable(Protocol):
    """What a connection offers to the poller."""

    last_active: int

    def poll(self) -> bool:
        """Try once to make progress without blocking; whether there was any."""

    def settle(self) -> None:
        """Register with the event loop for what it has to wait for now."""


class Poller:
    """Polls all active connections of one server.

    ``max_ns``: the longest time to poll in vain, nanoseconds; 0 turns polling off. ``busy`` says whether the slow path has
    work.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, max_ns: int, busy: Callable[[], bool]) -> None:
        self._loop = loop
        self._max_ns = max_ns
        self._busy = busy
        self._active: list[Pollable] = []
        self._turn: asyncio.Handle | None = None
        self._skips = 0  # wake-ups still to be served without polling
        self._penalty = 0  # what `_skips` starts from the next time

    def forget(self, connection: Pollable) -> None:
        """The connection is gone."""
        if connection in self._active:
            self._active.remove(connection)

    def woken(self, connection: Pollable) -> None:
        """The event loop says that ``connection`` can go on: serve it, then poll."""
        if not connection.poll() or not self._max_ns:
            connection.settle()
            return
        connection.last_active = monotonic_ns()
        if connection not in self._active:
            self._active.append(connection)
        if self._skips and self._turn is None:
            self._skips -= 1
            self._settle(connection.last_active)
        else:
            self._spin()

    def _spin(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        active = self._active
        began = idle_since = monotonic_ns()
        worked = False
        while active:
            progress = False
            for connection in tuple(active):
                if connection.poll():
                    progress = True
                    connection.last_active = idle_since
            for upstream in tuple(UPSTREAM):
                if upstream.poll():
                    progress = True
            now = monotonic_ns()
            if progress:
                worked = True
                idle_since = now
                if now - began > TURN_NS:
                    self._turn = self._loop.call_soon(self._spin)
                    break
            elif now - idle_since >= self._max_ns or self._busy():
                break
        if worked:
            self._penalty = 0
        elif not self._busy():  # else it was not polling that failed, it was called off
            self._penalty = min(self._penalty * 2 or 1, MAX_SKIPS)
            self._skips = self._penalty
        if self._turn is None:
            self._settle(idle_since)

    def _settle(self, now: int) -> None:
        for connection in tuple(self._active):
            connection.settle()
            if now - connection.last_active > _FORGET_NS:
                self._active.remove(connection)

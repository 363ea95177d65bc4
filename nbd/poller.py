"""Adaptive polling: after serving a client, look again for a moment before going to sleep.

Waking a sleeping process costs more than a small request does. So when a connection was served, the poller tries the
active connections again and again without blocking, for up to ``ns`` nanoseconds after the last success, and only then
returns to the event loop. The idea is QEMU's ``poll-max-ns``: a wake-up that came soon after the poller gave up means that
polling a little longer would have caught it, so ``ns`` doubles, up to ``max_ns``; one that came late means that polling was in
vain, and ``ns`` halves, down to nothing. A client with pauses is therefore not polled for, and an idle server sleeps. "Soon"
is twice ``max_ns``, because the time to wake-up includes the cost of waking up itself, which polling saves. Unlike
QEMU's, one late wake-up does not start all over: on a busy machine that would mean never to poll.

Everything else in the loop goes on: the poller returns to it at the latest every `TURN_NS`, and does not poll at all while
requests are in the slow path (their threads and callbacks need the loop, and the interpreter lock).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic_ns
from typing import Final, Protocol

DEFAULT_MAX_NS: Final = 64_000
"""Twice QEMU's default: an interpreter takes longer over a turn."""
TURN_NS: Final = 500_000
"""The longest time before the event loop gets a turn while clients keep the poller busy."""
_FIRST_NS: Final = 8_000
_FORGET_NS: Final = 2_000_000
"""A connection that was silent this long is no longer polled."""


class Pollable(Protocol):
    """What a connection offers to the poller."""

    last_active: int

    def poll(self) -> bool:
        """Try once to make progress without blocking; whether there was any."""

    def settle(self) -> None:
        """Register with the event loop for what it has to wait for now."""


class Poller:
    """Polls all active connections of one server.

    ``max_ns``: the longest time to poll in vain, nanoseconds; 0 turns polling off. ``busy`` says whether the slow path has work.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, max_ns: int, busy: Callable[[], bool]) -> None:
        self._loop = loop
        self._max_ns = max_ns
        self._busy = busy
        self._active: list[Pollable] = []
        self._turn: asyncio.Handle | None = None
        self._gave_up = 0
        self.ns = 0

    def forget(self, connection: Pollable) -> None:
        """The connection is gone."""
        if connection in self._active:
            self._active.remove(connection)

    def woken(self, connection: Pollable) -> None:
        """The event loop says that ``connection`` can go on: serve it, then poll."""
        if not self._max_ns:
            connection.poll()
            connection.settle()
            return
        now = monotonic_ns()
        if self._turn is None:
            waited = now - self._gave_up
            if waited > 2 * self._max_ns:
                self.ns = self.ns // 2 if self.ns > _FIRST_NS else 0
            elif waited > self.ns:
                self.ns = min(self._max_ns, self.ns * 2 or _FIRST_NS)
        if connection.poll():
            connection.last_active = now
            if connection not in self._active:
                self._active.append(connection)
            self._spin()
        else:
            connection.settle()

    def _spin(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        active = self._active
        began = idle_since = monotonic_ns()
        while active:
            progress = False
            for connection in tuple(active):
                if connection.poll():
                    progress = True
                    connection.last_active = idle_since
            now = monotonic_ns()
            if progress:
                idle_since = now
                if now - began > TURN_NS:
                    self._turn = self._loop.call_soon(self._spin)
                    return
            elif now - idle_since >= self.ns or self._busy():
                break
        self._gave_up = idle_since
        self._settle(idle_since)

    def _settle(self, now: int) -> None:
        for connection in tuple(self._active):
            connection.settle()
            if now - connection.last_active > _FORGET_NS:
                self._active.remove(connection)

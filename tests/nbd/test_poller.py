"""The poller's rules, with a clock and connections that do as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from livedisk.nbd import poller as module
from livedisk.nbd.poller import Poller

MAX = 64_000


class Clock:
    """Time that passes a microsecond at every look."""

    def __init__(self) -> None:
        self.now = 10**9

    def __call__(self) -> int:
        self.now += 1000
        return self.now


class Peer:
    """A connection; ``work`` says for each attempt whether it makes progress."""

    def __init__(self, work: Iterator[bool]) -> None:
        self.last_active = 0
        self.work = work
        self.attempts = 0
        self.settled = 0

    def poll(self) -> bool:
        self.attempts += 1
        return next(self.work, False)

    def settle(self) -> None:
        self.settled += 1


class Loop:
    """Keeps what is to be called soon."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, call: Callable[[], None]) -> Any:
        self.soon.append(call)
        loop = asyncio.new_event_loop()
        try:
            return asyncio.Handle(call, (), loop)
        finally:
            loop.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "monotonic_ns", clock)
    return clock


def wake(poller: Poller, clock: Clock, after: int) -> Peer:
    """A request that comes ``after`` nanoseconds, and none behind it."""
    clock.now += after
    peer = Peer(iter([True]))
    poller.woken(peer)
    poller.forget(peer)
    return peer


def test_polling_grows_when_the_next_request_comes_soon(clock: Clock) -> None:
    poller = Poller(Loop(), MAX, lambda: False)  # type: ignore[arg-type]
    grown = []
    for _ in range(7):
        wake(poller, clock, 10_000)
        grown.append(poller.ns)
    assert grown == [0, 8_000, 16_000, 32_000, 64_000, 64_000, 64_000]


def test_polling_shrinks_to_nothing_when_requests_are_rare(clock: Clock) -> None:
    poller = Poller(Loop(), MAX, lambda: False)  # type: ignore[arg-type]
    poller.ns = MAX
    attempts = []
    for _ in range(6):
        attempts.append(wake(poller, clock, 10**7).attempts)
    assert poller.ns == 0
    assert attempts == sorted(attempts, reverse=True)
    assert attempts[-1] == 2


def test_without_polling_one_attempt_is_made(clock: Clock) -> None:
    poller = Poller(Loop(), 0, lambda: False)  # type: ignore[arg-type]
    peer = Peer(iter([True] * 5))
    poller.woken(peer)
    assert (peer.attempts, peer.settled) == (1, 1)


def test_the_event_loop_gets_a_turn_though_work_never_ends(clock: Clock) -> None:
    loop = Loop()
    poller = Poller(loop, MAX, lambda: False)  # type: ignore[arg-type]
    peer = Peer(iter(lambda: True, False))
    poller.woken(peer)
    assert len(loop.soon) == 1
    assert peer.attempts <= module.TURN_NS // 1000 + 2
    before = peer.attempts
    loop.soon.pop()()
    assert peer.attempts > before
    assert len(loop.soon) == 1


def test_slow_requests_end_the_polling_at_once(clock: Clock) -> None:
    poller = Poller(Loop(), MAX, lambda: True)  # type: ignore[arg-type]
    poller.ns = MAX
    assert wake(poller, clock, 0).attempts == 2


def test_all_active_connections_are_polled_and_silent_ones_forgotten(clock: Clock) -> None:
    poller = Poller(Loop(), MAX, lambda: False)  # type: ignore[arg-type]
    silent, busy = Peer(iter([True])), Peer(iter([True] * 50))
    poller.woken(silent)
    poller.woken(busy)
    assert silent.attempts > 20
    clock.now += module._FORGET_NS
    busy.work = iter([True] * 5)
    poller.woken(busy)
    attempts = silent.attempts
    busy.work = iter([True] * 5)
    poller.woken(busy)
    assert silent.attempts == attempts

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


def wake(poller: Poller, *more: bool) -> Peer:
    """A connection with one request, and ``more`` as polling finds it; then nothing."""
    peer = Peer(iter([True, *more]))
    poller.woken(peer)
    poller.forget(peer)
    return peer


def test_polling_in_vain_is_tried_ever_more_rarely(clock: Clock) -> None:
    poller = Poller(Loop(), MAX, lambda: False)  # type: ignore[arg-type]
    polled = [wake(poller).attempts > 1 for _ in range(1000)]
    gaps = [len(gap) for gap in "".join("xo"[tried] for tried in polled).split("o")[1:-1]]
    assert gaps[:9] == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    assert wake(poller).settled == 1


def test_polling_in_vain_lasts_no_longer_than_it_may(clock: Clock) -> None:
    poller = Poller(Loop(), MAX, lambda: False)  # type: ignore[arg-type]
    before = clock.now
    wake(poller)
    assert MAX <= clock.now - before <= MAX + 5_000


def test_one_success_turns_polling_on_again(clock: Clock) -> None:
    poller = Poller(Loop(), MAX, lambda: False)  # type: ignore[arg-type]
    for _ in range(100):
        wake(poller)
    while wake(poller, False, False, True).attempts < 4:
        pass
    # Each success is followed by waiting for the next one from the start.
    assert wake(poller, False, True).attempts > 60
    assert wake(poller, False, True).attempts > 60


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
    for _ in range(5):
        # And that is no reason to skip it the next time.
        assert wake(poller).attempts == 2


def test_all_active_connections_are_polled_and_silent_ones_forgotten(clock: Clock) -> None:
    poller = Poller(Loop(), MAX, lambda: False)  # type: ignore[arg-type]
    silent, busy = Peer(iter([True, False, True])), Peer(iter([True] * 50))
    poller.woken(silent)
    before = silent.attempts
    poller.woken(busy)
    assert silent.attempts - before > 50
    clock.now += module._FORGET_NS
    busy.work = iter([True] * 5)
    poller.woken(busy)
    before = silent.attempts
    busy.work = iter([True] * 5)
    poller.woken(busy)
    assert silent.attempts == before

"""How much copies at once: by number where they are large, by bytes where they are small; and turns of those that never wait."""

from __future__ import annotations

import asyncio

import pytest

from livedisk.jobs import copy
from livedisk.jobs.copy import STEP, Lanes, Turns


async def fill(lanes: Lanes, size: int) -> int:
    """Launch copies of ``size`` bytes that never end, until there is no room; how many."""
    hold = asyncio.Event()

    async def work(offset: int, length: int) -> None:
        await hold.wait()

    count = 0
    while not lanes.full:
        await lanes.launch(count * size, size, work)
        count += 1
    assert lanes.bytes == count * size
    hold.set()
    await lanes.empty()
    assert lanes.idle
    assert lanes.bytes == 0
    return count


@pytest.mark.parametrize(
    ("size", "most", "count"),
    [
        (2 * STEP, 64, 3),
        (STEP, 64, 3),
        (STEP // 2, 64, 6),
        (STEP // 4, 64, 12),
        (512, 64, 12),
        (512, 3, 3),
        (512, 5, 5),
    ],
)
def test_small_copies_are_more(size: int, most: int, count: int) -> None:
    assert asyncio.run(fill(Lanes(3, most), size)) == count


@pytest.mark.parametrize("how", ["launch", "change", "empty"])
def test_a_mistake_in_what_was_launched_is_raised_once(how: str) -> None:
    async def run() -> None:
        lanes = Lanes(1, 1)

        async def work(offset: int, length: int) -> None:
            raise ValueError("a mistake")

        async def again() -> None:
            if how == "launch":
                await lanes.launch(STEP, STEP, work)
            else:
                await getattr(lanes, how)()

        await lanes.launch(0, STEP, work)
        with pytest.raises(ValueError, match="a mistake"):
            await again()
        await lanes.empty()
        assert lanes.idle
        assert not lanes.occupied(0, STEP)

    asyncio.run(run())


def test_others_have_their_turn_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0
    monkeypatch.setattr(copy, "monotonic_ns", lambda: clock)

    async def run() -> None:
        nonlocal clock
        turns, waited = Turns(), [0]

        def other(takes: int) -> None:
            nonlocal clock
            clock += takes
            waited[0] += 1

        loop = asyncio.get_running_loop()
        clock = 1 << 40
        await turns.give_way()
        assert not turns.crowded, "nobody was there"
        loop.call_soon(other, copy.CROWDED_NS + 1)
        clock += copy.TURN_NS
        await turns.give_way()
        assert waited == [0], "the turn is not over"
        clock += 1
        await turns.give_way()
        assert waited == [1]
        assert turns.crowded
        # They took long: the next turn lasts as long as theirs did, up to a bound.
        loop.call_soon(other, 1 << 40)
        clock += copy.TURN_NS + 1
        await turns.give_way()
        loop.call_soon(other, 1)
        clock += copy.LONG_TURN_NS
        await turns.give_way()
        assert waited == [2]
        await turns.give_way(always=True)
        assert waited == [3]
        assert not turns.crowded

    asyncio.run(run())

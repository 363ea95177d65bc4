"""Throttling in virtual time: rates, bursts, turns, changes while requests wait, drains."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from contract.disks import new_graph, parse

from kit.virtual_time import run_virtually
from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.throttle import Bucket, Direction, Limit, Limits, Member, ThrottleGroup
from livedisk.emulator.errors import BlockError

READ, WRITE = Direction.READ, Direction.WRITE


def group(iops_size: int = 0, **limits: Limit) -> ThrottleGroup:
    by_bucket = {Bucket(name.replace("_", "-")): limit for name, limit in limits.items()}
    return ThrottleGroup("g", Limits(by_bucket, iops_size), asyncio.get_running_loop().time)


async def served(member: Member, direction: Direction, length: int, seconds: float, depth: int = 4) -> int:
    """Requests that are admitted in that time, with so many waiting at any moment."""
    loop, count = asyncio.get_running_loop(), 0
    end = loop.time() + seconds

    async def ask() -> None:
        nonlocal count
        while loop.time() < end:
            await member.admit(direction, length)
            count += loop.time() < end

    await asyncio.gather(*(ask() for _ in range(depth)))
    return count


RATES: dict[str, tuple[dict[str, Any], Direction, int, float, float]] = {
    # limits, direction, bytes, seconds, requests expected (within one)
    "requests": ({"iops_total": Limit(100)}, READ, 4096, 10, 1010),
    "requests of that kind": ({"iops_write": Limit(50)}, WRITE, 512, 10, 505),
    "bytes": ({"bps_total": Limit(1 << 20)}, READ, 4096, 10, 2560 + 25.6),
    "the tighter of two": ({"bps_total": Limit(1 << 20), "iops_total": Limit(10)}, READ, 4096, 10, 101),
    "a maximum for a second": ({"iops_total": Limit(100, 500)}, READ, 512, 10, 500 + 1000),
    "a maximum for longer": ({"iops_total": Limit(100, 500, 3)}, READ, 512, 10, 1500 + 1000),
    "within a burst": ({"iops_total": Limit(100, 500, 10)}, READ, 512, 5, 2550),
    "large requests count more": ({"iops_total": Limit(100), "iops_size": 4096}, READ, 16384, 10, 252.5),
    "small ones do not count less": ({"iops_total": Limit(100), "iops_size": 4096}, READ, 512, 10, 1010),
}


@pytest.mark.parametrize("name", RATES)
def test_as_many_requests_go_as_the_limit_says(name: str) -> None:
    limits, direction, length, seconds, expected = RATES[name]

    async def act() -> int:
        return await served(Member(group(**limits)), direction, length, seconds)

    # What is under way may pass a full bucket by one request.
    assert abs(run_virtually(act()) - expected) <= 2


def test_the_other_direction_is_not_held() -> None:
    async def act() -> None:
        member = Member(group(iops_write=Limit(1)))
        for _ in range(5):
            await member.admit(READ, 512)
        assert asyncio.get_running_loop().time() == 0

    run_virtually(act())


def test_members_of_a_group_take_turns() -> None:
    async def act() -> list[int]:
        shared = group(iops_total=Limit(100))
        members = [Member(shared) for _ in range(3)]
        depths = (1, 4, 16)
        asked = zip(members, depths, strict=True)
        return await asyncio.gather(*(served(member, READ, 512, 10, depth) for member, depth in asked))

    counts = run_virtually(act())
    assert abs(sum(counts) - 1010) <= 3
    assert max(counts) - min(counts) <= 20


def test_limits_change_while_requests_wait() -> None:
    async def act() -> float:
        shared = group(iops_total=Limit(1))
        member = Member(shared)
        waiting = [asyncio.create_task(member.admit(READ, 512)) for _ in range(100)]
        await asyncio.sleep(0.5)
        with pytest.raises(BlockError, match="cannot be lower"):
            shared.set_limits(Limits({Bucket.IOPS_TOTAL: Limit(10, 5)}))
        shared.set_limits(Limits({Bucket.IOPS_TOTAL: Limit(200)}))
        await asyncio.gather(*waiting)
        return asyncio.get_running_loop().time()

    assert 0.8 < run_virtually(act()) < 1.1


@pytest.mark.parametrize("leave", [Member.leave, Member.suspend, lambda member: member.move(group())])
def test_who_leaves_or_is_drained_waits_no_longer_and_holds_up_nobody(leave: Callable[[Member], None]) -> None:
    async def act() -> None:
        shared = group(iops_total=Limit(2))
        one, other = Member(shared), Member(shared)
        mine = [asyncio.create_task(one.admit(READ, 512)) for _ in range(10)]
        theirs = [asyncio.create_task(other.admit(READ, 512)) for _ in range(4)]
        await asyncio.sleep(0.1)
        leave(one)
        await asyncio.gather(*mine)
        assert asyncio.get_running_loop().time() == pytest.approx(0.1)
        await asyncio.gather(*theirs)

    run_virtually(act())


def test_a_request_that_is_given_up_holds_up_nobody() -> None:
    async def act() -> None:
        member = Member(group(iops_total=Limit(2)))
        tasks = [asyncio.create_task(member.admit(WRITE, 512)) for _ in range(6)]
        await asyncio.sleep(0.1)
        for task in tasks[1:4]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await member.admit(WRITE, 512)

    run_virtually(act())


THROTTLED = {
    "driver": "throttle",
    "node-name": "t",
    "throttle-group": "g",
    "file": {"driver": "null-co", "size": 1 << 20},
}


@pytest.mark.parametrize("where", ["node", "device"])
def test_a_drain_does_not_wait_for_a_limit_and_the_fast_path_is_closed(where: str) -> None:
    async def act() -> None:
        graph = new_graph()
        slow = group(iops_total=Limit(1))
        graph.throttle_groups.named = {"g": slow}.get
        options = {**THROTTLED, "detect-zeroes": "off"} if where == "node" else {"driver": "null-co", "size": 1 << 20}
        node = await graph.open(parse(options))
        backend = BlockBackend(graph, "guest")
        graph.attach_root(backend, node, Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
        if where == "device":
            backend.set_throttle(slow)
        view = memoryview(bytearray(512))
        assert backend.try_read(0, view) == 0
        requests = [asyncio.create_task(backend.read(0, view)) for _ in range(20)]
        await asyncio.sleep(0)
        async with graph.drained(node):
            assert all(task.done() for task in requests)
            assert asyncio.get_running_loop().time() == 0
        more = [asyncio.create_task(backend.read(0, view)) for _ in range(3)]
        await asyncio.gather(*more)
        assert asyncio.get_running_loop().time() > 1
        await graph.detach_root(backend)
        await graph.close()
        assert slow.in_use is (where == "device")
        backend.set_throttle(None)
        assert not slow.in_use

    run_virtually(act())

"""Throttling: so many requests or bytes a second, for a disk or for a group of disks that share the limit.

Each limit is a *leaky bucket*: a request pours its units in, the bucket leaks ``average`` units a second, and while it holds
more than a burst's worth the next request waits. Without a ``maximum`` a burst is a tenth of a second's worth; with one,
``maximum`` units a second are allowed for ``length`` seconds, and a second bucket sees that no more than ``maximum`` a second is
used meanwhile. With ``iops_size`` a larger request counts as several.

In a group the members take turns: whoever waits is let in round robin, one request at a time, for reads and writes apart. The
limits can change while requests wait. A member that is drained lets everything through, as in QEMU, so that a drain
never waits for a limit.

Source: QEMU ``util/throttle.c``, ``block/throttle-groups.c``, ``docs/throttle.txt``; messages asked from QEMU 10.0.2.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

from livedisk.emulator.errors import BlockError

HIGHEST: Final = 1_000_000_000_000_000
"""Of any limit."""


class Direction(enum.IntEnum):
    """What a request does."""

    READ = 0
    WRITE = 1


class Bucket(enum.StrEnum):
    """What is limited, under the names of its options."""

    BPS_TOTAL = "bps-total"
    BPS_READ = "bps-read"
    BPS_WRITE = "bps-write"
    IOPS_TOTAL = "iops-total"
    IOPS_READ = "iops-read"
    IOPS_WRITE = "iops-write"


_OF: Final = {
    Direction.READ: ((Bucket.BPS_TOTAL, Bucket.BPS_READ), (Bucket.IOPS_TOTAL, Bucket.IOPS_READ)),
    Direction.WRITE: ((Bucket.BPS_TOTAL, Bucket.BPS_WRITE), (Bucket.IOPS_TOTAL, Bucket.IOPS_WRITE)),
}
"""By direction: the buckets of bytes, and those of requests."""


@dataclass(frozen=True)
class Limit:
    """``average`` and ``maximum``: units a second, 0: none; ``length``: seconds that a burst at the maximum may take."""

    average: int = 0
    maximum: int = 0
    length: int = 1


@dataclass(frozen=True)
class Limits:
    """All limits of a group. ``iops_size``: bytes that count as one request, 0: any request is one."""

    by_bucket: dict[Bucket, Limit] = field(default_factory=dict)
    iops_size: int = 0

    def __getitem__(self, bucket: Bucket) -> Limit:
        return self.by_bucket.get(bucket, Limit())

    @property
    def any(self) -> bool:
        """Whether anything is limited."""
        return any(self[bucket].average > 0 for bucket in Bucket)

    def check(self) -> None:
        """Raise BlockError, in QEMU's words, if the limits contradict each other."""
        for kind in ("bps", "iops"):
            total, *parts = (self[bucket] for bucket in Bucket if bucket.startswith(kind))
            averages = total.average and any(part.average for part in parts)
            if averages or (total.maximum and any(part.maximum for part in parts)):
                raise BlockError("bps/iops/max total values and read/write values cannot be used at the same time")
        if self.iops_size and not any(self[bucket].average for bucket in Bucket if bucket.startswith("iops")):
            raise BlockError("iops size requires an iops value to be set")
        for bucket in Bucket:
            _check_limit(self[bucket])


def _check_limit(limit: Limit) -> None:
    if not 0 <= limit.average <= HIGHEST or not 0 <= limit.maximum <= HIGHEST:
        raise BlockError(f"bps/iops/max values must be within [0, {HIGHEST}]")
    if not limit.length:
        raise BlockError("the burst length cannot be 0")
    if limit.length > 1 and not limit.maximum:
        raise BlockError("burst length set without burst rate")
    if limit.maximum and limit.length > HIGHEST // limit.maximum:
        raise BlockError("burst length too high for this burst rate")
    if limit.maximum and not limit.average:
        raise BlockError("bps_max/iops_max require corresponding bps/iops values")
    if limit.maximum and limit.maximum < limit.average:
        raise BlockError("bps_max/iops_max cannot be lower than bps/iops")


class Buckets:
    """How full each bucket is. ``clock``: seconds."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self._clock = clock
        self._level = dict.fromkeys(Bucket, 0.0)
        self._burst = dict.fromkeys(Bucket, 0.0)
        self._leaked = clock()

    def _leak(self) -> None:
        now = self._clock()
        passed, self._leaked = now - self._leaked, now
        for bucket, limit in self.limits.by_bucket.items():
            self._level[bucket] = max(self._level[bucket] - limit.average * passed, 0.0)
            self._burst[bucket] = max(self._burst[bucket] - limit.maximum * passed, 0.0)

    def wait(self, direction: Direction) -> float:
        """Seconds until a request may go; 0: now."""
        self._leak()
        return max(self._wait(bucket) for pair in _OF[direction] for bucket in pair)

    def _wait(self, bucket: Bucket) -> float:
        limit = self.limits[bucket]
        if not limit.average:
            return 0.0
        room = limit.maximum * limit.length if limit.maximum else limit.average / 10
        if self._level[bucket] > room:
            return (self._level[bucket] - room) / limit.average
        if limit.length > 1:
            return max(self._burst[bucket] - limit.maximum / 10, 0.0) / limit.maximum
        return 0.0

    def pour(self, direction: Direction, length: int) -> None:
        """A request of ``length`` bytes goes."""
        size = self.limits.iops_size
        requests = length / size if size and length > size else 1.0
        for buckets, units in zip(_OF[direction], (float(length), requests), strict=True):
            for bucket in buckets:
                self._level[bucket] += units
                if self.limits[bucket].length > 1:
                    self._burst[bucket] += units


class Member:
    """One disk in a group."""

    def __init__(self, group: ThrottleGroup) -> None:
        self.group = group
        self.pending = [0, 0]
        """Requests that wait or were just let go, by direction."""
        self._queues: tuple[deque[asyncio.Future[None]], ...] = (deque(), deque())
        self.suspended = 0
        group.join(self)

    async def admit(self, direction: Direction, length: int) -> None:
        """Wait for one's turn: before a request of ``length`` bytes."""
        if self.suspended:
            self.group.buckets.pour(direction, length)
            return
        group = self.group
        if group.must_wait(group.next_token(self, direction), direction) or self.pending[direction]:
            wait: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._queues[direction].append(wait)
            self.pending[direction] += 1
            try:
                await wait
            finally:
                self.pending[direction] -= 1
                if wait in self._queues[direction]:
                    self._queues[direction].remove(wait)
        group = self.group  # it may have moved to another one meanwhile
        group.buckets.pour(direction, length)
        group.let_next_go(self, direction)

    def let_one_go(self, direction: Direction) -> bool:
        """Wake the request that waits longest. False: none does."""
        queue = self._queues[direction]
        while queue:
            wait = queue.popleft()
            if not wait.done():
                wait.set_result(None)
                return True
        return False

    def suspend(self) -> None:
        """Limit nothing until `unsuspend`; what waits goes. Counted."""
        self.suspended += 1
        for direction in Direction:
            while self.let_one_go(direction):
                pass

    def unsuspend(self) -> None:
        """Undo one `suspend`."""
        self.suspended -= 1

    def move(self, group: ThrottleGroup) -> None:
        """Belong to another group from now on; what waits is let go."""
        self.suspend()
        self.group.leave(self)
        self.group = group
        group.join(self)
        self.unsuspend()

    def leave(self) -> None:
        """Belong to no group any more; what waits is let go."""
        self.suspend()
        self.group.leave(self)


class ThrottleGroup:
    """Limits, and the disks that share them. ``name``: as users know it."""

    def __init__(self, name: str, limits: Limits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.members: list[Member] = []
        self.buckets = Buckets(limits or Limits(), clock)
        self._clock = clock
        self._turn: list[Member | None] = [None, None]
        self._timers: list[asyncio.TimerHandle | None] = [None, None]

    @property
    def limits(self) -> Limits:
        return self.buckets.limits

    def set_limits(self, limits: Limits) -> None:
        """Other limits, from now on, with empty buckets. Raises BlockError, and nothing changes."""
        limits.check()
        self.buckets = Buckets(limits, self._clock)
        for direction in Direction:
            if self._disarm(direction):
                self._time_is_up(direction)

    @property
    def in_use(self) -> bool:
        """Whether a disk is in it."""
        return bool(self.members)

    def join(self, member: Member) -> None:
        """Take part in the turns."""
        self.members.append(member)

    def leave(self, member: Member) -> None:
        """Nothing of the member's waits any more."""
        place = self.members.index(member)
        self.members.remove(member)
        for direction in Direction:
            if self._turn[direction] is member:
                self._turn[direction] = self.members[place % len(self.members)] if self.members else None
                if self._disarm(direction) and self.members:
                    self._time_is_up(direction)

    # -- turns -------------------------------------------------------------------------------------------------------
    def next_token(self, member: Member, direction: Direction) -> Member:
        """Whose turn is next: round robin from who had the last, among those with a request that waits."""
        if member.suspended and member.pending[direction]:
            return member
        turn = self._turn[direction]
        start = self.members.index(turn) if turn in self.members else -1
        count = len(self.members)
        for step in range(1, count + 1):
            other = self.members[(start + step) % count]
            if other.pending[direction]:
                return other
        return member

    def must_wait(self, member: Member, direction: Direction) -> bool:
        """Whether the member's next request must wait; then there is a timer that ends it."""
        if member.suspended:
            return False
        if self._timers[direction] is not None:
            return True
        wait = self.buckets.wait(direction)
        if wait <= 0:
            return False
        self._turn[direction] = member
        self._timers[direction] = asyncio.get_running_loop().call_later(wait, self._time_is_up, direction)
        return True

    def _disarm(self, direction: Direction) -> bool:
        timer, self._timers[direction] = self._timers[direction], None
        if timer is not None:
            timer.cancel()
        return timer is not None

    def _time_is_up(self, direction: Direction) -> None:
        self._timers[direction] = None
        member = self._turn[direction]
        if member is None or member not in self.members:
            member = self.members[0] if self.members else None
        if member is not None and not member.let_one_go(direction):
            self.let_next_go(member, direction)

    def let_next_go(self, member: Member, direction: Direction) -> None:
        """A request of the member's has gone: let the next one go, or set the timer for it."""
        if member not in self.members:
            return
        token = self.next_token(member, direction)
        if not token.pending[direction] or self.must_wait(token, direction):
            return
        if member.let_one_go(direction):  # the member's own go first while nobody has to wait
            token = member
        else:
            token.let_one_go(direction)
        self._turn[direction] = token


class DrainListener(Protocol):
    """What holds requests back on its own, and must let them go while its node is drained."""

    def drain_begin(self) -> None:
        """Let all go, and hold none back."""

    def drain_end(self) -> None:
        """Undo one `drain_begin`."""


class ThrottleGroups:
    """The groups of one graph, by name: objects that users made, and those that came to be with a device's limits.

    ``named``: finds a user's object.
    """

    def __init__(self) -> None:
        self.named: Callable[[str], ThrottleGroup | None] = lambda name: None
        self._implicit: dict[str, ThrottleGroup] = {}

    def find(self, name: str) -> ThrottleGroup | None:
        """The group of that name, or None."""
        return self.named(name) or self._implicit.get(name)

    def obtain(self, name: str) -> ThrottleGroup:
        """The group of that name, made if need be; it lasts as long as it is used (`tidy`)."""
        found = self.find(name)
        if found is None:
            found = self._implicit[name] = ThrottleGroup(name)
        return found

    def tidy(self) -> None:
        """Forget groups that nobody made and nobody uses."""
        self._implicit = {name: group for name, group in self._implicit.items() if group.in_use}

    def __iter__(self) -> Iterator[ThrottleGroup]:
        return iter(self._implicit.values())

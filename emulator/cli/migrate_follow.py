"""While the disks are copied: how far they are, whether they converge, and what is done if they do not.

The guest is handed over when what is left would be copied within the downtime limit. Where the guest writes about as fast as
it is copied, that moment does not come by itself; so, one after the other, and each told:

    1. writes wait until they are on the destination as well (``copy-mode=write-blocking``): nothing new is left to copy
    2. the guest's writes are limited, to half of what it wrote, and half again (`block_set_io_throttle`)
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from livedisk.emulator.cli.figures import bar, duration, human_bytes
from livedisk.emulator.cli.migrate_plan import Disk, End, Plan, Refused
from livedisk.emulator.cli.migrate_prepare import throttle

_PATIENCE: Final = 5.0
"""Seconds of not converging before the next step is taken."""
_CONVERGES: Final = 0.7
"""A guest that dirties less than this share of what is copied leaves enough to come to an end."""
_STALLED: Final = 10.0
"""Seconds without any progress after which that is told."""
_SLOWEST: Final = 1 << 20
"""Bytes a second that the guest may write in any case."""
_EVENT: Final = 0.5
"""Seconds to wait for an event that should be there."""
_SMOOTH: Final = 0.3
"""How much a new look counts against those before."""


@dataclass
class Look:
    """How one disk's mirror is. Bytes; rates in bytes a second."""

    disk: Disk
    done: int = 0
    total: int = 0
    ready: bool = False
    synced: bool = False
    rate: float = 0.0
    dirty_rate: float = 0.0

    @property
    def left(self) -> int:
        return self.total - self.done

    def line(self, width: int) -> str:
        """For people."""
        share = self.done / self.total if self.total else 1.0
        gain = self.rate - self.dirty_rate
        left = (
            "in step"
            if self.ready and not self.left
            else duration(self.left / gain)
            if gain > 0 and self.left
            else "-:--"
        )
        return (
            f"{self.disk.node:<{width}} {bar(share, 24, '█░')} {share:4.0%}  {human_bytes(self.rate)}/s, "
            f"dirty {human_bytes(self.dirty_rate)}/s, left {human_bytes(self.left)}, {left}"
        )


class Follower:
    """Looks at the mirrors of ``plan`` again and again. ``limit``: seconds that the guest may be held; ``tell``: says a line to
    whoever watches."""

    def __init__(self, source: End, destination: End, plan: Plan, limit: float, tell: Callable[[str], None]) -> None:
        self._source = source
        self._destination = destination
        self._plan = plan
        self._limit = limit
        self._tell = tell
        self.looks = [Look(disk) for disk in plan.disks]
        self._looked = 0.0
        self._converged_at = time.monotonic()
        self._moved_at = time.monotonic()
        self._blocking = False
        self._limits: dict[str, int] = {}

    def lines(self) -> Iterator[str]:
        """A line a disk."""
        width = max((len(look.disk.node) for look in self.looks), default=0)
        return (look.line(width) for look in self.looks)

    @property
    def close_enough(self) -> bool:
        """Whether all can be handed over now: the rest would be copied within the limit."""
        if not all(look.ready for look in self.looks):
            return False
        return self._time_left() <= self._limit

    def _time_left(self) -> float:
        """Seconds that the rest would take with the guest held. A mirror that is in step was fast enough for what came."""
        left = sum(look.left for look in self.looks if not look.synced)
        if not left:
            return 0.0
        rate = sum(max(look.rate, look.dirty_rate) for look in self.looks)
        return left / max(rate, 16 << 20)

    async def look(self) -> None:
        """Ask once. Raises Refused, with the reason, for a mirror that failed; ConnectionLost, if an end is gone."""
        await self._destination.call("query-status")
        now = time.monotonic()
        passed, self._looked = now - self._looked, now
        jobs = {job["device"]: job for job in await self._source.call("query-block-jobs")}
        for look in self.looks:
            job = jobs.get(look.disk.name)
            if job is None or job.get("error") or job["status"] in ("concluded", "aborting"):
                raise Refused(await self._why(look, (job or {}).get("error") or "it is gone"))
            self._note(look, job, passed)
        rate, dirty = sum(look.rate for look in self.looks), sum(look.dirty_rate for look in self.looks)
        if not all(look.ready for look in self.looks) and dirty < _CONVERGES * rate:
            self._converged_at = now
        if rate >= 1 or dirty < 1:
            self._tell_stall(now, moving=rate >= 1)
        if rate < 1 and dirty < 1:
            self._converged_at = now  # it is not the guest that is in the way

    async def _why(self, look: Look, reason: str) -> str:
        """What a mirror failed with, and on which side: the job does not know, its last error event does."""
        side = ""
        with suppress(TimeoutError):
            async with asyncio.timeout(_EVENT):
                async for event in self._source.qmp.events():
                    if event["event"] == "BLOCK_JOB_ERROR" and event["data"]["device"] == look.disk.name:
                        side = (
                            "reading the source"
                            if event["data"]["operation"] == "read"
                            else "writing to the destination"
                        )
                        break
        hint = ""
        if reason == os.strerror(errno.ENOSPC):
            where = f" ({look.disk.target})" if look.disk.target else ""
            hint = f": make room there{where}, and run this again"
        return f"copying '{look.disk.node}' failed{', ' if side else ''}{side}: {reason}{hint}"

    def _tell_stall(self, now: float, *, moving: bool) -> None:
        if moving or all(look.ready for look in self.looks):
            self._moved_at = now
        elif now - self._moved_at > _STALLED:
            self._moved_at = now
            self._tell(
                f"nothing was copied for {_STALLED:.0f} seconds: waiting for the destination's storage or the network"
            )

    def _note(self, look: Look, job: dict[str, Any], passed: float) -> None:
        if look.total and passed < 10:
            look.rate += _SMOOTH * ((job["offset"] - look.done) / passed - look.rate)
            look.dirty_rate += _SMOOTH * ((job["len"] - look.total) / passed - look.dirty_rate)
            look.dirty_rate = max(look.dirty_rate, 0.0)
        look.done, look.total, look.ready = job["offset"], job["len"], job["ready"]
        look.synced = bool(job.get("actively-synced"))

    async def escalate(self) -> None:
        """Take the next step, if it is time for one."""
        if time.monotonic() - self._converged_at < _PATIENCE:
            return
        self._converged_at = time.monotonic()
        if not self._blocking:
            self._blocking = True
            self._tell("the guest writes about as fast as it is copied: its writes now wait for the destination")
            for look in self.looks:
                change = {"id": look.disk.name, "type": "mirror", "copy-mode": "write-blocking"}
                await self._source.call("block-job-change", change)
            return
        for look in self.looks:
            if look.left and not look.synced:
                await self._limit_writes(look)

    async def _limit_writes(self, look: Look) -> None:
        disk = look.disk
        if disk.throttled:
            self._tell(f"'{disk.node}' does not converge, and has limits of its own, which are left alone")
            return
        before = self._limits.get(disk.node) or int(max(look.dirty_rate, 2 * _SLOWEST))
        self._limits[disk.node] = limit = max(before // 2, _SLOWEST)
        self._tell(
            f"the guest's writes to '{disk.node}' are limited to {human_bytes(limit)} a second until the hand-over"
        )
        await throttle(self._source, disk.device, limit)

    async def until_close(self, draw: Callable[[], None], interval: float) -> None:
        """Return when the guest can be handed over. Raises Refused."""
        while True:
            await self.look()
            draw()
            if self.close_enough:
                return
            await self.escalate()
            await asyncio.sleep(interval)

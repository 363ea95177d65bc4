"""The copy engine: moves ranges from one node to another, several at a time, never two over the same bytes.

How one range is moved is `emulator/block/copy.py`'s; here is what jobs add. `copy_range` counts it as in flight on the job's
backends, so that a drain waits for it.

`Lanes` bounds what is under way, in bytes and so in memory (`LANES` copies of `STEP` bytes: 16 MiB), and keeps
overlapping ranges apart: who enters a range waits for those that are in it. A copy that has read old bytes can thus never
write them over newer ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic_ns
from typing import Final

from livedisk.emulator.block import copy as block_copy
from livedisk.emulator.block.copy import PIECE, STEP, ZERO_STEP, CopyFailed, Side
from livedisk.emulator.block.extents import begin_writeback
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.permissions import Role
from livedisk.emulator.block.types import ZeroFlags
from livedisk.emulator.drivers.file import FileDriver
from livedisk.jobs.block_job import JobBackend
from livedisk.jobs.events import IoOperation

LANES: Final = 8
"""Copies under way at once."""
OFFLOADED: Final = 4
"""Copies under way at once where the kernel moves the bytes, one after the other: one is moved, one begins to be written to the
disk, others wait for their turn, so that there is work while guests keep the event loop. More would take the processor from
guests whose writes allocate."""
WRITEBACK: Final = 16 << 20
"""Bytes copied after which the disk is to begin with them."""
TURN_NS: Final = 500_000
"""Nanoseconds of copies made at once before guests get a turn: as long as theirs (`nbd/poller.py`)."""
LONG_TURN_NS: Final = 2_000_000
"""If the guests' last turn was longer than that, a turn lasts as long, up to this."""
CROWDED_NS: Final = 200_000
"""Nanoseconds of others' work in the event loop from which on it is busy."""
OPERATION: Final = {Side.SOURCE: IoOperation.READ, Side.TARGET: IoOperation.WRITE}
"""What a job's error event says of a copy that failed on that side."""


async def copy_range(
    source: JobBackend, target: JobBackend, offset: int, length: int, *, flags: ZeroFlags, leave_zeroes: bool = False
) -> None:
    """`block.copy.copy_range`, in flight on both backends. Raises CopyFailed."""
    async with source.request(), target.request():
        assert source.root is not None
        assert target.root is not None
        await block_copy.copy_range(source.root, target.root, offset, length, flags=flags, leave_zeroes=leave_zeroes)


def _store_of(target: Node) -> FileDriver | None:
    """The file that the kernel may copy into, below ``target``; None where it may not."""
    node = target
    while not isinstance(node.driver, FileDriver):
        store = next((edge.node for edge in node.children.values() if edge.role & (Role.FILTERED | Role.DATA)), None)
        if store is None or not node.driver.copies_in:
            return None
        node = store
    return node.driver


def lanes_into(target: Node) -> int:
    """How many copies into ``target`` may be under way."""
    return LANES if _store_of(target) is None else OFFLOADED


class EarlyWriteback:
    """Has the disk begin with what was copied into ``target``, whichever way, so that the flush at the job's end finds less to
    do. What the kernel copies has begun already (`extents.py`)."""

    def __init__(self, target: Node) -> None:
        self._target = target
        self._copied = 0
        self._under_way: asyncio.Future[None] | None = None

    def copied(self, length: int) -> None:
        """So many bytes were."""
        self._copied += length
        if self._copied < WRITEBACK or (self._under_way is not None and not self._under_way.done()):
            return
        self._copied = 0
        store = _store_of(self._target)
        if store is not None and store.host.alignment == 1 and not store.node.cache_no_flush:
            self._under_way = begin_writeback(store.host)


class Turns:
    """Who copies pieces at once (`block.copy.copy_now`) never waits; this lets guests have their turn all the same. ``crowded``:
    whether guests were busy in the last one."""

    def __init__(self) -> None:
        self.crowded = False
        self._began = 0
        self._length = TURN_NS

    async def give_way(self, *, always: bool = False) -> None:
        """After a piece: let guests go on, if they waited long enough, or ``always``."""
        now = monotonic_ns()
        if always or now - self._began > self._length:
            await asyncio.sleep(0)
            self._began = monotonic_ns()
            away = self._began - now
            self.crowded = away > CROWDED_NS
            self._length = min(max(away, TURN_NS), LONG_TURN_NS)


class Lanes:
    """Ranges in which somebody works. ``room``: how many copies of `STEP` bytes or more may be under way; of smaller ones as
    many as have these bytes together, up to four times the number and ``most``. ``bytes``: how many those started by `launch`
    have under way.

    What is launched deals with failures of its copy itself. Anything else that it raises is a mistake, after which nobody knows
    what was copied: `launch`, `change` or `empty` raises it, once, so that the job fails."""

    def __init__(self, room: int = LANES, most: int = 4 * LANES) -> None:
        self.bytes = 0
        self._room = room
        self._most = most
        self._ranges: list[tuple[int, int]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._left = asyncio.Event()
        self._mistake: Exception | None = None

    @property
    def full(self) -> bool:
        """Whether `launch` would have to wait."""
        tasks = len(self._tasks)
        return tasks >= self._room and (self.bytes >= self._room * STEP or tasks >= min(4 * self._room, self._most))

    @property
    def idle(self) -> bool:
        """Whether nothing that was launched is under way."""
        return not self._tasks

    def occupied(self, offset: int, length: int) -> bool:
        """Whether somebody works in the range."""
        end = offset + length
        return any(offset < high and low < end for low, high in self._ranges)

    async def enter(self, offset: int, length: int) -> None:
        """Be alone in the range (bytes) until `leave`."""
        while self.occupied(offset, length):
            await self.change()
        self._ranges.append((offset, offset + length))

    def leave(self, offset: int, length: int) -> None:
        """Let others into the range again."""
        self._ranges.remove((offset, offset + length))
        self._left.set()

    async def launch(self, offset: int, length: int, work: Callable[[int, int], Awaitable[None]]) -> None:
        """Start ``work(offset, length)`` as soon as there is room. The range must not be `occupied`."""
        while self.full:
            await self.change()
        self._check()
        self._ranges.append((offset, offset + length))
        self.bytes += length

        async def run() -> None:
            try:
                await work(offset, length)
            except Exception as mistake:
                self._mistake = mistake
            finally:
                self.bytes -= length
                self.leave(offset, length)

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._left.set()

    def _check(self) -> None:
        mistake, self._mistake = self._mistake, None
        if mistake is not None:
            raise mistake

    async def change(self) -> None:
        """Wait until somebody leaves."""
        self._check()
        self._left.clear()
        await self._left.wait()
        self._check()

    async def empty(self) -> None:
        """Wait until nothing that was launched is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        self._check()


__all__ = [
    "LANES",
    "OPERATION",
    "PIECE",
    "STEP",
    "ZERO_STEP",
    "CopyFailed",
    "Lanes",
    "Side",
    "Turns",
    "copy_range",
    "lanes_into",
]

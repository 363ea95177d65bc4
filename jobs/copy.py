"""The copy engine: moves ranges from one node to another, several at a time, never two over the same bytes.

`copy_range` moves one range: it asks block status, so that zeroes and holes are written as zeroes whatever their length
and only data passes through memory, `STEP` bytes at a time. `CopyFailed` says which side failed.

`Lanes` bounds what is under way, in number and so in memory (`LANES` copies of `STEP` bytes: 16 MiB), and keeps
overlapping ranges apart: who enters a range waits for those that are in it. A copy that has read old bytes can thus never
write them over newer ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from livedisk.emulator.block.node import is_zero
from livedisk.emulator.block.status import BlockStatus, block_status
from livedisk.emulator.block.types import ZeroFlags
from livedisk.jobs.block_job import JobBackend
from livedisk.jobs.events import IoOperation

STEP: Final = 2 << 20
"""Bytes in memory of one copy at most. Above what `HostFile` moves inline, so that threads do it, on every core, while the
guest is served."""
LANES: Final = 8
"""Copies under way at once."""
ZERO_STEP: Final = 1 << 30
"""Bytes zeroed in one request at most."""


class CopyFailed(Exception):
    """A copy failed on one side; ``error`` says why. Not for users: jobs answer it by their policies."""

    def __init__(self, operation: IoOperation, error: OSError) -> None:
        super().__init__(str(error))
        self.operation = operation
        self.error = error


async def copy_range(
    source: JobBackend, target: JobBackend, offset: int, length: int, *, flags: ZeroFlags, detect_zeroes: bool = False
) -> None:
    """Make the target read as the source does in the range (bytes, inside both). ``flags``: how zeroes are written;
    ``detect_zeroes``: look for them in data too. Raises CopyFailed."""
    end = offset + length
    while offset < end:
        status = await run_at(source, offset, end - offset)
        step = status.length
        if status.zero:
            step = min(step, ZERO_STEP)
            await _writing(target.write_zeroes(offset, step, flags))
        else:
            step = min(step, STEP)
            with memoryview(bytearray(step)) as data:
                await reading(source.read(offset, data))
                if detect_zeroes and is_zero(data):
                    await _writing(target.write_zeroes(offset, step, flags))
                else:
                    await _writing(target.write(offset, data))
        offset += step


async def run_at(source: JobBackend, offset: int, length: int) -> BlockStatus:
    """Block status of the run at ``offset``. Raises CopyFailed."""
    try:
        return await block_status(source.node, offset, length)
    except OSError as error:
        raise CopyFailed(IoOperation.READ, error) from error


async def reading(request: Awaitable[None]) -> None:
    """Await a request to the source. Raises CopyFailed."""
    try:
        await request
    except OSError as error:
        raise CopyFailed(IoOperation.READ, error) from error


async def _writing(request: Awaitable[None]) -> None:
    try:
        await request
    except OSError as error:
        raise CopyFailed(IoOperation.WRITE, error) from error


class Lanes:
    """Ranges in which somebody works. ``room``: how many copies may be under way; ``bytes``: how many bytes those started by
    `launch` have under way."""

    def __init__(self, room: int = LANES) -> None:
        self.bytes = 0
        self._room = room
        self._ranges: list[tuple[int, int]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._left = asyncio.Event()

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
        while len(self._tasks) >= self._room:
            await self.change()
        self._ranges.append((offset, offset + length))
        self.bytes += length

        async def run() -> None:
            try:
                await work(offset, length)
            finally:
                self.bytes -= length
                self.leave(offset, length)

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._left.set()

    async def change(self) -> None:
        """Wait until somebody leaves."""
        self._left.clear()
        await self._left.wait()

    async def empty(self) -> None:
        """Wait until nothing that was launched is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

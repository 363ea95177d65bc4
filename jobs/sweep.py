"""One pass over an image from its start to its end: what stream and commit have in common.

Piece by piece the job is asked how far a run goes and whether it is to be copied (`look`); what is, is copied in `Lanes`, several
pieces at once. A piece that failed is answered by the job's policy: *stop* keeps it for when the job goes on, *report* ends the
pass, *ignore* does what the job says with `Ignored`, as QEMU's jobs do.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from typing import Final

from livedisk.emulator.device.policy import Action, OnError
from livedisk.jobs.block_job import BlockJob
from livedisk.jobs.copy import LANES, OPERATION, PIECE, CopyFailed, Lanes, Side

LIMITED_STEP: Final = 512 << 10
"""Bytes a piece under a speed limit (QEMU's STREAM_CHUNK, COMMIT_BUFFER_SIZE)."""

RETRY_AFTER: Final = 0.1
"""Seconds before a piece that failed, and whose error is ignored, is tried again."""


class Ignored(enum.Enum):
    """What becomes of a piece whose error is ignored."""

    LEFT_OUT = enum.auto()
    """It counts as done, and the job fails at its end (stream)."""
    TRIED_AGAIN = enum.auto()
    """The job goes on until it can be copied (commit)."""


Look = Callable[[int, int], Awaitable[tuple[int, bool]]]
Move = Callable[[int, int], Awaitable[None]]


class Sweep:
    """A pass of ``job``, ``room`` pieces at a time. ``look(offset, length)``: the length of the run there, and whether to copy
    it; raises OSError. ``move(offset, length)``: copy it; raises CopyFailed, or OSError, which counts as a failed read."""

    def __init__(
        self,
        job: BlockJob,
        policy: OnError,
        look: Look,
        move: Move,
        ignored: Ignored = Ignored.LEFT_OUT,
        *,
        room: int = LANES,
    ) -> None:
        self.lanes = Lanes(room)
        self._job = job
        self._policy = policy
        self._look = look
        self._move = move
        self._ignored = ignored
        self._wait = False
        self._again: list[tuple[int, int]] = []
        self._failure: OSError | None = None
        self._given_up = False

    async def run(self, size: int) -> None:
        """Go over ``size`` bytes, counting the job's progress. Returns early when the job is cancelled. Raises the first
        OSError that the policy did not make good."""
        job, offset = self._job, 0
        while not job.cancelled and not self._given_up:
            await job.keep_speed()
            if job.cancelled or self._given_up:
                break
            if self._wait:
                self._wait = False
                await job.sleep(RETRY_AFTER)
            elif self._again:
                await self._launch(*self._again.pop())
            elif offset < size:
                step = LIMITED_STEP if job.rate.speed else PIECE
                offset += await self._piece(offset, min(step, size - offset))
            elif not self.lanes.idle:
                await self.lanes.change()
            else:
                break
        await self.lanes.empty()
        if self._failure is not None and not job.cancelled:
            raise self._failure

    async def _piece(self, offset: int, length: int) -> int:
        """Deal with the run at ``offset``; returns its length, or 0 where it must be looked at again."""
        try:
            length, wanted = await self._look(offset, length)
        except OSError as error:
            action = self._answer(CopyFailed(Side.SOURCE, error))
            if action is Action.IGNORE and self._ignored is Ignored.LEFT_OUT:
                self._job.done += length
                return length
            return 0
        if wanted:
            await self._launch(offset, length)
        else:
            self._job.done += length
        return length

    async def _launch(self, offset: int, length: int) -> None:
        self._job.rate.account(length)
        await self.lanes.launch(offset, length, self._copy)

    async def _copy(self, offset: int, length: int) -> None:
        try:
            await self._move(offset, length)
        except OSError as error:
            self._failed(offset, length, CopyFailed(Side.SOURCE, error))
        except CopyFailed as failed:
            self._failed(offset, length, failed)
        else:
            self._job.done += length

    def _failed(self, offset: int, length: int, failed: CopyFailed) -> None:
        action = self._answer(failed)
        if action is Action.IGNORE and self._ignored is Ignored.LEFT_OUT:
            self._job.done += length
        elif action is not Action.REPORT:
            self._again.append((offset, length))

    def _answer(self, failed: CopyFailed) -> Action:
        action = self._job.answer(self._policy, OPERATION[failed.side], failed.error)
        if action is Action.IGNORE and self._ignored is Ignored.TRIED_AGAIN:
            self._wait = True
        elif action is not Action.STOP:
            self._failure = self._failure or failed.error
            self._given_up = self._given_up or action is Action.REPORT
        return action

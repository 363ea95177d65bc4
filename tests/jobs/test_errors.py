"""Failing reads and writes under each policy: what is told, the state, that the job goes on."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from livedisk.emulator.block.graph import Graph
from livedisk.emulator.device.policy import OnError
from livedisk.jobs.block_job import BlockJob
from livedisk.jobs.copy import CopyFailed, Side
from livedisk.jobs.events import BlockJobCompleted, BlockJobError, IoOperation
from livedisk.jobs.job import Jobs
from livedisk.jobs.states import JobType, Status
from livedisk.jobs.sweep import Sweep

SIZE = 64 << 20


class Passing(BlockJob):
    """Copies nothing, in pieces; one of which fails as often as it is told."""

    kind = JobType.STREAM

    def __init__(self, policy: OnError, number: int, times: int, *, when_looking: bool) -> None:
        super().__init__(Graph(), "j", auto_dismiss=False)
        self.copied: list[tuple[int, int]] = []
        self._number = number
        self._times = times
        self._when_looking = when_looking
        self.sweep = Sweep(self, policy, self._look, self._copy)

    async def run(self) -> None:
        self.total = SIZE
        await self.sweep.run(SIZE)

    async def settle(self) -> None:
        await self.sweep.lanes.empty()

    def _maybe_fail(self, offset: int) -> None:
        if offset == SIZE // 2 and self._times:
            self._times -= 1
            raise OSError(self._number, "")

    async def _look(self, offset: int, length: int) -> tuple[int, bool]:
        if self._when_looking:
            self._maybe_fail(offset)
        return length, True

    async def _copy(self, offset: int, length: int) -> None:
        await asyncio.sleep(0)
        if not self._when_looking:
            try:
                self._maybe_fail(offset)
            except OSError as error:
                raise CopyFailed(Side.TARGET, error) from error
        self.copied.append((offset, length))


def run(job: Passing, meanwhile: Callable[[Passing], Awaitable[None]] | None = None) -> list[msgspec.Struct]:
    """Run the job to its end; returns what it told."""
    told: list[msgspec.Struct] = []

    async def act() -> None:
        Jobs(told.append).add(job)
        job.start()
        if meanwhile is not None:
            await meanwhile(job)
        await job.over()

    asyncio.run(asyncio.wait_for(act(), 10))
    return told


def whole(job: Passing) -> bool:
    position = 0
    for offset, length in sorted(job.copied):
        if offset != position:
            return False
        position += length
    return position == SIZE


ERRORS = [(errno.EIO, "Input/output error"), (errno.ENOSPC, "No space left on device")]


@pytest.mark.parametrize("when_looking", [False, True])
@pytest.mark.parametrize(("number", "text"), ERRORS)
@pytest.mark.parametrize("policy", list(OnError))
def test_each_policy(policy: OnError, number: int, text: str, when_looking: bool) -> None:
    stops = policy is OnError.STOP or (policy in (OnError.ENOSPC, OnError.AUTO) and number == errno.ENOSPC)
    ignores = policy is OnError.IGNORE
    job = Passing(policy, number, 1, when_looking=when_looking)

    async def resume(job: Passing) -> None:
        while job.status is not Status.PAUSED:
            await asyncio.sleep(0.001)
        assert job.io_status == ("nospace" if number == errno.ENOSPC else "failed")
        assert job.user_paused
        job.user_resume()
        assert job.io_status == "ok"

    told = run(job, resume if stops else None)
    errors = [event for event in told if isinstance(event, BlockJobError)]
    operation = IoOperation.READ if when_looking else IoOperation.WRITE
    action = "stop" if stops else "ignore" if ignores else "report"
    assert [(one.device, one.operation, one.action) for one in errors] == [("j", operation, action)]
    end = next(event for event in told if isinstance(event, BlockJobCompleted))
    if stops:
        assert end.error is msgspec.UNSET
        assert whole(job)
        assert job.done == SIZE
    else:
        assert end.error == text
        assert job.error_text == text
        assert (job.done == SIZE) is ignores


def test_an_error_that_comes_again_stops_again() -> None:
    job = Passing(OnError.STOP, errno.EIO, 3, when_looking=False)

    async def resume(job: Passing) -> None:
        for _ in range(3):
            while not job.user_paused:
                await asyncio.sleep(0.001)
            job.user_resume()

    told = run(job, resume)
    assert sum(isinstance(event, BlockJobError) for event in told) == 3
    assert whole(job)


def test_a_job_that_an_error_stopped_can_be_cancelled() -> None:
    job = Passing(OnError.STOP, errno.EIO, 100, when_looking=False)

    async def cancel(job: Passing) -> None:
        while job.status is not Status.PAUSED:
            await asyncio.sleep(0.001)
        await job.user_cancel(force=True)

    run(job, cancel)
    assert job.error_text == "Operation canceled"
    assert job.status is Status.CONCLUDED

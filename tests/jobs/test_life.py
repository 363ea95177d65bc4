"""The life of a job: every cell of both tables, pause, cancel, groups; with a job that does as it is told."""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from livedisk.emulator.errors import BlockError
from livedisk.jobs.job import Group, Job, Jobs
from livedisk.jobs.states import MOVES, VERBS, JobType, Status, Verb

ORDER = [Status(name) for name in Status]
# Rows and columns in the order of Status: undefined, created, running, paused, ready, standby, waiting, pending, aborting,
# concluded, null. From QEMU's job.c, written out here so that a slip in our tables shows.
LEGAL_MOVES = """
0 1 0 0 0 0 0 0 0 0 0
0 0 1 0 0 0 0 0 1 0 1
0 0 0 1 1 0 1 0 1 0 0
0 0 1 0 0 0 0 0 0 0 0
0 0 0 0 0 1 1 0 1 0 0
0 0 0 0 1 0 0 0 0 0 0
0 0 0 0 0 0 0 1 1 0 0
0 0 0 0 0 0 0 0 1 1 0
0 0 0 0 0 0 0 0 1 1 0
0 0 0 0 0 0 0 0 0 0 1
0 0 0 0 0 0 0 0 0 0 0
"""
LEGAL_VERBS = {
    Verb.CANCEL: "0 1 1 1 1 1 1 1 0 0 0",
    Verb.PAUSE: "0 1 1 1 1 1 0 0 0 0 0",
    Verb.RESUME: "0 1 1 1 1 1 0 0 0 0 0",
    Verb.SET_SPEED: "0 1 1 1 1 1 0 0 0 0 0",
    Verb.COMPLETE: "0 0 0 0 1 1 0 0 0 0 0",
    Verb.FINALIZE: "0 0 0 0 0 0 0 1 0 0 0",
    Verb.DISMISS: "0 0 0 0 0 0 0 0 0 1 0",
    Verb.CHANGE: "0 1 1 1 1 1 0 0 0 0 0",
}


class Puppet(Job):
    """Works until it is told how to end; notes which hooks ran."""

    kind = JobType.STREAM

    def __init__(self, id: str, *, soft: bool = False, **how: Any) -> None:
        super().__init__(id, **how)
        self.soft = soft
        self.hooks: list[str] = []
        self.fails: Exception | None = None
        self.fails_to_prepare: Exception | None = None
        self.over_now = False
        self.steps = 0

    async def run(self) -> None:
        while not self.over_now and not self.cancelled:
            self.steps += 1
            await self.sleep(0.001)
        if self.fails is not None and not self.cancelled:
            raise self.fails

    def end(self) -> None:
        self.over_now = True

    def soft_cancel(self) -> bool:
        return self.soft and self.ready

    async def prepare(self) -> None:
        self.hooks.append("prepare")
        if self.fails_to_prepare is not None:
            raise self.fails_to_prepare

    async def commit(self) -> None:
        self.hooks.append("commit")

    async def abort(self) -> None:
        self.hooks.append("abort")

    async def clean(self) -> None:
        self.hooks.append("clean")


class Stage:
    """Jobs, and what they told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.jobs = Jobs(self._emit)

    def _emit(self, event: msgspec.Struct) -> None:
        self.told.append((event.id, event.status.value))  # type: ignore[attr-defined]

    def add(self, id: str = "j", **how: Any) -> Puppet:
        job = Puppet(id, **how)
        self.jobs.add(job)
        return job

    def states(self, id: str = "j") -> list[str]:
        return [status for job, status in self.told if job == id]


def play(test: Callable[[Stage], Awaitable[None]]) -> Callable[[], None]:
    """Run a test in an event loop, with a stage."""

    def run() -> None:
        async def limited() -> None:
            await asyncio.wait_for(test(Stage()), 10)

        asyncio.run(limited())

    run.__name__ = test.__name__  # type: ignore[attr-defined]
    return run


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_every_move_is_as_in_the_table() -> None:
    wanted = [[cell == "1" for cell in row.split()] for row in LEGAL_MOVES.split("\n") if row]
    for (i, before), (k, after) in itertools.product(enumerate(ORDER), repeat=2):
        assert (after in MOVES[before]) is wanted[i][k], f"{before} -> {after}"
        stage = Stage()
        job = Puppet("j")
        job._jobs = stage.jobs
        job.status = before
        if wanted[i][k]:
            job.move(after)
            assert job.status is after
            assert stage.told == ([("j", after.value)] if after is not before else [])
        else:
            with pytest.raises(AssertionError):
                job.move(after)
            assert job.status is before


def test_every_verb_is_refused_where_the_table_says_so() -> None:
    for verb, row in LEGAL_VERBS.items():
        for status, cell in zip(ORDER, row.split(), strict=True):
            assert (status in VERBS[verb]) is (cell == "1"), f"{verb} in {status}"
            job = Puppet("j")
            job.status = status
            if cell == "1":
                job.check_verb(verb)
            else:
                text = f"Job 'j' in state '{status}' cannot accept command verb '{verb}'"
                with pytest.raises(BlockError, match=f"^{text}$"):
                    job.check_verb(verb)


@play
async def test_a_job_that_does_its_work(stage: Stage) -> None:
    job = stage.add()
    job.start()
    job.end()
    await job.over()
    assert stage.states() == ["created", "running", "waiting", "pending", "concluded", "null"]
    assert job.hooks == ["prepare", "commit", "clean"]
    assert list(stage.jobs) == []


@play
async def test_a_job_that_fails_keeps_its_error_until_dismissed(stage: Stage) -> None:
    job = stage.add(auto_dismiss=False)
    job.fails = OSError(errno.ENOSPC, "in some words of its own")
    job.start()
    job.end()
    await job.over()
    assert stage.states() == ["created", "running", "aborting", "concluded"]
    assert job.hooks == ["abort", "clean"]
    assert job.error_text == "No space left on device"
    job.user_dismiss()
    assert stage.states()[-1] == "null"
    assert list(stage.jobs) == []


@play
async def test_a_job_that_cannot_prepare_fails(stage: Stage) -> None:
    job = stage.add()
    job.fails_to_prepare = BlockError("no")
    job.start()
    job.end()
    await job.over()
    assert stage.states() == ["created", "running", "waiting", "pending", "aborting", "concluded", "null"]
    assert job.hooks == ["prepare", "abort", "clean"]
    assert job.error_text == "no"


@play
async def test_pauses_are_counted_and_a_users_counts_once(stage: Stage) -> None:
    job = stage.add()
    job.start()
    with pytest.raises(BlockError, match=r"^Can't resume a job that was not paused$"):
        job.user_resume()
    job.user_pause()
    with pytest.raises(BlockError, match=r"^Job is already paused$"):
        job.user_pause()
    job.pause()  # a drained section
    await asyncio.wait_for(job.at_rest(), 5)
    steps = job.steps
    job.user_resume()
    await asyncio.sleep(0.02)
    assert job.steps == steps
    assert job.status is Status.PAUSED
    job.resume()
    await until(lambda: job.steps > steps)
    assert job.status is Status.RUNNING
    job.end()
    await job.over()
    assert stage.states()[2:4] == ["paused", "running"]


@play
async def test_a_ready_job_stands_by(stage: Stage) -> None:
    job = stage.add(soft=True)
    job.start()
    job.become_ready()
    job.user_pause()
    await job.at_rest()
    assert job.status is Status.STANDBY
    await job.user_cancel(force=False)  # ends the pause, too
    await job.over()
    assert stage.states()[2:] == ["ready", "standby", "ready", "waiting", "pending", "concluded", "null"]
    assert job.error is None


@pytest.mark.parametrize(("soft", "force"), [(False, False), (True, True)])
def test_a_cancel_that_is_forced_fails_the_job(soft: bool, force: bool) -> None:
    async def act() -> None:
        stage = Stage()
        job = stage.add(soft=soft)
        job.start()
        if soft:
            job.become_ready()
        await job.user_cancel(force=force)
        await job.over()
        assert stage.states()[-3:] == ["aborting", "concluded", "null"]
        assert job.error_text == "Operation canceled"
        assert job.hooks == ["abort", "clean"]

    asyncio.run(act())


@play
async def test_a_paused_job_can_be_cancelled(stage: Stage) -> None:
    job = stage.add()
    job.start()
    job.user_pause()
    await job.at_rest()
    await job.user_cancel(force=True)
    await job.over()
    assert stage.states() == ["created", "running", "paused", "running", "aborting", "concluded", "null"]


@play
async def test_a_job_that_never_started_can_be_cancelled(stage: Stage) -> None:
    job = stage.add()
    await job.user_cancel(force=True)
    assert stage.states() == ["created", "aborting", "concluded", "null"]
    assert list(stage.jobs) == []


@play
async def test_a_pending_job_waits_for_finalize_and_can_still_be_cancelled(stage: Stage) -> None:
    for name, cancel in (("one", False), ("two", True)):
        job = stage.add(name, auto_finalize=False)
        job.start()
        job.end()
        await until(lambda job=job: job.status is Status.PENDING)  # type: ignore[misc]
        await asyncio.sleep(0.01)
        assert job.hooks == []
        await (job.user_cancel(force=True) if cancel else job.user_finalize())
        assert job.hooks == (["abort", "clean"] if cancel else ["prepare", "commit", "clean"])
    assert stage.states("two")[-3:] == ["aborting", "concluded", "null"]


def grouped(stage: Stage, **how: Any) -> tuple[Puppet, Puppet]:
    one, two = stage.add("one", **how), stage.add("two", **how)
    group = Group()
    group.adopt(one)
    group.adopt(two)
    one.start()
    two.start()
    return one, two


@play
async def test_a_group_succeeds_together(stage: Stage) -> None:
    one, two = grouped(stage)
    one.end()
    await until(lambda: one.status is Status.WAITING)
    await asyncio.sleep(0.01)
    assert one.hooks == []
    two.end()
    await two.over()
    assert one.hooks == two.hooks == ["prepare", "commit", "clean"]
    assert stage.states("one") == stage.states("two")


@play
async def test_one_failure_fails_the_group(stage: Stage) -> None:
    one, two = grouped(stage, auto_dismiss=False)
    one.end()
    await until(lambda: one.status is Status.WAITING)
    two.fails = OSError(errno.EIO, "")
    two.end()
    await two.over()
    assert one.hooks == two.hooks == ["abort", "clean"]
    assert one.error_text == "Operation canceled"
    assert two.error_text == "Input/output error"
    assert one.status is two.status is Status.CONCLUDED


@play
async def test_a_cancel_of_one_cancels_the_running_other(stage: Stage) -> None:
    one, two = grouped(stage)
    await one.user_cancel(force=True)
    await one.over()
    await two.over()
    assert stage.states("two")[-3:] == ["aborting", "concluded", "null"]
    assert one.hooks == two.hooks == ["abort", "clean"]


@play
async def test_a_cancel_while_the_outcome_is_made_real_comes_too_late(stage: Stage) -> None:
    job = stage.add()
    gate = asyncio.Event()

    async def slow() -> None:
        job.hooks.append("prepare")
        await gate.wait()

    job.prepare = slow  # type: ignore[method-assign]
    job.start()
    job.end()
    await until(lambda: job.hooks == ["prepare"])
    await job.user_cancel(force=True)
    gate.set()
    await job.over()
    assert job.error is None
    assert job.hooks == ["prepare", "commit", "clean"]


@pytest.mark.parametrize("id", ["", "1", "a b", "-x", "a/b"])
def test_ids_that_are_refused(id: str) -> None:
    with pytest.raises(BlockError, match=f"^Invalid job ID '{id}'$"):
        Stage().add(id)


def test_an_id_is_taken_once() -> None:
    stage = Stage()
    stage.add()
    with pytest.raises(BlockError, match=r"^Job ID 'j' already in use$"):
        stage.add()


@play
async def test_the_end_of_the_daemon_ends_all_jobs(stage: Stage) -> None:
    running, paused, pending, kept = (
        stage.add(name, auto_finalize=name != "pending", auto_dismiss=name != "kept")
        for name in ("running", "paused", "pending", "kept")
    )
    stage.add("created")
    for job in (running, paused, pending, kept):
        job.start()
    paused.user_pause()
    pending.end()
    kept.end()
    await until(lambda: pending.status is Status.PENDING and kept.status is Status.CONCLUDED)
    await stage.jobs.close()
    assert list(stage.jobs) == []
    assert all(stage.states(name)[-1] == "null" for name in ("running", "paused", "pending", "kept", "created"))

"""One job's life: the moves, the verbs, pause and cancel, and how jobs of one group end together.

A job is a coroutine, `Job.run`, that does the work, and three hooks that make its outcome real when everybody in its
group has succeeded (`prepare`, which may fail, then `commit`) or not (`abort`), and `clean` after either. All legal
moves and verbs stand in `states.py`.

    start ─> run ... pause_point ... run ─> [group] waiting ─> pending ─> prepare, commit, clean ─> concluded ─> null
                                       └──> aborting ────────────────────> abort, clean ──────────> concluded ─> null

* A job works only between pause points; at one, it may be held (`pause`, counted: a user's pause counts once, each
  drained section of its nodes once) and it notices that it was cancelled.
* A *soft* cancel asks a job that is ready to end as it is; a *forced* one ends it as failed. A job that knows no soft
  cancel is always forced (`soft_cancel`).
* A group (`Group`; mostly of one) succeeds or fails as a whole. Once its outcome is being made real (``settling``) nothing
  stops it any more: a cancel that comes then is too late and changes nothing.
* The text of a failure is kept until the job is dismissed.

Source: QEMU ``job.c``; every message was asked from QEMU 10.0.2.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import msgspec

from livedisk.emulator.errors import BlockError, LiveDiskError
from livedisk.jobs.events import JobStatusChange
from livedisk.jobs.states import MOVES, VERBS, WORKING, JobType, Status, Verb

log = logging.getLogger(__name__)

Emit = Callable[[msgspec.Struct], None]
_WELL_FORMED = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")


class Cancelled(LiveDiskError):
    """The job was cancelled by force."""

    def __init__(self) -> None:
        super().__init__(os.strerror(errno.ECANCELED))


class Job(ABC):
    """One job. Made known by `Jobs.add`, which gives it its first state; set going by `start`.

    ``done`` and ``total``: progress, in units of the job's own (bytes, for block jobs). ``auto_finalize``,
    ``auto_dismiss``: whether it leaves the states pending and concluded by itself. ``error``: why it failed, or None.
    """

    kind: ClassVar[JobType]

    def __init__(self, id: str | None, *, auto_finalize: bool = True, auto_dismiss: bool = True) -> None:
        self.id = id or ""
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.status = Status.UNDEFINED
        self.error: Exception | None = None
        self.done = 0
        self.total = 0
        self.cancelled = False
        self.force_cancelled = False
        self.user_paused = False
        self.held = False
        self.sleeping = False
        self.group = Group(self)
        self._jobs: Jobs
        self._pauses = 0
        self.drains_itself = False
        self._wake = asyncio.Event()
        self._at_rest = asyncio.Event()
        self._at_rest.set()
        self._run_ended = False
        self._ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # -- what a kind of job does -----------------------------------------------------------------------------------
    @abstractmethod
    async def run(self) -> None:
        """Do the work, passing `pause_point` often. Raises OSError or LiveDiskError if it failed."""

    async def prepare(self) -> None:
        """Everybody of the group has done its work: do what may still fail. Raises OSError or LiveDiskError."""

    async def commit(self) -> None:
        """Make the success final. Must not fail."""

    async def abort(self) -> None:
        """Undo, after a failure. Must not fail."""

    async def clean(self) -> None:
        """Give back everything, after `commit` or `abort`. Must not fail."""

    async def settle(self) -> None:
        """Wait until nothing of the job's is in flight: called before it is held."""

    def complete(self) -> None:
        """A user asks a ready job to end. Raises BlockError if this kind cannot."""
        raise BlockError(f"The active block job '{self.id}' cannot be completed")

    @property
    def can_complete(self) -> bool:
        """Whether this kind of job has a `complete` of its own."""
        return type(self).complete is not Job.complete

    def soft_cancel(self) -> bool:
        """Whether a cancel without force may end this job, as it stands, in success."""
        return False

    def user_resumed(self) -> None:
        """The user lets it go on after an error stopped it: forget the error."""

    def announce_ready(self) -> None:
        """Tell that the job is ready."""

    def announce_pending(self) -> None:
        """Tell that the job waits to be finalized."""

    def announce_end(self) -> None:
        """Tell that the job is over: completed, failed or cancelled."""

    # -- looking -----------------------------------------------------------------------------------------------------
    @property
    def started(self) -> bool:
        """Whether it ever ran."""
        return self._task is not None

    @property
    def completed(self) -> bool:
        """Whether its own work is over, one way or another."""
        return self.status not in WORKING

    @property
    def ready(self) -> bool:
        """Whether it may be completed."""
        return self.status in (Status.READY, Status.STANDBY)

    @property
    def busy(self) -> bool:
        """Whether it does something at this moment."""
        return self.started and not self.held and not self.sleeping and not self._run_ended

    @property
    def paused(self) -> bool:
        """Whether there is a reason to hold it."""
        return self._pauses > 0

    @property
    def error_text(self) -> str | None:
        """Why it failed, as QEMU words it, or None."""
        return failure_text(self.error) if self.error is not None else None

    # -- moving ------------------------------------------------------------------------------------------------------
    def move(self, status: Status) -> None:
        """Go to ``status`` and tell. An illegal move is a mistake of this program: AssertionError."""
        assert status in MOVES[self.status], f"job {self.id}: {self.status} -> {status}"
        if status is not self.status:
            self.status = status
            self._jobs.emit(JobStatusChange(id=self.id, status=status))

    def check_verb(self, verb: Verb) -> None:
        """Raise BlockError, in QEMU's words, if the state does not allow ``verb``."""
        if self.status not in VERBS[verb]:
            raise BlockError(f"Job '{self.id}' in state '{self.status}' cannot accept command verb '{verb}'")

    def start(self) -> None:
        """Begin to work, in a task of its own."""
        self.move(Status.RUNNING)
        self._at_rest.clear()
        self._task = asyncio.get_running_loop().create_task(self._main())

    async def _main(self) -> None:
        try:
            await self.pause_point()
            await self.run()
        except (OSError, LiveDiskError) as error:
            self.error = self.error or error
        except Exception as error:
            log.exception("job %s", self.id)
            self.error = BlockError(f"internal error: {error!r}")
        self._run_ended = True
        self._at_rest.set()
        await self._complete_run()

    async def _complete_run(self) -> None:
        self.note_failure()
        self._ended.set()
        if self.error is not None:
            await self.group.fail(self)
        else:
            await self.group.succeed(self)

    def note_failure(self) -> None:
        """If the job failed or was cancelled by force, it is aborting from here on."""
        if self.error is None and self.force_cancelled:
            self.error = Cancelled()
        if self.error is not None:
            self.move(Status.ABORTING)

    def fail_early(self) -> None:
        """Forget a job that could not be set up: it was never started."""
        self.move(Status.NULL)
        self._jobs.forget(self)

    async def finish(self) -> None:
        """Make the outcome real, tell it, and be done; as one of a group."""
        self.note_failure()
        for hook in (self.commit if self.error is None else self.abort, self.clean):
            try:
                await hook()
            except Exception:
                # Whatever it was: a job that never ends keeps its nodes, and whoever waits for it, for ever.
                log.exception("job %s: %s", self.id, hook.__name__)
        if self.started:
            self.announce_end()
        self.group.jobs.remove(self)
        self.move(Status.CONCLUDED)
        if self.auto_dismiss or not self.started:
            self._dismiss()

    def _dismiss(self) -> None:
        self.move(Status.NULL)
        self._jobs.forget(self)

    def become_ready(self) -> None:
        """The work is done but for what keeps coming: tell."""
        self.move(Status.READY)
        self.announce_ready()

    # -- pause -------------------------------------------------------------------------------------------------------
    def pause(self) -> None:
        """Hold the job at its next pause point. Counted."""
        self._pauses += 1
        self._wake.set()

    def resume(self) -> None:
        """Undo one `pause`."""
        self._pauses -= 1
        if not self._pauses:
            self._wake.set()

    @property
    def resting(self) -> bool:
        """Whether the job is held, has ended its run, or waits for a drain itself: until it is let go on, it does nothing."""
        return self._at_rest.is_set() or self.drains_itself

    async def at_rest(self) -> None:
        """Wait until it is `resting`."""
        while not self.resting:
            await self._at_rest.wait()

    async def pause_point(self) -> None:
        """Be held while there is a reason to. A cancel ends every hold."""
        if not self._pauses or self.cancelled:
            return
        await self.settle()
        if not self._pauses or self.cancelled:
            return
        before = self.status
        self.move(Status.STANDBY if before is Status.READY else Status.PAUSED)
        self.held = True
        self._at_rest.set()
        while self._pauses and not self.cancelled:
            self._wake.clear()
            await self._wake.wait()
        self._at_rest.clear()
        self.held = False
        self.move(before)

    async def sleep(self, seconds: float) -> None:
        """Wait, but no longer than until somebody wants something of the job; then pass a pause point."""
        self._wake.clear()
        if not self._pauses and not self.cancelled:
            self.sleeping = True
            try:
                await asyncio.wait_for(self._wake.wait(), seconds if seconds >= 0 else None)
            except TimeoutError:
                pass
            finally:
                self.sleeping = False
        await self.pause_point()

    def wake(self) -> None:
        """End a `sleep`."""
        self._wake.set()

    # -- what users ask ----------------------------------------------------------------------------------------------
    def user_pause(self) -> None:
        """Raises BlockError if the state does not allow it, or a user paused it already."""
        self.check_verb(Verb.PAUSE)
        if self.user_paused:
            raise BlockError("Job is already paused")
        self.user_paused = True
        self.pause()

    def user_resume(self) -> None:
        """Raises BlockError if no user paused it."""
        if not self.user_paused:
            raise BlockError("Can't resume a job that was not paused")
        self.check_verb(Verb.RESUME)
        self._end_user_pause()
        self.wake()

    def _end_user_pause(self) -> None:
        self.user_resumed()
        self.user_paused = False
        self.resume()

    def user_complete(self) -> None:
        """Raises BlockError if the job is not ready, or is ending already."""
        self.check_verb(Verb.COMPLETE)
        if self.cancelled or not self.can_complete:
            raise BlockError(f"The active block job '{self.id}' cannot be completed")
        self.complete()
        self.wake()

    async def user_cancel(self, *, force: bool) -> None:
        """Raises BlockError if the state does not allow it."""
        self.check_verb(Verb.CANCEL)
        await self.cancel(force=force)

    async def user_finalize(self) -> None:
        """Let a pending group become real; on return it has. Raises BlockError if the job is not pending."""
        self.check_verb(Verb.FINALIZE)
        await self.group.finalize(self)

    def user_dismiss(self) -> None:
        """Forget a concluded job. Raises BlockError if it is not."""
        self.check_verb(Verb.DISMISS)
        self._dismiss()

    # -- cancel ------------------------------------------------------------------------------------------------------
    def request_cancel(self, *, force: bool) -> None:
        """Note the cancel; the job sees it at its next pause point."""
        forced = force or not self.soft_cancel()
        if self.user_paused:
            self._end_user_pause()
        if forced or not self._run_ended:  # a soft cancel of work that is done asks for what happens anyway
            self.cancelled = True
            self.force_cancelled = self.force_cancelled or forced
        self.wake()

    async def cancel(self, *, force: bool) -> None:
        """End the job; a concluded one is dismissed."""
        if self.status is Status.CONCLUDED:
            self._dismiss()
            return
        if self.group.settling:
            return
        self.request_cancel(force=force)
        if not self.started:
            await self._complete_run()
        elif self._run_ended and self.force_cancelled:
            await self.group.fail(self)

    async def ended(self) -> None:
        """Wait until its own work is over; its task may still be making the outcome real."""
        if self.started:
            await self._ended.wait()

    async def over(self) -> None:
        """Wait until its task is."""
        if self._task is not None:
            await asyncio.wait([self._task])


class Group:
    """Jobs that succeed or fail together, the newest first (QEMU's JobTxn)."""

    def __init__(self, *jobs: Job) -> None:
        self.jobs: list[Job] = list(jobs)
        self.settling = False
        self._failing = False

    def adopt(self, job: Job) -> None:
        """Take in a job that has not started."""
        job.group.jobs.remove(job)
        job.group = self
        self.jobs.insert(0, job)

    async def succeed(self, job: Job) -> None:
        """A job has done its work: if it was the last, all are pending, and end if nobody wants to be asked."""
        job.move(Status.WAITING)
        if any(not other.completed for other in self.jobs):
            return
        for other in list(self.jobs):
            other.move(Status.PENDING)
            if not other.auto_finalize:
                other.announce_pending()
        if all(other.auto_finalize for other in self.jobs):
            await self.finalize(job)

    async def finalize(self, job: Job) -> None:
        """Make the success of all real; if one cannot, all fail."""
        if self.settling:
            return
        self.settling = True
        for other in list(self.jobs):
            try:
                await other.prepare()
            except (OSError, LiveDiskError) as error:
                other.error = error
                other.note_failure()
                self.settling = False
                await self.fail(other)
                return
        for other in list(self.jobs):
            await other.finish()

    async def fail(self, job: Job) -> None:
        """One failed: cancel the others, wait for them, undo all."""
        if self._failing or self.settling:
            return
        self._failing = True
        for other in list(self.jobs):
            if other is not job:
                other.request_cancel(force=True)
        while self.jobs:
            other = self.jobs[0]
            await other.ended()
            self.settling = True
            await other.finish()


class Jobs:
    """All jobs of one daemon, the newest first.

    ``rechaining``: held while a job writes names of backing files into headers and lets the chain follow, so that no two see each
    other's half-changed chain.
    """

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.rechaining = asyncio.Lock()
        self._jobs: list[Job] = []

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs))

    def find(self, id: str) -> Job | None:
        """The job of that id."""
        return next((job for job in self._jobs if job.id == id), None)

    def add(self, job: Job) -> None:
        """Make the job known. Raises BlockError, in QEMU's words, if its id will not do."""
        if not _WELL_FORMED.match(job.id):
            raise BlockError(f"Invalid job ID '{job.id}'")
        if self.find(job.id) is not None:
            raise BlockError(f"Job ID '{job.id}' already in use")
        job._jobs = self
        self._jobs.insert(0, job)
        job.move(Status.CREATED)

    def forget(self, job: Job) -> None:
        """The job is null."""
        self._jobs.remove(job)

    async def close(self) -> None:
        """Cancel all jobs and wait for their end: the daemon is about to close its nodes."""
        for job in self:
            if job in self._jobs:
                await job.cancel(force=True)
                await job.over()
        for job in self:
            if job.status is Status.CONCLUDED:
                job.user_dismiss()


def failure_text(error: Exception) -> str:
    """What an exception says, as QEMU words it: an OSError by its number alone."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error)

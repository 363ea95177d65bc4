"""A job on block nodes: its hold on them, its speed, its error policy, and what query-block-jobs tells of it.

Hold: for every node that a job works on it keeps a `JobBackend` (QEMU: an edge from the job), with the permissions that it
needs, and an operation blocker in QEMU's words ("block device is in use by block job: stream"). Chains that must stay
as they are have their edges frozen. All of it is given back by `let_go`.

Drain: a drained section of a node does not stop the job's requests at the gate (a job that stands in the middle of a copy
could never reach a pause point); it pauses the job, and is complete when the job is held.

Errors: a failed read or write is answered by the policy for its side: *report* fails the job, *ignore* goes on,
*stop* holds the job as if a user had paused it until job-resume, *enospc* stops on a full disk and reports all
else; *auto* is *enospc* here, as it is for QEMU's jobs on nodes.

Source: QEMU ``blockjob.c``, ``qapi/block-core.json`` (BlockJobInfo, BlockdevOnError).
"""

from __future__ import annotations

import enum
import errno
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.blockers import Blocker
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Edge, Node
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.slow_drain import told_if_slow
from livedisk.emulator.device.policy import Action, OnError, action_for, settled
from livedisk.emulator.errors import BlockError
from livedisk.jobs.chains import links, with_filters
from livedisk.jobs.events import (
    BlockJobCancelled,
    BlockJobCompleted,
    BlockJobError,
    BlockJobPending,
    BlockJobReady,
    IoOperation,
)
from livedisk.jobs.job import Job, Jobs
from livedisk.jobs.rate import RateLimit
from livedisk.jobs.states import Verb

R = TypeVar("R")


class IoStatus(enum.StrEnum):
    """QEMU's BlockDeviceIoStatus, of a job: the error that holds it."""

    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"


class JobBackend(BlockBackend):
    """A job's way to one of its nodes. A drain pauses the job instead of gating its requests."""

    of_job = True

    def __init__(self, graph: Graph, job: BlockJob) -> None:
        super().__init__(graph, job.id, description=f"{job.kind} job '{job.id}'")
        self._job = self.owner = job

    @property
    def in_flight(self) -> int:
        # A job between two requests is not done either: the next one would come in the middle of the drained section.
        return self._in_flight or not self._job.resting

    def quiesce(self) -> None:
        super().quiesce()
        self._job.pause()

    def unquiesce(self) -> None:
        super().unquiesce()
        self._job.resume()

    async def idle(self) -> None:
        await self._job.at_rest()
        await super().idle()

    async def _enter(self) -> Node:
        node = self.node
        self._in_flight += 1
        return node

    async def _finish(self, work: Coroutine[Any, Any, R]) -> R:
        # A job's requests are never cancelled, so they need no task of their own; without one, a request that need not wait
        # is over before the guest's next, and a mirror catches up.
        try:
            return await work
        finally:
            self._leave()


class BlockJob(Job):
    """See the module. ``on_error``: the policy for reads (and for writes, where a kind has no other)."""

    def __init__(self, graph: Graph, id: str | None, *, auto_finalize: bool = True, auto_dismiss: bool = True) -> None:
        super().__init__(id, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
        self.graph = graph
        self.rate = RateLimit()
        self.io_status = IoStatus.OK
        self._backends: list[JobBackend] = []
        self._blocked: list[tuple[Node, Blocker]] = []
        self._frozen: list[Edge] = []

    # -- hold on nodes -----------------------------------------------------------------------------------------------
    def hold(self, node: Node, name: str, perm: Perm = Perm.NONE, shared: Perm = Perm.ALL) -> JobBackend:
        """Take ``node`` with these permissions, and block others' operations on it. ``name`` is the edge's, as QEMU's
        messages have it ("main node"). Raises PermissionConflict or LockError."""
        backend = JobBackend(self.graph, self)
        self.graph.attach_root(backend, node, perm, shared, name=name)
        self._backends.append(backend)
        blocker = Blocker(f"block device is in use by block job: {self.kind}")
        node.blockers.append(blocker)
        self._blocked.append((node, blocker))
        return backend

    def hold_between(self, top: Node, base: Node, shared: Perm) -> None:
        """Take all below ``top`` and above ``base`` as "intermediate node". Filters on the base show what the base shows: others
        may rely on that. Raises PermissionConflict or LockError."""
        lowest = with_filters(base, top)
        for edge in links(top, base)[:-1]:
            if edge.node is lowest:
                shared |= Perm.CONSISTENT_READ
            self.hold(edge.node, "intermediate node", Perm.NONE, shared)

    def freeze(self, edges: Iterable[Edge]) -> None:
        """Let nobody replace these edges. Raises BlockError, in QEMU's words, if one is frozen already."""
        edges = list(edges)
        for edge in edges:
            if edge.frozen:
                raise BlockError(f"Cannot freeze '{edge.name}' link to '{edge.node.name}'")
        for edge in edges:
            edge.frozen = True
        self._frozen += edges

    def thaw(self) -> None:
        """Let the frozen edges be replaced again."""
        for edge in self._frozen:
            edge.frozen = False
        self._frozen.clear()

    async def let_go(self) -> None:
        """Give back every hold. Twice is once."""
        self.thaw()
        for node, blocker in self._blocked:
            node.blockers.remove(blocker)
        self._blocked.clear()
        backends, self._backends = self._backends, []
        for backend in backends:
            await self.graph.detach_root(backend)

    def introduce(
        self, jobs: Jobs, main: Node, speed: int, perm: Perm = Perm.NONE, shared: Perm = Perm.ALL
    ) -> JobBackend:
        """Make the job known, hold its main node, set its speed. Raises BlockError, PermissionConflict or LockError; a job
        that was known by then is gone again, and its holds are the caller's to give back with `let_go`."""
        if not self.id:
            self.id = next((user.user_name for user in self.graph.backends_above([main]) if user.user_name), "")
        jobs.add(self)
        try:
            backend = self.hold(main, "main node", perm, shared)
            if speed:
                self.set_speed(speed)
        except BaseException:
            self.fail_early()
            raise
        return backend

    @asynccontextmanager
    async def drained(self, *nodes: Node) -> AsyncIterator[None]:
        """`Graph.drained`, for the job's own run: it does not wait for itself. Nothing of the job's may be in flight."""
        self.drains_itself = True
        try:
            async with self.graph.drained(*nodes):
                yield
        finally:
            self.drains_itself = False

    async def over(self) -> None:
        """As of any job; a target without an answer does not hold up the daemon's end for ever."""
        with told_if_slow(self.graph, f"job '{self.id}' is over", self._nodes):
            await super().over()

    def _nodes(self) -> list[Node]:
        return [backend.root.node for backend in self._backends if backend.root is not None]

    # -- speed -------------------------------------------------------------------------------------------------------
    def set_speed(self, speed: int) -> None:
        """Bytes a second; 0: no limit. Raises BlockError."""
        self.check_verb(Verb.SET_SPEED)
        if speed < 0:
            raise BlockError("Parameter 'speed' expects a non-negative value")
        self.rate.set(speed)
        self.wake()

    async def keep_speed(self) -> None:
        """Wait for one's turn: between two chunks of work. A pause point also where there is no limit."""
        while (delay := self.rate.delay()) > 0 and not self.cancelled:
            await self.sleep(delay)
        await self.pause_point()

    # -- errors ------------------------------------------------------------------------------------------------------
    def answer(self, policy: OnError, operation: IoOperation, error: OSError) -> Action:
        """What ``policy`` says of a failed request; told by BLOCK_JOB_ERROR. STOP holds the job."""
        action = action_for(settled(policy, read=False), error.errno)
        self._jobs.emit(BlockJobError(device=self.id, operation=operation, action=action))
        if action is Action.STOP:
            if not self.user_paused:
                self.user_paused = True  # visible to users, and theirs to end
                self.pause()
            if self.io_status is IoStatus.OK:
                self.io_status = IoStatus.NOSPACE if error.errno == errno.ENOSPC else IoStatus.FAILED
        return action

    def user_resumed(self) -> None:
        self.io_status = IoStatus.OK

    # -- telling -----------------------------------------------------------------------------------------------------
    def announce_ready(self) -> None:
        self._jobs.emit(
            BlockJobReady(type=self.kind, device=self.id, len=self.total, offset=self.done, speed=self.rate.speed)
        )

    def announce_pending(self) -> None:
        self._jobs.emit(BlockJobPending(type=self.kind, id=self.id))

    def announce_end(self) -> None:
        event = BlockJobCancelled if self.force_cancelled else BlockJobCompleted
        told = event(type=self.kind, device=self.id, len=self.total, offset=self.done, speed=self.rate.speed)
        if isinstance(told, BlockJobCompleted) and self.error_text is not None:
            told.error = self.error_text
        self._jobs.emit(told)

    def details(self) -> dict[str, object]:
        """Members of BlockJobInfo that only this kind has."""
        return {}

    async def change(self, options: object) -> None:
        """block-job-change. Raises BlockError if this kind has nothing to change."""
        raise BlockError("Job type does not support change")


def may_grow(base: Node, top: Node) -> Perm:
    """What a commit of ``top`` needs, besides, of a base that is too small for it. A filter on the base does not share it."""
    return Perm.RESIZE if base.size < top.size else Perm.NONE

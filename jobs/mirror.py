"""Mirrors: copy a node to another while the guest writes, and, if asked, let the guest go on from the copy.

    guest ─> mirror_top ─> source            complete:  guest ─> target
                  └ ─ ─ ─> target            cancel:    guest ─> source, the target a copy of this moment

A dirty map says what the target lacks. At first that is what the mirror is to copy (`sync`); guests' writes mark more. In
the *background* copy mode the map hangs on the filter as a dirty tracker, and writes stay on the fast path. In the
*write-blocking* mode each write goes to the target, too, before it is acknowledged, so that nothing gets dirty and the mirror
converges however fast the guest writes; `block-job-change` switches to it while the job runs.

The loop copies dirty runs, several at once, small ones without a task (`block.copy.copy_now`). Bits are cleared before the
source is read, so that a write meanwhile sets them again; two copies, or a copy and a mirrored write, never work on the
same bytes at a time (`Lanes`): older bytes are never written over newer ones. When nothing is dirty the first time the job
is READY.

The end (`prepare`) happens with the guest held: what is dirty by then is copied, the target flushed, and, if the job was
completed, the guest's edges move to the target in one step. If any of it fails, the guest stays on the source.

``total`` is what is done, under way and dirty, in bytes; it grows while the guest writes. query-block-jobs tells how
fast, and when the mirror will have caught up, if it gains on the guest at all (`details`; docs/faults.md has the ways
out). Source: QEMU ``block/mirror.c``, ``blockdev.c`` (blockdev_mirror_common); every message was asked from QEMU
10.0.2. Where we differ: between pending and finalize the guest is not held, as QEMU holds it; it writes on, and what it
wrote is copied at finalize. A target that fails in the write-blocking mode never fails the guest.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec

from livedisk.emulator.block import gate
from livedisk.emulator.block.copy import SMALL, copy_now
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.permissions import Perm, Role
from livedisk.emulator.block.reopen import set_read_only
from livedisk.emulator.block.status import allocation_depth, block_status
from livedisk.emulator.block.transaction import Transaction
from livedisk.emulator.block.types import Discard, ZeroFlags
from livedisk.emulator.device.policy import Action, OnError
from livedisk.emulator.drivers.job_filters import MirrorTop
from livedisk.emulator.errors import BlockError
from livedisk.emulator.qmp.context import Context
from livedisk.jobs.block_job import BlockJob, JobBackend, may_grow
from livedisk.jobs.chains import chain, links, with_filters
from livedisk.jobs.commands import BlockJobChangeOptionsMirror, MirrorCopyMode, jobs_of
from livedisk.jobs.copy import LANES, OPERATION, PIECE, STEP, ZERO_STEP, CopyFailed, Lanes, Side, Turns, copy_range
from livedisk.jobs.dirty import DirtyMap
from livedisk.jobs.filters import insert_filter, remove_filter, skip_filters
from livedisk.jobs.rate import Pace
from livedisk.jobs.states import JobType, Status

if TYPE_CHECKING:
    from livedisk.jobs.commit import CommitOptions

log = logging.getLogger(__name__)
IDLE_LOOK: Final = 0.05
"""Seconds between two looks at the dirty map of a mirror that has caught up."""
_WRITES: Final = Perm.WRITE | Perm.WRITE_UNCHANGED
RETRY_AFTER: Final = 0.1
"""Seconds before a copy that failed, and whose error is ignored, is tried again."""


class Sync(enum.StrEnum):
    """What a mirror or a backup copies at first (QEMU's MirrorSyncMode)."""

    TOP = "top"
    FULL = "full"
    NONE = "none"
    INCREMENTAL = "incremental"
    BITMAP = "bitmap"


class Backing(enum.Enum):
    """What becomes the target's backing file when the guest goes over to it."""

    LEAVE = enum.auto()
    """What it has."""
    SOURCE = enum.auto()
    """What the source has (sync top), the source itself (none), or nothing (full)."""
    OPEN = enum.auto()
    """What its header names; it was opened without."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to mirror.

    ``base``: only layers above it are copied at first; None: the whole chain. ``nothing``: no layer is. ``stale``: the
    target may hold other data where the source has none. ``granularity``, ``memory``: bytes. ``replaces``: the node whose
    users go over to the target, or None: the source.
    """

    id: str | None
    base: Node | None = None
    nothing: bool = False
    stale: bool = False
    granularity: int
    memory: int = LANES * STEP
    speed: int = 0
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    unmap: bool = True
    copy_mode: MirrorCopyMode = MirrorCopyMode.BACKGROUND
    filter_name: str | msgspec.UnsetType = msgspec.UNSET
    replaces: str | None = None
    backing: Backing = Backing.LEAVE
    auto_finalize: bool = True
    auto_dismiss: bool = True


class MirrorJob(BlockJob):
    """Mirrors ``source`` (a root node) to ``target``."""

    kind = JobType.MIRROR
    commits: ClassVar[bool] = False
    """Whether the target is a node below the source."""

    def __init__(self, graph: Graph, source: Node, target: Node, plan: Plan) -> None:
        super().__init__(graph, plan.id, auto_finalize=plan.auto_finalize, auto_dismiss=plan.auto_dismiss)
        self._source = source
        self._target = target
        self._plan = plan
        self._replaced = source
        self._mode = plan.copy_mode
        self._unit = _whole_unit(target, plan)
        self._granularity = max(plan.granularity, self._unit)
        self._dirty = DirtyMap(source.size, self._granularity)
        # All lanes, also where the kernel moves the bytes: what a guest dirties meanwhile comes in small pieces, and with fewer
        # at once a mirror does not catch up with a guest that writes without pause.
        self._lanes = Lanes(max(1, min(LANES, plan.memory // STEP)))
        self._filter: Node | None = None
        self._reader: JobBackend
        self._writer: JobBackend
        self._pace = Pace()
        self._failure: OSError | None = None
        self._turns = Turns()
        self._retry = False
        self._completing = False
        self._moved = False

    @property
    def _flags(self) -> ZeroFlags:
        return ZeroFlags.MAY_UNMAP if self._plan.unmap else ZeroFlags.NONE

    # -- setting up --------------------------------------------------------------------------------------------------
    async def set_up(self, ctx: Context) -> None:
        """Put the filter on, become known, hold source and target. Raises BlockError, PermissionConflict, LockError or OSError,
        with everything as it was."""
        try:
            async with self.graph.drained(self._source):
                self._filter = await insert_filter(self.graph, "mirror_top", self._source, self._plan.filter_name)
                self._top.commits = self.commits
                self._top.lack = self._dirty
                self._follow_writes()
            self.introduce(jobs_of(ctx.daemon), self._filter, self._plan.speed)
            self._reader = self.hold(self._source, "source")
            self._hold_target()
        except BaseException:
            if self.status is Status.CREATED:
                self.fail_early()
            await self.clean()
            raise

    @property
    def _top(self) -> MirrorTop:
        assert self._filter is not None
        driver = self._filter.driver
        assert isinstance(driver, MirrorTop)
        return driver

    def _hold_target(self) -> None:
        if self._target in chain(self._source):
            raise BlockError("Cannot mirror to a filter on top of a node in the source's backing chain")
        self._writer = self.hold(self._target, "target", Perm.WRITE, Perm.WRITE_UNCHANGED)

    def _follow_writes(self) -> None:
        """Learn of guests' writes in the way of the copy mode. No request is in flight on the filter."""
        assert self._filter is not None
        active = self._mode is MirrorCopyMode.WRITE_BLOCKING
        self._top.mirror = self if active else None
        if active and self._dirty in self._filter.trackers:
            self._filter.trackers.remove(self._dirty)
        elif not active and self._dirty not in self._filter.trackers:
            self._filter.trackers.append(self._dirty)
        self._filter.mapping_changed()

    async def change(self, options: object) -> None:
        """Switch the copy mode. QEMU only knows the way from background to write-blocking."""
        if not isinstance(options, BlockJobChangeOptionsMirror) or self.kind != options.type:
            raise BlockError("Job type does not support change")
        if options.copy_mode is self._mode or self._filter is None:
            return
        async with self.graph.drained(self._filter):
            self._mode = options.copy_mode
            self._follow_writes()

    # -- the work ----------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        await self._check_sizes()
        await self._mark_what_to_copy()
        start = 0
        while True:
            await self.keep_speed()
            if self._failure is not None:
                await self._lanes.empty()
                raise self._failure
            if self.force_cancelled:
                await self._lanes.empty()
                return
            self._account()
            if not self._dirty.dirty:
                if not self._lanes.idle:
                    await self._lanes.change()
                elif not self.ready:
                    await self._announce_caught_up()
                elif self._completing or self.cancelled:
                    return
                else:
                    await self.sleep(IDLE_LOOK)
                continue
            if self.ready and self.cancelled:
                return  # what is dirty is copied with the guest held, at a point in time
            start = await self._copy_some(start)

    async def _check_sizes(self) -> None:
        if self._target.size != self._source.size:
            raise BlockError("Source and target image have different sizes")

    async def _mark_what_to_copy(self) -> None:
        plan, size = self._plan, self._source.size
        if plan.nothing:
            return
        if plan.stale and plan.base is None and self._target.discard_mode is not Discard.UNMAP:
            self._dirty.mark(0, size)
            return
        if plan.stale:
            for offset in range(0, size, ZERO_STEP):
                await self.pause_point()
                if self.cancelled:
                    return
                await self._writer.write_zeroes(offset, min(ZERO_STEP, size - offset), ZeroFlags.MAY_UNMAP)
        offset = 0
        while offset < size and not self.cancelled:
            await self.pause_point()
            depth, length = await allocation_depth(self._source, offset, size - offset, plan.base)
            if depth:
                self._dirty.mark(offset, length)
            offset += length

    def _account(self) -> None:
        self.total = self.done + self._lanes.bytes + self._dirty.dirty
        self._pace.note(self.total, self.done)

    async def _announce_caught_up(self) -> None:
        try:
            await self._writer.flush()
        except OSError as error:
            self._answer_failure(CopyFailed(Side.TARGET, error))
            await self._wait_after_failure()
            return
        self.become_ready()

    async def _copy_some(self, start: int) -> int:
        """Start copying the next dirty run from ``start`` on, wrapping; returns where the search goes on."""
        await self._wait_after_failure()
        if self._failure is not None or self.paused:
            return start
        found = self._dirty.next(start, ZERO_STEP) or self._dirty.next(0, ZERO_STEP)
        if found is None:
            return 0
        offset, length = found
        length = await self._fit(offset, length)
        if self._lanes.occupied(offset, length):
            after = self._dirty.next(offset + length, PIECE)
            if after is not None and not self._lanes.occupied(*after):
                return after[0]
            await self._lanes.change()
            return start
        self._dirty.clear(offset, length)
        if length <= SMALL and self._copy_now(offset, length):
            await self._turns.give_way()
        else:
            await self._lanes.launch(offset, length, self._copy)
        return offset + length

    def _copy_now(self, offset: int, length: int) -> bool:
        """Copy a small run at once, if nothing has to be waited for: what guests dirty comes in such, and a task for each would
        cost more than the copy. Nobody works in the range."""
        source, target = self._reader.root, self._writer.root
        if self.paused or source is None or target is None or not copy_now(source, target, offset, length):
            return False
        self.done += length
        self.rate.account(length)
        return True

    async def _fit(self, offset: int, length: int) -> int:
        """As much of a dirty run as one copy may take: all that is zero, or one step of data; whole granules."""
        step = STEP if self.rate.speed else PIECE
        if length <= step:
            return length
        granularity = self._granularity
        try:
            status = await block_status(self._source, offset, step)
            if status.zero and status.length == step:
                status = await block_status(self._source, offset, length)
        except OSError:
            return max(step, granularity)  # the copy will meet it, too
        wanted = status.length if status.zero else min(status.length, step)
        return min(length, max(wanted // granularity * granularity, granularity))

    async def _copy_range(self, offset: int, length: int) -> None:
        plan, image = self._plan, skip_filters(self._target)
        # What a full copy without any backing file, now or later, shows as zeroes need not say so: or the time that a sparse disk
        # takes would depend on its size.
        alone = (
            plan.base is None and not plan.nothing and image.backing is None and image.driver.backing_filename() is None
        )
        leave = alone and plan.unmap and not self.commits
        await copy_range(self._reader, self._writer, offset, length, flags=self._flags, leave_zeroes=leave)

    async def _copy(self, offset: int, length: int) -> None:
        try:
            await self._copy_range(offset, length)
        except CopyFailed as failed:
            self._dirty.mark(offset, length)
            self._answer_failure(failed)
        else:
            self.done += length
            self.rate.account(length)

    def _answer_failure(self, failed: CopyFailed) -> None:
        """Ask the policy of the side that failed. What was to be copied is dirty again, and is tried again unless the job
        fails."""
        read = failed.side is Side.SOURCE
        policy = self._plan.on_source_error if read else self._plan.on_target_error
        action = self.answer(policy, OPERATION[failed.side], failed.error)
        if action is Action.REPORT:
            self._failure = self._failure or failed.error
        self._retry = action is Action.IGNORE
        self.wake()

    async def _wait_after_failure(self) -> None:
        if self._retry:
            self._retry = False
            await self.sleep(RETRY_AFTER)

    async def settle(self) -> None:
        await self._lanes.empty()

    # -- writes that go to both at once (job_filters.Mirror) -----------------------------------------------------------
    def _whole(self, offset: int, length: int) -> tuple[int, int]:
        """The range in units of which the target must have all or nothing (offset, length)."""
        end = min(-(-(offset + length) // self._unit) * self._unit, self._source.size)
        start = offset // self._unit * self._unit
        return start, max(end, offset + length) - start

    async def enter(self, offset: int, length: int) -> None:
        await self._lanes.enter(*self._whole(offset, length))

    def leave(self, offset: int, length: int) -> None:
        self._lanes.leave(*self._whole(offset, length))

    async def _mirror_whole(self, offset: int, length: int) -> bool:
        """If the target must not be written in part there: copy all around it, too, and return True."""
        whole = self._whole(offset, length)
        if whole == (offset, length):
            return False
        try:
            await copy_range(self._reader, self._writer, *whole, flags=self._flags)
        except CopyFailed as failed:
            self._dirty.mark(*whole)
            self._answer_failure(failed)
        else:
            self._dirty.clear(*whole)
        return True

    async def write(self, offset: int, data: memoryview) -> None:
        if await self._mirror_whole(offset, len(data)):
            return
        try:
            await self._writer.write(offset, data)
        except OSError as error:
            self._mirrored_write_failed(offset, len(data), error)
        else:
            self._dirty.clear(offset, len(data))

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        if await self._mirror_whole(offset, length):
            return
        try:
            await self._writer.write_zeroes(offset, length, flags & ~ZeroFlags.NO_FALLBACK)
        except OSError as error:
            self._mirrored_write_failed(offset, length, error)
        else:
            self._dirty.clear(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        # What a discarded range reads as is up to each node: the source's answer is copied.
        self._dirty.mark(offset, length)

    def _mirrored_write_failed(self, offset: int, length: int, error: OSError) -> None:
        self._dirty.mark(offset, length)
        self._answer_failure(CopyFailed(Side.TARGET, error))

    # -- what users ask ----------------------------------------------------------------------------------------------
    def complete(self) -> None:
        """End with the guest on the target. Raises BlockError if the node to be replaced is gone."""
        if self._plan.replaces is not None:
            if self._plan.replaces not in self.graph.nodes:
                raise BlockError(f"Node name '{self._plan.replaces}' not found")
            self._replaced = self.graph.nodes[self._plan.replaces]
        self._completing = True

    def soft_cancel(self) -> bool:
        return self.ready

    def request_cancel(self, *, force: bool) -> None:
        super().request_cancel(force=force)
        if self.force_cancelled:
            # What waits for a target that may come back must not hold up the end.
            for node in (self._target, *self.graph.below(self._target)):
                node.driver.cancel_in_flight()

    async def flush_target(self) -> None:
        """Put on the target's stable storage what is there already, so that the end has less to wait for. Raises OSError."""
        await self._target.flush()

    def details(self) -> dict[str, object]:
        if self.kind is not JobType.MIRROR:
            return {}
        active = self._mode is MirrorCopyMode.WRITE_BLOCKING
        remaining = self._lanes.bytes + self._dirty.dirty
        dirtied, copied = self._pace.rates(self.done + remaining, self.done)
        found: dict[str, object] = {
            "actively_synced": active and self.ready and not self._dirty.dirty,
            "x_remaining": remaining,
            "x_dirty_rate": dirtied,
            "x_copy_rate": copied,
        }
        if not remaining or copied > dirtied:
            found["x_seconds_left"] = -(-remaining // max(copied - dirtied, 1)) if remaining else 0
        return found

    # -- the outcome -------------------------------------------------------------------------------------------------
    async def prepare(self) -> None:
        assert self._filter is not None
        async with self.graph.drained(self._filter):
            await self._copy_the_rest()
            await self._writer.flush()
            if self._completing and not self.cancelled:
                await self._move_users()
                self._moved = True

    async def _copy_the_rest(self) -> None:
        """Copy what got dirty since the run ended. The guest is held."""
        while (found := self._dirty.next(0, ZERO_STEP)) is not None:
            offset, length = found
            self._dirty.clear(offset, length)
            try:
                await self._copy_range(offset, length)
            except CopyFailed as failed:
                self.answer(OnError.REPORT, OPERATION[failed.side], failed.error)
                raise failed.error from failed
            self.done += length
        self._account()

    async def _move_users(self) -> None:
        """Let the source's users go on with the target."""
        assert self._filter is not None
        target = self._target
        replaced = self._replaced
        if not may_replace(self._source, replaced):
            log.error(
                "Can no longer replace '%s' by '%s', because it can no longer be guaranteed that doing so would not lead to "
                "an abrupt change of visible data",
                replaced.name,
                target.name,
            )
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        for backend in self._backends:
            self.graph.set_root_permissions(backend, Perm.NONE, Perm.ALL)
        if target.read_only is not replaced.read_only:
            await set_read_only(self.graph, target, replaced.read_only)
        await self._settle_backing()
        own = [backend.root for backend in self._backends if backend.root is not None]
        old = self._filter if replaced is self._source else replaced
        self.thaw()
        async with self.graph.drained(target, old):
            with Transaction() as tran:
                self.graph.replace_node(old, target, tran, but=own)

    async def _settle_backing(self) -> None:
        image = skip_filters(self._target)
        if self._plan.backing is Backing.OPEN and image.backing is None:
            await gate.open_backing(
                image, msgspec.UNSET, image.driver.backing_filename(), image.driver.backing_format()
            )
        elif self._plan.backing is Backing.SOURCE and image.backing is None:
            backing = self._source if self._plan.nothing else self._plan.base
            if backing is not None:
                self.graph.attach_child(image, backing, "backing", Role.COW)

    async def clean(self) -> None:
        await self._lanes.empty()
        inserted, self._filter = self._filter, None
        self.thaw()
        for backend in self._backends:
            self.graph.set_root_permissions(backend, Perm.NONE, Perm.ALL)
        if inserted is not None:
            driver = inserted.driver
            assert isinstance(driver, MirrorTop)
            async with self.graph.drained(inserted):
                driver.mirror = None
                if self._dirty in inserted.trackers:
                    inserted.trackers.remove(self._dirty)
            if inserted.parents:
                await remove_filter(self.graph, inserted)
            else:
                await self.graph.release(inserted)
        await self.let_go()
        await self._freeze_source()

    async def _freeze_source(self) -> None:
        """If the target stands on the source now, that is an image below like those that a snapshot leaves: nobody writes to it,
        and others may read it."""
        source = self._source
        below = any(edge.role & Role.COW for edge in source.parents)
        if self._moved and self._plan.nothing and below and not source.read_only and not source.perm & _WRITES:
            await set_read_only(self.graph, source, True)


class ActiveCommit(MirrorJob):
    """A commit of what somebody writes to: a mirror into the base. Ended with complete, the guest is on the base; cancelled when
    ready, it stays on top of it."""

    kind = JobType.COMMIT
    commits = True

    def __init__(self, graph: Graph, source: Node, target: Node, plan: Plan) -> None:
        super().__init__(graph, source, target, plan)
        self._was_read_only = target.read_only

    @classmethod
    async def begin(cls, ctx: Context, top: Node, base: Node, options: CommitOptions) -> None:
        """Set the job up and start it. Raises BlockError, PermissionConflict, LockError or OSError."""
        plan = Plan(
            id=options.job_id if isinstance(options.job_id, str) else None,
            base=with_filters(base, top),
            granularity=default_granularity(base),
            speed=options.speed,
            on_source_error=options.on_error,
            on_target_error=options.on_error,
            filter_name=options.filter_node_name,
            auto_finalize=options.auto_finalize,
            auto_dismiss=options.auto_dismiss,
        )
        job = cls(ctx.daemon.graph, top, base, plan)
        await job.set_up(ctx)
        job.start()

    async def set_up(self, ctx: Context) -> None:
        if self._was_read_only:
            await set_read_only(self.graph, self._target, False)
        await super().set_up(ctx)

    def _hold_target(self) -> None:
        shared = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED | Perm.WRITE
        self.freeze(links(self._source, self._target))
        self.hold_between(self._source, self._target, shared)
        perm = Perm.CONSISTENT_READ | Perm.WRITE | may_grow(self._target, self._source)
        self._writer = self.hold(self._target, "target", perm, shared)

    async def _check_sizes(self) -> None:
        if self._target.size < self._source.size:
            async with self.drained(self._target):
                await self._writer.truncate(self._source.size, exact=False)

    async def clean(self) -> None:
        target = self._target
        await super().clean()
        if self._was_read_only and not self._moved and self.graph.nodes.get(target.name) is target:
            await set_read_only(self.graph, target, True)


def _whole_unit(target: Node, plan: Plan) -> int:
    """Bytes of the target's clusters, if it gets its backing file only when the guest goes over to it: until then it would fill
    the rest of a cluster with zeroes, over what the backing file is to show there. Else 1."""
    image = skip_filters(target)
    if image.backing is None and (plan.backing is not Backing.LEAVE or image.driver.backing_filename()):
        return max(image.driver.cluster_size(), 1)
    return 1


def may_replace(source: Node, wanted: Node) -> bool:
    """Whether the target may take the place of ``wanted``: that shows just what the source shows, or is a child of a quorum that
    the source shows. It may be a broken one: the target holds what the quorum's children agree on."""
    node: Node | None = source
    while node is not None and node is not wanted:
        if node.driver.name == "quorum" and any(edge.node is wanted for edge in node.children.values()):
            return True
        node = node.filtered.node if node.filtered is not None else None
    return node is wanted


def default_granularity(target: Node) -> int:
    """Bytes of a dirty map's granule for a target: its cluster size, at least 4 KiB; 64 KiB where it has none (QEMU's
    bdrv_get_default_bitmap_granularity)."""
    cluster = skip_filters(target).driver.cluster_size()
    return max(4096, cluster) if cluster else 65536


def check_root(node: Node) -> None:
    """Raise BlockError, in QEMU's words, if another node stands on ``node``, or a job works on it."""
    if any(isinstance(edge.parent, Node | JobBackend) for edge in node.parents):
        raise BlockError("Need a root block node")

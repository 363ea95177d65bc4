"""Backups: a copy of what a node was at the moment the job started, made while the guest writes on.

    guest ─> copy-before-write ─file──> source            at the end:  guest ─> source
                    └──target─> target                                 the target: the source at the start

The moment is kept by a ``copy-before-write`` filter on the source: a guest's write first has what it changes copied to the
target. The job copies the rest in the background, through the filter, which knows what is copied, being copied, or still to
be (`PointInTime`): the two never copy the same cluster, and never a changed one. With sync *none* the filter does everything,
until the job is cancelled.

What is copied (`sync`): *full*, everything; *top*, what the topmost image holds; *bitmap*, what a dirty bitmap says. The bitmap
is frozen while the job runs, a successor records what comes. In the end its bits are those of the successor, or both's, by
``bitmap-mode``:

                on success              on failure or cancel
    on-success  successor               bitmap and successor
    never       bitmap and successor    bitmap and successor
    always      successor               successor, and what was not copied

Failed copies of the background are answered by the policies of the side that failed, one error at a time: what else was under way
is waited for. If a copy for a guest's write fails, the guest's write is done all the same, and the backup is lost (QEMU, where
only `on-cbw-error` of a filter set up by hand can say so, fails the guest's write); ``on-cbw-error`` and ``cbw-timeout`` choose
otherwise. The target is put on stable storage before the job is said to have succeeded (QEMU: when it is closed).

What guests' writes leave in small pieces is copied at once, in turns with the guests (`Turns`); a guest's first write to a
cluster has what follows copied along (`AHEAD`): both cost less than a task.

``total`` is what is to be copied, in bytes of whole clusters. Memory: `LANES` copies of 2 MiB at most (none where the host copies
from file to file), and what the filter takes for guests' writes: 40 MiB. Source: QEMU ``block/backup.c``,
``block/block-copy.c``; every message was asked from QEMU 10.0.2.
"""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass
from typing import Final

import msgspec

from livedisk.emulator.block.bitmaps import DirtyBitmap
from livedisk.emulator.block.copy import SMALL
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.status import allocation_depth, block_status
from livedisk.emulator.device.policy import Action, OnError
from livedisk.emulator.drivers.copy_before_write import CopyBeforeWrite, OnCbwError
from livedisk.emulator.errors import BlockError
from livedisk.emulator.qmp.context import Context
from livedisk.jobs.block_job import BlockJob
from livedisk.jobs.commands import jobs_of
from livedisk.jobs.copy import (
    LANES,
    OPERATION,
    PIECE,
    STEP,
    ZERO_STEP,
    CopyFailed,
    EarlyWriteback,
    Lanes,
    Side,
    Turns,
)
from livedisk.jobs.filters import open_filter, put_on, remove_filter, skip_filters, under
from livedisk.jobs.mirror import Sync
from livedisk.jobs.states import JobType, Status

log = logging.getLogger(__name__)

LIMITED_STEP: Final = 1 << 20
"""Bytes a piece under a speed limit (QEMU's BLOCK_COPY_MAX_BUFFER)."""
AHEAD: Final = PIECE
"""Bytes from a guest's write on that are copied at once with its own cluster: about a millisecond's work. What guests' writes
would take one by one out of the job's pieces costs both many times as much."""
RETRY_AFTER: Final = 0.1
"""Seconds before a copy that failed, and whose error is ignored, is tried again."""


class BitmapMode(enum.StrEnum):
    """What becomes of the bitmap (QEMU's BitmapSyncMode); see the module."""

    ON_SUCCESS = "on-success"
    NEVER = "never"
    ALWAYS = "always"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to back up. ``speed``: bytes a second; ``max_chunk`` (0: no limit), ``min_cluster_size``: bytes; ``offload``: whether
    the kernel may copy from file to file; ``cbw_timeout``: seconds, 0: none."""

    id: str | None
    sync: Sync
    bitmap: DirtyBitmap | None = None
    bitmap_mode: BitmapMode = BitmapMode.ON_SUCCESS
    speed: int = 0
    compress: bool = False
    discard_source: bool = False
    offload: bool = True
    max_workers: int = 64
    max_chunk: int = 0
    min_cluster_size: int = 0
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT
    cbw_timeout: int = 0
    filter_name: str | msgspec.UnsetType = msgspec.UNSET
    auto_finalize: bool = True
    auto_dismiss: bool = True


class BackupJob(BlockJob):
    """Backs ``source`` up to ``target``. It is the filter's `Watcher`."""

    kind = JobType.BACKUP

    def __init__(self, graph: Graph, source: Node, target: Node, plan: Plan) -> None:
        super().__init__(graph, plan.id, auto_finalize=plan.auto_finalize, auto_dismiss=plan.auto_dismiss)
        self._source = source
        self._target = target
        self._plan = plan
        self._writeback = EarlyWriteback(target)
        self._lanes = Lanes(min(LANES, plan.max_workers), plan.max_workers)
        self._turns = Turns()
        self._filter: Node | None = None
        self._frozen_bitmap: DirtyBitmap | None = None
        self._failed: CopyFailed | None = None

    # -- setting up --------------------------------------------------------------------------------------------------
    async def set_up(self, ctx: Context) -> None:
        """Freeze the bitmap, put the filter on, become known, hold the target. The source is drained.

        Raises BlockError, PermissionConflict, LockError or OSError, with everything as it was.
        """
        try:
            if self._plan.bitmap is not None:
                self._freeze_bitmap(self._plan.bitmap)
            if self._source.size != self._target.size:
                raise BlockError("Source and target image have different sizes")
            await self._insert_filter()
            if self._plan.max_chunk and self._plan.max_chunk < self._driver.moment.cluster:
                raise BlockError(
                    f"Required max-chunk ({self._plan.max_chunk}) is less than backup cluster size "
                    f"({self._driver.moment.cluster})"
                )
            assert self._filter is not None
            self.introduce(jobs_of(ctx.daemon), self._filter, self._plan.speed)
            self._writer = self.hold(self._target, "target")
        except BaseException:
            if self.status is Status.CREATED:
                self.fail_early()
            self._end_bitmap(succeeded=None)
            await self.clean()
            raise
        self._choose_what_to_copy()

    def _freeze_bitmap(self, bitmap: DirtyBitmap) -> None:
        if self._plan.bitmap_mode is not BitmapMode.NEVER:
            bitmap.check_usable()
        bitmap.freeze()
        self._frozen_bitmap = bitmap

    async def _insert_filter(self) -> None:
        plan = self._plan
        if plan.min_cluster_size >= 1 << 63:
            raise BlockError(f"min-cluster-size too large: {plan.min_cluster_size} > {(1 << 63) - 1}")
        try:
            node = await open_filter(
                self.graph,
                "copy-before-write",
                self._source,
                plan.filter_name,
                target=self._target.name,
                on_cbw_error=plan.on_cbw_error,
                cbw_timeout=plan.cbw_timeout,
                min_cluster_size=plan.min_cluster_size,
            )
        except BlockError as error:
            raise BlockError(f"Could not create node: {error}", hint=error.hint) from error
        node.implicit = False  # queries show it, named or not, as QEMU's do
        self._filter = node
        self._driver.watcher = self
        self._driver.compressed = plan.compress
        self._driver.offloads = plan.offload
        self._driver.discard_source = plan.discard_source
        try:
            await put_on(self.graph, node, self._source)
        except BlockError as error:
            self._filter = None
            raise BlockError(f"Could not replace node: {error}", hint=error.hint) from error

    @property
    def _driver(self) -> CopyBeforeWrite:
        assert self._filter is not None
        driver = self._filter.driver
        assert isinstance(driver, CopyBeforeWrite)
        return driver

    def _choose_what_to_copy(self) -> None:
        if self._plan.sync is Sync.BITMAP:
            assert self._frozen_bitmap is not None
            self._driver.moment.want_only(self._frozen_bitmap.runs())
        elif self._plan.sync is Sync.TOP:
            self._driver.base = under(skip_filters(self._source))
        self._look_ahead()
        self._account()

    def _look_ahead(self) -> None:
        """Let a guest's write have some of what follows copied along; not past a speed limit."""
        if self._filter is not None:
            self._driver.ahead = 0 if self.rate.speed or self._plan.sync is Sync.NONE else AHEAD

    def set_speed(self, speed: int) -> None:
        super().set_speed(speed)
        self._look_ahead()

    def request_cancel(self, *, force: bool) -> None:
        super().request_cancel(force=force)
        source = {self._source, *self.graph.below(self._source)}
        for node in (self._target, *self.graph.below(self._target)):
            if node not in source:
                node.driver.cancel_in_flight()

    # -- the filter tells ----------------------------------------------------------------------------------------------
    def copied(self, length: int) -> None:
        self.done += length
        self._writeback.copied(length)

    def broke(self, error: OSError) -> None:
        self.wake()

    # -- the work ----------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        if self._plan.sync is Sync.TOP:
            await self._skip_what_is_below()
        if self._plan.sync is Sync.NONE:
            while not self.cancelled:
                self._check_whole()
                await self.sleep(-1)
            return
        await self._copy_everything()
        while not self.cancelled and not await self._flushed():
            await self.pause_point()

    async def _skip_what_is_below(self) -> None:
        """Nothing of what only lower layers hold is copied."""
        driver, offset = self._driver, 0
        while offset < self._source.size and not self.cancelled:
            await self.pause_point()
            depth, length = await allocation_depth(driver.disk.node, offset, self._source.size - offset, driver.base)
            if not depth:
                driver.moment.skip(offset, length)
                self._account()
            offset += length
        driver.base = None

    async def _copy_everything(self) -> None:
        moment, start = self._driver.moment, 0
        while True:
            await self.keep_speed()
            if self.cancelled:
                break
            self._account()
            if moment.broken is not None or self._failed is not None:
                await self._lanes.empty()
                await self._answer_failure()
            elif self.paused:
                continue
            elif moment.dirty:
                start = await self._copy_some(start)
            elif not self._lanes.idle:
                await self._lanes.change()
            elif (copy := moment.copy_in(0, moment.size)) is not None:  # for a guest's write; it may fail
                await copy.ended()
            else:
                break
        await self._lanes.empty()
        self._account()

    def _account(self) -> None:
        moment = self._driver.moment
        self.total = self.done + moment.dirty + moment.copying

    def _check_whole(self) -> None:
        """Raise OSError if the moment is lost."""
        error = self._driver.moment.broken
        if error is not None:
            self.answer(OnError.REPORT, OPERATION[Side.TARGET], error)
            raise error

    async def _copy_some(self, start: int) -> int:
        """Start copying the next dirty run from ``start`` on, wrapping; returns where the search goes on."""
        moment = self._driver.moment
        found = moment.next_dirty(start, moment.size, ZERO_STEP) or moment.next_dirty(0, moment.size, ZERO_STEP)
        if found is None:
            return 0
        offset, length = await self._fit(*found)
        if self._lanes.occupied(offset, length):
            # It was found again before its copy began, or all that is left is under way.
            await self._lanes.change()
            return start
        if length > SMALL and self._lanes.full:
            await self._turns.give_way(always=True)
            if self._turns.crowded and self._lanes.full:
                # The event loop comes back to the copies in threads too seldom to keep them busy: help them.
                length = min(length, max(SMALL, moment.cluster))
        if length <= SMALL and not self.paused and self._driver.copy_now(offset, offset + length):
            self.rate.account(length)
            await self._turns.give_way()
        else:
            self.rate.account(length)
            await self._lanes.launch(offset, length, self._copy)
        return offset + length

    async def _fit(self, offset: int, length: int) -> tuple[int, int]:
        """As much of a dirty run as one copy may take: all that is zero, or one piece of data; whole clusters."""
        cluster = self._driver.moment.cluster
        step = max(LIMITED_STEP if self.rate.speed else STEP if self._driver.compressed else PIECE, cluster)
        if self._plan.max_chunk:
            length = min(length, self._plan.max_chunk // cluster * cluster)
        if length <= step or self.rate.speed:
            return offset, min(length, step)
        try:
            status = await block_status(self._driver.disk.node, offset, length)
        except OSError:
            return offset, step  # the copy will meet it, too
        if status.zero and status.length >= cluster:
            whole = status.length if status.length == length else status.length // cluster * cluster
            return offset, whole
        return offset, min(max(status.length // cluster * cluster, cluster), step)

    async def _copy(self, offset: int, length: int) -> None:
        """Copy what is still dirty in the range: guests' writes may have had some of it copied meanwhile."""
        driver = self._driver
        while self._failed is None and driver.moment.broken is None:
            found = driver.moment.next_dirty(offset, offset + length, length)
            if found is None:
                return
            try:
                await driver.copy(driver.moment.take(*found))
            except CopyFailed as failed:
                self._failed = self._failed or failed
                self.wake()

    async def _answer_failure(self) -> None:
        """Ask the policy of the side that failed. What was to be copied is dirty again. Raises OSError if the job fails."""
        self._check_whole()
        failed, self._failed = self._failed, None
        if failed is not None and self._answer(failed) is Action.IGNORE:
            await self.sleep(RETRY_AFTER)

    def _answer(self, failed: CopyFailed) -> Action:
        read = failed.side is Side.SOURCE
        policy = self._plan.on_source_error if read else self._plan.on_target_error
        action = self.answer(policy, OPERATION[failed.side], failed.error)
        if action is Action.REPORT:
            raise failed.error
        return action

    async def _flushed(self) -> bool:
        """Put the target on stable storage. False: try again. Raises OSError if the job fails."""
        self._check_whole()
        try:
            await self._writer.flush()
        except OSError as error:
            if self._answer(CopyFailed(Side.TARGET, error)) is Action.IGNORE:
                await self.sleep(RETRY_AFTER)
            return False
        return True

    async def settle(self) -> None:
        await self._lanes.empty()

    # -- the outcome -------------------------------------------------------------------------------------------------
    async def prepare(self) -> None:
        self._check_whole()

    async def commit(self) -> None:
        self._end_bitmap(succeeded=True)
        await self._store_bitmap()

    async def abort(self) -> None:
        self._end_bitmap(succeeded=False)
        await self._store_bitmap()

    async def _store_bitmap(self) -> None:
        """Let the image know what has become of a persistent bitmap. Until then, it says more than it must."""
        if self._plan.bitmap is not None:
            try:
                await self._plan.bitmap.node.driver.sync_bitmaps()
            except (OSError, BlockError) as error:
                log.warning("job '%s': its bitmap could not be stored: %s", self.id, error)

    def _end_bitmap(self, *, succeeded: bool | None) -> None:
        """Let the bitmap be what its mode says. None: the job never was."""
        bitmap, self._frozen_bitmap = self._frozen_bitmap, None
        if bitmap is None:
            return
        mode = self._plan.bitmap_mode
        if succeeded is None or mode is BitmapMode.NEVER or (not succeeded and mode is BitmapMode.ON_SUCCESS):
            bitmap.reclaim()
            return
        bitmap = bitmap.abdicate()
        if not succeeded:
            for offset, length in self._driver.moment.missing_runs():
                bitmap.mark(offset, length)

    async def clean(self) -> None:
        await self._lanes.empty()
        inserted, self._filter = self._filter, None
        if inserted is not None:
            driver = inserted.driver
            assert isinstance(driver, CopyBeforeWrite)
            driver.watcher = None
            # A copy that came too late may hang with the target. The guest must not be held for as long.
            await driver.settle()
        await self.let_go()
        if inserted is not None:
            if inserted.parents:
                await remove_filter(self.graph, inserted)
            else:
                await self.graph.release(inserted)

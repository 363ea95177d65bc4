"""copy-before-write: before a guest's write changes a cluster, what it was goes to ``target``.

    guest ─> copy-before-write ─file─> the disk, which goes on changing
                    └──target─> what the disk's clusters were when the filter was put there

Together, the disk and the target show the moment at which the filter was made: `snapshot_access.py` reads it, a backup job copies
it (`jobs/backup.py`). Which cluster is where, who copies and who reads is kept in `PointInTime`; this driver moves the bytes.

* Reads of the guest show the disk straight and stay on the fast path. So do writes to clusters that were copied already:
  only they are mapped as writable in place. A first write has its cluster copied at once if nothing must be waited for.
* ``bitmap`` (a dirty bitmap of any node): only what it says at this moment is kept.
* ``on-cbw-error``: when a cluster cannot be copied, either the guest's write fails (*break-guest-write*), or the guest goes
  on and the moment is lost (*break-snapshot*): whoever reads or copies it then fails.
* ``cbw-timeout`` (seconds, 0: none): a copy that takes longer counts as failed. It cannot be taken back: it runs on, and
  drains wait for it.
* If the disk is below the target ("image fleecing": the target's readers see through it what was not copied), the copies
  wait for reads of the target that overlap and came before: those would otherwise read what the guest writes next.

A cluster is as large as one of the target's, and at least 64 KiB, or ``min-cluster-size``: the target must not fill up the
rest of its own clusters from elsewhere.

Guests' copies have at most `GUESTS_MEMORY` bytes in memory. Source: QEMU ``block/copy-before-write.c``,
``block/block-copy.c``; ``qapi/block-core.json`` (BlockdevOptionsCbw); every message was asked from QEMU 10.0.2. Where we
differ: zeroes are punched into a target that unmaps, and a target without backing file that reads as zeroes already is left
alone.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import logging
import os
from collections.abc import Sequence
from typing import Annotated, Final, Protocol

import msgspec

from livedisk.emulator.block.bitmaps import DirtyBitmap
from livedisk.emulator.block.copy import STEP, CopyFailed, copy_now, copy_range, run_at
from livedisk.emulator.block.driver import Driver, register
from livedisk.emulator.block.node import Edge, Node, write_now
from livedisk.emulator.block.options import BlockdevOptions, BlockdevRef, Size
from livedisk.emulator.block.permissions import Perm, Role, filter_perms
from livedisk.emulator.block.point_in_time import Held, PointInTime
from livedisk.emulator.block.status import allocation_depth
from livedisk.emulator.block.types import HostOffset, Kind, Preallocation, Segment, ZeroFlags
from livedisk.emulator.errors import BlockError

log = logging.getLogger(__name__)

DEFAULT_CLUSTER: Final = 64 << 10
"""Bytes copied as one at least."""
GUEST_STEP: Final = 512 << 10
"""Bytes of one copy for a guest's write at most (but a cluster)."""
GUESTS_MEMORY: Final = 24 << 20
"""Bytes in memory of copies for guests' writes at most."""

UInt32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32, extra={"qapi": "uint32"})]


class OnCbwError(enum.StrEnum):
    """What a cluster that cannot be copied breaks (QEMU's OnCbwError)."""

    BREAK_GUEST_WRITE = "break-guest-write"
    BREAK_SNAPSHOT = "break-snapshot"


class CbwBitmap(msgspec.Struct, rename="kebab", forbid_unknown_fields=True):
    """A dirty bitmap (QEMU's BlockDirtyBitmap)."""

    node: str
    name: str


class CopyBeforeWriteOptions(BlockdevOptions, kw_only=True):
    """What a copy-before-write filter takes. ``cbw-timeout``: seconds. ``min-cluster-size``: bytes, a power of two."""

    file: BlockdevRef
    target: BlockdevRef
    bitmap: CbwBitmap | msgspec.UnsetType = msgspec.UNSET
    on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE
    cbw_timeout: UInt32 = 0
    min_cluster_size: Size = 0


class Watcher(Protocol):
    """Who wants to know how the copying goes: a backup job. Nothing of this may fail."""

    def copied(self, length: int) -> None:
        """So many bytes (whole clusters) have been copied, for whomever."""

    def broke(self, error: OSError) -> None:
        """The moment is lost."""


class CopyBeforeWrite(Driver):
    """See the module. A job sets, before it begins: ``watcher``; ``compressed`` (data is written compressed); ``offloads`` (the
    kernel may copy); ``discard_source`` (what was copied is discarded from the disk);
    ``base`` (what only layers below it hold is not copied); ``ahead`` (bytes from a guest's write on that the job wants, too:
    they are copied along where that can be done at once, for less than by themselves)."""

    name = "copy-before-write"
    Options = CopyBeforeWriteOptions
    options: CopyBeforeWriteOptions
    is_filter = True
    named_as_child = True
    aligned_children = frozenset({"target"})

    async def open(self) -> None:
        graph, options = self.node.graph, self.options
        self.watcher: Watcher | None = None
        self.compressed = False
        self.offloads = True
        self.discard_source = False
        self.base: Node | None = None
        self.ahead = 0
        self._late: set[asyncio.Task[None]] = set()
        self._edge = await graph.open_child(self.node, options.file, "file", Role.FILTERED | Role.PRIMARY)
        self._target = await graph.open_child(self.node, options.target, "target", Role.DATA)
        bitmap = self._find_bitmap(options.bitmap) if isinstance(options.bitmap, CbwBitmap) else None
        try:
            cluster = cluster_size(self._target.node, options.min_cluster_size)
            self.moment = PointInTime(self._edge.node.size, cluster, self._changed)
            if bitmap is not None:
                self._keep_only(bitmap)
        except BlockError as error:
            raise BlockError(f"Cannot create block-copy-state: {error}", hint=error.hint) from error
        self.map_granularity = cluster
        self.request_alignment = self._edge.node.driver.request_alignment
        self._room = asyncio.Semaphore(GUESTS_MEMORY // min(max(cluster, GUEST_STEP), STEP))

    def _find_bitmap(self, wanted: CbwBitmap) -> DirtyBitmap:
        node = self.node.graph.nodes.get(wanted.node)
        if node is None:
            raise BlockError(f"Node '{wanted.node}' not found")
        return node.bitmaps.get(wanted.name)

    def _keep_only(self, bitmap: DirtyBitmap) -> None:
        """The moment is only of what ``bitmap`` says. Raises BlockError."""
        try:
            bitmap.check_usable(allow_read_only=True)
            if bitmap.size != self.moment.size:
                raise BlockError(
                    f"Bitmaps are of different sizes (destination size is {self.moment.size}, source size is "
                    f"{bitmap.size}) and can't be merged"
                )
        except BlockError as error:
            raise BlockError(
                f"Failed to merge bitmap '{bitmap.name}' to internal copy-bitmap: {error}", hint=error.hint
            ) from error
        self.moment.want_only(bitmap.runs())
        self.moment.show_only_wanted()

    async def close(self) -> None:
        await self.settle()

    @property
    def dispensable(self) -> frozenset[str]:
        breaks_guest = self.options.on_cbw_error is OnCbwError.BREAK_GUEST_WRITE
        return frozenset() if breaks_guest else frozenset({"target"})

    def working(self) -> bool:
        return bool(self._late)

    async def settle(self) -> None:
        while self._late:
            await asyncio.wait(self._late)

    # -- where -------------------------------------------------------------------------------------------------------
    @property
    def size(self) -> int:
        return self._edge.node.size

    @property
    def disk(self) -> Edge:
        """The edge to what the guest writes to."""
        return self._edge

    @property
    def target(self) -> Edge:
        """The edge to what the clusters are copied to."""
        return self._target

    def map(self, offset: int, length: int) -> Segment:
        length, passes = self.moment.run(offset, length)
        return Segment(Kind.DATA, length, self._edge, HostOffset(offset), passes)

    def _changed(self, offset: int, length: int) -> None:
        self.node.mapping_changed(offset, length)

    # -- the guest's requests ----------------------------------------------------------------------------------------
    async def write(self, offset: int, data: memoryview) -> None:
        await self._before_change(offset, len(data))
        await self._edge.write(offset, data)

    def write_now(self, offset: int, data: memoryview) -> bool:
        moment, length = self.moment, len(data)
        if not self._edge.may_write:
            return False
        if not moment.passes(offset, length):
            start, end = moment.align(offset, length)
            if not self.copy_now(start, max(end, min(start + self.ahead, moment.size))) or not moment.passes(
                offset, length
            ):
                return False
        moment.touch(offset, length)
        return write_now(self._edge.node, offset, data)

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        await self._before_change(offset, length)
        await self._edge.node.write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self._before_change(offset, length)
        await self._edge.node.discard(offset, length)

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        await self._before_change(offset, len(data))
        await self._edge.node.write_compressed(offset, data)

    async def flush(self) -> None:
        """Of the disk alone: a guest's flush neither waits for the target nor fails with it."""
        await self._edge.node.flush()

    async def truncate(self, size: int, *, exact: bool, prealloc: Preallocation) -> None:
        if size < self.size:
            await self._before_change(size, self.size - size)
        await self._edge.node.truncate(size, exact=exact, prealloc=prealloc)

    def highest_written(self) -> int:
        return self._edge.node.wr_highest

    def own_bitmaps(self) -> Sequence[tuple[int, int]]:
        dirty, access, done = self.moment.counts()
        return [(self.moment.cluster, count) for count in (access, done, dirty)]

    def cluster_size(self) -> int:
        return self._edge.node.driver.cluster_size()

    # -- copying -----------------------------------------------------------------------------------------------------
    async def _before_change(self, offset: int, length: int) -> None:
        """Return when the range may be changed: what it was is copied, or the moment is lost, and nobody reads it from the
        disk any more. Raises OSError where the guest's write must fail."""
        moment = self.moment
        if not moment.passes(offset, length):
            start, end = moment.align(offset, length)
            if moment.broken is None:
                try:
                    await self._save_in_time(start, end)
                except OSError as error:
                    if self.options.on_cbw_error is OnCbwError.BREAK_GUEST_WRITE:
                        raise
                    self._break_off(error)
            moment.touch(offset, length)
            await moment.thawed(start, end)
        else:
            moment.touch(offset, length)

    def copy_now(self, start: int, end: int) -> bool:
        """Copy what is dirty in the clusters of a range at once: a task, and a place among those that wait, would cost more than
        the copy of a few clusters. False: `copy` must do some of it."""
        moment = self.moment
        found = moment.next_dirty(start, end, GUEST_STEP) if moment.broken is None else None
        if found is None:
            return True
        if self.compressed or self.discard_source or self.base is not None or self._is_fleecing():
            return False
        while found is not None:
            offset, length = found
            if not copy_now(self._edge, self._target, offset, length):
                return False
            moment.copied_now(offset, length)
            self._tell_copied(offset, length)
            found = moment.next_dirty(offset + length, end, GUEST_STEP)
        return True

    def _break_off(self, error: OSError) -> None:
        if self.moment.broken is None:
            log.warning("node '%s': a copy failed, what the disk was is lost: %s", self.node.name, error)
            self.moment.break_off(error)
            if self.watcher is not None:
                self.watcher.broke(error)

    async def _save_in_time(self, start: int, end: int) -> None:
        seconds = self.options.cbw_timeout
        if not seconds:
            await self._save(start, end)
            return
        saving = asyncio.get_running_loop().create_task(self._save(start, end))
        done, _ = await asyncio.wait({saving}, timeout=seconds)
        if not done:
            self._late.add(saving)
            saving.add_done_callback(self._came_late)
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        saving.result()

    def _came_late(self, saving: asyncio.Task[None]) -> None:
        self._late.discard(saving)
        if (error := saving.exception()) is not None:
            log.info("node '%s': a copy that was late failed: %s", self.node.name, error)

    async def _save(self, start: int, end: int) -> None:
        """Copy what is dirty in the range, and wait for what others copy there. Raises OSError."""
        moment = self.moment
        while moment.broken is None:
            if moment.next_dirty(start, end, GUEST_STEP) is not None:
                async with self._room:
                    found = moment.next_dirty(start, end, GUEST_STEP)  # others may have taken it meanwhile
                    if found is not None:
                        await self._copy_for_guest(moment.take(*found))
            elif (other := moment.copy_in(start, end)) is not None:
                await other.ended()
            else:
                return

    async def _copy_for_guest(self, held: Held) -> None:
        try:
            await self.copy(held)
        except CopyFailed as failed:
            raise failed.error from failed

    async def copy(self, held: Held) -> None:
        """Copy clusters that the caller has taken from the moment, and give them back to it. Raises CopyFailed."""
        moment = self.moment
        try:
            if self.base is not None and await self._is_below(held):
                moment.dropped(held)
                return
            await self._move(held)
        except BaseException:
            moment.failed(held)
            raise
        moment.copied(held)
        self._tell_copied(held.start, held.length)

    def _tell_copied(self, offset: int, length: int) -> None:
        if self.watcher is not None:
            cluster = self.moment.cluster
            self.watcher.copied(-(-(offset + length) // cluster) * cluster - offset)

    async def _move(self, held: Held) -> None:
        offset, length = held.start, held.length
        if not await self._nothing_to_write(held):
            target = _Ordered(self._target) if self._is_fleecing() else self._target
            how = {"compressed": self.compressed, "offload": self.offloads}
            await copy_range(self._edge, target, offset, length, flags=ZeroFlags.MAY_UNMAP, **how)
        if self.discard_source:
            try:
                await self._edge.node.discard(offset, length)
            except OSError as error:
                log.info("node '%s': what was copied is not discarded: %s", self.node.name, error)

    async def _is_below(self, held: Held) -> bool:
        """Whether no layer above ``base`` holds anything of the range."""
        offset = held.start
        try:
            while offset < held.end:
                depth, length = await allocation_depth(self._edge.node, offset, held.end - offset, self.base)
                if depth:
                    return False
                offset += length
        except OSError:
            return False  # the copy will meet it, too
        return True

    async def _nothing_to_write(self, held: Held) -> bool:
        """Whether both sides read as zeroes, and nothing but the target itself says so for it."""
        node = self._target.node
        while node.filtered is not None:
            node = node.filtered.node
        if node.driver.supports_backing or held.end > node.size:
            return False
        for edge in (self._edge, self._target):
            offset = held.start
            while offset < held.end:
                status = await run_at(edge, offset, held.end - offset)
                if not status.zero:
                    return False
                offset += status.length
        return True

    def _is_fleecing(self) -> bool:
        """Whether the target shows the disk where it has nothing."""
        return self._edge.node in self.node.graph.below(self._target.node)

    async def forget(self, offset: int, length: int) -> None:
        """Nobody will read the clusters that lie whole in the range any more: neither copy nor keep them. Raises OSError."""
        self.moment.drop(offset, length)
        await self._target.node.discard(offset, length)

    # -- permissions -------------------------------------------------------------------------------------------------
    def child_perms(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        if not edge.role & Role.FILTERED:
            # Others may write to the target: the disk may be below it. Its size was looked at once.
            return Perm.WRITE, Perm.ALL & ~Perm.RESIZE
        perm, shared = filter_perms(perm, shared)
        if self.node.parents:
            perm |= Perm.CONSISTENT_READ
            if self.discard_source:
                perm |= Perm.WRITE
            shared &= ~(Perm.WRITE | Perm.RESIZE)
        return perm, shared


class _Ordered(Edge):
    """The target, for copies that must not be overtaken by reads which came before."""

    __slots__ = ()

    def __init__(self, edge: Edge) -> None:
        super().__init__(edge.parent, edge.node, edge.name, edge.role)
        self.perm, self.shared = edge.perm, edge.shared

    async def write(self, offset: int, data: memoryview) -> None:
        await self.node.write_serialising(offset, data)


def cluster_size(target: Node, least: int) -> int:
    """Bytes to be copied as one. Raises BlockError in QEMU's words."""
    if least >= 1 << 63:
        raise BlockError(f"min-cluster-size too large: {least} > {(1 << 63) - 1}")
    if least & (least - 1):
        raise BlockError("min-cluster-size needs to be a power of 2")
    least = max(least, DEFAULT_CLUSTER)
    image = target
    while image.filtered is not None:
        image = image.filtered.node
    own = image.driver.cluster_size()
    if not own and image.backing is None:
        log.warning(
            "The target block device doesn't provide information about the block size and it doesn't have a backing file. "
            "The (default) block size of %d bytes is used. If the actual block size of the target exceeds this value, the "
            "backup may be unusable",
            least,
        )
    return max(least, own)


register(CopyBeforeWrite)

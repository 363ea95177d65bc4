"""A virtio-blk device on a node: requests in, status out, under the run state and the error policy.

Two ways in, over the same requests:

* `VirtioBlk.submit` takes a request as the specification has it (type, sector, buffers) and answers a status byte: for a
  transport, and for tests. It checks alignment, range and features.
* `read`, `write`, ... take bytes and raise `OSError`: for an export of the device (``livedisk.emulator.exports``),
  whose server has checked already. `try_read` and `try_write` are their fast path; while the device is held, or the
  write cache is off, they decline.

Invariants

* While the device is held (`hold`, by the run state) no request is in its backend. Requests wait here, in order; so does
  a request that failed under the policy ``stop``, which is tried again when the device is released. Nothing of a held
  guest fails because it is held, unless its door is closed.
* Every request ends in the statistics once: done, failed or invalid.

Source: virtio 1.2, 5.2; QEMU ``hw/block/virtio-blk.c``, ``hw/block/block.c`` (blkconf_apply_backend_options).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
from msgspec import UNSET

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.flatmap import MISS
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.types import ZeroFlags
from livedisk.emulator.device.accounting import Accounting, FastPath, Kind
from livedisk.emulator.device.events import BlockIoError, IoOperationType
from livedisk.emulator.device.geometry import Geometry, guess
from livedisk.emulator.device.options import DEFAULT_GRANULARITY, DeviceOptions, OnOffAuto, block_sizes
from livedisk.emulator.device.policy import Action, OnError, action_for, settled
from livedisk.emulator.device.runstate import RunState, State
from livedisk.emulator.device.spec import (
    ID_BYTES,
    SECTOR,
    SEGMENT,
    WRITEBACK_OFFSET,
    ConfigSpace,
    Feature,
    RequestType,
    SegmentFlag,
    Status,
)

if TYPE_CHECKING:
    from livedisk.emulator.device.drives import Drive
    from livedisk.emulator.qmp.query_block import BlockInfo

log = logging.getLogger(__name__)

_NOTHING: Final = memoryview(b"")
_UNCLAIMED: Final = (Perm.NONE, Perm.ALL)
"""What a device of a guest that runs elsewhere holds and shares."""
_UNSUPPORTED: Final = (errno.ENOTSUP, errno.EOPNOTSUPP)


class Door(Protocol):
    """Whoever passes a guest's requests in: an export of the device."""

    closed: bool
    """Nobody waits for its requests any more: those that would have to wait fail with ESHUTDOWN instead."""


class VirtioBlk:
    """One emulated disk.

    ``id``: as the user named it, or "". ``path``: its QOM path; ``backend_path``: that of the virtio part, by which
    QEMU names the block device. ``backend``: where its requests enter the graph. ``accounting``: its statistics.
    """

    def __init__(
        self,
        graph: Graph,
        run_state: RunState,
        emit: Callable[[msgspec.Struct], None],
        options: DeviceOptions,
        path: str,
        drive: Drive | None = None,
    ) -> None:
        self.options = options
        self.id = options.id if isinstance(options.id, str) else ""
        self.path = path
        self.backend_path = f"{path}/virtio-backend"
        self.drive = drive
        self.backend = BlockBackend(graph, self.backend_path) if drive is None else drive.backend
        self.backend.rests = lambda: not run_state.running
        self.accounting = Accounting() if drive is None else drive.accounting
        if options.account_invalid is not OnOffAuto.AUTO:
            self.accounting.account_invalid = options.account_invalid is OnOffAuto.ON
        if options.account_failed is not OnOffAuto.AUTO:
            self.accounting.account_failed = options.account_failed is OnOffAuto.ON
        self.logical_block_size, self.physical_block_size = block_sizes(options)
        spec = drive.spec if drive is not None else None
        self.rerror = settled(spec.rerror if spec and options.rerror is OnError.AUTO else options.rerror, read=True)
        self.werror = settled(spec.werror if spec and options.werror is OnError.AUTO else options.werror, read=False)
        auto = spec.write_cache if spec is not None else True
        self.write_cache = auto if options.write_cache is OnOffAuto.AUTO else options.write_cache is OnOffAuto.ON
        self.read_only = False
        self.on_write_cache: list[Callable[[], None]] = []
        """Called when `try_write` is another."""
        self.config_generation = 0
        """Counts changes of the config space that a driver must notice (a resize)."""
        self.geometry = Geometry(options.cyls, options.heads, options.secs)
        self._graph = graph
        self._run_state = run_state
        self._emit = emit
        self._failure: str | None = None
        self._held = False
        self._waiting: dict[asyncio.Future[None], Door | None] = {}
        self._counted_write = self.accounting.counted_write(self.backend.try_write)
        self.try_read: FastPath = self.accounting.counted_read(self.backend.try_read)
        self.try_write: FastPath = _declines
        self._choose_write()
        self.backend.on_resize.append(self._resized)

    # -- life --------------------------------------------------------------------------------------------------------
    async def realize(self, node: Node) -> None:
        """Put the device on ``node`` and let it follow the run state. Raises PermissionConflict, LockError or
        BlockError; then nothing is left behind."""
        self.read_only = node.read_only
        perm, shared = self._permissions()
        if self._run_state.state is State.INMIGRATE:
            # As with QEMU: until the migration is complete the storage is others' to fill.
            perm, shared = _UNCLAIMED
        if self.backend.root is None:
            self._graph.attach_root(self.backend, node, perm, shared)
        else:
            self._graph.set_root_permissions(self.backend, perm, shared)
        if not any(self.geometry):
            self.geometry = guess(self.size, await self._first_sector())
        self._run_state.add(self)

    def _permissions(self) -> tuple[Perm, Perm]:
        perm, shared = Perm.CONSISTENT_READ, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED | Perm.RESIZE
        if not self.read_only:
            perm |= Perm.WRITE
        if self.options.share_rw:
            shared |= Perm.WRITE
        return perm, shared

    def claim(self) -> None:
        """Take the permissions that the device needs to run. Raises PermissionConflict; then nothing changes."""
        self._graph.set_root_permissions(self.backend, *self._permissions())

    def withdraw(self) -> None:
        """Give up all permissions but to look: another process has the guest now. The device is held."""
        self._graph.set_root_permissions(self.backend, *_UNCLAIMED)

    async def unrealize(self) -> None:
        """Let what is in flight end, flush, and take the device off its node. All doors are closed."""
        self.backend.quiesce()
        await self.backend.idle()
        node = self.backend.root.node if self.backend.root is not None else None
        try:
            if node is not None and not node.read_only:
                await node.flush()
        except OSError as error:
            log.warning("device %s: flushing its node failed: %s", self.path, error)
        self._run_state.remove(self)
        self.backend.unquiesce()
        self.backend.set_throttle(None)
        self._graph.throttle_groups.tidy()
        await self._graph.detach_root(self.backend)

    async def move(self, node: Node) -> None:
        """Put the device on another node between two requests; a node that nobody uses any more is closed.

        The guest sees other data, and maybe another size, from one request to the next. Raises BlockError, PermissionConflict
        or LockError; then nothing has changed.
        """
        edge, old, size = self.backend.root, self.backend.node, self.size
        assert edge is not None
        if node is old:
            return
        async with self._graph.drained(old, node):
            self._graph.replace_edge(edge, node)
            if self.size != size:
                for callback in list(self.backend.on_resize):
                    callback()
        await self._graph.release(old)

    @property
    def drive_name(self) -> str:
        """The property ``drive``: the name of the drive, else of the node, that the device is on, or ""."""
        if self.backend.user_name:
            return self.backend.user_name
        return self.backend.node.name if self.backend.root is not None else ""

    async def _first_sector(self) -> bytes:
        sector = bytearray(SECTOR)
        if self.size >= SECTOR:
            try:
                await self.backend.read(0, memoryview(sector))
            except OSError as error:
                log.info("device %s: no geometry from the partition table: %s", self.path, error)
        return bytes(sector)

    def _resized(self) -> None:
        self.config_generation += 1

    @property
    def names(self) -> tuple[str, ...]:
        """What users may call it: its id, its path, the path of its virtio part; absolute, or from where devices with ids are."""
        own = (self.path, self.backend_path)
        return (self.id, *own, f"{self.id}/virtio-backend") if self.id else own

    # -- what a driver sees --------------------------------------------------------------------------------------------
    @property
    def size(self) -> int:
        """Bytes that the guest can address: whole sectors."""
        return self.backend.size // SECTOR * SECTOR

    @property
    def serial(self) -> str:
        """As given; the guest sees its first 20 bytes."""
        return self.options.serial if isinstance(self.options.serial, str) else ""

    @property
    def features(self) -> int:
        """The feature bits offered (5.2.3)."""
        options = self.options
        offered = {
            Feature.SEG_MAX: True,
            Feature.GEOMETRY: True,
            Feature.RO: self.read_only,
            Feature.BLK_SIZE: True,
            Feature.FLUSH: self.write_cache or options.config_wce,
            Feature.TOPOLOGY: True,
            Feature.CONFIG_WCE: options.config_wce,
            Feature.MQ: self.queues > 1,
            Feature.DISCARD: options.discard,
            Feature.WRITE_ZEROES: options.write_zeroes,
            Feature.VERSION_1: True,
        }
        return sum(1 << bit for bit, on in offered.items() if on)

    @property
    def queues(self) -> int:
        """How many virtqueues it has."""
        return 1 if self.options.num_queues == 0xFFFF else self.options.num_queues

    def config(self) -> ConfigSpace:
        """The config space as it stands (5.2.4); QEMU's virtio_blk_update_config."""
        options, block = self.options, self.logical_block_size
        granularity = options.discard_granularity
        if granularity == DEFAULT_GRANULARITY or not options.report_discard_granularity:
            granularity = block
        track = self.geometry.sectors
        if self.size // SECTOR % track:
            # Some drivers reject a track that is no whole number of blocks.
            track &= ~(block // SECTOR - 1)
        return ConfigSpace(
            capacity=self.size // SECTOR,
            size_max=0,
            seg_max=options.queue_size - 2 if options.seg_max_adjust else 126,
            cylinders=self.geometry.cylinders,
            heads=self.geometry.heads,
            sectors=track,
            blk_size=block,
            physical_block_exp=(self.physical_block_size // block).bit_length() - 1,
            alignment_offset=0,
            min_io_size=options.min_io_size // block,
            opt_io_size=options.opt_io_size // block,
            writeback=self.write_cache,
            num_queues=self.queues,
            max_discard_sectors=options.max_discard_sectors if options.discard else 0,
            max_discard_seg=1 if options.discard else 0,
            discard_sector_alignment=granularity // SECTOR if options.discard else 0,
            max_write_zeroes_sectors=options.max_write_zeroes_sectors if options.write_zeroes else 0,
            max_write_zeroes_seg=1 if options.write_zeroes else 0,
            write_zeroes_may_unmap=1 if options.write_zeroes else 0,
        )

    async def write_config(self, offset: int, data: bytes) -> None:
        """A driver writes to the config space: ``writeback`` under CONFIG_WCE, nothing else (5.2.5.2).

        Switching the cache off flushes first. Writes to other fields have no effect, as the specification says of
        fields that are read-only for the driver.
        """
        inside = WRITEBACK_OFFSET - offset
        if not self.options.config_wce or not 0 <= inside < len(data):
            return
        wanted = bool(data[inside])
        if self.write_cache and not wanted:
            await self.flush()
        self.set_write_cache(wanted)

    def set_write_cache(self, on: bool) -> None:
        """Switch the write cache, as a driver did or a migration tells. Nothing is flushed."""
        self.write_cache = on
        self._choose_write()

    def _choose_write(self) -> None:
        """With the write cache off every write must reach stable storage, which cannot be done without blocking."""
        self.try_write = self._counted_write if self.write_cache else _declines
        for callback in list(self.on_write_cache):
            callback()

    # -- the run state's side (runstate.Guest) -------------------------------------------------------------------------
    def hold(self) -> None:
        """Start no request until `release`."""
        self._held = True
        self.backend.quiesce()

    def release(self) -> None:
        """Serve again; what waited goes first, in order. An error that stopped the guest is forgotten."""
        self._held = False
        self._failure = None
        self.backend.unquiesce()
        waiting, self._waiting = self._waiting, {}
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def idle(self) -> None:
        """Wait until no request is in the backend."""
        await self.backend.idle()

    def door_closed(self, door: Door) -> None:
        """Fail, with ESHUTDOWN, every request that waits here and came through ``door``: whoever closes the door must
        not wait for `release`."""
        for future, owner in self._waiting.items():
            if owner is door and not future.done():
                future.set_exception(_shut_down())

    async def enter(self, door: Door | None) -> None:
        """Wait while the device is held. Raises ESHUTDOWN if ``door`` closes. Whatever enters the backend next, without
        awaiting in between, is not held."""
        while self._held:
            if door is not None and door.closed:
                raise _shut_down()
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting[future] = door
            try:
                await future
            finally:
                self._waiting.pop(future, None)

    # -- requests in bytes ---------------------------------------------------------------------------------------------
    async def _serve(self, kind: Kind, length: int, door: Door | None, attempt: Callable[[], Awaitable[None]]) -> None:
        """Run one request to its end under the error policy. Raises the OSError that is to be reported."""
        started = self.accounting.start()
        while True:
            await self.enter(door)
            try:
                await attempt()
            except OSError as error:
                action = self._failed(error, read=kind is Kind.READ)
                if action is Action.REPORT:
                    self.accounting.failed(kind, started)
                    raise
                if action is Action.STOP:
                    continue  # held now: waits above
            self.accounting.done(kind, length, started)
            return

    def _failed(self, error: OSError, *, read: bool) -> Action:
        """Decide what the failure leads to, announce it, and stop the guest where the policy says so."""
        number = error.errno or errno.EIO
        action = action_for(self.rerror if read else self.werror, number)
        root = self.backend.root
        log.info("device %s: %s failed (%s): %s", self.path, "read" if read else "write", action, error)
        if action is Action.STOP:
            if self._failure is None:
                self._failure = "nospace" if number == errno.ENOSPC else "failed"
            self._run_state.stop_soon(State.IO_ERROR)
        self._emit(
            BlockIoError(
                qom_path=self.backend_path,
                device=self.backend.user_name,
                node_name=root.node.name if root is not None else UNSET,
                operation=IoOperationType.READ if read else IoOperationType.WRITE,
                action=action,
                nospace=number == errno.ENOSPC if self._keeps_status else UNSET,
                reason=os.strerror(number),
            )
        )
        return action

    @property
    def _keeps_status(self) -> bool:
        return self.rerror is OnError.STOP or self.werror in (OnError.STOP, OnError.ENOSPC)

    @property
    def io_status(self) -> str | None:
        """query-block's io-status: "ok", "failed" or "nospace"; None where no policy can stop the guest."""
        return (self._failure or "ok") if self._keeps_status else None

    async def block_info(self) -> BlockInfo:
        """This device's element of query-block."""
        # Imported here: a device works without QMP.
        from livedisk.emulator.qmp.query_block import (
            BlockDeviceInfo,
            BlockDeviceIoStatus,
            BlockInfo,
            node_info,
            throttling,
        )

        info: BlockDeviceInfo | msgspec.UnsetType = UNSET
        if self.backend.root is not None:
            info = await node_info(self.backend.node, deep=True, writeback=self.write_cache, skip_implicit=True)
            throttle = self.backend.throttle
            if throttle is not None:
                info = msgspec.structs.replace(info, **throttling(throttle.group))
        status = self.io_status
        return BlockInfo(
            device=self.backend.user_name,
            qdev=self.backend_path,
            type="unknown",
            removable=False,
            locked=False,
            inserted=info,
            io_status=UNSET if status is None else BlockDeviceIoStatus(status),
        )

    async def read(self, offset: int, view: memoryview, door: Door | None = None) -> None:
        """Fill ``view`` from ``offset`` (bytes)."""
        await self._serve(Kind.READ, len(view), door, lambda: self.backend.read(offset, view))

    async def write(self, offset: int, data: memoryview, *, fua: bool = False, door: Door | None = None) -> None:
        """Write ``data`` at ``offset``; with ``fua``, or without write cache, it is on stable storage on return."""
        through = fua or not self.write_cache
        await self._serve(Kind.WRITE, len(data), door, lambda: self.backend.write(offset, data, fua=through))

    async def flush(self, door: Door | None = None) -> None:
        """Put every acknowledged write on stable storage."""
        await self._serve(Kind.FLUSH, 0, door, self.backend.flush)

    async def discard(self, offset: int, length: int, *, fua: bool = False, door: Door | None = None) -> None:
        """Drop a range's storage."""
        await self._serve(Kind.UNMAP, length, door, lambda: self.backend.discard(offset, length, fua=fua))

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        flags: ZeroFlags = ZeroFlags.NONE,
        *,
        fua: bool = False,
        door: Door | None = None,
    ) -> None:
        """Zero a range. Under NO_FALLBACK raises ENOTSUP, which is an answer and no failure, where that is slow."""
        through = fua or not self.write_cache
        refused: list[OSError] = []

        async def attempt() -> None:
            try:
                await self.backend.write_zeroes(offset, length, flags, fua=through)
            except OSError as error:
                if not flags & ZeroFlags.NO_FALLBACK or error.errno not in _UNSUPPORTED:
                    raise
                refused.append(error)

        await self._serve(Kind.WRITE, length, door, attempt)
        if refused:
            raise refused[0]

    # -- requests as the specification has them ------------------------------------------------------------------------
    async def submit(self, kind: int, sector: int, data: memoryview = _NOTHING, into: memoryview = _NOTHING) -> Status:
        """Serve one request: ``kind`` and ``sector`` of its header, the driver's bytes, the room for the device's.

        ``data`` is the payload of OUT, or the segments of DISCARD and WRITE_ZEROES; ``into`` is filled by IN and
        GET_ID. Returns the status byte.
        """
        try:
            if kind == RequestType.IN:
                return await self._in(sector, into)
            if kind == RequestType.OUT:
                return await self._out(sector, data)
            if kind == RequestType.FLUSH:
                await self.flush()
                return Status.OK
            if kind == RequestType.GET_ID:
                serial = self.serial.encode(errors="surrogateescape")[:ID_BYTES].ljust(ID_BYTES, b"\0")
                into[: min(len(into), ID_BYTES)] = serial[: len(into)]
                return Status.OK
            if kind in (RequestType.DISCARD, RequestType.WRITE_ZEROES):
                return await self._segment(RequestType(kind), data)
        except OSError:
            return Status.IOERR
        return Status.UNSUPP

    def _addressable(self, sector: int, length: int) -> bool:
        block = self.logical_block_size
        start = sector * SECTOR
        return not (start % block or length % block) and start + length <= self.size

    async def _in(self, sector: int, into: memoryview) -> Status:
        if not self._addressable(sector, len(into)):
            self.accounting.invalid(Kind.READ)
            return Status.IOERR
        await self.read(sector * SECTOR, into)
        return Status.OK

    async def _out(self, sector: int, data: memoryview) -> Status:
        if self.read_only or not self._addressable(sector, len(data)):
            self.accounting.invalid(Kind.WRITE)
            return Status.IOERR
        await self.write(sector * SECTOR, data)
        return Status.OK

    async def _segment(self, kind: RequestType, data: memoryview) -> Status:
        zeroes = kind is RequestType.WRITE_ZEROES
        counted = Kind.WRITE if zeroes else Kind.UNMAP
        offered = self.options.write_zeroes if zeroes else self.options.discard
        # One segment a request, which is what max_*_seg says.
        if not offered or len(data) != SEGMENT.size:
            self.accounting.invalid(counted)
            return Status.UNSUPP
        sector, count, flags = SEGMENT.unpack(data)
        most = self.options.max_write_zeroes_sectors if zeroes else self.options.max_discard_sectors
        length = count * SECTOR
        if self.read_only or count > most or not self._addressable(sector, length):
            self.accounting.invalid(counted)
            return Status.IOERR
        if flags not in (0, SegmentFlag.UNMAP) or (flags and not zeroes):
            self.accounting.invalid(counted)
            return Status.UNSUPP
        if zeroes:
            await self.write_zeroes(sector * SECTOR, length, ZeroFlags.MAY_UNMAP if flags else ZeroFlags.NONE)
        else:
            await self.discard(sector * SECTOR, length)
        return Status.OK

    def __repr__(self) -> str:
        return f"<VirtioBlk {self.path}>"


def _shut_down() -> OSError:
    return OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN))


def _declines(offset: int, view: memoryview) -> int:
    """A fast path that is closed."""
    return MISS

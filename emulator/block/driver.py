"""What an image format, a protocol or a filter implements, and the registry of all of them.

Drivers say where, not how: the central method is the synchronous `Driver.map`. A driver never sees a request that was
not
checked by its node (range, read-only, in flight, drain). To add one: derive from `Driver`, write its options class,
call
`register` in the module's last line. `emulator/drivers/null.py` is the example to copy.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import msgspec

from livedisk.emulator.block.debug import Event, primary, tell
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.block.permissions import Perm, Role, backing_perms, filter_perms, storage_perms
from livedisk.emulator.block.types import Preallocation, Segment, ZeroFlags
from livedisk.emulator.errors import BlockError

if TYPE_CHECKING:
    from livedisk.emulator.block.creation import BlockdevAmendOptions, BlockdevCreateOptions
    from livedisk.emulator.block.debug import Breakpoints, Debugger
    from livedisk.emulator.block.extents import Extents
    from livedisk.emulator.block.graph import Graph
    from livedisk.emulator.block.node import Edge, Node
    from livedisk.emulator.block.status import BlockStatus


ZERO_GRANULE: Final = -1
"""`Driver.sift`: reads as zeroes."""
SLOW_GRANULE: Final = -2
"""`Driver.sift`: the slow path must ask the node, always."""


class Moment(NamedTuple):
    """When a snapshot is taken: the host's clock, and the guest's (nanoseconds since it started)."""

    seconds: int
    nanoseconds: int
    guest_clock: int = 0


Ended = Callable[[OSError | None, Sequence[tuple[int, int]]], None]
"""Told of the end of what `Driver.start_read` or `start_write` began: its error or None; and which parts of a read are zeroes,
as (start, length) in its view, as far as that is known."""


class Driver(ABC):
    """One node's format, protocol or filter.

    Life: constructed with the node and its typed options (no I/O), then `open` (opens children with
    ``node.graph.open_child``), serves, then `close`. All coroutines run on the event loop; they may run concurrently,
    and a driver
    that needs order between them keeps its own locks. Failures of I/O are `OSError`; refusals are `BlockError`.
    """

    name: ClassVar[str]
    Options: ClassVar[type[BlockdevOptions]]
    is_format: ClassVar[bool] = False
    """Interprets the content of its file child (qcow2, raw)."""
    is_filter: ClassVar[bool] = False
    """Shows its child's content unchanged (throttle, copy-before-write, blkdebug)."""
    named_as_child: ClassVar[bool] = False
    """In queries it goes by its child's file name."""
    supports_backing: ClassVar[bool] = False
    filename_children: ClassVar[tuple[str, ...]] = ()
    """Options that `parse_filename` gives as the file name of a child."""
    image_children: ClassVar[tuple[str, ...]] = ()
    """Of these, the ones whose names are of images rather than of files."""
    aligned_children: ClassVar[Collection[str]] = ()
    """Children, besides the one that shows through, of which what stands at an offset matters for that offset only."""
    protocols: ClassVar[Collection[str]] = ()
    """What stands before the colon of file names that this driver reads itself (`options_of`)."""
    internal: ClassVar[bool] = False
    """Only opened from inside (a job's own filter): users do not find it among the drivers."""
    request_alignment: int = 1
    """Smallest offset and length, in bytes, served without a bounce buffer."""
    copies_in: bool = False
    """Whether `copy_in` is more than reading and writing."""
    map_granularity: int = 0
    """Bytes that are mapped as one (the cluster or sub-cluster size); 0: the mapping is one straight line."""

    def __init__(self, node: Node, options: Any) -> None:
        self.node = node
        self.options = options

    # -- making images ---------------------------------------------------------------------------------------------
    @classmethod
    def create_options(cls) -> type[BlockdevCreateOptions] | None:
        """What blockdev-create takes for this driver; None: it makes no images."""
        return None

    @classmethod
    async def create(cls, graph: Graph, options: Any) -> None:
        """Make an image as `create_options` describe it. Raises BlockError, ParameterError or OSError."""
        raise BlockError("Driver does not support blockdev-create")

    @classmethod
    def amend_options(cls) -> type[BlockdevAmendOptions] | None:
        """What x-blockdev-amend takes for this driver; None: it changes nothing in that way."""
        return None

    async def amend_prepare(self, options: Any) -> None:
        """Refuse, before a job is made, what cannot be amended. Raises BlockError."""
        raise BlockError("Driver does not support x-blockdev-amend")

    async def amend(self, options: Any, *, force: bool) -> None:
        """Change the format's own properties in the image. Raises BlockError or OSError."""
        raise BlockError("Driver does not support x-blockdev-amend")

    # -- tests of errors (`block/debug.py`) --------------------------------------------------------------------------
    @property
    def debugger(self) -> Debugger | None:
        """Whoever is told of the debug events of the format above this node; only blkdebug listens."""
        return None

    def breakpoints(self) -> Breakpoints | None:
        """Who takes breakpoints for a monitor, if it is this node itself."""
        return None

    # -- life ------------------------------------------------------------------------------------------------------
    @abstractmethod
    async def open(self) -> None:
        """Open children and read what must be known. Raises BlockError or OSError; what was opened is closed by the
        node."""

    async def close(self) -> None:
        """Write back what is cached and release everything but the children (the node releases those). Called once."""

    def working(self) -> bool:
        """Whether the driver does something on its children that none of its parents waits for. A drain waits for `settle`."""
        return False

    async def settle(self) -> None:
        """Wait until what `working` told of is over. No request of a parent's is in flight."""

    async def inactivate(self) -> None:
        """Put everything on the children so that another process may open the image (before a migration's
        hand-over)."""
        await self.flush()

    def way_out(self) -> str:
        """What lets requests fail that get no answer, in a sentence for people; "": nothing does."""
        return ""

    @property
    def dispensable(self) -> frozenset[str]:
        """Names of children whose errors never become those of a user of this node."""
        return frozenset()

    def give_up(self) -> bool:
        """Let requests fail that get no answer. False: that is not possible."""
        return False

    def cancel_in_flight(self) -> None:
        """Somebody gives up on what is under way: let fail what waits for others than the storage (a reconnect)."""

    async def activate(self) -> None:
        """Undo `inactivate`: drop cached metadata and read it anew."""

    def measure_again(self) -> None:
        """A node above is activated: others may have changed the size of what is stored here."""

    # -- where -----------------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes that the node shows."""

    def identity(self) -> int:
        """What tells the stored file from a copy of it (its inode); 0 where that is not known."""
        return self.node.filtered.node.driver.identity() if self.node.filtered is not None else 0

    @abstractmethod
    def map(self, offset: int, length: int) -> Segment:
        """Say where the first bytes of ``[offset, offset+length)`` are; the answer's length is in ``1..length``.

        Synchronous and quick. Raises NotMapped where metadata would have to be read: await `load` and ask again.
        """

    async def status(self, offset: int, length: int) -> BlockStatus | None:
        """Block status of the start of a range, where `map` cannot tell (OPAQUE) but the driver can. None: see `map`."""
        return None

    def shows_through(self) -> bool:
        """Whether the bytes are the child's, straight, so that block status is the child's (filters, raw)."""
        return self.is_filter

    def may_have_holes(self) -> bool:
        """Whether what `map` calls DATA may well be a hole of the file below, so that looking pays (qcow2 with
        preallocated metadata). Block status then reports it as data that reads as zeroes."""
        return False

    def data_run(self, offset: int, length: int) -> tuple[bool, int]:
        """Of the start of a range that `map` calls DATA in a host file: whether bytes are stored there (else it is a
        hole and reads as zeroes), and for how many bytes that holds. Only block status asks; may take a system call."""
        return True, length

    async def load(self, offset: int, length: int) -> None:
        """Read the metadata that `map` needs for the start of this range."""

    def sift(self, shift: int, granules: list[int], found: dict[int, int]) -> tuple[list[int], Edge] | None:
        """Many answers of `map` at once, for the flat map: where `map` would cost more than the request that it is for.

        For each granule (of ``1 << shift`` bytes, ascending numbers) that one cluster answers for, put into ``found`` its host
        offset in the edge that is returned, plus 1 where it may be written in place; or `ZERO_GRANULE`; or `SLOW_GRANULE`.
        Return the granules of which this node says nothing (ask its backing file), and that edge. A granule in neither needs
        metadata that is not in memory. None: this image cannot; ask `map` for one after the other.
        """
        return None

    # -- moving bytes; reads of DATA, ZERO and UNALLOCATED segments never come here
    # -------------------------------------
    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from a COMPRESSED or OPAQUE segment that covers it."""
        raise NotImplementedError(f"driver {self.name} maps all its data")

    async def write(self, offset: int, data: memoryview) -> None:
        """Write; on return a later read sees the data. ``data`` is only valid until then."""
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    def write_now(self, offset: int, data: memoryview) -> bool:
        """Write without awaiting, allocating if need be: True; or False, with nothing or a part of it written: `write` does it
        all, and counts it. Optional, for speed; called from the fast path while no request in flight touches the range. Raises
        OSError as `write` does."""
        return False

    async def copy_in(self, offset: int, extents: Extents) -> None:
        """Write bytes that stand in host files, passing them on to where they will stand, so that the kernel moves them. Only
        asked of a driver that says `copies_in`. Raises OSError; SourceUnreadable where they cannot be read."""
        raise NotImplementedError(f"driver {self.name} has no copy_in")

    @property
    def writes_durably(self) -> bool:
        """Whether `write_durably` is there, and cheaper than a write and a flush."""
        return False

    async def write_durably(self, offset: int, data: memoryview) -> None:
        """`write`, and on return it is on stable storage (FUA)."""
        raise NotImplementedError(f"driver {self.name} has no durable writes")

    def start_read(self, offset: int, view: memoryview, ended: Ended) -> bool:
        """Begin `read` without a coroutine, and call ``ended`` when it is over (not from within this call): True; or False, and
        nothing happened: `read` does it. Optional, for speed, for drivers whose requests are waited for and not worked on."""
        return False

    def start_write(self, offset: int, data: memoryview, ended: Ended) -> bool:
        """As `start_read`; ``data`` stays valid until ``ended``."""
        return False

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        """Zero the range. Raises ENOTSUP, having changed nothing, where this driver has no quicker way than writing
        zeroes; the
        node then writes them (unless NO_FALLBACK)."""
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    async def discard(self, offset: int, length: int) -> None:
        """Drop the range's storage; a hint: doing nothing is allowed."""

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        """Write one cluster compressed. ``offset`` is cluster aligned."""
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    async def flush_metadata(self) -> None:
        """Write back cached metadata to the children, without syncing them (QEMU's flush-to-os)."""

    async def flush(self) -> None:
        """Put all acknowledged writes on stable storage: own metadata first, then every child that takes writes."""
        await self.flush_metadata()
        await tell(primary(self.node), Event.FLUSH_TO_DISK)
        for edge in list(self.node.children.values()):
            if edge.may_write:
                await edge.node.flush()

    async def truncate(self, size: int, *, exact: bool, prealloc: Preallocation) -> None:
        """Change the size to ``size`` bytes. New bytes read as zeroes. Without ``exact`` a larger result is fine."""
        raise BlockError("Image format driver does not support resize")

    async def prefetch(self, offset: int, length: int) -> None:
        """Bring a COMPRESSED or OPAQUE range into a cache (NBD_CMD_CACHE), where there is one. Default: nothing is."""

    def highest_written(self) -> int:
        """Largest byte offset, exclusive, that the fast path wrote to below this driver, past the node."""
        return 0

    # -- persistent bitmaps --------------------------------------------------------------------------------------------
    def check_bitmap_storable(self, name: str, granularity: int) -> None:
        """Raise BlockError, in QEMU's words, if the image cannot store one more bitmap of that name and granularity (bytes)."""
        raise BlockError(f"Can't store persistent bitmaps to {self.node.name}: {os.strerror(errno.ENOTSUP)}")

    def bitmaps_changed(self) -> None:
        """A bitmap of the node was made, removed, enabled or disabled. Must not fail and must not await."""

    async def sync_bitmaps(self) -> None:
        """Persistent bitmaps of the node were added, removed or changed by something other than writes: put into the image
        what a crash must not undo. Raises OSError or BlockError."""

    # -- permissions -----------------------------------------------------------------------------------------------
    def child_perms(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """What this node needs from and shares on a child, given what its parents need (``perm``) and share."""
        if edge.role & Role.FILTERED:
            return filter_perms(perm, shared)
        if edge.role & Role.COW:
            return backing_perms(perm, shared)
        return storage_perms(edge.role, perm, shared, writable=not self.node.read_only)

    def prepare_perms(self, perm: Perm, shared: Perm) -> None:
        """The node's cumulative permissions are about to become these: take locks, or raise. Followed by commit or
        abort."""

    def commit_perms(self, perm: Perm, shared: Perm) -> None:
        """Keep what `prepare_perms` prepared; drop what is no longer needed."""

    def abort_perms(self) -> None:
        """Undo `prepare_perms`."""

    # -- reopen (blockdev-reopen) ------------------------------------------------------------------------------------
    async def reopen_prepare(self, options: Any, *, read_only: bool) -> None:
        """Check and prepare a change to ``options`` of the same class (all I/O is drained). ``node.reopening`` has the
        generic settings to come. Raises BlockError naming the option that cannot be changed, and has then undone what
        it did itself. Followed by commit or abort, which set ``self.options`` or leave it."""
        raise BlockError(f"Block format '{self.name}' used by node '{self.node.name}' does not support reopening files")

    def check_unchanged(self, options: Any, *, changeable: Collection[str] = ()) -> None:
        """Raise BlockError, in QEMU's words, if one of the driver's own options but ``changeable`` (Python's names)
        is another one now. Children are not looked at: reopen replaces them."""
        generic = BlockdevOptions.__struct_fields__
        for field in msgspec.structs.fields(type(options)):
            old, new = getattr(self.options, field.name), getattr(options, field.name)
            is_child = field.encode_name in self.node.children or isinstance(new, BlockdevOptions)
            is_child = is_child or field.name in ("file", "backing", "data_file")
            if field.name in generic or field.name in changeable or is_child or old == new:
                continue
            if new is msgspec.UNSET or new == field.default:
                raise BlockError(f"Option '{field.encode_name}' cannot be reset to its default value")
            raise BlockError(f"Cannot change the option '{field.encode_name}'")

    def reopen_commit(self) -> None:
        """Switch to what was prepared."""

    def reopen_abort(self) -> None:
        """Drop what was prepared."""

    # -- words -----------------------------------------------------------------------------------------------------
    @property
    def filename(self) -> str:
        """What QEMU calls the exact filename: a path or URI, or "" where there is none of that form."""
        edge = self.node.children.get("file")
        return edge.node.driver.filename if edge is not None else ""

    def exact_filename(self, children: Mapping[str, str], strong: Collection[str]) -> str | None:
        """The plain name that means this node with its children, from theirs (by edge; "" where they have none) and the names
        of the given options that matter; "": there is none. None: the rule for all drivers decides."""
        return None

    @classmethod
    def parse_filename(cls, rest: str) -> dict[str, str] | None:
        """The options that a file name of the form ``DRIVER:rest`` means; of the children in ``filename_children``, their
        file names. Raises BlockError. None: this driver has no such form."""
        return None

    @classmethod
    def options_of(cls, filename: str) -> BlockdevOptions:
        """The options that a file name with one of ``protocols`` means. Raises BlockError in QEMU's words."""
        raise NotImplementedError(f"driver {cls.name} has no protocols")

    def backing_filename(self) -> str | None:
        """The backing file name as the image's header has it, or None."""
        return None

    def backing_format(self) -> str | None:
        """The backing format as the image's header has it, or None."""
        return None

    async def make_empty(self) -> None:
        """Let go of everything that the image holds itself, so that its backing file shows through. Raises BlockError where the
        format cannot, or OSError."""
        raise BlockError(f"Format driver '{self.name}' cannot empty an image")

    async def change_backing_file(self, filename: str | None, fmt: str | None) -> None:
        """Rewrite the backing file name (and format) in the image's header."""
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def cluster_size(self) -> int:
        """ImageInfo's cluster-size in bytes, or 0. A filter has that of what it shows."""
        edge = self.node.filtered
        return edge.node.driver.cluster_size() if edge is not None else 0

    def vm_state_offset(self) -> int:
        """Where a machine's state would stand in the image, as an offset past the disk (bytes), or 0."""
        edge = self.node.filtered
        return edge.node.driver.vm_state_offset() if edge is not None else 0

    def specific_info(self) -> Mapping[str, Any] | None:
        """ImageInfo's format-specific member: ``{"type": ..., "data": {...}}``."""
        return None

    def dirty_flag(self) -> bool | None:
        """Whether the image says of itself that it was not closed (ImageInfo's dirty-flag); None where there is no
        image."""
        edge = self.node.filtered or self.node.children.get("file")
        return edge.node.driver.dirty_flag() if edge is not None else False

    def snapshots(self) -> Sequence[Mapping[str, Any]]:
        """The image's internal snapshots, each with the members of QEMU's SnapshotInfo."""
        return ()

    def own_bitmaps(self) -> Sequence[tuple[int, int]]:
        """Bitmaps of the driver's own, which queries list after users': granularity and count, bytes."""
        return ()

    @property
    def has_snapshots(self) -> bool:
        """Whether the format keeps internal snapshots."""
        return False

    async def snapshot_create(self, name: str, moment: Moment) -> Mapping[str, Any]:
        """Keep the image as it is now (all requests are drained): the new one of `snapshots`. Raises OSError."""
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    async def snapshot_delete(self, id: str) -> None:
        """Forget the snapshot of that id (all requests are drained). Raises OSError; ENOENT if there is none."""
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    async def snapshot_show(self, id: str) -> None:
        """Read as what the snapshot of that id kept, until the node, which is read-only, is closed. Raises OSError."""
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    async def snapshot_apply(self, id: str) -> None:
        """Make the image what the snapshot of that id kept (all requests are drained). Raises OSError."""
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def specific_stats(self) -> Mapping[str, Any] | None:
        """BlockStats' driver-specific member (``{"driver": ..., ...}``), or None."""
        return None

    async def allocated_size(self) -> int | None:
        """Bytes occupied on the host (ImageInfo's actual-size), or None where unknown."""
        edge = self.node.filtered or self.node.children.get("file")
        return await edge.node.driver.allocated_size() if edge is not None else None


class ChildKeeper(Driver):
    """A driver with any number of children of one kind, named ``children.0`` and so on, that come and go while it is used."""

    @abstractmethod
    def attach(self, child: Node) -> None:
        """One more. Nothing is in flight. Raises BlockError or PermissionConflict."""

    @abstractmethod
    def detach(self, edge: Edge) -> None:
        """One less; the caller releases it. Nothing is in flight. Raises BlockError."""


DRIVERS: dict[str, type[Driver]] = {}
"""Every known driver by name. Filled by `register`; importing ``livedisk.emulator.drivers`` registers the built-in
ones."""


def register(driver: type[Driver]) -> None:
    """Make a driver known; the last line of its module. A name can be taken once."""
    if driver.name in DRIVERS:
        raise ValueError(f"driver {driver.name!r} is registered twice")
    DRIVERS[driver.name] = driver


def driver_class(name: str) -> type[Driver]:
    """The driver of that name. Raises BlockError, naming the known ones, if there is none."""
    try:
        return DRIVERS[name]
    except KeyError:
        known = ", ".join(sorted(DRIVERS))
        raise BlockError(f"Unknown driver '{name}'", hint=f"Known drivers: {known}") from None

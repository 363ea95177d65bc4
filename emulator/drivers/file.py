"""file: a regular file of the host.

`map` answers every range with one straight segment, so what formats above it resolve to is ``(HostFile, offset)`` and
the fast path reads and writes the descriptor itself. Holes are only looked for by block status (`data_run`).

Opening and permissions
* A node that may choose (``auto-read-only``) is open read-only until a parent needs to write; then `prepare_perms`
  opens the same inode again for writing and `commit_perms` puts that descriptor under the old number. ``read-only``
  nodes stay read-only; others are open for writing at once.
* Image locks (`block/imagelock.py`) follow the permissions, but for ``locking=off``.

Flush: one fdatasync serves everyone who waits. A flush that comes while one runs waits for the next, because the running
one may have begun before the writes that it must cover. A failed fdatasync may have dropped dirty pages, so without
O_DIRECT every later flush fails too.

The size is what it was at open, rounded up to whole sectors; our own writes and resizes change it, changes made by
others behind our back are not looked for. Source: QEMU ``block/file-posix.c``; ``qapi/block-core.json``
(BlockdevOptionsFile).

Where we differ: a reopen goes through ``/proc/self/fd``, so a file that was renamed or replaced meanwhile is still the
one that was opened. ``aio`` takes QEMU's values and checks their conditions, but every value does I/O in the one way
described in ``hostfile.py``.

``/dev/fdset/N`` opens no path: it takes a copy of the descriptor of that set that fits (``descriptors.py``), also where the
file is opened again with other flags.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import os
import stat
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final

import msgspec

from livedisk.emulator.block import fallocate, imagelock, pagecache
from livedisk.emulator.block.descriptors import PREFIX, Lease, open_file
from livedisk.emulator.block.driver import Driver, register
from livedisk.emulator.block.extents import Extents, copy_extents
from livedisk.emulator.block.hostfile import HostFile, direct_alignment, in_thread
from livedisk.emulator.block.imagelock import ImageLock
from livedisk.emulator.block.node import ZERO_CHUNK
from livedisk.emulator.block.options import BlockdevOptions, OnOffAuto
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.types import HostOffset, Kind, Preallocation, Segment, ZeroFlags, whole_sectors
from livedisk.emulator.errors import BlockError

if TYPE_CHECKING:
    from livedisk.emulator.block.creation import BlockdevCreateOptions
    from livedisk.emulator.block.graph import Graph
    from livedisk.emulator.block.node import Node

_WRITERS: Final = Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE
NO_RUN: Final = (0, 0)
"""No bytes are known to be stored."""
_UNSUPPORTED: Final = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENODEV, errno.ENOSYS, errno.ENOTTY)
"""A file system or device says in one of these ways that it has no such operation."""


class AioMode(enum.StrEnum):
    """QEMU's BlockdevAioOptions."""

    THREADS = "threads"
    NATIVE = "native"
    IO_URING = "io_uring"


class FileOptions(BlockdevOptions):
    """What `file` and `host_device` take. libvirt looks for the feature before it relies on auto-read-only."""

    __qapi_features__: ClassVar[tuple[str, ...]] = ("dynamic-auto-read-only",)

    filename: str
    """Path."""
    pr_manager: str | msgspec.UnsetType = msgspec.UNSET
    """Persistent reservations: refused, there are no pr-manager objects here."""
    locking: OnOffAuto = OnOffAuto.AUTO
    """Whether to lock the image against other processes; auto: yes."""
    aio: AioMode = AioMode.THREADS
    """Accepted for compatibility. ``native`` requires cache.direct."""
    aio_max_batch: Annotated[int, msgspec.Meta(extra={"qapi": "int"})] = 0
    """Accepted for compatibility: there are no batches to bound."""
    drop_cache: bool = True
    """Drop the host's page cache when the image is taken over after a migration."""
    x_check_cache_dropped: bool = False
    """After a migration, fail if the page cache was not dropped. For tests."""


class FileDriver(Driver):
    """A regular file."""

    name = "file"
    copies_in = True
    Options = FileOptions
    options: FileOptions

    def __init__(self, node: Node, options: Any) -> None:
        super().__init__(node, options)
        self._lock: ImageLock | None = None
        self._lease: Lease | None = None
        self._flags = 0
        self._only_writable = False
        self._size = 0
        self._reopened: _Opened | None = None
        self._switched: _Opened | None = None
        self._sync_error = 0
        self._sync_running: asyncio.Task[None] | None = None
        self._sync_queued: asyncio.Task[None] | None = None
        self._lacks_zero_range = False
        self._lacks_punch_hole = False
        self._discards = {"discard-nb-ok": 0, "discard-nb-failed": 0, "discard-bytes-ok": 0}
        self._lacks_fallocate = False
        self._stored = NO_RUN

    # -- making files ------------------------------------------------------------------------------------------------
    @classmethod
    def create_options(cls) -> type[BlockdevCreateOptions] | None:
        from livedisk.emulator.drivers.file_create import BlockdevCreateOptionsFile

        return BlockdevCreateOptionsFile

    @classmethod
    async def create(cls, graph: Graph, options: Any) -> None:
        from livedisk.emulator.drivers import file_create

        await file_create.create(graph, options)

    # -- life --------------------------------------------------------------------------------------------------------
    async def open(self) -> None:
        path = self.options.filename
        self._check_options()
        fd, lease = self._open_first(path)
        try:
            self._check_type(fd)
            alignment = _alignment(fd, direct=self.node.cache_direct, path=path)
        except BaseException:
            imagelock.give_up(fd, lease)
            raise
        self._lease = lease
        self.host = HostFile(fd, path, alignment=alignment)
        self.request_alignment = alignment
        self._size = whole_sectors(self._measure())
        if self.options.locking is not OnOffAuto.OFF:
            self._lock = ImageLock(path, lease)

    def _open_first(self, path: str) -> tuple[int, Lease | None]:
        self._flags = self._wanted_flags(Perm.NONE, direct=self.node.cache_direct)
        try:
            return _open(path, self._flags)
        except BlockError:
            self._only_writable = path.startswith(PREFIX) and self.node.auto_read_only
            writable = self._wanted_flags(Perm.NONE, direct=self.node.cache_direct)
            if writable == self._flags:
                raise
        # A set with nothing but a descriptor for writing: there is no other way to have the file. QEMU refuses.
        fd, lease = _open(path, writable)
        self._flags = writable
        return fd, lease

    def _check_options(self) -> None:
        if not self.options.filename:
            raise BlockError(f"The '{self.name}' block driver requires a file name")
        if "\0" in self.options.filename:
            raise BlockError("A file name cannot contain a zero byte")
        if self.options.pr_manager is not msgspec.UNSET:
            raise BlockError(f"No persistent reservation manager with id '{self.options.pr_manager}'")
        self._check_aio(direct=self.node.cache_direct)

    def _check_aio(self, *, direct: bool) -> None:
        if self.options.aio is AioMode.NATIVE and not direct:
            raise BlockError("aio=native was specified, but it requires cache.direct=on, which was not specified.")

    def _check_type(self, fd: int) -> None:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise BlockError(f"'{self.name}' driver requires '{self.options.filename}' to be a regular file")

    def _measure(self) -> int:
        """Bytes that the host has."""
        return os.fstat(self.host.fd).st_size

    def identity(self) -> int:
        status = os.fstat(self.host.fd)
        return status.st_ino if stat.S_ISREG(status.st_mode) else 0  # a device's node may be made anew at every start

    async def close(self) -> None:
        """What was written is on stable storage when the file is closed in order, as with QEMU (bdrv_close). Raises
        OSError if it may not be, unless an earlier flush told that; the file is closed in any case."""
        try:
            if not (self.node.read_only or self.node.cache_no_flush or self._sync_error):
                await self.flush()
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EROFS):  # a special file, which has nothing to put there
                raise
        finally:
            imagelock.give_up(self.host.fd, self._lease)
            self.host.fd = -1  # the number may soon be another file's

    async def inactivate(self) -> None:
        """Let another process have the file: everything is on it, and it is not locked."""
        await self.flush()
        if self._lock is not None:
            self._lock.commit(self.host.fd, Perm.NONE, Perm.ALL)

    async def activate(self) -> None:
        """Another process wrote the file: lock it again, forget what this host cached of it, and its size."""
        if self._lock is not None:
            self._lock.prepare(self.host.fd, self.node.perm, self.node.shared)
            self._lock.commit(self.host.fd, self.node.perm, self.node.shared)
        if self.options.drop_cache and not self._flags & os.O_DIRECT:
            fd = self.host.fd
            if self._flags & os.O_RDWR:
                await in_thread(os.fdatasync, fd)
            await in_thread(os.posix_fadvise, fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if self.options.x_check_cache_dropped and await in_thread(pagecache.resident, fd):
                raise BlockError("page cache still in use!")
        self.measure_again()

    def measure_again(self) -> None:
        self._stored = NO_RUN
        self._size = whole_sectors(self._measure())

    # -- where -------------------------------------------------------------------------------------------------------
    @property
    def size(self) -> int:
        return self._size

    @property
    def filename(self) -> str:
        return self.options.filename

    def map(self, offset: int, length: int) -> Segment:
        return Segment(Kind.DATA, length, self.host, HostOffset(offset), True)

    def data_run(self, offset: int, length: int) -> tuple[bool, int]:
        start, end = self._stored
        if start <= offset < end:
            return True, min(length, end - offset)
        fd = self.host.fd
        try:
            data = os.lseek(fd, offset, os.SEEK_DATA)
            if data > offset:
                return False, min(length, data - offset)
            end = whole_sectors(os.lseek(fd, offset, os.SEEK_HOLE))
            # The search for a hole walks over all data before it, page by page on tmpfs: what it found is kept until
            # something may make a hole.
            self._stored = offset, end
            return True, min(length, end - offset)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False, length  # the trailing hole, or past the end of the file
            return True, length  # the file system does not say

    def specific_info(self) -> Mapping[str, Any]:
        return {"type": "file", "data": {}}  # of a host_device too, as in QEMU

    async def allocated_size(self) -> int:
        return os.fstat(self.host.fd).st_blocks * 512

    # -- moving bytes ------------------------------------------------------------------------------------------------
    async def write(self, offset: int, data: memoryview) -> None:
        await self.host.write(offset, data)
        self.grown(offset + len(data))

    async def copy_in(self, offset: int, extents: Extents) -> None:
        await copy_extents(extents, self.host, offset, flushed=not self.node.cache_no_flush)
        self.grown(offset + len(extents))

    def grown(self, end: int) -> None:
        """Something was written up to ``end`` (bytes), maybe straight to the host file."""
        if end > self._size:
            self._size = whole_sectors(end)

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        try:
            await in_thread(self._zero_blocking, offset, length, flags)
        finally:
            self._stored = NO_RUN
        self.host.highest = max(self.host.highest, offset + length)
        self.grown(offset + length)

    def _zero_blocking(self, offset: int, length: int, flags: ZeroFlags) -> None:
        fd = self.host.fd
        if flags & ZeroFlags.MAY_UNMAP and self._try_punch(offset, length):
            if offset + length > os.fstat(fd).st_size:
                # Not ftruncate: the file may have grown meanwhile, and would be cut.
                fallocate.fallocate(fd, 0, offset + length - 1, 1)
            return
        if not self._lacks_zero_range:
            try:
                fallocate.zero_range(fd, offset, length)
                return
            except OSError as error:
                self._lacks_zero_range = error.errno in _UNSUPPORTED
                # EINVAL: some file systems do not like this range; others may.
                if not self._lacks_zero_range and error.errno != errno.EINVAL:
                    raise
        if not self._lacks_fallocate and (self._try_punch(offset, length) or offset >= os.fstat(fd).st_size):
            try:
                fallocate.fallocate(fd, 0, offset, length)
                return
            except OSError as error:
                self._lacks_fallocate = error.errno in _UNSUPPORTED
                if not self._lacks_fallocate:
                    raise
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def _try_punch(self, offset: int, length: int) -> bool:
        """Make a hole; False where this file cannot have one there."""
        if self._lacks_punch_hole:
            return False
        try:
            fallocate.punch_hole(self.host.fd, offset, length)
        except OSError as error:
            self._lacks_punch_hole = error.errno in _UNSUPPORTED
            if self._lacks_punch_hole or error.errno in (errno.EINVAL, errno.EPERM):
                return False
            raise
        return True

    async def discard(self, offset: int, length: int) -> None:
        done = False
        try:
            done = await in_thread(self._try_punch, offset, length)
        finally:
            self._stored = NO_RUN
            self._count_discard(length, done=done)

    def _count_discard(self, length: int, *, done: bool) -> None:
        counts = self._discards
        counts["discard-nb-ok" if done else "discard-nb-failed"] += 1
        counts["discard-bytes-ok"] += length if done else 0

    def specific_stats(self) -> Mapping[str, Any]:
        return {"driver": self.name, **self._discards}

    def highest_written(self) -> int:
        return self.host.highest

    # -- flush -------------------------------------------------------------------------------------------------------
    async def flush(self) -> None:
        if self._sync_queued is None:
            self._sync_queued = asyncio.get_running_loop().create_task(self._sync(self._sync_running))
        await asyncio.shield(self._sync_queued)

    async def _sync(self, previous: asyncio.Task[None] | None) -> None:
        if previous is not None and not previous.done():
            await asyncio.wait([previous])
        # Who comes from here on wrote after this one began, and needs another.
        self._sync_running, self._sync_queued = self._sync_queued, None
        if self._sync_error:
            raise OSError(self._sync_error, os.strerror(self._sync_error), self.host.path)
        try:
            await in_thread(os.fdatasync, self.host.fd)
        except OSError as error:
            if not self._flags & os.O_DIRECT:
                self._sync_error = error.errno or errno.EIO
            raise

    # -- size --------------------------------------------------------------------------------------------------------
    async def truncate(self, size: int, *, exact: bool, prealloc: Preallocation) -> None:
        try:
            await in_thread(self._truncate_blocking, size, prealloc)
        finally:
            self._stored = NO_RUN
        self._size = whole_sectors(size)

    def _truncate_blocking(self, size: int, prealloc: Preallocation) -> None:
        fd = self.host.fd
        old = os.fstat(fd).st_size
        if prealloc is Preallocation.METADATA:
            raise BlockError(f"Unsupported preallocation mode: {prealloc}")
        if old > size and prealloc is not Preallocation.OFF:
            raise BlockError("Cannot use preallocation for shrinking files")
        doing = "Could not resize file"
        try:
            if prealloc is Preallocation.FALLOC:
                doing = "Could not preallocate new data"
                if size > old:
                    os.posix_fallocate(fd, old, size - old)
                return
            os.ftruncate(fd, size)
            if prealloc is Preallocation.FULL:
                doing = "Could not write zeros for preallocation"
                for start in range(old, size, len(ZERO_CHUNK)):
                    step = min(len(ZERO_CHUNK), size - start)
                    self.host.write_blocking(start, memoryview(ZERO_CHUNK)[:step])
                doing = "Could not flush file to disk"
                os.fsync(fd)
        except OSError as error:
            os.ftruncate(fd, old)
            raise BlockError(f"{doing}: {os.strerror(error.errno or 0)}") from error

    # -- permissions and reopening -----------------------------------------------------------------------------------
    def _wanted_flags(self, perm: Perm, *, direct: bool) -> int:
        """The flags that the file must be open with."""
        node = self.node
        settings = node.reopening or node
        may_wait = settings.auto_read_only and not self._only_writable
        writable = not settings.read_only and (bool(perm & _WRITERS) or not may_wait)
        return (os.O_RDWR if writable else os.O_RDONLY) | (os.O_DIRECT if direct else 0)

    def _open_again(self, flags: int) -> _Opened:
        """The same inode with other flags."""
        path = self.options.filename
        if not path.startswith(PREFIX):
            path = f"/proc/self/fd/{self.host.fd}"
        fd, lease = _open(path, flags, shown=self.host.path)
        try:
            alignment = _alignment(fd, direct=bool(flags & os.O_DIRECT), path=self.host.path)
            if self._lock is not None:
                self._lock.copy_to(fd, lease)
        except BaseException:
            imagelock.give_up(fd, lease)
            raise
        return _Opened(fd, flags, alignment, lease)

    def _adopt(self, opened: _Opened) -> None:
        if self._lock is not None:
            self._lock.copy_to(opened.fd, opened.lease)  # those taken since it was opened
            self._lock.move(opened.lease)
        if self._lease is not None:
            # The description lives on in its set: closing this copy would not unlock it.
            imagelock.give_up(os.dup(self.host.fd), self._lease)
        self._lease = opened.lease
        self.host.switch(opened.fd, alignment=opened.alignment)
        self.request_alignment = opened.alignment
        self._flags = opened.flags

    def prepare_perms(self, perm: Perm, shared: Perm) -> None:
        if self._switched is not None:
            # Permissions are prepared twice in one transaction: the locks of what the first opened would be in the way.
            self._switched.close()
            self._switched = None
        if self._lock is not None and self.node.active:
            self._lock.prepare(self.host.fd, perm, shared)
        try:
            flags = self._wanted_flags(perm, direct=self.node.cache_direct)
            before = self._switched or self._reopened
            if flags != (before.flags if before else self._flags):
                self._switched = self._open_again(flags)
        except BaseException:
            self.abort_perms()
            raise

    def commit_perms(self, perm: Perm, shared: Perm) -> None:
        if self._switched is not None:
            switched, self._switched = self._switched, None
            self._adopt(switched)
        if self._lock is not None and self.node.active:
            self._lock.commit(self.host.fd, perm, shared)

    def abort_perms(self) -> None:
        if self._switched is not None:
            self._switched.close()
            self._switched = None
        if self._lock is not None:
            self._lock.abort(self.host.fd)

    async def reopen_prepare(self, options: Any, *, read_only: bool) -> None:
        self.check_unchanged(options, changeable=("drop_cache", "x_check_cache_dropped"))
        direct = self.node.reopening.cache_direct if self.node.reopening else self.node.cache_direct
        self._check_aio(direct=direct)
        flags = self._wanted_flags(self.node.perm, direct=direct)
        if flags != self._flags:
            self._reopened = self._open_again(flags)
        self._new_options: FileOptions = options

    def reopen_commit(self) -> None:
        self.options = self._new_options
        if self._reopened is not None:
            reopened, self._reopened = self._reopened, None
            self._adopt(reopened)

    def reopen_abort(self) -> None:
        if self._reopened is not None:
            self._reopened.close()
            self._reopened = None


class _Opened(msgspec.Struct, frozen=True):
    """A descriptor that may take the place of the present one."""

    fd: int
    flags: int
    alignment: int
    lease: Lease | None

    def close(self) -> None:
        """It does not take it."""
        imagelock.give_up(self.fd, self.lease)


def _open(path: str, flags: int, *, shown: str = "") -> tuple[int, Lease | None]:
    """open(2) with QEMU's messages; ``shown`` is the name that they give where it is not ``path``."""
    shown = shown or path
    try:
        return open_file(path, flags)
    except OSError as error:
        if error.errno == errno.EINVAL and flags & os.O_DIRECT:
            raise BlockError(f"Could not open '{shown}': filesystem does not support O_DIRECT") from error
        raise BlockError(f"Could not open '{shown}': {os.strerror(error.errno or 0)}") from error


def _alignment(fd: int, *, direct: bool, path: str) -> int:
    if not direct:
        return 1
    try:
        return direct_alignment(fd)
    except OSError as error:
        hint = f"file system may not support O_DIRECT: try cache.direct=off for '{path}'"
        raise BlockError(str(error.strerror), hint=hint) from error


register(FileDriver)

"""An open host file: inline I/O where it cannot block, threads where it can.

Buffered reads first try ``preadv(..., RWF_NOWAIT)``: a page that is in the cache is copied at once, a cold one answers
EAGAIN (an ordinary answer: the page cache can be reclaimed at any moment) and goes to a thread. tmpfs answers
EOPNOTSUPP to the flag; there nothing can be cold, so it is read without. Buffered writes go to the page cache inline.
With O_DIRECT everything blocks and goes to threads, through aligned bounce buffers where offset, length or address are
not aligned. fsync, fallocate and copy_file_range always run in a thread.

The number of the descriptor never changes while the file is open: `HostFile.switch` puts another open file description
under the same number (dup2 does that atomically), so that whoever holds the number, a thread in the middle of a pread or
a flat map, goes on with a valid one and never with somebody else's file.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_pool: ThreadPoolExecutor | None = None
THREADS: Final = 16
"""Blocking calls under way at once, for the whole process."""

_INLINE_LIMIT: Final = 1 << 20
"""Bytes copied inline at most in one slow-path call; larger ones go to a thread so that the loop keeps its latency."""

_BOUNCE: Final = 1 << 20
"""Bytes of an aligned bounce buffer: larger requests go through it piece by piece."""

_ALIGNMENTS: Final = (512, 1024, 2048, 4096)
"""What O_DIRECT may ask for, smallest first."""


async def in_thread(call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a blocking call in the I/O threads; see `run_in`."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(THREADS, thread_name_prefix="livedisk-io")
    return await run_in(_pool, call, *args, **kwargs)


async def run_in(pool: ThreadPoolExecutor, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a blocking call in a thread of ``pool``.

    A cancelled waiter still waits for the call's end before it raises CancelledError: the call works on the caller's
    buffer and descriptor, and both must outlive it.
    """
    future = asyncio.get_running_loop().run_in_executor(pool, lambda: call(*args, **kwargs))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError:
                continue  # asked again: the answer is the same
        raise


class HostFile:
    """A descriptor with the facts the data path needs.

    ``fd``: the descriptor; its number never changes. ``alignment``: smallest offset, length and address in bytes that
    the descriptor takes (1 when buffered). ``inline_flags``: the flags with which ``preadv`` does not block, or None
    where every read may. ``inline_writes``: whether ``pwrite`` only copies to a cache. ``highest``: largest offset
    written to, exclusive, bytes. ``turn``: held by the thread that copies into the file (`extents.py`).
    """

    __slots__ = ("alignment", "fd", "highest", "inline_flags", "inline_writes", "path", "turn")

    def __init__(self, fd: int, path: str, *, alignment: int = 1) -> None:
        self.fd = fd
        self.path = path
        self.highest = 0
        self.turn = threading.Lock()
        self._describe(alignment)

    def _describe(self, alignment: int) -> None:
        self.alignment = alignment
        self.inline_writes = alignment == 1
        self.inline_flags: int | None = nowait_flags(self.fd) if alignment == 1 else None

    def switch(self, fd: int, *, alignment: int) -> None:
        """Go on with the open file description of ``fd``, which is closed. A change of ``alignment`` asks that no
        request is in flight."""
        os.dup2(fd, self.fd, inheritable=False)
        os.close(fd)
        self._describe(alignment)

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset`` (bytes); what lies past the end of the file reads as zeroes."""
        if self.inline_flags is not None and len(view) <= _INLINE_LIMIT:
            try:
                if os.preadv(self.fd, (view,), offset, self.inline_flags) == len(view):
                    return
            except BlockingIOError:
                pass  # cold: an ordinary answer
        await in_thread(self.read_blocking, offset, view)

    def read_blocking(self, offset: int, view: memoryview) -> None:
        """`read`, in the calling thread."""
        if self.alignment == 1 or self._is_aligned(offset, view):
            self._fill(offset, view)
            return
        end = offset + len(view)
        with _bounce_buffer(self.alignment, offset, end) as bounce, memoryview(bounce) as whole:
            position = offset
            while position < end:
                start = position // self.alignment * self.alignment
                stop = min(-(-end // self.alignment) * self.alignment, start + len(whole))
                with whole[: stop - start] as aligned:
                    self._fill(start, aligned)
                    last = min(stop, end)
                    view[position - offset : last - offset] = aligned[position - start : last - start]
                position = last

    def _fill(self, offset: int, view: memoryview) -> None:
        position = 0
        while position < len(view):
            done = os.preadv(self.fd, (view[position:],), offset + position)
            position += done
            if done <= 0 or (self.alignment > 1 and done % self.alignment):  # the end of the file
                view[position:] = bytes(len(view) - position)
                return

    async def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` at ``offset`` (bytes)."""
        if self.inline_writes and len(data) <= _INLINE_LIMIT:
            self.write_blocking(offset, data)
        else:
            await in_thread(self.write_blocking, offset, data)

    def write_blocking(self, offset: int, data: memoryview) -> None:
        """`write`, in the calling thread. Unaligned O_DIRECT writes read the surrounding blocks first; the node keeps
        others off them (`Node.write`)."""
        if self.alignment == 1 or self._is_aligned(offset, data):
            self._drain(offset, data)
        else:
            self._write_bounced(offset, data)
        self.highest = max(self.highest, offset + len(data))

    def _write_bounced(self, offset: int, data: memoryview) -> None:
        end, position = offset + len(data), offset
        with _bounce_buffer(self.alignment, offset, end) as bounce, memoryview(bounce) as whole:
            while position < end:
                start = position // self.alignment * self.alignment
                stop = min(-(-end // self.alignment) * self.alignment, start + len(whole))
                last = min(stop, end)
                with whole[: stop - start] as aligned:
                    self._read_edges(start, stop, position, last, aligned)
                    aligned[position - start : last - start] = data[position - offset : last - offset]
                    self._drain(start, aligned)
                position = last

    def _read_edges(self, start: int, stop: int, first: int, last: int, aligned: memoryview) -> None:
        """Read the blocks that a write of [first, last) only covers in part."""
        step = self.alignment
        if first > start:
            self._fill(start, aligned[:step])
        if last < stop and (stop - start > step or first == start):
            self._fill(stop - step, aligned[-step:])

    def _drain(self, offset: int, data: memoryview) -> None:
        position = 0
        while position < len(data):
            done = os.pwrite(self.fd, data[position:], offset + position)
            if done == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)
            position += done

    async def prefetch(self, offset: int, length: int) -> None:
        """Ask the host to bring the range into its page cache; with O_DIRECT there is none."""
        if self.alignment == 1:
            await in_thread(os.posix_fadvise, self.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def _is_aligned(self, offset: int, view: memoryview) -> bool:
        # The address of a view cannot be asked for cheaply; a buffer that is not page aligned is bounced.
        return (
            (offset | len(view)) % self.alignment == 0
            and isinstance(view.obj, mmap.mmap)
            and view.nbytes == len(view.obj)
        )


def _bounce_buffer(alignment: int, offset: int, end: int) -> mmap.mmap:
    """An anonymous map, and so page aligned, that holds the blocks of the range or `_BOUNCE` bytes."""
    blocks = -(-end // alignment) - offset // alignment
    return mmap.mmap(-1, min(blocks * alignment, _BOUNCE))


def nowait_flags(fd: int) -> int | None:
    """The preadv flags that never block on this descriptor, or None where there are none."""
    probe = bytearray(1)
    try:
        os.preadv(fd, (probe,), 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return os.RWF_NOWAIT
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP and _is_tmpfs(fd):
            return 0
        return None
    return os.RWF_NOWAIT


def direct_alignment(fd: int) -> int:
    """What offsets and lengths must be multiples of on an O_DIRECT descriptor, in bytes: found by trying.

    Raises OSError(EINVAL) where nothing works. A file system that takes even one byte (NFS) or has no data to refuse is
    given pages. Source: QEMU ``block/file-posix.c`` (raw_probe_alignment).
    """
    with mmap.mmap(-1, _ALIGNMENTS[-1]) as page, memoryview(page) as view:
        for size in (1, *_ALIGNMENTS):
            try:
                with view[:size] as part:
                    os.preadv(fd, (part,), 0)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    continue
            return size if size > 1 else _ALIGNMENTS[-1]
    raise OSError(errno.EINVAL, "Could not find working O_DIRECT alignment")


def _is_tmpfs(fd: int) -> bool:
    """Whether the file lives in memory: then a plain read never waits for a disk."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            fields, _, kind = line.partition(" - ")
            if fields.split()[2] == wanted:
                return kind.split()[0] == "tmpfs"
    return False

"""An open host file: inline I/O where it cannot block, threads where it can.

Buffered reads first try ``preadv(..., RWF_NOWAIT)``: a page that is in the cache is copied at once, a cold one
answers EAGAIN (an ordinary
answer: the page cache can be reclaimed at any moment) and goes to a thread. tmpfs answers EOPNOTSUPP to the flag;
there nothing can be
cold, so it is read without. Buffered writes go to the page cache inline. With O_DIRECT everything blocks and goes to
threads, through aligned
bounce buffers. fsync, fallocate and copy_file_range always run in a thread.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_pool: ThreadPoolExecutor | None = None
THREADS = 16
"""Blocking calls under way at once, for the whole process."""

_INLINE_LIMIT = 1 << 20
"""Bytes copied inline at most in one slow-path call; larger ones go to a thread so that the loop keeps its latency."""


async def in_thread(call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a blocking call in the I/O threads. A cancelled waiter leaves the call to finish."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(THREADS, thread_name_prefix="livedisk-io")
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_pool, lambda: call(*args, **kwargs))


class HostFile:
    """A descriptor with the facts the data path needs.

    ``fd``: the descriptor (a reopen changes it). ``alignment``: smallest offset, length and address in bytes that the
    descriptor takes (1 when
    buffered). ``inline_flags``: the flags with which ``preadv`` does not block, or None where every read may.
    ``inline_writes``: whether
    ``pwrite`` only copies to a cache. ``highest``: largest offset written to, exclusive, bytes.
    """

    __slots__ = ("alignment", "fd", "highest", "inline_flags", "inline_writes", "path")

    def __init__(self, fd: int, path: str, *, alignment: int = 1) -> None:
        self.fd = fd
        self.path = path
        self.highest = 0
        self.alignment = alignment
        self.inline_writes = alignment == 1
        self.inline_flags: int | None = nowait_flags(fd) if alignment == 1 else None

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
        if self.alignment > 1:
            start, end = self._aligned(offset, len(view))
            with mmap.mmap(-1, end - start) as bounce, memoryview(bounce) as aligned:  # anonymous maps are page aligned
                self._fill(start, aligned)
                view[:] = aligned[offset - start : offset - start + len(view)]
        else:
            self._fill(offset, view)

    def _fill(self, offset: int, view: memoryview) -> None:
        position = 0
        while position < len(view):
            done = os.preadv(self.fd, (view[position:],), offset + position)
            if done <= 0:
                view[position:] = bytes(len(view) - position)
                return
            position += done

    async def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` at ``offset`` (bytes)."""
        if self.inline_writes and len(data) <= _INLINE_LIMIT:
            self.write_blocking(offset, data)
        else:
            await in_thread(self.write_blocking, offset, data)

    def write_blocking(self, offset: int, data: memoryview) -> None:
        """`write`, in the calling thread. Unaligned O_DIRECT writes read the surrounding blocks first; the caller
        keeps others off them."""
        end = offset + len(data)
        if self.alignment > 1:
            start, stop = self._aligned(offset, len(data))
            with mmap.mmap(-1, stop - start) as bounce, memoryview(bounce) as aligned:
                if start != offset or stop != end:
                    self._fill(start, aligned)
                aligned[offset - start : end - start] = data
                self._drain(start, aligned)
        else:
            self._drain(offset, data)
        self.highest = max(self.highest, end)

    def _drain(self, offset: int, data: memoryview) -> None:
        position = 0
        while position < len(data):
            done = os.pwrite(self.fd, data[position:], offset + position)
            if done == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)
            position += done

    def _aligned(self, offset: int, length: int) -> tuple[int, int]:
        return offset // self.alignment * self.alignment, -(-(offset + length) // self.alignment) * self.alignment


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

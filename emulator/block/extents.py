"""Bytes that stand in host files, and moving them to another host file within the kernel.

`Extents` say where bytes are without holding them; a driver that `copies_in` passes them on to where they will stand, and
`copy_extents` moves them: by copy_file_range, which is a reflink where the file system has it and elsewhere copies from page
cache to page cache, else through a bounce buffer (O_DIRECT, other file systems, devices). Everything happens in threads.

Copies into one file take turns: a file system locks the inode for a write, and a second thread would only spin on that lock
(measured on ext4: twice the processor time for the same bytes). The threads themselves wait for their turn, in a pool of their
own, so that one copy follows the other without the event loop, which may be busy with a guest for milliseconds at a time.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final

from livedisk.emulator.block.fallocate import start_writeback
from livedisk.emulator.block.hostfile import HostFile, in_thread, run_in

COPY_BUFFER: Final = 2 << 20
"""Bytes of a buffer that `copy_buffer` lends."""
_SAMPLE: Final = 4096
"""Bytes looked at first for zeroes."""
_SPARE: Final = 8
"""Buffers kept for the next copy: 16 MiB at most, and only if they were used."""
_POPULATE_READ: Final = 22
"""MADV_POPULATE_READ: read the pages in, and wait for them (Linux 5.14; before, EINVAL)."""
_PART: Final = 4 << 20
"""Bytes asked of the kernel at once."""

_spare: list[mmap.mmap] = []
_copiers: Final = ThreadPoolExecutor(4, thread_name_prefix="livedisk-copy")
"""One copies, others wait for their turn, or for the disk to take what was copied."""


@contextmanager
def copy_buffer() -> Iterator[mmap.mmap]:
    """`COPY_BUFFER` bytes with any content, page aligned. Reused, because to get and clear fresh memory costs as much as to copy.
    Nobody may use a view of it any more; the traceback of a request that failed may still hold one."""
    buffer = _spare.pop() if _spare else mmap.mmap(-1, COPY_BUFFER)
    try:
        yield buffer
    finally:
        if len(_spare) < _SPARE:
            _spare.append(buffer)
        # Else it goes with its last view: `close` raises where there is one.


class SourceUnreadable(OSError):
    """What `Extents` stand in could not be read: the source of a copy failed, not its target."""


class Extents:
    """Bytes that stand in host files, piece after piece: ``parts`` are (file, host offset, bytes), with file None for zeroes.

    Sliced as a memoryview is. Who made them sees to it that the bytes stay there while they are used (`pins.py`).
    """

    __slots__ = ("_length", "parts")

    def __init__(self, parts: Sequence[tuple[HostFile | None, int, int]]) -> None:
        self.parts = parts
        self._length = sum(length for _, _, length in parts)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, wanted: slice) -> Extents:
        start, stop, _ = wanted.indices(self._length)
        if start == 0 and stop == self._length:
            return self
        found, position = [], 0
        for file, at, length in self.parts:
            low, high = max(start - position, 0), min(stop - position, length)
            if low < high:
                found.append((file, at + low if file is not None else 0, high - low))
            position += length
        return Extents(found)

    async def read(self, view: memoryview) -> None:
        """Fill ``view``, which is as long. Raises SourceUnreadable."""
        await in_thread(self._read, view)

    def _read(self, view: memoryview) -> None:
        position = 0
        for file, at, length in self.parts:
            with view[position : position + length] as part:
                if file is None:
                    part[:] = bytes(length)
                else:
                    _read_source(file, at, part)
            position += length

    async def may_be_zero(self) -> bool:
        """Whether it takes a closer look to know that no `COPY_BUFFER` of them is zero. Raises SourceUnreadable."""
        for start in range(0, len(self), COPY_BUFFER):
            with memoryview(bytearray(min(_SAMPLE, len(self) - start))) as sample:
                await self[start : start + len(sample)].read(sample)
                if not any(sample):
                    return True
        return False

    async def warm(self) -> bool:
        """Have them in the page cache, so that a system call that takes them from there does not wait for a disk; False where
        that cannot be, or a disk fails to read them."""
        return all(file is None or file.alignment == 1 for file, _, _ in self.parts) and await in_thread(self._warm)

    def _warm(self) -> bool:
        try:
            for file, at, length in self.parts:
                if file is not None:
                    os.posix_fadvise(file.fd, at, length, os.POSIX_FADV_WILLNEED)
            for file, at, length in self.parts:
                if file is not None:
                    start = at // mmap.PAGESIZE * mmap.PAGESIZE
                    with mmap.mmap(
                        file.fd, at + length - start, mmap.MAP_SHARED, mmap.PROT_READ, offset=start
                    ) as pages:
                        pages.madvise(_POPULATE_READ)
        except (OSError, ValueError):  # ValueError: past the end of the file
            return False
        return True


async def write_through_memory(
    extents: Extents, offset: int, write: Callable[[int, memoryview], Awaitable[None]]
) -> None:
    """Read ``extents`` and ``write(offset, data)`` them, a buffer at a time: where the kernel cannot move them. Raises
    SourceUnreadable, or what ``write`` raises."""
    with copy_buffer() as buffer:
        for start in range(0, len(extents), len(buffer)):
            with memoryview(buffer) as whole, whole[: len(extents) - start] as part:
                await extents[start : start + len(part)].read(part)
                await write(offset + start, part)


async def copy_extents(extents: Extents, target: HostFile, offset: int, *, flushed: bool) -> None:
    """Write ``extents`` into ``target`` at ``offset`` (bytes). ``flushed``: somebody will flush the target, so that the disk may
    begin with it while the next extents are copied. Raises OSError; SourceUnreadable where they cannot be read."""
    await run_in(_copiers, _copy_in_turn, extents, target, offset, flushed)


def begin_writeback(target: HostFile) -> asyncio.Future[None]:
    """Let the disk begin with all that the page cache holds of ``target``, which somebody will flush."""
    return asyncio.get_running_loop().run_in_executor(_copiers, start_writeback, target.fd, 0, 0)


def _copy_in_turn(extents: Extents, target: HostFile, offset: int, flushed: bool) -> None:
    with target.turn:
        _copy(extents, target, offset)
    if flushed and target.alignment == 1:
        start_writeback(target.fd, offset, len(extents))


def _copy(extents: Extents, target: HostFile, offset: int) -> None:
    for file, start, length in extents.parts:
        done = _offload(file, start, target, offset, length) if file is not None else 0
        if done < length:
            _copy_through_memory(file, start + done, target, offset + done, length - done)
        offset += length
    target.highest = max(target.highest, offset)


def _offload(file: HostFile, start: int, target: HostFile, offset: int, length: int) -> int:
    """Let the kernel copy; gives how many bytes it did. Whatever it refuses or fails at is to be tried again byte by byte, which
    tells which side failed."""
    done = 0
    if file.alignment > 1 or target.alignment > 1:
        return done
    try:
        while done < length:
            copied = os.copy_file_range(file.fd, target.fd, min(_PART, length - done), start + done, offset + done)
            if not copied:  # the end of the source: the rest reads as zeroes
                break
            done += copied
    except OSError:
        pass
    return done


def _copy_through_memory(file: HostFile | None, start: int, target: HostFile, offset: int, length: int) -> None:
    with copy_buffer() as buffer:
        if file is None:
            buffer[:] = bytes(len(buffer))
        for at in range(0, length, len(buffer)):
            with memoryview(buffer) as whole, whole[: length - at] as part:
                if file is not None:
                    _read_source(file, start + at, part)
                target.write_blocking(offset + at, part)


def _read_source(file: HostFile, offset: int, view: memoryview) -> None:
    try:
        file.read_blocking(offset, view)
    except OSError as error:
        raise SourceUnreadable(error.errno, error.strerror, file.path) from error

"""A file as the block layer's format code sees a node: asynchronous reads, writes, zeroes, truncation.

For tests of a format without a graph around it. ``events`` lists every write as ``(offset, bytes)`` and every flush as
None, so that a test may replay any prefix of them: a power cut.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class PlainFile:
    """An open file of the host. Bytes past its end read as zeroes."""

    def __init__(self, path: Path, *, record: bool = False) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.record = record
        self.events: list[tuple[int, bytes] | None] = []
        self.reads: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size

    async def read(self, offset: int, view: memoryview) -> None:
        self.reads.append((offset, len(view)))
        raw = os.pread(self.fd, len(view), offset)
        view[: len(raw)] = raw
        view[len(raw) :] = bytes(len(view) - len(raw))

    async def write(self, offset: int, data: memoryview) -> None:
        if self.record:
            self.events.append((offset, bytes(data)))
        done = 0
        while done < len(data):
            done += os.pwrite(self.fd, data[done:], offset + done)

    async def write_zeroes(self, offset: int, length: int, flags: Any = None) -> None:
        step = 1 << 20
        for start in range(offset, offset + length, step):
            await self.write(start, memoryview(bytes(min(step, offset + length - start))))

    async def flush(self) -> None:
        if self.record:
            self.events.append(None)

    async def truncate(self, size: int, *, exact: bool = True, prealloc: Any = "off") -> None:
        old = self.size
        os.ftruncate(self.fd, size)
        if str(prealloc) != "off" and size > old:
            os.posix_fallocate(self.fd, old, size - old)

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> PlainFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

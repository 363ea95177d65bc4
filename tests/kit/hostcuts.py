"""Power cuts below this process's own system calls: what the host's disk may hold, whoever wrote it and how.

`CrashDisk` stands below a node; what a driver writes straight to a descriptor (the flat map, qcow2's inline allocating write, the
kernel's copies from file to file) passes it by. `HostDisk` listens where all of it passes: pwrite, copy_file_range, fallocate,
ftruncate, fdatasync. Each file of its folder is a `Platter`, whose unflushed sectors a cut keeps or drops by seed.

What a call in a thread did is known when it is through; a flush covers what was through when it began.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self

import pytest

from kit.crashdisk import Platter
from livedisk.emulator.block import fallocate, flatmap


class HostDisk:
    """A context in which all files of ``folder`` lose what was not flushed at `cut`.

    ``before``: called in the loop's thread before each write of the loop's, with the file's name and the offset. Flushes take a
    while, by ``chance``, so that much is written while they run. Made in the loop's thread.
    """

    def __init__(self, folder: Path, chance: Random) -> None:
        self.folder = folder
        self.before: Callable[[str, int], None] = lambda name, offset: None
        self.calls = 0
        self._chance = chance
        self._platters: dict[int, Platter] = {}
        self._names: dict[int, str] = {}
        self._lock = threading.RLock()
        self._loop = threading.get_ident()
        self._patch = pytest.MonkeyPatch()
        for path in folder.iterdir():
            self.made(path)

    def cut(self, seed: int | None) -> dict[str, bytes]:
        """What each file, by name, might hold if the power failed now; ``seed`` None: only what was flushed."""
        left = {}
        with self._lock:
            for number, path in enumerate(sorted(self.folder.iterdir())):
                platter = self._platters.get(path.stat().st_ino)
                if platter is None:
                    left[path.name] = path.read_bytes()
                else:
                    left[path.name] = platter.durable if seed is None else platter.after_power_cut(seed + number)
        return left

    def made(self, path: Path) -> None:
        """Somebody else made this file, and flushed it. (Its inode may have been another file's before.)"""
        with self._lock:
            self._platters[path.stat().st_ino] = Platter(path.read_bytes())

    # -- listening -------------------------------------------------------------------------------------------------------
    def __enter__(self) -> Self:
        patch, pwrite = self._patch, os.pwrite
        copy, truncate, allocate = os.copy_file_range, os.ftruncate, fallocate._fallocate

        def on_pwrite(fd: int, data: Any, offset: int) -> int:
            return self._written(fd, offset, lambda: pwrite(fd, data, offset))

        def on_copy(source: int, fd: int, count: int, start: int, offset: int) -> int:
            return self._written(fd, offset, lambda: copy(source, fd, count, start, offset))

        def on_allocate(fd: int, mode: int, offset: int, length: int) -> int:
            return 0 if self._written(fd, offset, lambda: 0 if allocate(fd, mode, offset, length) else length) else -1

        def on_truncate(fd: int, size: int) -> None:
            platter = self._platter(fd)
            truncate(fd, size)
            if platter is not None:
                with self._lock:
                    platter.cut(size)

        patch.setattr(os, "pwrite", on_pwrite)
        patch.setattr(flatmap, "_pwrite", on_pwrite)
        patch.setattr(os, "copy_file_range", on_copy)
        patch.setattr(os, "ftruncate", on_truncate)
        patch.setattr(fallocate, "_fallocate", on_allocate)
        for name in ("fdatasync", "fsync"):
            patch.setattr(os, name, self._flush)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._patch.undo()

    def _platter(self, fd: int) -> Platter | None:
        status = os.fstat(fd)
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path.parent != self.folder:
            return None
        with self._lock:
            known = self._platters.get(status.st_ino)
            if known is None:
                known = self._platters[status.st_ino] = Platter(path.read_bytes())
            self._names[fd] = path.name
            return known

    def _written(self, fd: int, offset: int, call: Callable[[], int]) -> int:
        platter = self._platter(fd)
        self.calls += 1
        if platter is not None and threading.get_ident() == self._loop:
            self.before(self._names[fd], offset)
        done = call()
        if platter is not None and done > 0:
            with self._lock:
                size = os.fstat(fd).st_size
                platter.write(offset, os.pread(fd, min(done, max(size - offset, 0)), offset))
        return done

    def _flush(self, fd: int) -> None:
        platter = self._platter(fd)
        if platter is None:
            return
        with self._lock:
            covered = platter.pending[-1] if platter.pending else None
        time.sleep(self._chance.choice((0, 0, 0.0005, 0.003)))
        with self._lock:
            platter.flush_up_to(covered)

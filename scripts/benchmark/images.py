"""The disks that are served: the same content as raw file, as one qcow2 image and as chains of 8 and 32.

The content is random (nothing compresses, nothing is zero). In a chain every cluster lies in one image, chosen at
random, so that a read has to look through half of the chain on average.
"""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from benchmark.workloads import Disk

CLUSTER: Final = 65536
_STEP: Final = 1 << 20


class Images:
    """A folder of disks of ``size`` bytes, made on demand, removed at the end. ``parent`` says on which file
    system."""

    def __init__(self, parent: Path | None, size: int) -> None:
        self.size = size
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix="livedisk-bench-", dir=parent)
        self.folder = Path(self._folder.name)
        self._made: dict[Disk, list[Path]] = {}

    def files(self, disk: Disk) -> list[Path]:
        """The files of a disk, the active layer last."""
        if disk not in self._made:
            self._made[disk] = self._make(disk)
        return self._made[disk]

    def warm(self, disk: Disk) -> None:
        """Put the disk's files into the page cache, and what was written to them on the disk, so that no run pays
        for another."""
        buffer = bytearray(_STEP)
        for path in self.files(disk):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                while os.readv(descriptor, [buffer]):
                    pass
            finally:
                os.close(descriptor)

    def _make(self, disk: Disk) -> list[Path]:
        if disk == "raw":
            return [self._raw()]
        raw = self.files("raw")[0]
        if disk == "qcow2":
            path = self.folder / "disk.qcow2"
            _qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, path)
            return [path]
        return self._chain(raw, disk, int(disk.removeprefix("chain-")))

    def _raw(self) -> Path:
        path = self.folder / "disk.raw"
        with path.open("wb") as out:
            for _ in range(0, self.size, _STEP):
                out.write(os.urandom(_STEP))
        return path

    def _chain(self, raw: Path, disk: Disk, depth: int) -> list[Path]:
        """``depth`` images on each other; the clusters of ``raw`` are dealt out among them at random."""
        dealer = random.Random(depth)
        owner = [dealer.randrange(depth) for _ in range(self.size // CLUSTER)]
        layers: list[Path] = []
        sparse = self.folder / "layer.raw"
        with raw.open("rb") as content:
            for layer in range(depth):
                with sparse.open("wb") as out:
                    out.truncate(self.size)
                    for cluster in (index for index, of in enumerate(owner) if of == layer):
                        os.copy_file_range(
                            content.fileno(), out.fileno(), CLUSTER, cluster * CLUSTER, cluster * CLUSTER
                        )
                path = self.folder / f"{disk}-{layer:02}.qcow2"
                _qemu_img("convert", "-f", "raw", "-O", "qcow2", sparse, path)
                if layers:
                    _qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", layers[-1], path)
                layers.append(path)
        sparse.unlink()
        return layers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()


def _qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, stdout=subprocess.DEVNULL)

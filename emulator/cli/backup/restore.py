"""A checkpoint's disk as an image of its own, and the images of a folder opened for reading."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.copy import CopyFailed, copy_range
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.cli.backup import manifest as folder_of
from livedisk.emulator.cli.backup.manifest import BackupError, Image, Manifest
from livedisk.emulator.cli.backup.report import Bars
from livedisk.emulator.daemon import Daemon
from livedisk.emulator.drivers.qcow2.create import CreateOptions, create_file
from livedisk.emulator.qmp.registry import load_plugins

STEP: Final = 64 << 20
"""Bytes between two looks at the bar."""


@contextlib.asynccontextmanager
async def opened(*images: tuple[Path, str, bool]) -> AsyncIterator[list[BlockBackend]]:
    """Images open in a graph of their own: (path, format, whether to write). Raises BlockError, OSError."""
    load_plugins()
    daemon = Daemon()
    graph, backends = daemon.graph, list[BlockBackend]()
    try:
        for path, fmt, writable in images:
            options: dict[str, Any] = {"driver": fmt, "file": {"driver": "file", "filename": str(path)}}
            node = await graph.open(daemon.parse_options(options | {"read-only": not writable}))
            backend = BlockBackend(graph)
            backends.append(backend)
            perm = Perm.CONSISTENT_READ | (Perm.WRITE if writable else Perm.NONE)
            graph.attach_root(backend, node, perm, Perm.ALL & ~(Perm.WRITE | Perm.RESIZE))
        yield backends
    finally:
        for backend in backends:
            await graph.detach_root(backend)
        await graph.close()


def check_chain(folder: Path, manifest: Manifest, image: Image, bars: Bars) -> None:
    """Raise BackupError, naming the file, if one of the chain is not what was written."""
    for part in manifest.chain(image):
        check_file(folder, part, bars)


def check_file(folder: Path, image: Image, bars: Bars) -> None:
    """Raise BackupError if the file's bytes are not those that were written."""
    path, done = folder / image.file, 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        bars.show(f"{image.file}: checksum", done, image.file_size)

    try:
        size, digest = folder_of.checksum(path, advance)
    except OSError as error:
        raise BackupError(f"{path}: {error.strerror}") from None
    if size != image.file_size:
        raise BackupError(f"{path} has {size} bytes, and had {image.file_size} when it was made: it was changed or cut")
    if digest != image.sha256:
        raise BackupError(f"{path} is damaged: its SHA-256 is {digest}, and was {image.sha256} when it was made")


async def restore(folder: Path, image: Image, output: Path, fmt: str, bars: Bars) -> None:
    """Write the disk as it was at the image's checkpoint to a new file. Raises BackupError, BlockError, OSError; the file is
    gone then."""
    size = image.virtual_size
    if os.path.lexists(output):
        raise BackupError(f"{output} exists: give a new name")
    try:
        if fmt == "qcow2":
            await create_file(str(output), CreateOptions(size=size))
        else:
            with open(output, "xb") as file:
                os.truncate(file.fileno(), size)
        async with opened((folder / image.file, "qcow2", False), (output, fmt, True)) as (source, target):
            await _copy(source, target, size, f"{output.name}: restoring", bars)
            await target.flush()
        folder_of.sync_folder(output.resolve().parent)
    except BaseException:
        output.unlink(missing_ok=True)
        raise


async def _copy(source: BlockBackend, target: BlockBackend, size: int, title: str, bars: Bars) -> None:
    assert source.root is not None
    assert target.root is not None
    try:
        for offset in range(0, size, STEP):
            length = min(STEP, size - offset)
            await copy_range(source.root, target.root, offset, length, detect_zeroes=True)
            bars.show(title, offset + length, size)
    except CopyFailed as failed:
        raise BackupError(f"restoring failed at the {failed.side.name.lower()}: {failed.error}") from None

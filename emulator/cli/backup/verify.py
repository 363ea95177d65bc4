"""``livedisk backup verify``: are the files those that were written, is the chain whole, and is it the disk?

Against the live disk: where the checkpoint's bitmap is clean, the guest has written nothing since, and disk and backup must be
the same, byte by byte. Both are looked at in one moment (`moment.py`), so a guest that writes on cannot disturb the answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.status import block_status
from livedisk.emulator.cli.backup.manifest import BackupError, Image, Manifest
from livedisk.emulator.cli.backup.moment import Door, Moment, held
from livedisk.emulator.cli.backup.report import Bars
from livedisk.emulator.cli.backup.restore import check_file, opened
from livedisk.emulator.cli.backup.source import find_disks
from livedisk.emulator.drivers.qcow2.check import CheckFailed, check
from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp.client import QmpClient
from livedisk.nbd.client import NbdClient

STEP: Final = 1 << 20
"""Bytes compared at once."""
SPAN: Final = 1 << 30
"""Bytes of which extents are asked at once."""
ZERO: Final = 2
"""base:allocation's flag: reads as zeroes."""
MOST: Final = 10
"""Differences told of one disk."""


@dataclass
class Findings:
    """``problems``: what is wrong, each a sentence; ``compared``, ``changed``: bytes of the live disk that were compared, and
    that were not, because the guest wrote to them since."""

    problems: list[str] = field(default_factory=list)
    files: int = 0
    compared: int = 0
    changed: int = 0


async def verify_files(folder: Path, manifest: Manifest, images: list[Image], bars: Bars) -> Findings:
    """Check each file of the images' chains: checksum, structure, parent."""
    findings, seen = Findings(), set[str]()
    for image in images:
        for part in manifest.chain(image):
            if part.file in seen:
                continue
            seen.add(part.file)
            findings.files += 1
            try:
                check_file(folder, part, bars)
                await _check_structure(folder, part)
            except (LiveDiskError, OSError) as error:
                findings.problems.append(str(error))
    return findings


async def _check_structure(folder: Path, image: Image) -> None:
    path = folder / image.file
    async with opened((path, "qcow2", False)) as (backend,):
        node = backend.node
        if node.driver.backing_filename() != image.parent:
            raise BackupError(
                f"{path} has the backing file {node.driver.backing_filename()}, and {image.parent} is its parent"
            )
        if node.size != image.virtual_size:
            raise BackupError(f"{path} shows {node.size} bytes, and the disk had {image.virtual_size}")
        try:
            result = await check(node.file.node)
        except CheckFailed as error:
            raise BackupError(f"{path} cannot be checked: {error}") from None
        if result.corruptions or result.check_errors:
            raise BackupError(f"{path} is damaged: {result.corruptions} errors in its tables (see livedisk img check)")


async def verify_live(
    qmp: QmpClient, folder: Path, images: dict[str, Image], server: str, scratch: Path, bars: Bars, *, running: bool
) -> Findings:
    """Compare the newest image of each of these disks with the disk. Raises BackupError, QmpError, ConnectionLost, OSError."""
    disks = {name: (await find_disks(qmp, [name]))[0] for name in images}
    for name, disk in disks.items():
        bitmap = disk.bitmaps.get(images[name].bitmap)
        if bitmap is None or bitmap.get("inconsistent") or not bitmap.get("recording"):
            raise BackupError(
                f"'{name}' cannot be compared: tracking since the checkpoint was lost (bitmap '{images[name].bitmap}' of node "
                f"'{disk.node}')"
            )
    since = {disk.name: images[name].bitmap for name, disk in disks.items()}
    moment = Moment(list(disks.values()), since, server, scratch, copy=True, running=running)
    findings = Findings()
    async with held(qmp, moment) as doors:
        for name, disk in disks.items():
            async with opened((folder / images[name].file, "qcow2", False)) as (backup,):
                await _compare(name, doors[disk.name], server, backup, findings, bars)
    return findings


async def _compare(name: str, door: Door, server: str, backup: BlockBackend, findings: Findings, bars: Bars) -> None:
    context = f"qemu:dirty-bitmap:{door.bitmap}"
    client = await NbdClient.connect_unix(server, door.export, contexts=(context, "base:allocation"))
    told = 0
    try:
        size = min(client.info.size, backup.size)
        async for offset, length, dirty, zero in _pieces(client, size, context):
            if dirty:
                findings.changed += length
            else:
                findings.compared += length
                if not (zero and await _reads_as_zeroes(backup.node, offset, length)):
                    data = bytearray(length)
                    await backup.read(offset, memoryview(data))
                    if await client.read(offset, length) != data:
                        told += 1
                        if told <= MOST:
                            findings.problems.append(
                                f"'{name}' differs from its backup between bytes {offset} and {offset + length}, where the "
                                f"guest wrote nothing since the checkpoint"
                            )
            bars.show(f"{name}: comparing", offset + length, size)
    finally:
        await client.disconnect()
    if told > MOST:
        findings.problems.append(f"'{name}': {told - MOST} more differences")


async def _pieces(client: NbdClient, size: int, bitmap: str) -> AsyncIterator[tuple[int, int, bool, bool]]:
    """The disk in pieces of at most STEP bytes that are alike: offset, length, dirty, known to be zero."""
    offset = 0
    while offset < size:
        answers = await client.block_status(offset, min(SPAN, size - offset))
        dirty, allocation = answers[bitmap][0], answers["base:allocation"][0]
        length = min(dirty.length, allocation.length, size - offset)
        end = offset + length
        is_zero = bool(allocation.flags & ZERO)
        while offset < end:
            step = min(end - offset, SPAN if dirty.flags else STEP)
            yield offset, step, bool(dirty.flags), is_zero
            offset += step


async def _reads_as_zeroes(node: Node, offset: int, length: int) -> bool:
    status = await block_status(node, offset, length)
    return status.zero and status.length >= length

"""``livedisk backup full`` and ``incremental``: one checkpoint over several disks, in one transaction.

Why tracking cannot be lost is told in the package's docstring. An incremental backup becomes a full one where its disk was
not tracked without a gap since the latest checkpoint; the manifest keeps the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from livedisk.emulator.cli.backup import manifest as folder_of
from livedisk.emulator.cli.backup.manifest import BackupError, Checkpoint, Image, Kind, Manifest, Pending
from livedisk.emulator.cli.backup.report import Bars
from livedisk.emulator.cli.backup.source import Disk, create_image, end_job, find_disks, finish_jobs, places_of, quietly
from livedisk.emulator.qmp.client import ConnectionLost, QmpClient, QmpError


@dataclass(frozen=True)
class Order:
    """What is asked for. ``speed``: bytes a second a disk, 0: no limit."""

    folder: Path
    kind: Kind
    disks: Sequence[str] = ()
    speed: int = 0
    compress: bool = False


@dataclass(frozen=True)
class Plan:
    """What will be done for one disk. ``expected``: bytes to be copied, at most; ``seconds``: expected, if earlier runs tell."""

    disk: Disk
    kind: Kind
    reason: str
    file: str
    parent: Image | None
    bitmap: str
    expected: int
    seconds: float | None


def make_plans(folder: Path, manifest: Manifest, disks: Sequence[Disk], kind: Kind) -> list[Plan]:
    """Decide for each disk what the next checkpoint holds of it. Raises BackupError."""
    number = manifest.checkpoints[-1].number + 1 if manifest.checkpoints else 1
    plans = []
    for disk in disks:
        latest = manifest.latest(disk.name)
        reason = "asked for" if kind is Kind.FULL else _why_full(folder, manifest, disk, latest)
        full = reason is not None
        expected = disk.size if full else disk.bitmaps[_known(latest).bitmap]["count"]
        if full and disk.allocated is not None:
            expected = min(expected, disk.allocated)
        plans.append(
            Plan(
                disk,
                Kind.FULL if full else Kind.INCREMENTAL,
                reason or f"changes since checkpoint file {_known(latest).file}",
                f"{_file_name(disk.name)}.{number:04}.qcow2",
                None if full else latest,
                f"{manifest.prefix}{disk.name}-{number}",
                expected,
                _expected_seconds(manifest, disk.name, expected),
            )
        )
    names = [plan.file for plan in plans]
    if len(set(names)) < len(names):
        raise BackupError("two disks' names differ only in characters that file names cannot have: back them up apart")
    return plans


def _known(image: Image | None) -> Image:
    assert image is not None
    return image


def _file_name(disk: str) -> str:
    return "".join(char if char.isalnum() or char in "-_" else "_" for char in disk)


def _why_full(folder: Path, manifest: Manifest, disk: Disk, latest: Image | None) -> str | None:
    """Why an increment is not possible, or None. Raises BackupError where waiting would help."""
    if latest is None:
        return "the first backup of this disk"
    # A bitmap's name is this folder's, disk's and checkpoint's alone: on whatever node the disk is now, it came along, and disks
    # whose images were exchanged are noticed. Nodes' names may be made up anew whenever the emulator starts.
    bitmap = disk.bitmaps.get(latest.bitmap)
    if bitmap is None and disk.node != latest.node and not (disk.node[0] == latest.node[0] == "#"):
        return f"the disk is on node '{disk.node}' now, and '{latest.node}' was tracked (a snapshot was taken?)"
    if bitmap is None:
        kept = "" if latest.persistent else " (its format does not keep bitmaps when the emulator ends)"
        return f"tracking was lost: bitmap '{latest.bitmap}' is not on node '{disk.node}' any more{kept}"
    if bitmap.get("inconsistent"):
        return f"tracking was lost: bitmap '{latest.bitmap}' is inconsistent (the image was not closed cleanly)"
    if bitmap.get("busy"):
        raise BackupError(
            f"bitmap '{latest.bitmap}' of node '{disk.node}' is in use by another operation: wait for its end"
        )
    if not bitmap.get("recording"):
        return f"tracking was lost: bitmap '{latest.bitmap}' was disabled"
    for image in manifest.chain(latest):
        try:
            size = (folder / image.file).stat().st_size
        except OSError as error:
            return f"the chain is broken: {image.file}: {error.strerror}"
        if size != image.file_size:
            return f"the chain is broken: {image.file} has {size} bytes, and had {image.file_size}"
    return None


def _expected_seconds(manifest: Manifest, disk: str, expected: int) -> float | None:
    for checkpoint in reversed(manifest.checkpoints):
        image = checkpoint.images.get(disk)
        if image is not None and image.copied > 1 << 20 and image.seconds > 0:
            return expected * image.seconds / image.copied
    return None


async def plan(qmp: QmpClient, order: Order) -> list[Plan]:
    """What `take` would do now, changing nothing. Raises BackupError, QmpError, ConnectionLost."""
    manifest = folder_of.load_or_new(order.folder)
    return make_plans(order.folder, manifest, await find_disks(qmp, order.disks), order.kind)


async def take(qmp: QmpClient, order: Order, bars: Bars) -> Checkpoint:
    """Make a checkpoint. Raises BackupError, QmpError, ConnectionLost, OSError; the folder and the bitmaps are then as they
    were, or the next run makes them so."""
    folder = order.folder
    with folder_of.locked(folder, make=True):
        manifest = folder_of.load_or_new(folder)
        await clear_away(qmp, folder, manifest)
        plans = make_plans(folder, manifest, await find_disks(qmp, order.disks), order.kind)
        run = _Run(qmp, order, manifest, plans, bars)
        try:
            checkpoint = await run.copy()
        except BaseException:
            # What a lost connection leaves is cleared away by the next run.
            with contextlib.suppress(QmpError, ConnectionLost, OSError):
                await asyncio.shield(clear_away(qmp, folder, manifest))
            raise
        manifest.checkpoints.append(checkpoint)
        manifest.pending = None
        folder_of.save(folder, manifest)
        await _drop_old_bitmaps(qmp, manifest, checkpoint)
        return checkpoint


class _Run:
    """One checkpoint being made."""

    def __init__(self, qmp: QmpClient, order: Order, manifest: Manifest, plans: Sequence[Plan], bars: Bars) -> None:
        self._qmp = qmp
        self._order = order
        self._manifest = manifest
        self._plans = plans
        self._bars = bars
        number = plans[0].bitmap.rpartition("-")[2]
        self._names = [f"ld{manifest.id}-{number}-{index}" for index in range(len(plans))]
        """Of each plan's target node and of its job; a node's name has at most 31 bytes, with what is appended to it."""

    async def copy(self) -> Checkpoint:
        await self._prepare()
        started, moment = time.monotonic(), datetime.datetime.now(datetime.UTC)
        actions = [
            action for plan, name in zip(self._plans, self._names, strict=True) for action in self._actions(plan, name)
        ]
        # Not grouped: bitmaps cannot be added so, and a run that fails clears everything away anyhow.
        await self._qmp.call("transaction", {"actions": actions})
        seconds, copied = await self._wait(started)
        for name in self._names:
            await self._qmp.execute("blockdev-del", node_name=name)
        images = {}
        for plan, name in zip(self._plans, self._names, strict=True):
            size, digest = await self._checksum(plan)
            images[plan.disk.name] = Image(
                kind=plan.kind,
                reason=plan.reason,
                file=plan.file,
                parent=plan.parent.file if plan.parent is not None else None,
                node=plan.disk.node,
                bitmap=plan.bitmap,
                persistent=plan.disk.keeps_bitmaps,
                virtual_size=plan.disk.size,
                file_size=size,
                copied=copied[name],
                seconds=round(seconds[name], 3),
                sha256=digest,
            )
        number = int(self._plans[0].bitmap.rpartition("-")[2])
        return Checkpoint(number=number, time=moment.isoformat(timespec="milliseconds"), images=images)

    async def _prepare(self) -> None:
        """Write down what will be made, and make the targets."""
        folder, manifest = self._order.folder, self._manifest
        manifest.pending = Pending(
            files=[plan.file for plan in self._plans],
            jobs=[*self._names, *(f"{name}-c" for name in self._names)],
            nodes=[*self._names, *(f"{name}-f" for name in self._names)],
            bitmaps=[(plan.disk.node, plan.bitmap) for plan in self._plans],
        )
        for plan in self._plans:
            if (folder / plan.file).exists():
                manifest.pending = None  # not ours to delete
                raise BackupError(f"{folder / plan.file} is there but not in the manifest: move it away")
        folder_of.save(folder, manifest)
        for plan, name in zip(self._plans, self._names, strict=True):
            path = (folder / plan.file).resolve()
            parent = plan.parent.file if plan.parent is not None else None
            await create_image(self._qmp, str(path), name, plan.disk.size, parent)
            if not path.exists():
                raise BackupError(
                    f"the emulator made {path}, and it is not here: the folder must be the same for it and for this command"
                )

    def _actions(self, plan: Plan, name: str) -> list[dict[str, Any]]:
        bitmap = {"node": plan.disk.node, "name": plan.bitmap, "persistent": plan.disk.keeps_bitmaps}
        job: dict[str, Any] = {"job-id": name, "device": plan.disk.node, "target": name, "sync": "full"}
        job |= {"auto-dismiss": False, "speed": self._order.speed, "compress": self._order.compress}
        if plan.parent is not None:
            job |= {"sync": "bitmap", "bitmap": plan.parent.bitmap, "bitmap-mode": "never"}
        return [{"type": "block-dirty-bitmap-add", "data": bitmap}, {"type": "blockdev-backup", "data": job}]

    async def _wait(self, started: float) -> tuple[dict[str, float], dict[str, int]]:
        """Wait for the jobs. Returns seconds and bytes by job. Raises BackupError."""
        seconds: dict[str, float] = {}
        copied: dict[str, int] = {}
        titles = {name: plan.disk.name for plan, name in zip(self._plans, self._names, strict=True)}

        def seen(job: dict[str, Any]) -> None:
            done, total = job["current-progress"], job["total-progress"]
            copied[job["id"]] = done
            if job["status"] in ("pending", "concluded", "waiting"):
                seconds.setdefault(job["id"], time.monotonic() - started)
            self._bars.show(f"{titles[job['id']]}: copying", done, total)

        errors = await finish_jobs(self._qmp, self._names, seen)
        if errors:
            raise BackupError(
                "; ".join(f"the backup of '{titles[name]}' failed: {text}" for name, text in errors.items())
            )
        return seconds, copied

    async def _checksum(self, plan: Plan) -> tuple[int, str]:
        path = self._order.folder / plan.file
        total, done = path.stat().st_size, 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self._bars.show(f"{plan.disk.name}: checksum", done, total)

        return await asyncio.to_thread(folder_of.checksum, path, advance)


async def clear_away(qmp: QmpClient, folder: Path, manifest: Manifest) -> None:
    """Undo what a run that did not come to its end has made, in the emulator and in the folder."""
    pending = manifest.pending
    if pending is None:
        return
    for job in pending.jobs:
        await end_job(qmp, job)
    for node in pending.nodes:
        await quietly(qmp, "blockdev-del", node_name=node)
    # Not where they were: nodes' names may be made up anew whenever the emulator starts.
    for node, bitmap in await places_of(qmp, {bitmap for _, bitmap in pending.bitmaps}):
        await quietly(qmp, "block-dirty-bitmap-remove", node=node, name=bitmap)
    for file in pending.files:
        (folder / file).unlink(missing_ok=True)
    manifest.pending = None
    folder_of.save(folder, manifest)


async def _drop_old_bitmaps(qmp: QmpClient, manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Remove this folder's bitmaps of earlier checkpoints from the disks that were backed up: only the newest is needed."""
    for name, image in checkpoint.images.items():
        for disk in await find_disks(qmp, [image.node]):
            for bitmap in disk.bitmaps:
                if bitmap.startswith(manifest.prefix) and bitmap != image.bitmap:
                    error = await quietly(qmp, "block-dirty-bitmap-remove", node=disk.node, name=bitmap)
                    if error is not None:
                        raise BackupError(
                            f"the backup of '{name}' is whole, but its earlier bitmap '{bitmap}' could not be removed: {error}"
                        )

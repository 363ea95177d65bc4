"""Drives: what ``-drive`` and the human monitor's drive_add make: a named block device with the node below it.

    -drive if=none,id=d0,file=a.qcow2,format=qcow2 -device virtio-blk,drive=d0        or, in one,       -drive if=virtio,file=...

A drive is a `BlockBackend` with a name that commands, events and jobs know it by (``device=d0``). Its node is opened with it and
closed with it. A device that is put on a drive takes the drive's backend over, and the drive ends with the device; drive_del
takes a drive away from under its device, which then has no medium.

Reading the options is `drive_options`; here is what happens to drives. Source: QEMU ``blockdev.c`` (drive_new,
blockdev_init), ``block/block-backend.c``; asked from QEMU 10.0.2.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.driver import driver_class
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.options import BlockdevOptions, CacheOptions
from livedisk.emulator.block.permissions import Perm, Role
from livedisk.emulator.block.throttle import Limits
from livedisk.emulator.block.types import DetectZeroes
from livedisk.emulator.device.accounting import Accounting
from livedisk.emulator.device.policy import OnError
from livedisk.emulator.errors import BlockError, DeviceNotFound

if TYPE_CHECKING:
    from livedisk.emulator.device.virtio_blk import VirtioBlk


@dataclass(frozen=True, kw_only=True)
class DriveSpec:
    """What is to be made. ``node``: options of the node, None for a drive without medium. ``interface``: "virtio": it gets a
    device of its own; "none": it waits for one. ``bus``, ``unit``: its place there. ``limits``: of the throttle group
    ``group``, or None. ``detect_zeroes``: of the node, whether or not it discards. ``account_invalid``, ``account_failed``: as
    `Accounting` has them, unless the device says otherwise."""

    name: str
    interface: str
    bus: int = 0
    unit: int
    node: BlockdevOptions | None
    write_cache: bool = True
    rerror: OnError = OnError.AUTO
    werror: OnError = OnError.AUTO
    copy_on_read: bool = False
    snapshot: bool = False
    limits: Limits | None = None
    group: str = ""
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    account_invalid: bool = True
    account_failed: bool = True


@dataclass(eq=False)
class Drive:
    """One drive. ``accounting``: of what it is asked to do, which a device on it goes on with; ``device``: the one that is on
    it; ``scratch``: a temporary image that ends with it."""

    spec: DriveSpec
    backend: BlockBackend
    accounting: Accounting
    device: VirtioBlk | None = None
    scratch: str = ""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def node(self) -> Node | None:
        """What is in it."""
        return self.backend.root.node if self.backend.root is not None else None


class Drives:
    """All drives by name, in order of their making."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._drives: dict[str, Drive] = {}
        graph.reserved.append(self._drives.__contains__)

    def __iter__(self) -> Iterator[Drive]:
        return iter(self._drives.values())

    def find(self, name: str) -> Drive | None:
        """The drive of that name."""
        return self._drives.get(name)

    def get(self, name: str) -> Drive:
        """As `find`; raises DeviceNotFound."""
        if name not in self._drives:
            raise DeviceNotFound(f"Device '{name}' not found")
        return self._drives[name]

    async def add(self, spec: DriveSpec) -> Drive:
        """Make a drive. Raises BlockError, LockError, PermissionConflict or OSError; then nothing is left."""
        if spec.name in self._drives:
            raise BlockError(f"Device with id '{spec.name}' already exists")
        if spec.name in self._graph.nodes:
            raise BlockError(f"Device name '{spec.name}' conflicts with an existing node name")
        backend = BlockBackend(self._graph, spec.name)
        backend.user_name = spec.name
        backend.rests = lambda: True
        drive = Drive(
            spec, backend, Accounting(account_invalid=spec.account_invalid, account_failed=spec.account_failed)
        )
        try:
            if spec.node is not None:
                node = await self._open(drive, spec.node)
                try:
                    self._graph.attach_root(backend, node, Perm.CONSISTENT_READ, Perm.ALL)
                except BaseException:
                    await self._graph.release(node)
                    raise
        except BaseException:
            _remove(drive.scratch)
            raise
        if spec.limits is not None:
            group = self._graph.throttle_groups.obtain(spec.group or spec.name)
            backend.set_throttle(group)
            group.set_limits(spec.limits)
        self._drives[spec.name] = drive
        return drive

    async def _open(self, drive: Drive, options: BlockdevOptions) -> Node:
        node = await (
            self._open_overlay(drive, options)
            if drive.spec.snapshot
            else self._graph.open(options, inactive=self._graph.opens_inactive)
        )
        node.detect_zeroes = drive.spec.detect_zeroes
        if drive.spec.copy_on_read and not node.read_only:
            return await self._cover(node)
        return node

    async def _open_overlay(self, drive: Drive, options: BlockdevOptions) -> Node:
        """A temporary overlay, which takes the writes; the image itself is only read."""
        # Imported here: few drives have one.
        from livedisk.emulator.drivers.qcow2.create import CreateOptions, create_file

        read_only = options.read_only if isinstance(options.read_only, bool) else False
        below = await self._graph.open(
            msgspec.structs.replace(options, read_only=True, auto_read_only=False),
            role=Role.COW,
            inactive=self._graph.opens_inactive,
        )
        try:
            number, drive.scratch = tempfile.mkstemp(prefix="vl.", dir=os.environ.get("TMPDIR") or "/var/tmp")
            os.close(number)
            await create_file(drive.scratch, CreateOptions(size=-(-below.size // 512) * 512))
            make, file = driver_class("qcow2").Options, driver_class("file").Options
            upper: dict[str, Any] = {"driver": "qcow2", "backing": below.name, "read_only": read_only}
            upper["file"] = file(driver="file", filename=drive.scratch)  # type: ignore[call-arg]
            cache = CacheOptions(direct=False, no_flush=True)
            return await self._graph.open(make(**upper, cache=cache), inactive=self._graph.opens_inactive)
        except BaseException:
            await self._graph.release(below)
            raise

    async def _cover(self, node: Node) -> Node:
        """A filter, which users do not see, that keeps what is read from backing files."""
        options = driver_class("copy-on-read").Options
        try:
            given = options(driver="copy-on-read", file=node.name)  # type: ignore[call-arg]
            above = await self._graph.open(given, inactive=not node.active)
        except BaseException:
            await self._graph.release(node)
            raise
        above.implicit = True
        return above

    async def remove(self, name: str) -> None:
        """drive_del: the drive is gone; a device on it has no medium from now on. Raises DeviceNotFound, BlockError."""
        drive = self.get(name)
        del self._drives[name]
        backend = drive.backend
        if drive.device is not None:
            backend.user_name = ""
        else:
            backend.set_throttle(None)
            self._graph.throttle_groups.tidy()
        if backend.root is not None:
            async with self._graph.drained(backend.root.node):
                await self._graph.detach_root(backend)
        _remove(drive.scratch)

    def forget(self, drive: Drive) -> None:
        """The device on the drive is gone, and its backend with it."""
        if self._drives.get(drive.name) is drive:
            del self._drives[drive.name]
        _remove(drive.scratch)

    async def close(self) -> None:
        """End all: the daemon ends. Devices are gone already."""
        for name in list(self._drives):
            await self.remove(name)


def _remove(path: str) -> None:
    if path:
        with suppress(OSError):
            os.unlink(path)

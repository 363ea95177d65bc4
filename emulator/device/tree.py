"""All devices of one daemon: made by ``-device`` and device_add, found by id or by path, ended by device_del.

Paths are QEMU's: ``/machine/peripheral/ID``, and ``/machine/peripheral-anon/device[N]`` for a device without id.
Source: QEMU ``system/qdev-monitor.c``; messages asked from QEMU 10.0.2.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final

import msgspec

from livedisk.emulator.block.graph import Graph
from livedisk.emulator.device.drives import Drive, Drives
from livedisk.emulator.device.events import DeviceDeleted
from livedisk.emulator.device.options import DeviceError, DeviceOptions, check, model_of, read_options
from livedisk.emulator.device.runstate import RunState
from livedisk.emulator.device.virtio_blk import VirtioBlk
from livedisk.emulator.errors import DeviceNotFound, ParameterError
from livedisk.emulator.qmp.visit import Syntax

_IDENTIFIER: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")


class DeviceTree:
    """Devices in order of their making.

    ``emit``: sends an event. ``known_iothread``: whether an iothread object of that name exists. ``before_delete``: each
    is awaited with a device that is about to go (exports of it end there).
    """

    def __init__(
        self,
        graph: Graph,
        run_state: RunState,
        emit: Callable[[msgspec.Struct], None],
        known_iothread: Callable[[str], bool],
    ) -> None:
        self._graph = graph
        self._run_state = run_state
        self._emit = emit
        self._known_iothread = known_iothread
        self._devices: list[VirtioBlk] = []
        self._anonymous = 0
        self.drives = Drives(graph)
        self.before_delete: list[Callable[[VirtioBlk], Awaitable[None]]] = []

    def __iter__(self) -> Iterator[VirtioBlk]:
        return iter(self._devices)

    # -- looking -----------------------------------------------------------------------------------------------------
    def find(self, name: str) -> VirtioBlk | None:
        """The device of that id, or of that QOM path (its own or its backend's); None where there is none."""
        if not name:
            return None
        return next((device for device in self._devices if name in device.names), None)

    def find_drive(self, name: str) -> VirtioBlk | None:
        """The device whose block device has that name."""
        drive = self.drives.find(name)
        if drive is not None:
            return drive.device
        return next((device for device in self._devices if name and name == device.id), None)

    def blocks(self) -> list[VirtioBlk | Drive]:
        """Every block device that queries tell of: drives without a device, and devices; each once, in order of making."""
        found: list[VirtioBlk | Drive] = [drive.device or drive for drive in self.drives]
        return found + [device for device in self._devices if device not in found]

    def get(self, name: str) -> VirtioBlk:
        """As `find`; raises DeviceNotFound."""
        device = self.find(name)
        if device is None:
            raise DeviceNotFound(f"Device '{name}' not found")
        return device

    # -- making and ending -------------------------------------------------------------------------------------------
    async def add(self, values: Mapping[str, Any], syntax: Syntax) -> VirtioBlk:
        """Make the device that parsed JSON or key=value describes.

        Raises ParameterError, DeviceError, PermissionConflict or BlockError; then nothing is left.
        """
        model_of(values)
        self._check_id(values.get("id"))
        options = read_options(values, syntax)
        drive = self._free_drive(options)
        node = self._drive(options) if drive is None else drive.backend.node
        check(options)
        if isinstance(options.iothread, str) and not self._known_iothread(options.iothread):
            raise DeviceNotFound(f"Device '{options.iothread}' not found")
        device = VirtioBlk(self._graph, self._run_state, self._emit, options, self._new_path(options), drive)
        await device.realize(node)
        if drive is not None:
            drive.device = device
        self._devices.append(device)
        return device

    def _check_id(self, wanted: object) -> None:
        if not isinstance(wanted, str):
            return  # absent; or of a wrong type, which the visitor will say
        if not _IDENTIFIER.match(wanted):
            raise ParameterError(
                "Parameter 'id' expects an identifier",
                hint="Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
            )
        if any(device.id == wanted for device in self._devices):
            raise DeviceError(f"Duplicate device ID '{wanted}'")

    def _free_drive(self, options: DeviceOptions) -> Drive | None:
        """The drive that the device is to be put on; None if it names none. Raises DeviceError."""
        drive = self.drives.find(options.drive) if isinstance(options.drive, str) else None
        if drive is None:
            return None
        if drive.device is not None:
            how = "by another device"
            if drive.spec.interface == "virtio":
                how = "because it has been automatically connected to another device"
                raise DeviceError(
                    f"Drive '{drive.name}' is already in use {how} (did you need 'if=none' in the drive options?)"
                )
            raise DeviceError(f"Drive '{drive.name}' is already in use {how}")
        if drive.node is None:
            raise DeviceError("Device needs media, but drive is empty")
        return drive

    def _drive(self, options: DeviceOptions) -> Any:
        if not isinstance(options.drive, str):
            raise DeviceError("drive property not set")
        node = self._graph.nodes.get(options.drive)
        if node is None:
            raise DeviceError(f"Property 'virtio-blk-device.drive' can't find value '{options.drive}'")
        return node

    def _new_path(self, options: DeviceOptions) -> str:
        if isinstance(options.id, str):
            return f"/machine/peripheral/{options.id}"
        path = f"/machine/peripheral-anon/device[{self._anonymous}]"
        self._anonymous += 1
        return path

    async def delete(self, name: str) -> None:
        """device_del: end the device of that id or path, and every export of it. Raises DeviceNotFound.

        There is no guest that would have to let go of it, so that it is gone, and DEVICE_DELETED sent, on return.
        """
        await self._end(self.get(name))

    async def _end(self, device: VirtioBlk) -> None:
        for watcher in list(self.before_delete):
            await watcher(device)
        self._devices.remove(device)
        await device.unrealize()
        if device.drive is not None:
            self.drives.forget(device.drive)
        # QEMU sends one for the virtio part and one for the device around it.
        self._emit(DeviceDeleted(path=device.backend_path))
        self._emit(DeviceDeleted(device=device.id or msgspec.UNSET, path=device.path))

    async def close(self) -> None:
        """End every device, without events: the daemon ends. Exports are gone already."""
        while self._devices:
            device = self._devices.pop()
            await device.unrealize()
            if device.drive is not None:
                self.drives.forget(device.drive)
        await self.drives.close()

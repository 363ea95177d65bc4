"""The events of devices and of the run state. Source: QEMU ``qapi/block-core.json``, ``run-state.json``,
``qdev.json``."""

from __future__ import annotations

import enum

from livedisk.emulator.device.policy import Action
from livedisk.emulator.qmp.events import event
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType


class IoOperationType(enum.StrEnum):
    """QEMU's IoOperationType."""

    READ = "read"
    WRITE = "write"


@event("BLOCK_IO_ERROR", rate=1.0, key="qom-path")
class BlockIoError(QapiStruct):
    """A request of the guest failed. ``device`` is empty for devices made by ``-device`` and ``device_add``, as with
    QEMU: ``qom-path`` says which it is."""

    qom_path: str
    device: str
    operation: IoOperationType
    action: Action
    reason: str
    node_name: str | UnsetType = UNSET
    nospace: bool | UnsetType = UNSET


@event("STOP")
class Stop(QapiStruct):
    """The guest's I/O is held."""


@event("RESUME")
class Resume(QapiStruct):
    """The guest's I/O goes on."""


@event("DEVICE_DELETED")
class DeviceDeleted(QapiStruct):
    """The device is gone and its id may be used again."""

    path: str
    device: str | UnsetType = UNSET
